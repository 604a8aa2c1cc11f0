"""Shared by all tests: uninitialised memory holds NaN, every run sees the same random numbers."""

import signal

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _interruptible():
    # A shell starts background jobs with SIGINT ignored, and Python then installs no handler: tests that interrupt
    # themselves would go on.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    # Deterministic mode fills torch.empty with NaN (integers: the largest value), so that an output element that a
    # kernel forgets to write cannot pass for a result.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
