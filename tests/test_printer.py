"""Progress: bars where they can move, a line every ten seconds where not; always within 80 columns."""

import io
import re
import time
from pathlib import Path

import pytest
from rich.console import Console

from saefw.pipeline import StagePlan
from saefw.printer import Bar, Printer, brief, size, span
from saefw.store import Store
from saefw.unit import Unit

UNITS = [Unit("train", {"k": k}, label=f"topk k={k}, a backbone of some name on a dataset, layer {k}") for k in (8, 16)]
PLAN = StagePlan("sweep", UNITS, [], UNITS)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def printer(terminal: bool) -> tuple[Printer, io.StringIO]:
    file = io.StringIO()
    return Printer(Console(file=file, width=80, force_terminal=terminal, markup=False, highlight=False)), file


def test_lines(clock: list[float]) -> None:
    shown, file = printer(terminal=False)
    shown.planned([PLAN])
    file.seek(0)
    file.truncate()
    shown.entered(PLAN)
    for step in range(31):
        clock[0] += 1
        shown.saefw_progressed("sweep", step * 1000, 40_000, "tokens")
        if step == 12:
            shown.saefw_logged(UNITS[1], step, {"nmse": 0.5, "l0": 16.0, "dead": 0.25, "loss": 7.0})
    shown.saefw_logged(UNITS[0], 30, {"nmse": 0.03125, "loss": 7.0, "l0": 8.0})
    shown.saefw_kept(UNITS[0], Path(), 3.0)
    shown.saefw_kept(UNITS[1], Path(), 0)
    shown.left(PLAN, UNITS[:1])
    assert [line.rstrip() for line in file.getvalue().splitlines()] == [
        "sweep: 2 units to make, 0 kept",
        "sweep: 9,000 of 40,000 tokens (22 %), 1000/s, 31 s left",
        "sweep: 19,000 of 40,000 tokens (47 %), 1000/s, 21 s left",
        "  topk k=16, a backbone o…et, layer 16  nmse 0.5, l0 16, dead 0.25",
        "sweep: 29,000 of 40,000 tokens (72 %), 1000/s, 11 s left",
        "  topk k=8, a backbone of…set, layer 8  nmse 0.0312, l0 8",
        "sweep  1 made, 1 kept, 31 s",
    ]


def test_bars_follow_each_other(clock: list[float]) -> None:
    shown, _ = printer(terminal=False)
    shown.entered(PLAN)
    seen = []
    for what, done, total in (("images", 1, 2), ("images", 2, 2), ("images", 1, 2), ("sheets", 1, 2), ("sheets", 2, 2)):
        shown.saefw_progressed("visuals", done, total, what)
        seen.append(shown._bar)
    assert seen[0] is seen[1] and seen[3] is seen[4] and len(set(map(id, seen))) == 3


def test_a_terminal(clock: list[float]) -> None:
    shown, file = printer(terminal=True)
    shown.entered(PLAN)
    shown.saefw_progressed("sweep", 0, 2_000_000, "tokens")
    clock[0] += 10
    shown.saefw_logged(UNITS[0], 30, {"nmse": 0.03125, "l0": 8.0})
    shown.saefw_logged(UNITS[1], 30, {"loss": 0.5})
    shown.saefw_progressed("sweep", 500_000, 2_000_000, "tokens")
    shown.left(PLAN, UNITS)
    lines = [re.sub("\x1b[^a-zA-Z]*[a-zA-Z]", "", line) for line in re.split("[\r\n]", file.getvalue())]
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("sweep ━") and line.endswith(" 500k/2M tokens, 50k/s, 30 s left") for line in lines)
    assert any(line.rstrip() == "  topk k=8, a backbone of…set, layer 8  nmse 0.0312, l0 8" for line in lines)
    assert any(line.rstrip() == "  topk k=16, a backbone o…et, layer 16  loss 0.5" for line in lines)
    assert lines[-2] == "sweep  2 made, 0 kept, 10 s"


def test_waiting_is_said_once(clock: list[float]) -> None:
    shown, file = printer(terminal=False)
    for unit in UNITS:
        shown.waiting(unit, "process 7 on here")
    assert file.getvalue().count("waiting for process 7 on here") == 1


def test_labels_are_no_markup(clock: list[float]) -> None:
    shown, file = printer(terminal=False)
    unit = Unit("probe", {}, label="linear on [CLS] [/bold]")
    shown.entered(StagePlan("probes", [unit], [], [unit]))
    shown.saefw_kept(unit, Path(), 1.0)
    assert "linear on [CLS] [/bold]" in file.getvalue()


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (0.1234, "0.123"), (99.5, "99.5"), (950, "950"), (9_999, "9999"), (12_345, "12.3k"), (4.56e6, "4.56M"),
     (1e10, "10G")],
)  # fmt: skip
def test_brief(number: float, text: str) -> None:
    assert brief(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 0 s"), (185, "3 min 5 s"), (7_805, "2 h 10 min")],
)
def test_span(seconds: float, text: str) -> None:
    assert span(seconds) == text


@pytest.mark.parametrize(
    ("n_bytes", "text"), [(0, ""), (999, "999 B"), (12_345, "12.3 kB"), (3_400_000, "3.4 MB"), (1.2e12, "1.2 TB")]
)
def test_size(n_bytes: int, text: str) -> None:
    assert size(n_bytes) == text


def test_the_rate_is_that_of_lately(clock: list[float]) -> None:
    """One SAE that catches up with others, from its last checkpoint, is quicker than all of them."""
    bar = Bar("sweep", 0, 40_000, "tokens")
    clock[0] += 1
    bar.move(10_000)
    for _ in range(30):
        clock[0] += 1
        bar.move(bar.done + 100)
    assert bar.times() == "100/s, 4 min 30 s left"


@pytest.mark.parametrize("made", [True, False])
@pytest.mark.parametrize(("stage", "shown"), [("record", False), ("train", True), ("steer", True)])
def test_the_page_is_named_where_it_has_something_to_show(stage: str, shown: bool, made: bool, tmp_path: Path) -> None:
    told, file = printer(terminal=False)
    units = [Unit(stage, {})]
    told.made = int(made)
    told.summary([StagePlan("some", units, [], units)], Store(tmp_path), Path("registry.yaml"))
    assert ("saefw serve" in file.getvalue()) == shown and "FROM pareto" in file.getvalue()


def test_a_bar_without_a_total(clock: list[float]) -> None:
    bar = Bar("sweep", 0, 0, "")
    assert bar.times() == ""
    clock[0] += 12
    assert bar.times() == "12 s"
