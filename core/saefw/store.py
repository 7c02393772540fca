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
from functools import cache, cached_property
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from saefw.errors import Faults, UserError
from saefw.unit import Unit, canonical

INDEX = "saefw.duckdb"
STORAGE = "v1.2.0"
"""DuckDB's storage version of the index: one that DuckDB 1.2 and newer can open."""

PART = ".part"
"""The end of the name of a file that is being written; one that a killed run left is never kept."""

_SINGLE = (str, bytes, int, float, np.generic, type(None))


def schema() -> str:
    """Return the SQL that makes the tables and views."""
    return files("saefw").joinpath("schema.sql").read_text()


@cache
def types() -> dict[str, dict[str, str]]:
    """Return each table of the schema, with its columns and their types, both in the schema's order."""
    found: dict[str, dict[str, str]] = {}
    with duckdb.connect() as db:
        db.execute(schema())
        for table, column, kind in db.execute(
            "SELECT table_name, column_name, data_type FROM duckdb_columns() SEMI JOIN duckdb_tables()"
            " USING (table_name) ORDER BY table_oid, column_index"
        ).fetchall():
            found.setdefault(table, {})[column] = kind
    return found


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    part = path.with_name(path.name + PART)
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    _settle(path.parent)


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
        self._seen: object = None
        """The version of the index that was last found in line with the folders, and their addresses."""

    @cached_property
    def _memory(self) -> duckdb.DuckDBPyConnection:
        """A connection without a file, through which rows go to parquet."""
        return duckdb.connect()

    # Units

    def folder(self, unit: Unit) -> Path:
        """Where the unit is once kept."""
        return self.root / unit.stage / unit.address

    def partial(self, unit: Unit) -> Path:
        """Where the unit is worked on."""
        return self.root / unit.stage / f"{unit.address}.partial"

    def has(self, unit: Unit) -> bool:
        """Whether the unit was kept: a folder without made.json (half a copy, say) is not.

        Raises:
            UserError: the folder of its address holds another unit, or none that can be read.

        """
        folder = self.folder(unit)
        if not (folder / "made.json").exists():
            return False
        _same(folder, unit)
        return True

    def begin(self, unit: Unit) -> Path:
        """Return the folder to work in; what an interrupted run left there is still in it.

        Raises:
            UserError: it cannot be written to, or the folder there is that of another unit.

        """
        folder = self.partial(unit)
        if (folder / "unit.json").exists():
            _same(folder, unit)
            return folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "unit.json", unit.text.encode())
        except OSError as error:
            raise UserError(f"{folder}: cannot write there ({error.strerror})") from error
        return folder

    def write(self, unit: Unit, table: str, columns: Mapping[str, Any]) -> None:
        """Write rows of a table into the unit's working folder, typed as the schema says.

        `columns` maps column names to arrays or lists of one length, or to single values; `unit` is filled in, and
        a column left out is NULL. The order of rows is kept, and the same rows give the same bytes.
        """
        kinds, given = types()[table], {"unit": unit.address, **columns}
        unknown = sorted(set(given) - set(kinds))
        if unknown:
            raise TypeError(f"table '{table}' has no column {', '.join(unknown)} (there are: {', '.join(kinds)})")
        rows = {name: _array(value) for name, value in given.items() if not isinstance(value, _SINGLE)}
        lengths = {name: len(array) for name, array in rows.items()}
        if len(set(lengths.values())) > 1:
            raise TypeError(f"table '{table}': columns of different lengths: {lengths}")
        # Single values are not repeated in memory: a table of 40 million rows has several.
        single = {name: _array([given.get(name)]) for name in kinds if name not in rows}
        source = {name: f'"{name}"' if name in rows else f'(SELECT "{name}" FROM single)' for name in kinds}
        casts = ", ".join(f'CAST({source[name]} AS {kinds[name]}) AS "{name}"' for name in kinds)
        part = self.begin(unit) / f"{table}.parquet{PART}"
        self._memory.register("rows", rows or {"row": np.zeros(1)})
        self._memory.register("single", single)
        try:
            self._memory.execute(
                f"COPY (SELECT {casts} FROM rows) TO '{_quoted(part)}' (FORMAT parquet, COMPRESSION zstd)"
            )
        finally:
            self._memory.unregister("rows")
            self._memory.unregister("single")
        part.replace(part.with_suffix(""))

    def keep(self, unit: Unit, seconds: float, made_with: Mapping[str, str], without: Sequence[str] = ()) -> Path:
        """Turn the working folder into the unit: the rename is the commit. Returns the folder.

        Files called as in `without` served the making alone and are dropped, after the rename, so that a run killed
        in between has lost nothing. If another machine put the same unit there meanwhile, that one stays.
        """
        partial, folder = self.begin(unit), self.folder(unit)
        for stale in [path for path in partial.rglob(f"*{PART}") if path.is_file()]:
            stale.unlink()
        entries = sorted(partial.rglob("*"))
        for path in entries:
            _settle(path)
        made = {
            "label": unit.label,
            "seconds": round(seconds, 3),
            "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "made_with": dict(made_with),
            "files": {
                path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "sha256": checksum(path)}
                for path in entries
                if path.is_file() and path.name not in ("made.json", *without)
            },
        }
        write_atomically(partial / "made.json", json.dumps(made, indent=1).encode())
        if self.has(unit):
            shutil.rmtree(partial)
            return folder
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
        _settle(folder.parent)
        for name in without:
            (folder / name).unlink(missing_ok=True)
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
        """Bring the index in line with the folders; return how many units were added or dropped.

        Writes nothing if there is nothing to do, so a store that is read-only may be read.

        Raises:
            UserError: a unit is damaged (the others are indexed all the same), or the index cannot be written.

        """
        path, kept = self.root / INDEX, self.kept()
        if not self.root.is_dir() or self._seen == (_version(path), kept.keys()):
            return 0
        try:
            with duckdb.connect(_local(path), read_only=True) as db:
                current = db.execute("SELECT comment FROM duckdb_views() WHERE view_name = 'final'").fetchone()
                indexed = {row[0] for row in db.execute("SELECT unit FROM unit").fetchall()}
            whole = current == (_schema_mark(),)
        except duckdb.Error:
            whole, indexed = False, set()
        if not whole:
            return self.rebuild()
        new, gone = {a: f for a, f in kept.items() if a not in indexed}, sorted(indexed - set(kept))
        if new or gone:
            return self.index(new, gone)
        # Opening an index costs more than looking whether it is still the same one.
        self._seen = _version(path), kept.keys()
        return 0

    def rebuild(self) -> int:
        """Make the index anew from the parquet in the unit folders; return how many units are in it.

        Raises:
            UserError: a unit is damaged (the others are indexed all the same), or the index cannot be written.

        """
        return self.index({}, afresh=True)

    def index(self, new: Mapping[str, Path], gone: Iterable[str] = (), afresh: bool = False) -> int:
        """Publish an index with the rows of some units added (again) and of others dropped.

        Works on a copy that then replaces `saefw.duckdb`. With `afresh` the copy starts empty and takes in every
        kept unit. Returns how many units were added or dropped.

        Raises:
            UserError: a unit is damaged (the others are indexed all the same), or the index cannot be written.

        """
        path, copy = self.root / INDEX, self.root / f".{INDEX}{PART}"
        gone, faults = list(gone), []
        with self._flock(self.root / "locks" / "index"):
            for stale in self.root.glob(f".{INDEX}{PART}*"):
                stale.unlink()
            if afresh or not path.exists():
                # Listed under the lock: what another run publishes while we wait for it must not get lost.
                new = self.kept()
                _empty(copy)
            else:
                shutil.copyfile(path, copy)
            with duckdb.connect(_local(copy)) as db:
                db.execute("BEGIN")
                for table in types():
                    db.execute(f'DELETE FROM "{table}" WHERE list_contains(?, unit)', [[*new, *gone]])
                db.execute("COMMIT")
                for address, folder in new.items():
                    try:
                        _insert(db, address, folder, types())
                    except UserError as error:
                        faults.append(str(error))
                db.execute("CHECKPOINT")
            # Left by somebody who opened the index to write: it would be played back onto the new one.
            path.with_name(f"{INDEX}.wal").unlink(missing_ok=True)
            copy.replace(path)
        if faults:
            raise Faults(faults)
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
            db = duckdb.connect(_local(path), read_only=True)
        except duckdb.Error as error:
            raise UserError(f"{path}: cannot be opened; `saefw index` rebuilds it ({error})") from error
        with db:
            yield db


def _local(path: Path) -> str:
    """Return a path that DuckDB takes for one: `md:x` is a service to it."""
    return str(path.absolute())


def _version(path: Path) -> tuple[int, int] | None:
    """Tell one published index from the next."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        return None
    return facts.st_ino, facts.st_mtime_ns


def _empty(path: Path) -> None:
    with duckdb.connect() as db:
        db.execute(f"ATTACH '{_quoted(path.absolute())}' AS made (STORAGE_VERSION '{STORAGE}')")
        db.execute("USE made")
        db.execute(schema())
        db.execute(f"COMMENT ON VIEW final IS '{_schema_mark()}'")


def _schema_mark() -> str:
    """Tell one version of the schema from another: an index made with another is rebuilt."""
    return f"newest value of each metric; schema {sha256(schema().encode()).hexdigest()[:12]}"


def _insert(db: duckdb.DuckDBPyConnection, address: str, folder: Path, tables: Iterable[str]) -> None:
    """Insert all rows of a unit or, if any file of it is damaged, none."""
    path = folder / "unit.json"
    db.execute("BEGIN")
    try:
        unit = json.loads(path.read_text())
        stage, content, needs = unit["stage"], canonical(unit["content"]), list(dict.fromkeys(unit["needs"]))
        path = folder / "made.json"
        made = json.loads(path.read_text())
        db.execute(
            "INSERT INTO unit VALUES (?, ?, ?, ?, ?, ?, ?)",
            [
                address, stage, made["label"], content, json.dumps(made["made_with"]),
                made["made_at"], made["seconds"],
            ],
        )  # fmt: skip
        for need in needs:
            db.execute("INSERT INTO need VALUES (?, ?)", [address, need])
        for table in tables:
            path = folder / f"{table}.parquet"
            if path.exists():
                db.execute(f'INSERT INTO "{table}" BY NAME SELECT * FROM read_parquet(?)', [str(path)])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, duckdb.Error) as error:
        db.execute("ROLLBACK")
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: damaged ({why}); delete the folder {folder} to make it again") from error
    db.execute("COMMIT")


def _same(folder: Path, unit: Unit) -> None:
    """Refuse a folder that holds another unit than the one that its name says."""
    path = folder / "unit.json"
    try:
        same = path.read_text() == unit.text
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete the folder {folder} to make it again") from error
    if not same:
        raise UserError(f"{folder}: holds another unit than '{unit.label}'; delete it to make that one")


def _settle(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")


def _array(value: Any) -> np.ndarray[Any, Any]:
    """Return a column that DuckDB takes: text as objects, the rest as it is."""
    array = np.asarray(value)
    return array.astype(object) if array.dtype.kind in "US" else array
