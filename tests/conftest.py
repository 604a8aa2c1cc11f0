"""Shared by all tests: uninitialised memory holds NaN, every run sees the same random numbers."""

import signal

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption(
        "--default-backends", action="store_true", help="only cases in which the package chooses what runs an operator"
    )


def pytest_collection_modifyitems(config, items):
    if config.getoption("--default-backends"):
        left_out = {
            item
            for item in items
            if "backend" in getattr(getattr(item, "callspec", None), "params", ()) or item.get_closest_marker("once")
        }
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=list(left_out))


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
