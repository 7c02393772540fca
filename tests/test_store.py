"""Folders are the truth and the index follows them, whatever is killed, copied, damaged or looked at meanwhile."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

from saefw.care import Damage, Unread, damages, write_atomically
from saefw.errors import UserError
from saefw.index import INDEX
from saefw.run import LOG, Run
from saefw.store import Store
from saefw.unit import Unit


def unit(n: int = 0, *needs: Unit) -> Unit:
    return Unit("fake", {"n": n}, needs, label=f"fake {n}")


def make(store: Store, made: Unit, value: float = 1.0) -> Path:
    store.begin(made)
    store.write(made, "metric", {"name": ["a", "b"], "step": 3, "value": [value, 2.0]})
    return store.keep(made, 1.5, {"saefw": "test"})


def values(store: Store) -> list[tuple[object, ...]]:
    with store.db() as db:
        return db.execute("SELECT unit, name, step, value FROM metric ORDER BY ALL").fetchall()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


def test_keep(store: Store) -> None:
    one = unit(1, unit(0))
    assert not store.has(one)
    store.begin(one)
    assert not store.has(one)
    (store.partial(one) / "sub").mkdir()
    (store.partial(one) / "sub" / "note.txt").write_text("x")
    folder = make(store, one)
    assert folder == store.folder(one) == store.root / "fake" / one.address
    assert store.has(one) and not store.partial(one).exists()
    assert (folder / "unit.json").read_text() == one.text
    made = json.loads((folder / "made.json").read_text())
    assert made["label"] == "fake 1" and made["seconds"] == 1.5 and made["made_with"] == {"saefw": "test"}
    assert sorted(made["files"]) == ["metric.parquet", "sub/note.txt", "unit.json"]
    for name, facts in made["files"].items():
        data = (folder / name).read_bytes()
        assert facts == {"bytes": len(data), "sha256": sha256(data).hexdigest()}
    assert store.sync() == 1
    assert values(store) == [(one.address, "a", 3, 1.0), (one.address, "b", 3, 2.0)]
    with store.db() as db:
        assert db.execute("SELECT needs FROM need WHERE unit = ?", [one.address]).fetchall() == [(unit(0).address,)]
        assert db.execute("SELECT stage, content->'n' FROM unit").fetchall() == [("fake", "1")]


def test_rows_are_typed_and_in_order(store: Store) -> None:
    one, order = unit(1), np.random.default_rng(0).permutation(200_000)
    store.begin(one)
    store.write(
        one, "top_example",
        {"sae": "s", "acts": "a", "feature": order, "rank": np.int64(2), "example": 1, "token": [0] * 200_000,
         "value": order.astype(np.float64)},
    )  # fmt: skip
    path = store.partial(one) / "top_example.parquet"
    with duckdb.connect() as db:
        columns = db.execute(f"DESCRIBE SELECT * FROM '{path}'").fetchall()
        got = db.execute(f"SELECT * FROM '{path}'").fetchnumpy()
    assert [(name, kind) for name, kind, *_ in columns] == [
        ("unit", "VARCHAR"), ("sae", "VARCHAR"), ("acts", "VARCHAR"), ("feature", "INTEGER"), ("rank", "SMALLINT"),
        ("example", "INTEGER"), ("token", "SMALLINT"), ("value", "FLOAT"), ("score", "FLOAT"),
    ]  # fmt: skip
    assert (got["feature"] == order).all() and set(got["unit"]) == {one.address} and set(got["rank"]) == {2}


def test_same_rows_same_bytes(store: Store) -> None:
    one, value = unit(1), np.random.default_rng(0).normal(size=300_000)
    seen = set()
    for _ in range(3):
        store.write(one, "metric", {"name": "x", "step": np.arange(300_000), "value": value})
        seen.add((store.partial(one) / "metric.parquet").read_bytes())
    assert len(seen) == 1


def test_no_rows_and_missing_columns(store: Store) -> None:
    one = unit(1)
    store.write(one, "metric", {"name": [], "step": [], "value": []})
    store.write(one, "acts", {"backbone": "b", "layer": 1})
    store.keep(one, 0, {})
    store.sync()
    assert values(store) == []
    with store.db() as db:
        assert db.execute("SELECT backbone, layer, dtype FROM acts").fetchall() == [("b", 1, None)]


def test_wrong_rows_leave_nothing_behind(store: Store) -> None:
    one = unit(1)
    with pytest.raises(TypeError, match=r"table 'metric' has no column nmae \(there are: unit, name, step, value\)"):
        store.write(one, "metric", {"nmae": "x"})
    with pytest.raises(TypeError, match="columns of different lengths"):
        store.write(one, "metric", {"name": ["x", "y"], "step": [1]})
    with pytest.raises(duckdb.Error):
        store.write(one, "example", {"example": [1], "label": [70_000]})
    assert [path.name for path in store.partial(one).iterdir() if path.suffix == ".parquet"] == []
    make(store, one)
    store.sync()
    assert len(values(store)) == 2


def test_half_a_copy_is_not_kept(store: Store) -> None:
    one = unit(1)
    folder = make(store, one)
    (folder / "made.json").unlink()
    assert not store.has(one) and store.kept() == {}
    make(store, one, value=5.0)
    assert store.has(one) and list(store.kept()) == [one.address]
    store.sync()
    assert values(store)[0][3] == 5.0


def test_the_same_unit_came_meanwhile(store: Store) -> None:
    one = unit(1)
    make(store, one, value=1.0)
    make(store, one, value=2.0)
    assert not store.partial(one).exists()
    store.sync()
    assert values(store)[0][3] == 1.0


def test_folders_of_another_unit_are_refused(store: Store) -> None:
    one, other = unit(1), unit(2)
    make(store, other)
    store.folder(other).rename(store.folder(one))
    with pytest.raises(UserError) as caught:
        store.has(one)
    assert str(caught.value) == f"{store.folder(one)}: holds another unit than 'fake 1'; delete it to make that one"


@pytest.mark.parametrize("text", ['{"stage":"fake"', unit(2).text])
def test_a_working_folder_of_something_else_is_begun_anew(
    store: Store, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = store.begin(unit(1))
    (folder / "checkpoint").write_text("of what?")
    (folder / "unit.json").write_text(text)
    assert store.begin(unit(1)) == folder
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("unit.json", unit(1).text)]
    assert caplog.messages == [f"{folder / 'unit.json'}: is not what it should be; 'fake 1' is begun anew"]


def test_a_unit_without_its_content_counts_as_missing(store: Store) -> None:
    folder = make(store, unit(1))
    (folder / "unit.json").unlink()
    assert not store.has(unit(1))
    assert [str(one) for one in store.damage(folder)] == [f"{folder / 'unit.json'}: damaged (is not there)"]


def test_what_an_interrupted_run_left_is_still_there(store: Store) -> None:
    one = unit(1)
    (store.begin(one) / "checkpoint").write_text("half")
    (store.begin(one) / "big.safetensors.part").write_text("torn")
    assert (store.begin(one) / "checkpoint").read_text() == "half"
    assert sorted(path.name for path in make(store, one).iterdir()) == [
        "checkpoint", "made.json", "metric.parquet", "unit.json",
    ]  # fmt: skip


def test_index_follows_the_folders(store: Store) -> None:
    for n in range(3):
        make(store, unit(n))
    assert store.sync() == 3 and store.sync() == 0
    folder = store.folder(unit(0))
    folder.rename(store.root / "gone")
    make(store, unit(7))
    assert store.sync() == 2
    assert {row[0] for row in values(store)} == {unit(n).address for n in (1, 2, 7)}


def test_indexing_twice_is_harmless(store: Store) -> None:
    folder = make(store, unit(1))
    for _ in range(2):
        assert store.index({unit(1).address: folder}) == 1
    assert len(values(store)) == 2


def test_rebuild(store: Store) -> None:
    make(store, unit(1))
    store.sync()
    before = values(store)
    (store.root / INDEX).write_bytes(b"not a database")
    assert store.sync() == 1
    assert values(store) == before
    (store.root / INDEX).unlink()
    (store.root / f".{INDEX}.part").write_bytes(b"left by a kill")
    assert store.rebuild() == 1
    assert values(store) == before and not list(store.root.glob(f".{INDEX}*"))


def test_an_index_of_an_older_schema_is_made_anew(store: Store) -> None:
    make(store, unit(1))
    store.sync()
    with duckdb.connect(str(store.root / INDEX)) as db:
        db.execute("COMMENT ON VIEW final IS 'of an older version'")
    assert store.sync() == 1 and store.sync() == 0


def test_damaged_parquet(store: Store) -> None:
    for n in range(3):
        make(store, unit(n))
    path = store.folder(unit(1)) / "metric.parquet"
    path.write_bytes(path.read_bytes()[:40])
    assert store.sync() == 2
    ((folder, (damage,)),) = store.broken().items()
    assert folder == path.parent and str(damage) == f"{path}: damaged (40 bytes, not 674)"
    assert {row[0] for row in values(store)} == {unit(0).address, unit(2).address}
    assert not store.has(unit(1)) and store.sync() == 0
    assert store.rebuild() == 2
    assert {row[0] for row in values(store)} == {unit(0).address, unit(2).address}
    make(store, unit(1))
    assert store.has(unit(1)) and store.broken() == {} and store.sync() == 1
    assert len(values(store)) == 6


def test_a_reader_neither_waits_nor_delays(store: Store) -> None:
    make(store, unit(1))
    store.sync()
    code = """if True:
        import duckdb, sys
        db = duckdb.connect(sys.argv[1], read_only=True)
        print(db.execute("SELECT count(*) FROM unit").fetchone()[0], flush=True)
        sys.stdin.readline()
        print(db.execute("SELECT count(*) FROM unit").fetchone()[0], flush=True)
    """
    with subprocess.Popen(
        [sys.executable, "-c", code, str(store.root / INDEX)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as notebook:
        assert notebook.stdout and notebook.stdin
        assert notebook.stdout.readline() == "1\n"
        make(store, unit(2))
        assert store.sync() == 1
        assert len(values(store)) == 4
        notebook.stdin.write("\n")
        notebook.stdin.flush()
        assert notebook.stdout.readline() == "1\n"


def test_somebody_has_the_index_open_to_write(store: Store) -> None:
    make(store, unit(1))
    store.sync()
    code = """if True:
        import duckdb, os, sys
        db = duckdb.connect(sys.argv[1])
        db.execute("CREATE TABLE mine (x INTEGER)")
        print("open", flush=True)
        sys.stdin.readline()
        os._exit(0)
    """
    with subprocess.Popen(
        [sys.executable, "-c", code, str(store.root / INDEX)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as shell:
        assert shell.stdout and shell.stdin
        assert shell.stdout.readline() == "open\n"
        make(store, unit(2))
        store.sync()
        assert len(values(store)) == 4
        shell.communicate("\n")
    assert len(values(store)) == 4 and store.sync() == 0


def test_a_lock_dies_with_its_holder(store: Store) -> None:
    code = """if True:
        import sys
        from pathlib import Path
        from saefw.store import Store
        from saefw.unit import Unit
        with Store(Path(sys.argv[1])).lock(Unit("fake", {"n": 1}), print):
            print("locked", flush=True)
            sys.stdin.readline()
    """
    with subprocess.Popen(
        [sys.executable, "-c", code, str(store.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout and holder.stdout.readline() == "locked\n"
        heard = []

        def waiting(who: str) -> None:
            heard.append(who)
            holder.kill()

        with store.lock(unit(1), waiting):
            assert heard == [f"process {holder.pid} on {os.uname().nodename}"]


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "runs")
    assert not store.has(unit(1)) and store.sync() == 0
    with pytest.raises(UserError) as begun:
        store.begin(unit(1))
    with pytest.raises(UserError) as locked, store.lock(unit(1), print):
        pass
    address = unit(1).address
    for caught, path in (begun, f"fake/{address}.partial"), (locked, f"locks/{address}"):
        assert str(caught.value) == f"{store.root / path}: cannot write there (Not a directory)"


def test_no_index_yet(store: Store) -> None:
    with pytest.raises(UserError) as caught, store.db():
        pass
    assert str(caught.value) == (
        f"{store.root / INDEX}: there is no index yet; `saefw run` makes one, `saefw index` rebuilds it"
    )


def test_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    write_atomically(path, b"old")

    def full(handle: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


# The desk's part of it: logs.


def desk(store: Store) -> Run:
    run = Run(store, store.root, {}, {}, device="cpu")
    run.enter("fake")
    return run


def test_a_log_survives_a_kill(store: Store) -> None:
    code = """if True:
        import os, sys
        from pathlib import Path
        from saefw.run import Run
        from saefw.store import Store
        from saefw.unit import Unit
        run = Run(Store(Path(sys.argv[1])), Path(), {}, {})
        for step in range(5):
            run.log(Unit("fake", {"n": 1}), step, loss=step / 2)
            if step == 3:
                print(run.mark(Unit("fake", {"n": 1})), flush=True)
        os.kill(os.getpid(), 9)
    """
    killed = subprocess.run(
        [sys.executable, "-c", code, str(store.root)], check=False, stdout=subprocess.PIPE, text=True
    )
    assert killed.returncode == -9
    one, run = unit(1), desk(store)
    with (store.partial(one) / LOG).open("a") as torn:
        torn.write('[5, {"lo')
    assert run.rewind(one, killed.stdout.strip())
    run.log(one, 4, loss=40.0)
    run.log(one, 4, loss=44.0)
    run.log(one, 5, loss=55.0, nmse=float("nan"))
    run.keep(one)
    assert not (store.folder(one) / LOG).exists()
    with run.db() as db:
        rows = db.execute("SELECT step, value FROM metric WHERE name = 'loss' ORDER BY ALL").fetchall()
    assert rows == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.5), (4, 44.0), (5, 55.0)]


def test_a_log_that_nobody_goes_on_from_begins_anew(store: Store) -> None:
    one = unit(1)
    desk(store).log(one, 1, old=1.0)
    run = desk(store)
    run.log(one, 1, new=2.0)
    run.keep(one)
    with run.db() as db:
        assert db.execute("SELECT name, value FROM metric").fetchall() == [("new", 2.0)]


@pytest.mark.parametrize("cut", [10, None])
def test_a_damaged_log_is_not_gone_on_from(store: Store, cut: int | None) -> None:
    one, run = unit(1), desk(store)
    run.log(one, 1, loss=1.5)
    mark, path = run.mark(one), store.partial(one) / LOG
    path.write_bytes(path.read_bytes()[:cut].replace(b"1.5", b"1.7"))
    run = desk(store)
    assert not run.rewind(one, mark) and path.read_bytes() == b""
    assert run.mark(one) == desk(store).mark(one)


def test_being_set_back_is_not_whole(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while a damaged unit was set back, between the rename and the end of made.json."""
    one, run = unit(1), desk(store)
    run.log(one, 1, loss=1.0)
    run.keep(one)
    (store.folder(one) / "metric.parquet").write_bytes(b"damaged")
    damage = list(damages(store.folder(one)))
    unlink = Path.unlink

    def killed(self: Path, missing_ok: bool = False) -> None:
        if self.name == "made.json":
            raise KeyboardInterrupt
        unlink(self, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        store.set_back(store.folder(one), damage)
    assert not store.has(one) and (store.partial(one) / "made.json").exists()
    assert not store.settled(one) and not (store.partial(one) / "made.json").exists()


def test_whole_but_not_renamed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the rename, whether what served the making was dropped by then or not, a unit is kept as it is."""
    one, run = unit(1), desk(store)

    def killed(self: Path, *args: object, **more: object) -> None:
        if (store.partial(one) / "made.json").exists():
            raise KeyboardInterrupt

    assert not store.settled(one)
    run.log(one, 1, loss=1.0)
    (run.folder(one) / "checkpoint").write_text("half way")
    for method in ("unlink", "rename"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, method, killed)
            if method == "unlink":
                run.keep(one, without=["checkpoint"])
            else:
                store.settled(one)
        assert not store.has(one)
    assert store.settled(one) and store.settled(one)
    assert sorted(path.name for path in store.folder(one).iterdir()) == ["made.json", "metric.parquet", "unit.json"]
    assert not store.partial(one).exists()


def test_logging_is_cheap(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run, units, asked = desk(store), [unit(n) for n in range(20)], 0
    has = store.has

    def counted(unit: Unit) -> bool:
        nonlocal asked
        asked += 1
        return has(unit)

    monkeypatch.setattr(store, "has", counted)
    for step in range(10):
        for made in units:
            run.log(made, step, loss=1.0)
    assert asked == 20


def test_logging_to_a_kept_unit_is_a_bug(store: Store) -> None:
    one, run = unit(1), desk(store)
    make(store, one)
    with pytest.raises(RuntimeError, match="'fake 1' was logged to after it was kept"):
        run.log(one, 1, loss=1.0)


def test_time_is_shared_by_units_kept_together(store: Store) -> None:
    run = desk(store)
    time.sleep(0.2)
    run.keep(unit(1), unit(2))
    run.publish()
    with run.db() as db:
        first, second = (row[0] for row in db.execute("SELECT seconds FROM unit").fetchall())
    assert first == second and 0.1 <= first < 0.2


# What cannot be read is not damaged.

UNREAD = "nothing is deleted for that; make it readable, or delete it, and its unit is made again"


def refuse(patch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """Let the system fail to open the files of a name, as a network disk does for a while."""
    whole = Path.open

    def failing(self: Path, *args: Any, **more: Any) -> Any:
        if self.name == name:
            raise OSError(number, os.strerror(number), str(self))
        return whole(self, *args, **more)

    patch.setattr(Path, "open", failing)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
@pytest.mark.parametrize("name", ["metric.parquet", "made.json"])
def test_a_file_that_cannot_be_read_is_not_damaged(
    store: Store, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    folder, run = make(store, unit(1)), Run(store, store.root, {}, {}, mend=True)
    before, file = contents(folder), folder / name
    with monkeypatch.context() as patch:
        refuse(patch, name, number)
        for met in (
            lambda: run.check(unit(1)),
            lambda: store.sync(),
            lambda: store.set_back(folder, [Damage(file, "of old")]),
        ):
            with pytest.raises(Unread) as caught:
                met()
            assert str(caught.value) == f"{file}: cannot be read ({os.strerror(number)}); {UNREAD}"
    assert contents(folder) == before and not store.partial(unit(1)).exists() and store.has(unit(1))
    run.check(unit(1))
    assert store.sync() == 1


def test_damage_is_looked_at_again_before_anything_goes(store: Store) -> None:
    folder = make(store, unit(1))
    before = contents(folder)
    store.set_back(folder, [Damage(folder / "metric.parquet", "of old")])
    assert contents(folder) == before


def test_a_link_to_itself_cannot_be_read(store: Store) -> None:
    file = make(store, unit(1)) / "metric.parquet"
    file.unlink()
    file.symlink_to(file)
    with pytest.raises(Unread) as caught:
        list(damages(file.parent))
    assert str(caught.value) == f"{file}: cannot be read (Too many levels of symbolic links); {UNREAD}"


def test_a_working_folder_that_cannot_be_read_for_a_while_stays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = store.begin(unit(1))
    (folder / "checkpoint").write_text("hours of work")
    with monkeypatch.context() as patch, pytest.raises(Unread) as caught:
        refuse(patch, "unit.json", errno.ESTALE)
        store.begin(unit(1))
    assert str(caught.value) == f"{folder / 'unit.json'}: cannot be read (Stale file handle); {UNREAD}"
    assert (store.begin(unit(1)) / "checkpoint").read_text() == "hours of work"


def test_a_whole_unit_is_not_replaced(store: Store) -> None:
    """Even if it was taken for damaged when the making began."""
    folder = make(store, unit(1))
    before = contents(folder)
    store.mark(folder, [Damage(folder / "metric.parquet", "said a disk that was full for a while")])
    assert not store.has(unit(1))
    assert make(store, unit(1), value=7.0) == folder
    assert contents(folder) == before and store.has(unit(1)) and not store.partial(unit(1)).exists()


@pytest.mark.parametrize("kind", [duckdb.OutOfMemoryException, duckdb.InterruptException, duckdb.IOException])
def test_an_error_that_passes_marks_no_unit(
    store: Store, monkeypatch: pytest.MonkeyPatch, kind: type[duckdb.Error]
) -> None:
    folder = make(store, unit(1))

    def failing(value: object) -> str:
        raise kind("for a while\nand more")

    with monkeypatch.context() as patch:
        patch.setattr("saefw.index.canonical", failing)
        with pytest.raises(kind if kind is duckdb.InterruptException else UserError) as caught:
            store.sync()
    if kind is not duckdb.InterruptException:
        assert str(caught.value) == (
            f"{store.root / INDEX}: cannot be brought up to date (for a while); the next run tries again"
        )
    assert not store.damage(folder) and store.has(unit(1)) and store.sync() == 1


def test_a_unit_that_is_a_link_is_not_deleted(store: Store, tmp_path: Path) -> None:
    folder = make(store, unit(1))
    folder.rename(tmp_path / "big")
    folder.symlink_to(tmp_path / "big")
    with pytest.raises(UserError) as caught:
        store.delete(folder, print)
    assert str(caught.value) == f"{folder}: is a link, and stays; delete it and what it leads to yourself"
    assert store.has(unit(1)) and sorted(path.name for path in folder.parent.iterdir()) == [folder.name]


def test_a_link_to_a_damaged_unit_goes_and_what_it_leads_to_stays(store: Store, tmp_path: Path) -> None:
    """Units moved to a larger disk, with links in their place."""
    folder = make(store, unit(1))
    partial = store.partial(unit(1))
    for elsewhere in ("kept", "begun"):
        shutil.copytree(folder, tmp_path / elsewhere)
    shutil.rmtree(folder)
    (tmp_path / "begun" / "unit.json").write_text("{}")
    partial.symlink_to(tmp_path / "begun")
    assert store.begin(unit(1)) == partial and not partial.is_symlink()
    folder.symlink_to(tmp_path / "kept")
    assert store.has(unit(1))
    table = folder / "metric.parquet"
    table.write_bytes(table.read_bytes()[:-1])
    assert store.unkeep(folder, list(damages(folder))) and not folder.exists()
    assert partial.is_symlink() and not store.settled(unit(1))
    make(store, unit(1))
    assert store.has(unit(1)) and sorted(path.name for path in folder.parent.iterdir()) == [folder.name]
    assert {path.name for path in tmp_path.iterdir()} >= {"kept", "begun"}
