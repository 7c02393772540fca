"""What a run does with a unit that was found damaged: the index's word, a file put back, a kill in between."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import duckdb
import fakes
import pytest
from fakes import made
from test_pipeline import Heard, catalog, write
from typer.testing import CliRunner

from saefw import pipeline
from saefw.care import checksum
from saefw.cli import app
from saefw.errors import UserError
from saefw.index import INDEX, schema
from saefw.pipeline import StagePlan
from saefw.registry import read
from saefw.store import Store

FILE = "saefw: 1\nstages:\n  numbers: {use: numbers, n: [1, 2]}\n"


def go(base: Path, text: str = FILE, observer: Heard | None = None) -> None:
    plugins = catalog()
    pipeline.run(read(write(base, text), plugins), plugins, observer=observer)


def unit(store: Store, label: str) -> Path:
    folders = {json.loads((path / "made.json").read_text())["label"]: path for path in store.kept().values()}
    return folders[label]


def rows(store: Store, table: str = "metric") -> int:
    with store.db() as db:
        return len(db.execute(f"SELECT unit FROM {table}").fetchall())


def forged(folder: Path) -> str:
    """Give a unit a table that the index has no room for, with a checksum that is right; return what DuckDB says."""
    path = folder / "metric.parquet"
    with duckdb.connect() as db:
        db.execute(schema())
        db.execute(f"COPY (SELECT 1 AS nmae) TO '{path}' (FORMAT parquet)")
        with pytest.raises(duckdb.Error) as caught:
            db.execute("INSERT INTO metric BY NAME SELECT * FROM read_parquet(?)", [str(path)])
    told = json.loads((folder / "made.json").read_text())
    told["files"]["metric.parquet"] = {"bytes": path.stat().st_size, "sha256": checksum(path)}
    (folder / "made.json").write_text(json.dumps(told))
    return str(caught.value).splitlines()[0]


def test_what_the_index_alone_finds_fault_with(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is deleted for that: by its checksums the unit is what its stage made."""
    go(tmp_path)
    store = Store(tmp_path / "runs")
    folder = unit(store, "number 2")
    why = forged(folder)
    assert "nmae" in why
    (store.root / INDEX).unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    damaged = f"{folder}/metric.parquet: damaged ({why})"
    with pytest.raises(UserError) as caught:
        go(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/registry.yaml:3:3: stages.numbers: {damaged}, by what the index says, though not by its checksum; "
        f"delete {folder}, and the next run makes it again"
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    go(tmp_path, FILE.replace("[1, 2]", "[1]"))
    right = f"its checksums are right; delete {folder} to make it again"
    assert caplog.messages == [f"{damaged}; its unit is left out of the index; {right}"]
    result = CliRunner().invoke(app, ["index", "--registry", str(tmp_path / "registry.yaml")])
    assert (result.exit_code, result.stderr) == (1, f"{damaged}; its unit is left out; {right}\n")
    shutil.rmtree(folder)
    go(tmp_path)
    assert made(tmp_path) == ["number 1", "number 2", "number 2"] and rows(store) == 4


def test_a_file_put_back_before_its_unit_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    go(tmp_path)
    store = Store(tmp_path / "runs")
    path = unit(store, "number 2") / "metric.parquet"
    data = path.read_bytes()
    path.write_bytes(b"")
    (store.root / INDEX).unlink()

    class PutsBack(Heard):
        def entered(self, plan: StagePlan) -> None:
            assert [unit.label for unit in plan.missing] == ["number 2"]
            path.write_bytes(data)

    go(tmp_path, observer=PutsBack())
    assert made(tmp_path) == ["number 1", "number 2"] and caplog.messages == []
    assert rows(store) == 4


KILLER = '''
"""Kills the run as soon as it has kept a unit."""

import os

from saefw.plugin import hookimpl


@hookimpl
def saefw_kept(unit, folder, seconds):
    """Be quick."""
    if seconds:
        os.kill(os.getpid(), 9)
'''


def test_killed_when_it_was_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is in the index: the rows of the damaged one are gone by then, so that the new ones are missed."""
    go(tmp_path)
    store = Store(tmp_path / "runs")
    folder = unit(store, "number 2")
    (folder / "unit.json").write_text("{}")
    (tmp_path / "killer.py").write_text(KILLER)
    monkeypatch.setenv("SAEFW_BLOCK", "figures")  # the fakes bring a draw of their own
    plugins = f"plugins: [{fakes.__file__}, killer.py]\n"
    path = write(tmp_path, FILE + plugins)
    killed = subprocess.run([sys.executable, "-m", "saefw", "run", str(path)], check=False, capture_output=True)
    assert killed.returncode == -9, killed.stderr
    assert (folder / "made.json").exists() and made(tmp_path) == ["number 1", "number 2", "number 2"]
    assert (rows(store, "unit"), rows(store)) == (1, 2)
    go(tmp_path)
    assert made(tmp_path) == ["number 1", "number 2", "number 2"]
    assert (rows(store, "unit"), rows(store)) == (2, 4)
