"""Which features are shown: the choice beside a plain reading of the same numbers."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import desk

from saefw.choice import PUREST, Best, Choice, best_classes, picked
from saefw.plugin import Pick, Run, Unit, UserError

D_SAE, CLASSES = 40, ("cat", "dog", "eel")


def numbers(classes: int) -> dict[str, Any]:
    """Statistics of forty features, the first of which never fires, and of those of them that fire on each class."""
    rng = np.random.default_rng(1)
    frequency_s, mean_s = (10 ** rng.uniform(-4, 0, D_SAE)).astype(np.float32), rng.uniform(0.01, 9, D_SAE)
    frequency_s[0] = mean_s[0] = 0
    pairs = [(c, s) for c in range(classes) for s in range(1, D_SAE) if rng.random() < 0.6]
    ap = rng.integers(0, 20, len(pairs)) / 20  # some are equal
    return {
        "frequency": frequency_s.tolist(),
        "value": mean_s.astype(np.float32).tolist(),
        "ap": dict(zip(pairs, ap.astype(np.float32).tolist(), strict=True)),
        "purity": dict(zip(pairs, rng.permutation(ap).astype(np.float32).tolist(), strict=True)),
    }


def stocked(path: Path, classes: int = len(CLASSES)) -> tuple[Run, Unit, dict[str, Any]]:
    run, told = desk(path), numbers(classes)
    acts = Unit("record", {})
    run.store.begin(acts)
    run.put(acts, "class", label=np.arange(classes), name=np.array(CLASSES[:classes], dtype=object))
    run.keep(acts)
    unit = Unit("visuals", {}, (acts,), label="topk")
    run.store.begin(unit)
    run.put(
        unit, "feature", acts=acts.address, feature=np.arange(D_SAE), frequency=told["frequency"], mean=told["value"]
    )
    if classes:
        label, feature = (list(column) for column in zip(*told["ap"], strict=True))
        run.put(
            unit, "class_feature", acts=acts.address, label=label, feature=feature, ap=list(told["ap"].values()),
            purity=list(told["purity"].values()),
        )  # fmt: skip
    run.log(unit, 0, n_live=D_SAE - 1)
    run.keep(unit)
    return run, unit, told


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Unit, dict[str, Any]]:
    return stocked(tmp_path_factory.mktemp("choice"))


def plainly(choice: Choice, told: dict[str, Any]) -> list[int]:
    """Say the same as `choose`, feature by feature; not for the lot."""

    def best(name: str, s: int) -> float:
        labels = range(3) if choice.of_class is None else [CLASSES.index(choice.of_class)]
        return max((told[name][label, s] for label in labels if (label, s) in told[name]), default=-math.inf)

    passing = []
    for s in range(D_SAE):
        passes = told["frequency"][s] > 0 and not (choice.of_class and best("ap", s) == -math.inf)
        for name, bounds in (("frequency", choice.log_frequency), ("value", choice.log_value)):
            passes = passes and (bounds is None or bounds[0] < math.log10(told[name][s]) < bounds[1])
        if passes:
            passing.append(s)
    by = told[choice.order].__getitem__ if choice.order in ("frequency", "value") else lambda s: best(choice.order, s)
    passing.sort(key=lambda s: (-by(s), s))
    return choice.include + [s for s in passing[: choice.n] if s not in choice.include]


@pytest.mark.parametrize("order", ["frequency", "value", "purity", "ap"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"n": 5},
        {"n": 0, "include": [9, 0]},
        {"log_frequency": (-3, -1), "n": 10},
        {"log_value": (0.2, 0.7), "include": [39, 3]},
        {"of_class": "dog", "n": 12},
        {"of_class": "eel", "log_frequency": (-2, 0), "log_value": (-1, 0.8)},
    ],
)
def test_the_choice_is_that_of_a_plain_reading(
    stock: tuple[Run, Unit, dict[str, Any]], order: Any, settings: dict[str, Any]
) -> None:
    run, unit, told = stock
    choice = Choice(order=order, **settings)
    with run.db() as db:
        chosen = choice.choose(db, unit.address)
    assert chosen == plainly(choice, told)
    assert len(chosen) >= min(choice.n, 2)


def test_the_lot_is_of_those_that_pass(stock: tuple[Run, Unit, dict[str, Any]]) -> None:
    run, unit, told = stock
    passing = set(plainly(Choice(order="value", log_value=(0, 1)), told))
    with run.db() as db:
        lots = [Choice(n=6, seed=seed, log_value=(0, 1)).choose(db, unit.address) for seed in (0, 0, 1)]
        every = Choice(log_value=(0, 1)).choose(db, unit.address)
    assert lots[0] == lots[1] == sorted(lots[0]) != lots[2]
    assert len(lots[0]) == len(lots[2]) == 6 and {*lots[0], *lots[2]} <= passing
    assert every == sorted(passing)


@pytest.mark.parametrize(
    ("choice", "why"),
    [
        (Choice(include=[3, 40]), "include: there is no feature 40; there are 40, from 0 on"),
        (Choice(of_class="eal"), "of_class: no such class (got 'eal'); did you mean 'eel'?"),
        (Choice(of_class="\x1b[31m"), "of_class: no such class (got '\\x1b[31m') (there are: cat, dog, eel)"),
    ],
)
def test_what_is_not_there_is_named(stock: tuple[Run, Unit, dict[str, Any]], choice: Choice, why: str) -> None:
    run, unit, _ = stock
    with run.db() as db, pytest.raises(UserError) as caught:
        choice.choose(db, unit.address)
    assert str(caught.value) == why


def test_without_classes(tmp_path: Path) -> None:
    run, unit, told = stocked(tmp_path, classes=0)
    with run.db() as db:
        assert Choice(order="frequency", n=3).choose(db, unit.address) == plainly(Choice(order="frequency", n=3), told)
        with pytest.raises(UserError) as caught:
            Choice(order="purity").choose(db, unit.address)
        assert best_classes(db, unit.address) == {}
        # Nothing is pure: the SAE with most features that fire is picked.
        assert picked(db, PUREST, "here", [unit.address])[:2] == (unit.address, "topk")
        with pytest.raises(UserError) as nothing:
            picked(db, Pick(highest="nmse"), "here", [unit.address])
    assert str(caught.value) == "order: no feature has this (got 'purity'); the images have no classes"
    assert str(nothing.value) == "here: nothing measured 'nmse' (there are: n_live)"


def test_the_best_class_of_each_feature(stock: tuple[Run, Unit, dict[str, Any]]) -> None:
    run, unit, told = stock
    with run.db() as db:
        found = best_classes(db, unit.address)
    for s in range(D_SAE):
        ours = [(-told["ap"][label, s], label) for label in range(3) if (label, s) in told["ap"]]
        assert found.get(s) == (Best(CLASSES[min(ours)[1]], -min(ours)[0]) if ours else None)
