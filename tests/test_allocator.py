"""`tune_allocator`: what glibc keeps afterwards, and the reason where nothing can be set."""

import platform
import subprocess
import sys

import pytest

import robattr_fast as rf

pytestmark = pytest.mark.once

# In a process of its own: the thresholds of this one must stay what they are.
FAULTS = """
import resource
import torch
import robattr_fast as rf
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.empty(2**24).fill_(1.0)  # 64 MiB, 16384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
torch.set_num_threads(1)
faults()
print(faults())
done, what = rf.tune_allocator()
assert done and "MiB" in what, what
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the thresholds are glibc's")
def test_freed_pages_are_kept():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, check=True, text=True)
    default, tuned = map(int, done.stdout.split())
    assert tuned < default / 2


def test_elsewhere_the_reason_is_told(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    done, reason = rf.tune_allocator()
    assert not done
    assert "musl" in reason
