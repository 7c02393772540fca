"""The index where others are at work on the store, or where it cannot be written."""

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pytest
from test_store import make, unit, values

from saefw.errors import UserError
from saefw.index import INDEX
from saefw.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


def addresses(store: Store) -> set[object]:
    return {row[0] for row in values(store)}


OTHER = """if True:
    import sys
    from pathlib import Path
    from saefw.store import Store
    from test_store import make, unit
    store = Store(Path(sys.argv[1]))
    make(store, unit(1))
    store.delete(store.folder(unit(2)), print)
    store.sync()
    make(store, unit(4))
"""


def test_another_process_is_at_work_before_we_hold_the_lock(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it put in stays, what it deleted is neither missed nor called damaged, what it kept comes in."""
    for n in (0, 1):
        make(store, unit(n))
    store.sync()
    store.delete(store.folder(unit(1)), print)
    for n in (2, 3):
        make(store, unit(n))
    lock, other = store._flock, []

    @contextmanager
    def late(path: Path, *args: Any) -> Iterator[None]:
        command = [sys.executable, "-c", OTHER, str(store.root)]
        other.append(subprocess.run(command, cwd=Path(__file__).parent, check=True))
        with lock(path, *args):
            yield

    with monkeypatch.context() as patch:
        patch.setattr(store, "_flock", late)
        store.sync()
    assert len(other) == 1
    assert addresses(store) == {unit(n).address for n in (0, 1, 3, 4)}
    assert store.broken() == {} and store.sync() == 0


@contextmanager
def no_file_larger_than(n_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("there", [True, False])
def test_an_index_that_grows_too_large(store: Store, there: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Copied it is the system that refuses, made anew it is DuckDB; neither is damage."""
    make(store, unit(1))
    if there:
        store.sync()
    make(store, unit(2))
    with no_file_larger_than(100_000):
        with pytest.raises(UserError) as caught:
            store.sync()
        why = "File too large"
        if not there:
            copy = store.root / f".{INDEX}.part"
            with pytest.raises(duckdb.FatalException) as refused, duckdb.connect(copy) as db:
                db.execute("CREATE TABLE x AS SELECT 1")
                db.execute("CHECKPOINT")
            why = str(refused.value).splitlines()[0]
    assert str(caught.value) == f"{store.root / INDEX}: cannot be brought up to date ({why}); the next run tries again"
    assert caplog.messages == [] and store.broken() == {}
    store.sync()
    assert addresses(store) == {unit(1).address, unit(2).address} and not list(store.root.glob(".*"))
