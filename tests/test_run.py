"""A registry with every stage, run whole on a tiny backbone: twice, renamed, widened, and byte for byte."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
import torch
from typer.testing import CliRunner

from saefw import notes, pipeline
from saefw.acts import Acts
from saefw.catalog import Catalog
from saefw.cli import app
from saefw.index import types
from saefw.registry import read
from saefw.store import Store

REGISTRY = f"""
saefw: 1
plugins: [{tiny.__file__}]
backbones: {{vit: {{use: tiny-vit}}}}
datasets: {{images: {{use: tiny-set}}}}
saes:
  relu: {{use: relu, expansion: 2, warmup: 5, vary: {{l1: [0.001, 0.01]}}}}
  topk: {{use: topk, expansion: 2, warmup: 5, k: 4}}
probes: {{linear: {{use: linear, steps: 50, vary: {{lr: [0.01, 0.1], weight_decay: [0.0, 0.1]}}}}}}
figures:
  front: {{use: pareto}}
  grids: {{use: feature-grid}}
  probing: {{use: probe-grid}}
  doses: {{use: dose-response}}
stages:
  acts: {{use: record, backbone: vit, datasets: [images], layers: [1, -1]}}
  sweep: {{use: train, acts: acts, layers: [1], saes: [relu, topk], n_tokens: 10_000, batch_size: 100}}
  visuals: {{use: visuals, saes: sweep, acts: acts, top: 4}}
  sheets: {{use: sheets, visuals: visuals, features: {{n: 2}}}}
  probes: {{use: probe, acts: acts, probes: [linear]}}
  faithful: {{use: faithfulness, saes: sweep, probes: probes, acts: acts}}
  steer: {{use: steer, saes: sweep, probes: probes, visuals: visuals, n_features: 2, amounts: [0, 1]}}
  figures: {{use: draw, figures: [front, grids, probing, doses], of: [sweep, visuals, probes, steer]}}
"""

N_UNITS = 2 + 3 + 3 + 3 + 4 + 3 + 1 + 4


def prepared(folder: Path, text: str = REGISTRY) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "registry.yaml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The registry, run once from the command line."""
    path = prepared(tmp_path_factory.mktemp("whole"))
    result = CliRunner().invoke(app, ["run", str(path)])
    assert result.exit_code == 0, result.output
    assert f"Made {N_UNITS} units" in result.output
    return path


def fingerprints(store: Store) -> Mapping[str, str]:
    """Return the checksum of every file of every unit, but for the one that says when it was made."""
    return {
        str(path.relative_to(store.root)): sha256(path.read_bytes()).hexdigest()
        for folder in store.kept().values()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "made.json"
    }


def test_a_second_run_makes_nothing(made: Path) -> None:
    before = fingerprints(Store(made.parent / "runs"))
    result = CliRunner().invoke(app, ["run", str(made)])
    assert result.exit_code == 0
    assert result.output.startswith(f"Nothing to make: {N_UNITS} units kept in ")
    assert fingerprints(Store(made.parent / "runs")) == before


def test_the_same_registry_gives_the_same_bytes(made: Path, tmp_path: Path) -> None:
    again = prepared(tmp_path / "again")
    assert CliRunner().invoke(app, ["run", str(again)]).exit_code == 0
    assert fingerprints(Store(again.parent / "runs")) == fingerprints(Store(made.parent / "runs"))


def test_neither_workers_nor_the_place_change_a_byte(made: Path, tmp_path: Path) -> None:
    """Another number of workers, another working directory, the registry named by a path."""
    base = tmp_path / "else where"
    again = prepared(base, REGISTRY.replace("layers: [1, -1]}", "layers: [1, -1], workers: 5}"))
    inside = base / "deeper"
    inside.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "saefw", "run", f"../{again.name}"], cwd=inside, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert list(inside.iterdir()) == []
    assert fingerprints(Store(base / "runs")) == fingerprints(Store(made.parent / "runs"))


def test_shards_of_another_size_hold_the_same_activations(made: Path, tmp_path: Path) -> None:
    again = prepared(tmp_path / "again", REGISTRY.replace("layers: [1, -1]}", "layers: [1, -1], shard_mb: 0.02}"))
    assert CliRunner().invoke(app, ["run", str(again), "--stage", "acts"]).exit_code == 0
    stores = [Store(path.parent / "runs") for path in (made, again)]
    for address, folder in stores[1].kept().items():
        one, two = Acts(stores[0].root / "record" / address), Acts(folder)
        assert len(one.shards) == 1 < len(two.shards)
        for (_, a), (_, b) in zip(one.read("all"), two.read("all"), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)  # the next number in float16


def test_a_store_can_be_moved(made: Path, tmp_path: Path) -> None:
    """Copied to another place with its registry, then renamed, it is as whole as it was: nothing in it says where."""
    place = tmp_path / "elsewhere"
    shutil.copytree(made.parent, tmp_path / "copied")
    (tmp_path / "copied").rename(place)
    before = fingerprints(Store(place / "runs"))
    for command in (["run", str(place / made.name)], ["index", "--registry", str(place / made.name)]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    assert fingerprints(Store(place / "runs")) == before == fingerprints(Store(made.parent / "runs"))
    result = CliRunner().invoke(app, ["run", str(place / made.name)])
    assert result.output.startswith(f"Nothing to make: {N_UNITS} units kept in ")
    result = CliRunner().invoke(
        app, ["sql", "--csv", "SELECT count(*) FROM unit", "--registry", str(place / made.name)]
    )
    assert result.output.split() == ["count_star()", str(N_UNITS)]


def test_no_path_is_stored(made: Path) -> None:
    """Neither that of the store nor that of this checkout, whose plugin file the registry names; rows are unpacked."""
    paths = [str(made.parent).encode(), str(Path(__file__).parent).encode()]
    store = Store(made.parent / "runs")
    for file in store.root.rglob("*"):
        if file.is_file():
            assert not any(path in file.read_bytes() for path in paths), file
    with store.db() as db:
        for table in types():
            rows = db.execute(f"SELECT CAST(t AS TEXT) FROM {table} t").fetchall()
            assert not any(path.decode() in text for path in paths for (text,) in rows), table


def test_new_names_and_another_order_make_nothing(made: Path) -> None:
    text = REGISTRY.replace("images:", "pictures:").replace("[images]", "[pictures]").replace("sweep", "dictionaries")
    relu, topk = (line for line in text.splitlines() if line.startswith(("  relu:", "  topk:")))
    text = text.replace(f"{relu}\n{topk}", f"{topk}\n{relu}")
    other = made.with_name("renamed.yaml")
    other.write_text(text)
    result = CliRunner().invoke(app, ["run", str(other), "--dry"])
    assert result.exit_code == 0, result.output
    registry = read(other, catalog := Catalog())
    assert [unit.label for plan in pipeline.plan(registry, catalog) for unit in plan.missing] == []


def test_a_new_value_makes_only_its_members(made: Path) -> None:
    text = REGISTRY.replace("l1: [0.001, 0.01]", "l1: [0.001, 0.003, 0.01]")
    other = made.with_name("wider.yaml")
    other.write_text(text)
    registry = read(other, catalog := Catalog())
    plans = {plan.name: plan for plan in pipeline.plan(registry, catalog)}
    assert [unit.label for unit in plans["sweep"].missing] == ["relu l1=0.003, vit on images, layer 1"]
    assert [len(plans[name].missing) for name in ("acts", "sweep", "visuals", "probes")] == [0, 1, 1, 0]


def test_the_index_is_rebuilt_from_the_folders(made: Path) -> None:
    store = Store(made.parent / "runs")
    tables = ["unit", "need", "metric", "acts", "example", "feature", "top_example", "edit", "edit_logit"]

    def rows() -> dict[str, list[tuple[object, ...]]]:
        with store.db() as db:
            return {table: db.execute(f"SELECT * FROM {table} ORDER BY ALL").fetchall() for table in tables}

    before = rows()
    assert all(before.values())
    (store.root / "saefw.duckdb").unlink()
    assert CliRunner().invoke(app, ["index", "--registry", str(made)]).exit_code == 0
    assert rows() == before


def test_the_documented_queries_find_something(made: Path) -> None:
    """Every query of docs/queries.md runs, on this store; an SAE and a class of it stand in for those named there."""
    text = (Path(__file__).parents[1] / "docs" / "queries.md").read_text()
    queries = [query for block in re.findall(r"^```sql\n(.*?)^```", text, re.M | re.S) for query in block.split(";")]
    queries = [query for query in queries if query.strip()]
    assert len(queries) >= 8
    store = Store(made.parent / "runs")
    with store.db() as db:
        ((sae, feature),) = db.execute("SELECT sae, feature FROM feature LIMIT 1").fetchall()
    notes.write(store.root, sae, feature, "a stroke")
    store.sync()
    with store.db() as db:
        ((sae, name),) = db.execute("SELECT any_value(sae), (SELECT min(name) FROM class) FROM edit").fetchall()
        ((key,),) = db.execute("SELECT min(key) FROM example WHERE split = 'train'").fetchall()
        for query in queries:
            here = (
                query.replace("a1b2c3d4e5f6", sae)
                .replace("= '3'", f"= '{name}'")
                .replace("digit-0000", key)
                .replace("n >= 12", "n >= 1")
                .replace("f.label != predicted", "true")  # a probe that makes no mistake
            )
            assert db.execute(here.replace("frequency < 0.01", "frequency < 1")).fetchall(), query


def test_tables_become_arrays_and_data_frames(made: Path) -> None:
    """As docs/queries.md says; pandas and polars only where they are installed."""
    with Store(made.parent / "runs").db() as db:
        found = db.sql("FROM class_feature ORDER BY ap DESC LIMIT 100")
        purest = found.fetchnumpy()
        assert 0 < purest["ap"].mean() <= 1 and purest["ap"].tolist() == sorted(purest["ap"], reverse=True)
        if find_spec("pandas"):
            assert found.df()["ap"].tolist() == purest["ap"].tolist()
        if find_spec("polars") and find_spec("pyarrow"):
            assert found.pl()["ap"].to_list() == purest["ap"].tolist()


def test_every_unit_says_what_it_is(made: Path) -> None:
    for address, folder in Store(made.parent / "runs").kept().items():
        text = (folder / "unit.json").read_text()
        assert sha256(text.encode()).hexdigest()[:12] == address
        listed = json.loads((folder / "made.json").read_text())["files"]
        there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert set(listed) == there - {"made.json"}
