"""Which cases of a parametrized test run in which tier."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def tiers(cases: Iterable[str], default: Container[str] = (), slow: Container[str] = ()) -> list[Any]:
    """`cases` as parameters: those named in neither tier are exhaustive."""

    def tier(case: str) -> Any:
        return () if case in default else pytest.mark.slow if case in slow else pytest.mark.exhaustive

    return [pytest.param(case, marks=tier(case)) for case in cases]
