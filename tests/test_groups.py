"""Under pytest-xdist, tests of one group run in one process: what is slow to make is made once."""

import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.once

TESTS = """
import pytest

@pytest.mark.parametrize("case", range(6))
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in "ab"])
def test_grouped(name, case):
    pass

@pytest.mark.parametrize("case", range(12))
def test_alone(case):
    pass
"""


def test_a_group_stays_in_one_process(tmp_path):
    pytest.importorskip("xdist", reason="pytest-xdist is not installed: all tests run in one process")
    (tmp_path / "test_made.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    plugins = ["-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "no:hypothesispytest", "-p", "xdist"]
    command = [sys.executable, "-m", "pytest", "-v", *plugins, "-n", "2", "--dist", "loadgroup", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout
    ran = re.findall(r"\[(gw\d)\].* PASSED \S*(test_\w+)\[(\w)", done.stdout)
    assert len(ran) == 24
    for name in "ab":
        assert len({worker for worker, test, group in ran if (test, group) == ("test_grouped", name)}) == 1
    assert {worker for worker, *_ in ran} == {"gw0", "gw1"}
