"""What `make test` leaves to `make test-all`."""

from collections.abc import Iterable

import pytest


def slow_beside(cases: Iterable[str], quick: Iterable[str]) -> list:
    """``cases`` for ``parametrize``, all marked slow except the ``quick`` ones."""
    cases, quick = list(cases), set(quick)
    assert quick <= set(cases), quick - set(cases)
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]
