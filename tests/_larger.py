"""Which cases `make test` leaves to `make test-all`."""

import pytest


def larger(*cases, when: bool = True) -> list:
    """Parameters for `make test-all` alone: the others show the same on a smaller scale. ``when``: in this process."""
    if not when:
        return list(cases)
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases]
