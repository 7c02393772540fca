"""What is missing is made, once, in the order of the file, whoever else is at it and whatever was killed before."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fakes
import pytest
import torch
from fakes import made

from saefw import __version__, pipeline
from saefw.catalog import Catalog
from saefw.errors import UserError
from saefw.pipeline import Observer, StagePlan
from saefw.plugin import hookimpl
from saefw.registry import read
from saefw.store import Store
from saefw.unit import Unit

FILE = """
saefw: 1
stages:
  numbers: {use: numbers}
  all: {use: sums, of: numbers}
  best: {use: sums, of: numbers, pick: {lowest: nmse}}
"""

Go = Callable[..., list[StagePlan]]


class Heard(Observer):
    """Notes what it is told, as observer and as plugin."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def entered(self, plan: StagePlan) -> None:
        self.lines.append(f"{plan.name}: {len(plan.kept)} kept, {len(plan.missing)} to make")

    def waiting(self, unit: Unit, holder: str) -> None:
        self.lines.append(f"{unit.label}: waiting for {holder}")

    def left(self, plan: StagePlan, made: Sequence[Unit]) -> None:
        self.lines.append(f"{plan.name}: {len(made)} made")

    @hookimpl
    def saefw_logged(self, unit: Unit, step: int, values: Mapping[str, float]) -> None:
        self.lines.append(f"{unit.label}: {step} {dict(values)}")

    @hookimpl
    def saefw_progressed(self, stage: str, done: int, total: int, what: str) -> None:
        self.lines.append(f"{stage}: {done} of {total} {what}")

    @hookimpl
    def saefw_kept(self, unit: Unit, folder: Path, seconds: float) -> None:
        assert folder.name == unit.address
        self.lines.append(f"{unit.label}: {'kept' if seconds else 'found'}")


def catalog(*modules: object) -> Catalog:
    return Catalog(modules=[fakes, *modules], entry_points=False)


def write(base: Path, text: str = FILE) -> Path:
    path = base / "registry.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def go(tmp_path: Path) -> Go:
    """Run the text of a registry in a folder."""

    def go(text: str = FILE, only: str | None = None, observer: Observer | None = None) -> list[StagePlan]:
        plugins = catalog(*([observer] if isinstance(observer, Heard) else []))
        return pipeline.run(read(write(tmp_path, text), plugins), plugins, only, observer)

    return go


ALL = ["number 1", "number 2", "number 3", "sum of numbers", "sum of numbers"]


def test_the_order_of_the_file_and_nothing_twice(go: Go, tmp_path: Path) -> None:
    done = go()
    assert made(tmp_path) == ALL
    assert [(plan.name, len(plan.units), len(plan.kept), plan.missing) for plan in done] == [
        ("numbers", 3, 3, []), ("all", 1, 1, []), ("best", 1, 1, []),
    ]  # fmt: skip
    store = Store(tmp_path / "runs")
    assert (store.folder(done[1].units[0]) / "number.txt").read_text() == "6"
    assert (store.folder(done[2].units[0]) / "number.txt").read_text() == "3"
    index = tmp_path / "runs" / "saefw.duckdb"
    before = index.stat()
    assert go() == done
    assert made(tmp_path) == ALL
    assert (index.stat().st_ino, index.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_what_is_told(go: Go) -> None:
    heard = Heard()
    go("{saefw: 1, stages: {a: {use: numbers, n: [1, 2]}}}", observer=heard)
    assert heard.lines == [
        "a: 0 kept, 2 to make",
        "number 1: 1 {'nmse': 0.5, 'l0': 8.0}",
        "number 1: kept",
        "a: 1 of 2 numbers",
        "number 2: 1 {'nmse': 0.3333333333333333, 'l0': 8.0}",
        "number 2: kept",
        "a: 2 of 2 numbers",
        "a: 2 made",
    ]
    again = Heard()
    go("{saefw: 1, stages: {a: {use: numbers, n: [1, 2]}}}", observer=again)
    assert again.lines == ["a: 2 kept, 0 to make", "number 1: found", "number 2: found", "a: 0 made"]


def test_only_what_is_missing(go: Go, tmp_path: Path) -> None:
    go()
    go(FILE.replace("{use: numbers}", "{use: numbers, n: [1, 4, 2, 3]}"))
    assert made(tmp_path) == [*ALL, "number 4", "sum of numbers", "sum of numbers"]


def test_names_and_knobs_make_nothing(go: Go, tmp_path: Path) -> None:
    go()
    go(FILE.replace("numbers:", "renamed:").replace("of: numbers", "of: renamed").replace("all:", "total:"))
    go(FILE.replace("{use: numbers}", "{use: numbers, seconds: 0.001}"))
    assert made(tmp_path) == ALL


def test_one_stage_and_those_above_it(go: Go, tmp_path: Path) -> None:
    assert [plan.name for plan in go(only="all")] == ["numbers", "all"]
    assert made(tmp_path) == ALL[:4]
    with pytest.raises(UserError) as caught:
        go(only="al")
    assert str(caught.value) == f"{tmp_path}/registry.yaml: there is no stage 'al'; did you mean 'all'?"
    with pytest.raises(UserError) as caught:
        go(only="zzz")
    assert str(caught.value) == f"{tmp_path}/registry.yaml: there is no stage 'zzz' (there are: numbers, all, best)"


def test_a_stage_that_varies(go: Go, tmp_path: Path) -> None:
    (plan,) = go("{saefw: 1, stages: {a: {use: numbers, n: [1, 2, 2], vary: {plus: [0, 1]}}}}")
    assert [unit.label for unit in plan.units] == ["number 1", "number 2", "number 3"]
    assert made(tmp_path) == ["number 1", "number 2", "number 3"]


def test_a_plan_makes_nothing(tmp_path: Path) -> None:
    plugins = catalog()
    registry = read(write(tmp_path), plugins)
    plans = pipeline.plan(registry, plugins)
    assert [(plan.name, len(plan.units), len(plan.missing), plan.reason) for plan in plans] == [
        ("numbers", 3, 3, ""), ("all", 1, 1, ""), ("best", 0, 0, "decided once numbers is made"),
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == [tmp_path / "registry.yaml"]
    run = pipeline.desk(registry, plugins)
    sizes = pipeline.disk(registry, run, pipeline.plan(registry, plugins, run=run)[0])
    assert {unit.label: size for unit, size in sizes.items()} == {
        "number 1": 1_000_000, "number 2": 2_000_000, "number 3": 3_000_000,
    }  # fmt: skip
    pipeline.run(registry, plugins)
    assert [(plan.name, len(plan.kept), plan.missing) for plan in pipeline.plan(registry, plugins)] == [
        ("numbers", 3, []), ("all", 1, []), ("best", 1, []),
    ]  # fmt: skip


def test_what_hangs_on_a_stage_not_yet_planned(tmp_path: Path) -> None:
    plugins = catalog()
    text = FILE + "  more: {use: sums, of: best}\n"
    assert [plan.reason for plan in pipeline.plan(read(write(tmp_path, text), plugins), plugins)] == [
        "", "", "decided once numbers is made", "decided once best is made",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("units", "{where}: these numbers do not fit"),
        ("make", "{where}: the second is too large\n{where}: and too blue"),
    ],
)
def test_faults_have_a_place(go: Go, tmp_path: Path, fault: str, text: str) -> None:
    with pytest.raises(UserError) as caught:
        go(FILE.replace("{use: numbers}", f"{{use: numbers, fault: {fault}}}"))
    assert str(caught.value) == text.format(where=f"{tmp_path}/registry.yaml:4:3: stages.numbers")


def test_what_was_kept_before_a_fault_stays(go: Go, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        go(FILE.replace("{use: numbers}", "{use: numbers, fault: make}"))
    with Store(tmp_path / "runs").db() as db:
        assert db.execute("SELECT label FROM unit").fetchall() == [("number 1",)]
    go()
    assert made(tmp_path) == ALL


def test_a_bug_is_not_dressed_up(go: Go) -> None:
    with pytest.raises(ZeroDivisionError, match="a bug"):
        go(FILE.replace("{use: numbers}", "{use: numbers, fault: bug}"))


def test_a_stage_that_forgets_a_unit(go: Go) -> None:
    with pytest.raises(RuntimeError) as caught:
        go(FILE.replace("{use: numbers}", "{use: numbers, fault: forget}"))
    assert str(caught.value) == (
        "stage 'numbers' (Numbers) is done but did not keep 2 of 3 units, the first of them 'number 2'"
    )


class Killed(BaseException):
    """Stands for kill -9: nothing that runs after it is relied on."""


@pytest.mark.parametrize(
    ("where", "made_again"),
    [
        ("write", ["number 1"]),  # before the parquet
        ("rename", []),  # when all is there but the rename
        ("index", []),  # between the rename and the index
        ("replace", []),  # between the index and its publication
    ],
)
def test_killed_and_gone_on(
    go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, made_again: list[str]
) -> None:
    def killed(self: Any, *args: Any, **more: Any) -> None:
        raise Killed

    def replace(self: Path, target: Path) -> Path:
        if target.name == "saefw.duckdb":
            raise Killed
        os.replace(self, target)
        return target

    with monkeypatch.context() as patch, pytest.raises(Killed):
        if where == "rename":
            patch.setattr(Path, "rename", killed)
        elif where == "replace":
            patch.setattr(Path, "replace", replace)
        else:
            patch.setattr(Store, where, killed)
        go()
    before = made(tmp_path)
    go()
    assert made(tmp_path)[len(before) :] == [*made_again, *ALL[len(before) :]]
    with Store(tmp_path / "runs").db() as db:
        assert [row[0] for row in db.execute("SELECT label FROM unit ORDER BY made_at, label").fetchall()] == ALL
        assert db.execute("SELECT count(*), sum(step) FROM metric").fetchall() == [(6, 6)]
    assert not list(tmp_path.glob("runs/*/*.partial")) and not list(tmp_path.glob("runs/.saefw*"))


OTHER = """if True:
    import sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import test_pipeline as t
    class Aloud(t.Observer):
        def waiting(self, unit, holder):
            print(f"{unit.label}: waiting for {holder}", flush=True)
        def left(self, plan, made):
            print(f"{plan.name}: {len(made)} made", flush=True)
    plugins = t.catalog()
    registry = t.read(Path(sys.argv[2]), plugins)
    print("ready", flush=True)
    t.pipeline.run(registry, plugins, observer=Aloud())
"""


def other(path: Path) -> "subprocess.Popen[str]":
    """Start the same run in another process."""
    command = [sys.executable, "-c", OTHER, str(Path(__file__).parent), str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_runs_at_once(go: Go, tmp_path: Path) -> None:
    text = FILE.replace("{use: numbers}", "{use: numbers, n: [1, 2, 3, 4], seconds: 0.25}")
    with other(write(tmp_path, text)) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        while not list(tmp_path.glob("runs/numbers/*.partial")):
            time.sleep(0.01)
        heard = Heard()
        go(text, observer=heard)
        out = process.communicate()[0]
    assert process.returncode == 0 and "numbers: 4 made" in out
    assert sorted(made(tmp_path)) == sorted(["number 1", "number 2", "number 3", "number 4", *ALL[3:]])
    waits = [line for line in heard.lines if "waiting" in line]
    assert waits and waits[0].endswith(f": waiting for process {process.pid} on {os.uname().nodename}")
    assert "numbers: 0 made" in heard.lines


def test_the_other_run_is_killed(go: Go, tmp_path: Path) -> None:
    text = FILE.replace("{use: numbers}", "{use: numbers, seconds: 0.3}")
    with other(write(tmp_path, text)) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        while not made(tmp_path):
            time.sleep(0.01)
        threading.Timer(0.1, process.send_signal, [signal.SIGKILL]).start()
        go(text)
    assert sorted(set(made(tmp_path))) == sorted(set(ALL))
    with Store(tmp_path / "runs").db() as db:
        assert db.execute("SELECT count(*) FROM unit").fetchall() == [(5,)]


def test_what_it_was_made_with(go: Go, tmp_path: Path) -> None:
    go()
    with Store(tmp_path / "runs").db() as db:
        rows = db.execute("SELECT DISTINCT made_with FROM unit").fetchall()
    assert rows == [
        (
            f'{{"saefw": "{__version__}", "torch": "{torch.__version__}", "stages.numbers": "fakes", '
            '"stages.sums": "fakes"}',
        )
    ]
