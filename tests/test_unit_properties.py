"""What holds of any unit, pick and store: addresses say what is in them, choices are right, no unit is ever half."""

import json
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from saefw import care
from saefw import store as module
from saefw.errors import UserError
from saefw.plugin import Pick
from saefw.store import Store
from saefw.unit import Unit, canonical

QUICK = settings(max_examples=80, deadline=None, derandomize=True)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same JSON: 1, 1.0 and true are three things, 0.0 and -0.0 two."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other and (not isinstance(one, float) or math.copysign(1, one) == math.copysign(1, other)))


@QUICK
@given(one=JSON, other=JSON)
def test_two_values_have_one_text_only_if_they_are_one(one: Any, other: Any) -> None:
    assert (canonical(one) == canonical(other)) == same(one, other)
    assert same(json.loads(canonical(one)), one)
    assert canonical(one).isascii()


@QUICK
@given(value=st.dictionaries(st.text(max_size=4), JSON, max_size=5), random=st.randoms(use_true_random=False))
def test_the_order_of_keys_does_not_matter(value: dict[str, Any], random: Any) -> None:
    items = list(value.items())
    random.shuffle(items)
    assert canonical(dict(items)) == canonical(value)


def test_what_is_no_json_has_no_text() -> None:
    for value in (math.nan, math.inf, [-math.inf]):
        with pytest.raises(ValueError):
            canonical(value)
    with pytest.raises(TypeError):
        canonical({1, 2})


STAGES = st.sampled_from(["record", "train", "a-b_1"])
CONTENTS = st.dictionaries(st.text(max_size=3), JSON, max_size=3)


@QUICK
@given(stage=STAGES, content=CONTENTS, label=st.text(), note=st.text(), others=st.lists(CONTENTS, max_size=3))
def test_an_address_hangs_on_stage_content_and_needs_alone(
    stage: str, content: dict[str, Any], label: str, note: str, others: list[dict[str, Any]]
) -> None:
    needs = tuple(Unit("record", other) for other in others)
    unit = Unit(stage, content, needs)
    assert Unit(stage, content, needs, label=label, given={"note": note}).address == unit.address
    assert Unit(stage, content, needs, label=label) == unit
    assert Unit(stage, {**content, "one more": 1}, needs).address != unit.address
    assert Unit(stage + "x", content, needs).address != unit.address
    assert Unit(stage, content, (*needs, unit)).address != unit.address
    if len({need.address for need in needs}) > 1:
        assert Unit(stage, content, needs[::-1]).address != unit.address or needs == needs[::-1]
    assert len(unit.address) == 12 and set(unit.address) <= set("0123456789abcdef")


# Picks

VALUES = st.floats(allow_nan=False, allow_infinity=False, width=16) | st.sampled_from([0.0, 1.0])
MEASURED = st.dictionaries(st.sampled_from("xyz"), VALUES | st.just(math.nan), max_size=3)
METRICS = st.dictionaries(st.integers(0, 5), MEASURED, max_size=5)
BOUNDS = st.dictionaries(st.sampled_from("xyz"), VALUES, max_size=2)


@QUICK
@given(
    metrics=METRICS,
    way=st.sampled_from(["lowest", "highest", ""]),
    name=st.sampled_from("xyz"),
    below=BOUNDS,
    above=BOUNDS,
)
def test_a_pick_is_the_one_that_looking_at_all_would_find(
    metrics: dict[int, dict[str, float]], way: str, name: str, below: dict[str, float], above: dict[str, float]
) -> None:
    settings: dict[str, Any] = {"below": below, "above": above, **({way: name} if way else {})}
    pick, given_metrics = Pick(**settings), metrics
    metrics = {unit: {key: x for key, x in values.items() if x == x} for unit, values in metrics.items()}
    known = {key for values in metrics.values() for key in values}
    fits = [
        unit
        for unit, values in metrics.items()
        if all(key in values and values[key] <= bound for key, bound in below.items())
        and all(key in values and values[key] >= bound for key, bound in above.items())
    ]
    measured = [unit for unit in fits if name in metrics[unit]] if way else fits
    best: int | None = None
    for unit in measured or fits:
        if best is None:
            best = unit
        elif way and measured:
            new, old = metrics[unit][name], metrics[best][name]
            best = unit if (new < old if way == "lowest" else new > old) else best
    wanted = {*below, *above, *([name] if way else [])}
    if best is None or not wanted <= known:
        with pytest.raises(UserError):
            pick.choose("sweep", given_metrics)
    else:
        assert pick.choose("sweep", given_metrics) == best


# The store


class Killed(BaseException):
    """What a kill is to the code: it goes no further, and cleans nothing up."""


class Kept(RuleBasedStateMachine):
    """A store on which runs make units and are killed anywhere, and whose folders are copied and thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.units = [Unit("fake", {"n": n}, label=f"n {n}") for n in range(3)]
        self.store = Store(self.root / "runs")
        self.kept: set[str] = set()

    def teardown(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)

    def make(self, n: int) -> None:
        unit = self.units[n]
        (self.store.begin(unit) / "note.txt").write_text(str(n))
        self.store.write(unit, "metric", {"name": "n", "step": 1, "value": float(n)})
        self.store.keep(unit, 1.0, {}, without=["note.txt"])

    @rule(n=st.integers(0, 2))
    def made(self, n: int) -> None:
        if not self.store.has(self.units[n]):
            self.make(n)
        self.kept.add(self.units[n].address)

    @rule(n=st.integers(0, 2), after=st.integers(0, 24))
    def killed_while_making(self, n: int, after: int) -> None:
        """Let so many writes, renames and removals happen, and die."""
        left = after

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **more: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return real(*args, **more)

            return call

        if self.store.has(self.units[n]):
            return
        with (
            patch.object(module, "settle", counted(care.settle)),
            patch.object(Path, "rename", counted(Path.rename)),
            patch.object(Path, "replace", counted(Path.replace)),
            patch.object(Path, "unlink", counted(Path.unlink)),
        ):
            try:
                self.make(n)
            except Killed:
                pass
        if self.store.has(self.units[n]):
            self.kept.add(self.units[n].address)

    @rule(n=st.integers(0, 2))
    def thrown_away(self, n: int) -> None:
        shutil.rmtree(self.store.folder(self.units[n]), ignore_errors=True)
        self.kept.discard(self.units[n].address)

    @rule(n=st.integers(0, 2))
    def half_a_copy(self, n: int) -> None:
        """Somebody copies a unit from elsewhere and is stopped before its last file."""
        folder = self.store.folder(self.units[n])
        if not folder.exists():
            folder.mkdir(parents=True)
            (folder / "unit.json").write_text(self.units[n].text)

    @rule()
    def indexed(self) -> None:
        self.store.sync()
        if self.store.root.is_dir() and self.kept:
            with self.store.db() as db:
                assert {row[0] for row in db.execute("SELECT unit FROM unit").fetchall()} == self.kept
                rows = db.execute("SELECT unit, value FROM metric").fetchall()
            assert sorted(rows) == sorted(
                (unit.address, float(n)) for n, unit in enumerate(self.units) if unit.address in self.kept
            )

    @rule()
    def another_process(self) -> None:
        self.store = Store(self.root / "runs")

    @invariant()
    def no_unit_is_half(self) -> None:
        for n, unit in enumerate(self.units):
            there = self.store.has(unit)
            assert there == (unit.address in self.kept)
            if there:
                folder = self.store.folder(unit)
                made = json.loads((folder / "made.json").read_text())
                assert made["label"] == f"n {n}"
                assert set(made["files"]) == {"metric.parquet", "unit.json"}
                for name, facts in made["files"].items():
                    assert (folder / name).stat().st_size == facts["bytes"]


TestKept = Kept.TestCase
TestKept.settings = settings(max_examples=12, stateful_step_count=20, deadline=None, derandomize=True)
