"""`saefw gc` deletes what no registry needs, and nothing else."""

import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import duckdb
import fakes
import pytest
from test_cli import FILE, Saefw
from test_index import no_file_larger_than

from saefw import gc
from saefw.store import Store
from saefw.unit import Unit

SMALLER = FILE.replace("{use: numbers}", "{use: numbers, n: [1, 2]}").replace(
    "dots: {use: dots}", "dots: {use: dots, size: 2.0}"
)

RAN = [sys.executable, "-m", "saefw"]


@pytest.fixture
def saefw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Saefw:
    """The command line in a folder with a registry that was run; what is needed by now are two numbers less."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAEFW_BLOCK", "figures")
    called = Saefw(tmp_path)
    called.write()
    called("run")
    called.write(SMALLER)
    return called


def plain(text: str) -> str:
    """Ages and sizes come and go."""
    text = re.sub(r"\d+(\.\d+)? (kB|B)\b", "N kB", text)
    text = re.sub("─+", "─", text)
    return re.sub(r" +", " ", re.sub(r"\d+(\.\d+)? s\b", "T s", text))


def folders(base: Path) -> list[str]:
    return sorted(f"{path.parent.name}/{path.name}" for path in (base / "runs").glob("*/*") if path.is_dir())


def labels(base: Path) -> list[str]:
    with Store(base / "runs").db() as db:
        return [row[0] for row in db.execute("SELECT label FROM unit ORDER BY ALL").fetchall()]


def test_what_is_not_needed_is_listed_and_deleted(saefw: Saefw) -> None:
    saefw("run")
    before = folders(saefw.base)
    head = """\
stage unit what disk age
─
draw ff9597ad216b dots N kB T s
numbers a6e71fee52b1 number 3 N kB T s
sums 222a64fe6360 sum of numbers N kB T s"""
    assert plain(saefw("gc", "--dry")) == f"{head}\n3 units, N kB, can go; 4 kept and needed by registry.yaml."
    assert folders(saefw.base) == before
    assert plain(saefw("gc", "--yes")) == f"{head}\nDeleted 3 units, N kB."
    assert len(folders(saefw.base)) == len(before) - 3
    assert labels(saefw.base) == ["dots", "number 1", "number 2", "sum of numbers"]
    assert saefw("gc") == "Nothing to delete in runs: 4 kept and needed by registry.yaml."
    assert saefw("run").startswith("Nothing to make: 4 units kept in runs.")


def test_what_cannot_be_listed_yet_is_kept(saefw: Saefw) -> None:
    """Number 4 is missing, so `best` cannot say which number it is the sum of: all sums stay, and what they sum."""
    saefw.write(FILE.replace("{use: numbers}", "{use: numbers, n: [1, 4]}"))
    why = "registry.yaml cannot say yet what best needs (decided once numbers is made)"
    assert plain(saefw("gc", "--yes")) == (
        f"2 units stay: {why}\n"
        "stage unit what disk age\n"
        "─\n"
        "numbers 3548c2f3ea9f number 2 N kB T s\n"
        "Deleted 1 unit, N kB."
    )
    assert labels(saefw.base) == ["dots", "number 1", "number 3", "sum of numbers"]


def test_without_an_answer_nothing_is_deleted(saefw: Saefw) -> None:
    before = folders(saefw.base)
    assert plain(saefw("gc", exit_code=1)) == (
        "3 units, N kB, can go; nothing was deleted, since nobody is there to be asked (--yes: do not ask)"
    )
    assert folders(saefw.base) == before


@pytest.mark.parametrize(("answer", "said"), [("", "Nothing was deleted."), ("y", "Deleted 3 units, N kB.")])
def test_it_asks(saefw: Saefw, answer: str, said: str) -> None:
    saefw("run")
    before = folders(saefw.base)
    ours, theirs = pty.openpty()
    with subprocess.Popen([*RAN, "gc"], stdin=theirs, stdout=subprocess.PIPE, text=True) as process:
        os.write(ours, f"{answer}\n".encode())
        out, _ = process.communicate(timeout=60)
    os.close(ours)
    os.close(theirs)
    assert plain(out).endswith(f"Delete 3 units, N kB? [y/N]: {said}\n")
    assert (folders(saefw.base) == before) is (answer == "")


def test_several_registries_share_a_store(saefw: Saefw) -> None:
    (saefw.base / "more.yaml").write_text(FILE)
    assert (
        saefw("gc", "registry.yaml", "more.yaml")
        == "Nothing to delete in runs: 5 kept and needed by registry.yaml, more.yaml."
    )
    (saefw.base / "other.yaml").write_text("store: elsewhere\n" + FILE.lstrip())
    assert saefw("gc", "registry.yaml", "other.yaml", exit_code=1) == (
        "other.yaml: its store is elsewhere, that of registry.yaml is runs; name registries of one store"
    )
    (saefw.base / "bad.yaml").write_text(FILE.replace("of: numbers", "of: numbrs"))
    assert saefw("gc", "registry.yaml", "bad.yaml", "--yes", exit_code=1) == (
        "bad.yaml:7:21: stages.best.of: 'numbrs' is not one of the stages above it; did you mean 'numbers'?"
    )
    assert len(folders(saefw.base)) == 5


def test_leftovers_and_strangers(saefw: Saefw) -> None:
    """What was begun and is not needed goes; what a registry still wants, and what is no unit, stays."""
    store = Store(saefw.base / "runs")
    saefw.write(FILE.replace("n: [1, 2]", "n: [1, 2, 5]"))
    begun, unwanted = (Unit("numbers", {"n": n}, label=f"number {n}") for n in (5, 6))
    for unit in (begun, unwanted):
        (store.begin(unit) / "number.txt").write_text("5")
    saefw.write(FILE.replace("{use: numbers}", "{use: numbers, n: [1, 2, 3, 5]}"))
    half = store.folder(unwanted).with_suffix(".gone")
    half.mkdir()
    (half / "number.txt").write_text("6")
    mine = store.root / "notes" / "of mine"
    mine.mkdir(parents=True)
    (mine / "read me.txt").write_text("dear me")
    copied = store.root / "numbers" / "0123456789ab"
    copied.mkdir()
    (copied / "number.txt").write_text("half a copy")
    assert [(spare.address, spare.label) for spare in gc.find([Path("registry.yaml")]).spare] == [
        (unwanted.address, "half deleted"),
        (unwanted.address, "begun, not kept"),
    ]
    assert saefw("gc", "--yes").endswith(" B.")
    assert not store.partial(unwanted).exists() and not half.exists()
    assert store.partial(begun).exists() and mine.exists() and copied.exists()


def test_what_another_run_makes_and_makes_it_from_stays(saefw: Saefw) -> None:
    store, number = Store(saefw.base / "runs"), Unit("numbers", {"n": 3}, label="number 3")
    sums = Unit("sums", {"of": 3}, (number,), label="sum of 3")
    store.begin(sums)
    with store.lock(sums, print):
        found = gc.find([Path("registry.yaml")])
        who = f"process {os.getpid()} on {os.uname().nodename}"
        assert found.held == {f"{who} is at work on it, or on what is made from it": 2}
        assert [spare.label for spare in found.spare] == ["dots", "sum of numbers"]
    found = gc.find([Path("registry.yaml")])
    assert sorted(spare.label for spare in found.spare) == ["begun, not kept", "dots", "number 3", "sum of numbers"]
    with store.lock(number, print):
        assert [(spare.label, holder) for spare, holder in gc.delete(found) if holder] == [("number 3", who)]
    assert store.has(number) and not store.partial(sums).exists()
    assert "number 3" in labels(saefw.base) and "dots" not in labels(saefw.base)


def test_killed_while_deleting(saefw: Saefw, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is half deleted is no unit, and goes next time."""
    store, number = Store(saefw.base / "runs"), Unit("numbers", {"n": 3}, label="number 3")

    def killed(path: Path) -> None:
        (path / "number.txt").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        store.delete(store.folder(number), print)
    assert not store.has(number)
    assert sorted(spare.label for spare in gc.find([Path("registry.yaml")]).spare) == [
        "dots", "half deleted", "sum of numbers",
    ]  # fmt: skip
    saefw("gc", "--yes")
    assert not [path for path in folders(saefw.base) if path.endswith(".gone")]
    saefw.write()
    saefw("run")
    assert fakes.made(saefw.base).count("number 3") == 2


def test_what_a_run_began_to_use_since_it_was_listed_stays(saefw: Saefw) -> None:
    store, number = Store(saefw.base / "runs"), Unit("numbers", {"n": 3}, label="number 3")
    sums = Unit("sums", {"of": 3}, (number,), label="sum of 3")
    found = gc.find([Path("registry.yaml")])
    with store.lock(sums, print):
        store.begin(sums)
        held = [(spare.label, holder) for spare, holder in gc.delete(found) if holder]
    assert held == [("number 3", f"process {os.getpid()} on {os.uname().nodename}")]
    assert store.has(number) and "dots" not in labels(saefw.base)


def test_a_unit_that_is_a_link_stays(saefw: Saefw) -> None:
    """All else that can go goes."""
    number = next(path for path in (saefw.base / "runs").glob("numbers/*") if path.name == "a6e71fee52b1")
    number.rename(saefw.base / "elsewhere")
    number.symlink_to(saefw.base / "elsewhere")
    stays = f"1 unit stays: runs/numbers/{number.name} is a link; delete it and what it leads to yourself"
    assert plain(saefw("gc", "--yes")) == (
        f"{stays}\n"
        "stage unit what disk age\n"
        "─\n"
        "draw ff9597ad216b dots N kB T s\n"
        "sums 222a64fe6360 sum of numbers N kB T s\n"
        "Deleted 2 units, N kB."
    )
    assert labels(saefw.base) == ["number 1", "number 2", "number 3"]
    assert saefw("gc") == f"{stays}\nNothing to delete in runs: 3 kept and needed by registry.yaml."


def test_a_unit_that_cannot_be_deleted(saefw: Saefw, mounted: Callable[..., None]) -> None:
    """It is named, all else goes, and the index follows."""
    number = saefw.base / "runs" / "numbers" / "a6e71fee52b1"
    mounted("--bind", number, number)
    assert (
        saefw("gc", "--yes", exit_code=1) == f"runs/numbers/{number.name}: cannot be deleted (Device or resource busy)"
    )
    assert labels(saefw.base) == ["number 1", "number 2", "number 3"]


def test_an_index_that_cannot_follow(saefw: Saefw) -> None:
    (saefw.base / "runs" / "saefw.duckdb").unlink()
    with no_file_larger_than(100_000):
        said = saefw("gc", "--yes", exit_code=1)
        copy = saefw.base / "runs" / ".saefw.duckdb.part"
        with pytest.raises(duckdb.FatalException) as refused, duckdb.connect(copy) as db:
            db.execute("CREATE TABLE x AS SELECT 1")
            db.execute("CHECKPOINT")
    why = str(refused.value).splitlines()[0]
    assert said == f"runs/saefw.duckdb: cannot be brought up to date ({why}); the next run tries again"
    assert len(folders(saefw.base)) == 5
    saefw("gc", "--yes")
    assert len(folders(saefw.base)) == 2
