"""The suite of ratios: how a result is compared with the committed one.  Numbers in, tables out."""

import json
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.perf.__main__ import format_change, format_ratios, format_service
from benchmarks.perf.baseline import changes, comparable, describe, read_committed
from benchmarks.perf.stories import ServiceRatio
from benchmarks.perf.suite import Ratio

NOW = [
    Ratio("sweep", "sweep", "joint", 1.0, 2.0, 0.5, 0.3),
    Ratio("stories", "at once", "one by one", 3.0, 4.0, 0.75, None),
]
BEFORE = [
    Ratio("sweep", "sweep", "joint", 8.0, 20.0, 0.4, 0.3),
    Ratio("sweep", "sweep", "another", 1.0, 1.0, 9.0, 9.0),
]


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]


def test_ratios_are_compared_with_those_of_the_same_name_and_variants() -> None:
    rows = cells(format_ratios(NOW, {"ratios": [asdict(one) for one in BEFORE]}))
    assert rows[0][-4:] == ["0.50", "0.30", "+25%", "+0%"]
    assert rows[1][-4:] == ["0.75", "-", "-", "-"]


def test_without_a_baseline_nothing_is_compared() -> None:
    assert [row[-2:] for row in cells(format_ratios(NOW, {}))] == [["-", "-"], ["-", "-"]]
    assert "No result of this class of machine" in describe({})


def test_the_service_is_compared_by_the_number_of_clients() -> None:
    now = [ServiceRatio(1, 4.5, 5.0, 0.9), ServiceRatio(16, 60.0, 80.0, 0.75)]
    rows = cells(format_service(now, {"service": [asdict(ServiceRatio(16, 80.0, 80.0, 1.0))]}))
    assert [row[-2:] for row in rows] == [["0.90", "-"], ["0.75", "-25%"]]


def test_a_change_that_rounds_to_nothing_has_no_sign() -> None:
    assert [format_change(change) for change in (-0.001, 0.001, -0.01, None)] == ["+0%", "+0%", "-1%", "-"]


@pytest.mark.parametrize("then", [None, 0, 0.0])
def test_what_was_nothing_before_has_no_change(then: float | None) -> None:
    assert changes([{"a": 1, "b": 2.0}], [{"a": 1, "b": then}], ["a"], "b") == [None]


def test_other_settings_are_no_baseline() -> None:
    baseline = {"settings": ["seed=0"], "ratios": []}
    assert comparable(baseline, ("seed=0",)) == baseline
    assert comparable(baseline, ("seed=1",)) == {}
    assert comparable({}, ("seed=0",)) == {}


def test_the_baseline_is_named_by_revision_and_machine() -> None:
    found = {"environment": {"git": {"revision": "0123456789"}, "hardware": "a processor"}}
    assert (
        describe(found)
        == "The baseline is the committed result of revision 0123456 on the same class of machine, a processor."
    )
    assert "revision unknown" in describe({"environment": {"git": None}})


def test_a_result_that_is_not_committed_is_no_baseline(tmp_path: Path) -> None:
    file = tmp_path / "perf.json"
    file.write_text('{"a": 2}')
    assert read_committed(file) == {}
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "x"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    file.write_text(json.dumps({"a": 3}))
    assert read_committed(file) == {"a": 2}
    assert read_committed(tmp_path / "other.json") == {}
