"""The embedded experiment, run whole: what it claims must be true."""

from __future__ import annotations  # as text, or DuckDB, held by pytest through a fixture, reports leaks

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pytest
from scipy.stats import t

from saefw import pipeline
from saefw.acts import Acts
from saefw.catalog import Catalog
from saefw.registry import read
from saefw.trained import open_sae

TOP = Path(__file__).parents[1]

GOLDEN = {
    "acts": ["572bc2e3caff", "afb1ffa67c34"],
    "sweep": ["19ba8fa905dc", "395c1444bda3", "934e8e2760ac", "7fba97738a14", "bb6f9f3007a2"],
}
"""Addresses of the first stages: a change orphans what anybody has made from this registry, so it is a decision."""


def test_golden_addresses_of_the_embedded_registry() -> None:
    catalog = Catalog()
    plans = {plan.name: plan for plan in pipeline.plan(read(TOP / "registry.yaml", catalog), catalog)}
    assert {name: [unit.address for unit in plans[name].units] for name in GOLDEN} == GOLDEN


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a whole run, in a folder of its own."""
    folder = tmp_path_factory.mktemp("embedded")
    shutil.copy(TOP / "registry.yaml", folder)
    catalog = Catalog()
    registry = read(folder / "registry.yaml", catalog)
    pipeline.run(registry, catalog)
    return registry.store


@pytest.fixture
def db(store: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect(str(store / "saefw.duckdb"), read_only=True) as connection:
        yield connection


@pytest.mark.slow
def test_one_sae_explains_with_few_features(db: duckdb.DuckDBPyConnection) -> None:
    rows = db.execute("SELECT variant, nmse, l0, dead FROM pareto").fetchall()
    assert sorted(variant for variant, *_ in rows) == ["relu"] * 3 + ["topk"] * 2
    assert any(nmse <= 0.1 and l0 <= 16 and dead <= 0.1 for _, nmse, l0, dead in rows), rows


@pytest.mark.slow
def test_features_have_classes(db: duckdb.DuckDBPyConnection) -> None:
    """At least ten features of the steered SAE fire strongest for one class: 13 or more of their 16 top images."""
    pure = db.execute(
        "SELECT feature, max(n) AS most FROM feature_class JOIN edit USING (sae) GROUP BY feature HAVING most >= 13"
    ).fetchall()
    assert len(pure) >= 10


@pytest.mark.slow
def test_features_have_classes_on_test_images_too(store: Path, db: duckdb.DuckDBPyConnection) -> None:
    """The same of images that no training saw, counted here from the activations themselves."""
    catalog = Catalog()
    registry = read(TOP / "registry.yaml", catalog)
    (steered,) = {row[0] for row in db.execute("SELECT sae FROM edit").fetchall()}
    sweep = next(plan for plan in pipeline.plan(registry, catalog) if plan.name == "sweep")
    unit = next(unit for unit in sweep.units if unit.address == steered)
    acts = Acts(store / "record" / unit.needs[0].address)
    sae = open_sae(unit.given["sae"], store / "train" / unit.address)
    test = acts.of_split("test")
    ((_, x_etd),) = acts.read("patches", test, len(test))
    largest_es = sae.dense(x_etd.flatten(0, 1)).view(*x_etd.shape[:2], -1).amax(dim=1).numpy()
    n_pure = 0
    for largest_e in largest_es.T:
        top = [e for e in np.argsort(-largest_e, kind="stable")[:16] if largest_e[e] > 0]
        n_pure += np.bincount(acts.labels[test[top]], minlength=10).max() >= 13
    assert n_pure >= 10


@pytest.mark.slow
def test_the_probe_reads_the_test_split(db: duckdb.DuckDBPyConnection) -> None:
    ((n,),) = db.execute("SELECT count(*) FROM probe").fetchall()
    assert n == 6 * 5
    ((accuracy, n_test),) = db.execute(
        "SELECT max(value) FILTER (name = 'test_accuracy'), max(value) FILTER (name = 'n_test') FROM final "
        "WHERE unit = (SELECT any_value(probe) FROM edit)"
    ).fetchall()
    assert accuracy >= 0.96 and n_test >= 300


@pytest.mark.slow
def test_class_features_move_their_class_more_than_both_controls(db: duckdb.DuckDBPyConnection) -> None:
    """In all ten classes, at every amount from 1 p99 on; the intervals are computed here from the rows themselves."""
    rows = db.execute(
        "SELECT dose, target, chosen_by, example, l.after - l.before FROM edit JOIN edit_logit l USING (unit, edit) "
        "WHERE role = 'other class' AND label = target AND dose >= 1 AND way = 'effect'"
    ).fetchall()
    ((n_train,),) = db.execute(
        "SELECT count(*) FROM edit e JOIN example x ON x.unit = e.acts AND x.example = e.example WHERE split != 'test'"
    ).fetchall()
    assert n_train == 0
    assert len({row[3] for row in rows}) >= 300
    shifts: dict[tuple[float, int, str], list[float]] = {}
    for amount, target, kind, _, shift in rows:
        shifts.setdefault((amount, target, kind), []).append(shift)
    amounts = sorted({amount for amount, _, _ in shifts})
    assert amounts == [1.0, 2.0]
    for amount in amounts:
        for target in range(10):
            bounds = {}
            for kind in ("effect", "like features", "random directions"):
                x = np.array(shifts[amount, target, kind])
                half = t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
                bounds[kind] = x.mean() - half, x.mean() + half
            above = bounds["effect"][0]
            assert above > bounds["like features"][1], (amount, target, bounds)
            assert above > bounds["random directions"][1], (amount, target, bounds)


@pytest.mark.slow
def test_controls_change_as_much_and_as_often(db: duckdb.DuckDBPyConnection) -> None:
    """Each control has the norm of its edit; features of like frequency are like in frequency, all in all."""
    ((worst,),) = db.execute(
        "SELECT max(abs(c.norm / e.norm - 1)) FROM edit e JOIN edit c USING (unit, example, role, target, dose, way) "
        "WHERE e.chosen_by = e.way AND c.chosen_by IN ('like features', 'random directions') AND e.norm > 0"
    ).fetchall()
    assert worst < 1e-3
    logs = db.execute(
        "SELECT chosen_by, avg(log10(frequency)) FROM edit e JOIN edit_feature f USING (unit, edit) "
        "JOIN feature s ON s.sae = e.sae AND s.feature = f.feature WHERE way = 'effect' "
        "GROUP BY ALL"
    ).fetchall()
    means = dict(logs)
    assert abs(means["effect"] - means["like features"]) < 0.15, means


@pytest.mark.slow
def test_the_first_example_turns_one_digit_into_another(store: Path) -> None:
    ((path,),) = [list(store.glob("steer/*/first.json"))]
    first = json.loads(path.read_text())
    assert len(first["features"]) <= 3
    assert first["before"][first["from"]] > 0.9
    assert first["after"][first["to"]] > 0.8
    assert min(first["place"]) >= 0.8 or min(first["purity"]) >= 0.8
