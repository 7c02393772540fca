"""Folders are the truth, DuckDB is their index.

A unit is a folder `<store>/<stage>/<address>/` that came into being by one rename; until then it is
`<address>.partial/`. Each table's rows of a unit lie in it as `<table>.parquet`. `saefw.duckdb` holds them all for
queries; it is only ever replaced whole, so a reader neither waits for a run nor delays one.
"""

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from saefw.errors import UserError
from saefw.unit import Unit, canonical

INDEX = "saefw.duckdb"
STORAGE = "v1.2.0"
"""DuckDB's storage version of the index: one that DuckDB 1.2 and newer can open."""


_SINGLE = (str, bytes, int, float, type(None))


def schema() -> str:
    """Return the SQL that makes the tables and views."""
    return files("saefw").joinpath("schema.sql").read_text()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class Store:
    """The units of one folder, and their index."""

    def __init__(self, root: Path) -> None:
        """Use the folder `root`; nothing is made before the first unit is."""
        self.root = root

    @cached_property
    def _typed(self) -> duckdb.DuckDBPyConnection:
        """Empty tables in memory, through which rows get the types of the schema on their way to parquet."""
        db = duckdb.connect()
        db.execute(schema())
        return db

    # Units

    def folder(self, unit: Unit) -> Path:
        """Where the unit is once kept."""
        return self.root / unit.stage / unit.address

    def partial(self, unit: Unit) -> Path:
        """Where the unit is worked on."""
        return self.root / unit.stage / f"{unit.address}.partial"

    def has(self, unit: Unit) -> bool:
        """Whether the unit was kept.

        Raises:
            UserError: the folder of its address holds another unit, or none that can be read.

        """
        path = self.folder(unit) / "unit.json"
        if not path.parent.is_dir():
            return False
        try:
            same = path.read_text() == unit.text
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror}); delete {path.parent} to make it again"
            ) from error
        if not same:
            raise UserError(f"{path.parent}: holds another unit than {unit.label!r}; delete it to make that one")
        return True

    def begin(self, unit: Unit) -> Path:
        """Return the folder to work in; what an interrupted run left there is still in it."""
        folder = self.partial(unit)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "unit.json", unit.text.encode())
        except OSError as error:
            raise UserError(f"{folder}: cannot write there ({error.strerror})") from error
        return folder

    def write(self, unit: Unit, table: str, columns: Mapping[str, Any]) -> None:
        """Write rows of a table into the unit's working folder, typed as the schema says.

        `columns` maps column names to arrays or lists of one length, or to single values; `unit` is filled in.
        """
        given = {"unit": unit.address, **columns}
        length = max((len(value) for value in given.values() if not isinstance(value, _SINGLE)), default=1)
        rows = {
            name: _array([value] * length if isinstance(value, _SINGLE) else value) for name, value in given.items()
        }
        part = self.partial(unit) / f"{table}.parquet.part"
        if length:
            self._typed.register("rows", rows)
            self._typed.execute(f'INSERT INTO "{table}" BY NAME SELECT * FROM rows')
        self._typed.execute(f"COPY \"{table}\" TO '{_quoted(part)}' (FORMAT parquet, COMPRESSION zstd)")
        self._typed.execute(f'DELETE FROM "{table}"')
        part.replace(part.with_suffix(""))

    def keep(self, unit: Unit, seconds: float, made_with: Mapping[str, str]) -> Path:
        """Turn the working folder into the unit: the rename is the commit. Returns the folder."""
        partial, folder = self.partial(unit), self.folder(unit)
        made = {
            "label": unit.label,
            "seconds": round(seconds, 3),
            "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "made_with": dict(made_with),
            "files": {
                str(path.relative_to(partial)): {"bytes": path.stat().st_size, "sha256": checksum(path)}
                for path in sorted(partial.rglob("*"))
                if path.is_file() and path.name != "made.json"
            },
        }
        write_atomically(partial / "made.json", json.dumps(made, indent=1).encode())
        partial.rename(folder)
        return folder

    @contextmanager
    def lock(self, unit: Unit, waiting: Callable[[str], None]) -> Iterator[None]:
        """Hold the right to make a unit; `waiting` is told who has it. A lock dies with its holder."""
        with self._flock(self.root / "locks" / unit.address, waiting):
            yield

    @contextmanager
    def _flock(self, path: Path, waiting: Callable[[str], None] = lambda holder: None) -> Iterator[None]:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        except OSError as error:
            raise UserError(f"{path}: cannot write there ({error.strerror})") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                waiting(file.read().strip() or "another run")
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            file.truncate()
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield

    # The index

    def kept(self) -> dict[str, Path]:
        """Return every kept unit's folder, by address."""
        return {
            path.parent.name: path.parent for path in sorted(self.root.glob("*/*/made.json")) if not path.parent.suffix
        }

    def sync(self) -> int:
        """Bring the index in line with the folders; return how many units were added or dropped."""
        path = self.root / INDEX
        if not self.root.is_dir():
            return 0
        try:
            with duckdb.connect(str(path), read_only=True) as db:
                current = db.execute("SELECT comment FROM duckdb_views() WHERE view_name = 'final'").fetchone()
                indexed = {row[0] for row in db.execute("SELECT unit FROM unit").fetchall()}
            whole = current == (_schema_mark(),)
        except duckdb.Error:
            whole, indexed = False, set()
        kept = self.kept()
        if not whole:
            return self.index(kept, [], afresh=True)
        new, gone = {a: f for a, f in kept.items() if a not in indexed}, sorted(indexed - set(kept))
        return self.index(new, gone) if new or gone else 0

    def index(self, new: Mapping[str, Path], gone: Iterable[str] = (), afresh: bool = False) -> int:
        """Publish an index with the rows of some units added (again) and of others dropped.

        Works on a copy that then replaces `saefw.duckdb`. With `afresh` the copy starts empty. Returns how many
        units were added or dropped.
        """
        path, copy = self.root / INDEX, self.root / f".{INDEX}.part"
        gone = list(gone)
        with self._flock(self.root / "locks" / "index"):
            for stale in self.root.glob(f".{INDEX}.part*"):
                stale.unlink()
            if afresh or not path.exists():
                _empty(copy)
            else:
                shutil.copyfile(path, copy)
            with duckdb.connect(str(copy)) as db:
                tables = [row[0] for row in db.execute("SELECT table_name FROM duckdb_tables() ORDER BY 1").fetchall()]
                db.execute("BEGIN")
                for address in [*new, *gone]:
                    for table in tables:
                        db.execute(f'DELETE FROM "{table}" WHERE unit = ?', [address])
                for address, folder in new.items():
                    _insert(db, address, folder, tables)
                db.execute("COMMIT")
                db.execute("CHECKPOINT")
            copy.replace(path)
        return len(new) + len(gone)

    @contextmanager
    def db(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """Open the index to read, as it was last published; a run may replace it meanwhile.

        Raises:
            UserError: there is none.

        """
        path = self.root / INDEX
        if not path.exists():
            raise UserError(f"{path}: there is no index yet; `saefw run` makes one, `saefw index` rebuilds it")
        try:
            db = duckdb.connect(str(path), read_only=True)
        except duckdb.Error as error:
            raise UserError(f"{path}: cannot be opened; `saefw index` rebuilds it ({error})") from error
        with db:
            yield db


def _empty(path: Path) -> None:
    with duckdb.connect() as db:
        db.execute(f"ATTACH '{_quoted(path)}' AS made (STORAGE_VERSION '{STORAGE}')")
        db.execute("USE made")
        db.execute(schema())
        db.execute(f"COMMENT ON VIEW final IS '{_schema_mark()}'")


def _schema_mark() -> str:
    """Tell one version of the schema from another: an index made with another is rebuilt."""
    return f"newest value of each metric; schema {sha256(schema().encode()).hexdigest()[:12]}"


def _insert(db: duckdb.DuckDBPyConnection, address: str, folder: Path, tables: Sequence[str]) -> None:
    unit = json.loads((folder / "unit.json").read_text())
    made = json.loads((folder / "made.json").read_text())
    db.execute(
        "INSERT INTO unit VALUES (?, ?, ?, ?, ?, ?, ?)",
        [
            address, unit["stage"], made["label"], canonical(unit["content"]), json.dumps(made["made_with"]),
            made["made_at"], made["seconds"],
        ],
    )  # fmt: skip
    for need in dict.fromkeys(unit["needs"]):
        db.execute("INSERT INTO need VALUES (?, ?)", [address, need])
    for table in tables:
        path = folder / f"{table}.parquet"
        if path.exists():
            db.execute(f'INSERT INTO "{table}" BY NAME SELECT * FROM read_parquet(?)', [str(path)])


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")


def _array(value: Any) -> np.ndarray[Any, Any]:
    """Return a column that DuckDB takes: text as objects, the rest as it is."""
    array = np.asarray(value)
    return array.astype(object) if array.dtype.kind in "US" else array
