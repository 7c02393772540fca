"""The index of a store: every table of every kept unit, in DuckDB.

It is only ever replaced whole, so a reader neither waits for a run nor delays one. A unit whose tables are damaged is
left out of it. A damaged index costs nothing: it is made anew from the folders.
"""

import fcntl
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

import duckdb

from saefw import notes
from saefw.care import MADE, PART, PASSING, REFUSED, Damage, damages, found, writing
from saefw.errors import UserError
from saefw.unit import canonical

INDEX = "saefw.duckdb"
STORAGE = "v1.2.0"
"""DuckDB's storage version of the index: one that DuckDB 1.2 and newer can open."""

CONTENT = (
    ValueError,
    KeyError,
    TypeError,
    RecursionError,
    duckdb.DataError,
    duckdb.IntegrityError,
    duckdb.ProgrammingError,
    duckdb.NotSupportedError,
)
"""What comes of reading files that hold something else than a unit's: the same every time."""

DISK = duckdb.IOException, duckdb.FatalException
"""What comes of a disk that fails or refuses, at a checkpoint the second."""

log = logging.getLogger("saefw")


class BrokenIndex(UserError):
    """The index turned out to be damaged while it was read."""


def schema() -> str:
    """Return the SQL that makes the tables and views."""
    return files("saefw").joinpath("schema.sql").read_text()


@cache
def types() -> dict[str, dict[str, str]]:
    """Return each table of units' rows, with its columns and their types, both in the schema's order."""
    kinds: dict[str, dict[str, str]] = {}
    with duckdb.connect() as db:
        db.execute(schema())
        for table, column, kind in db.execute(
            "SELECT table_name, column_name, data_type FROM duckdb_columns() SEMI JOIN duckdb_tables()"
            " USING (table_name) WHERE table_name != 'note' ORDER BY table_oid, column_index"
        ).fetchall():
            kinds.setdefault(table, {})[column] = kind
    return kinds


class Index:
    """The kept units of a folder, and the database of all their tables."""

    def __init__(self, root: Path) -> None:
        """Use the folder `root`; nothing is made."""
        self.root = root
        self._seen: object = None
        """The version of the index that was last found in line with the folders, their addresses, and the notes."""
        self._broken: dict[Path, tuple[object, list[Damage]]] = {}
        """Kept units found damaged, by folder: the version of their made.json, and what is wrong."""

    def kept(self) -> dict[str, Path]:
        """Return every kept unit's folder, by address."""
        return {
            path.parent.name: path.parent for path in sorted(self.root.glob(f"*/*/{MADE}")) if not path.parent.suffix
        }

    def mark(self, folder: Path, damage: Sequence[Damage]) -> None:
        """Remember what is damaged of a kept unit: from now on it counts as missing."""
        if version := _version(folder / MADE):  # or it was set back or deleted meanwhile
            self._broken[folder] = version, list(damage)

    def damage(self, folder: Path) -> list[Damage]:
        """Return what was found damaged of a kept unit, if it was neither set back nor made again since."""
        version, damage = self._broken.get(folder, (None, []))
        return damage if damage and version == _version(folder / MADE) else []

    def forgive(self, folder: Path) -> None:
        """Forget what was found damaged of a kept unit."""
        self._broken.pop(folder, None)

    def broken(self) -> dict[Path, list[Damage]]:
        """Return what was found damaged, by the folder of the unit."""
        return {folder: damage for folder in self._broken if (damage := self.damage(folder))}

    def sync(self) -> int:
        """Bring the index in line with the folders; return how many units were added or dropped.

        Writes nothing if there is nothing to do, so a store that is read-only may be read. Units whose tables are
        damaged are left out, and are in `broken` from then on.

        Raises:
            OSError: the index cannot be written.

        """
        path, kept, said = self.root / INDEX, self.kept(), notes.mark(notes.listed(self.root))
        if not self.root.is_dir() or self._seen == (_version(path), kept.keys(), said):
            return 0
        try:
            with duckdb.connect(local(path), read_only=True) as db:
                current = db.execute("SELECT comment FROM duckdb_views() WHERE view_name = 'final'").fetchone()
                taken = db.execute("SELECT comment FROM duckdb_tables() WHERE table_name = 'note'").fetchone()
                indexed = _indexed(db)
            whole = current == (_schema_mark(),)
        except duckdb.Error:
            if path.exists():
                log.warning("%s: cannot be read; made anew from the folders of the units", path)
            whole, taken, indexed = False, None, set()
        if not whole:
            return self.rebuild()
        new = self._sound({address: folder for address, folder in kept.items() if address not in indexed})
        if new or indexed - kept.keys() or taken != (said,):
            return self.index(new)
        # Opening an index costs more than looking whether it is still the same one.
        self._seen = _version(path), kept.keys(), said
        return 0

    def rebuild(self) -> int:
        """Make the index anew from the parquet in the unit folders; return how many units are in it.

        Raises:
            OSError: the disk is full, or may not be written to.
            UserError: the index cannot be written.

        """
        return self.index({}, afresh=True)

    def index(self, made: Mapping[str, Path], afresh: bool = False) -> int:
        """Publish an index in line with the folders; return how many units were added or dropped.

        Works on a copy that then replaces `saefw.duckdb`.

        Args:
            made: units known to be whole, whose rows are added, or put in the place of those of the same address.
            afresh: start from an empty copy.

        Raises:
            OSError: the disk is full, or may not be written to; the old index stays.
            UserError: the index cannot be written; the old one stays.

        """
        path, copy = self.root / INDEX, self.root / f".{INDEX}{PART}"
        with self._flock(self.root / "locks" / "index"), writing(path):
            try:
                try:
                    return self._publish(path, copy, made, afresh or not path.exists())
                except duckdb.Error as error:
                    if afresh or self._passes(error):
                        raise
                    log.warning("%s: damaged; made anew from the folders of the units", path)
                    return self._publish(path, copy, {}, afresh=True)
            except (OSError, duckdb.OutOfMemoryException, *DISK) as error:
                if any(os.strerror(number) in str(error) for number in REFUSED):
                    raise
                why = getattr(error, "strerror", "") or str(error).splitlines()[0]
                raise UserError(f"{path}: cannot be brought up to date ({why}); the next run tries again") from error
            finally:
                _clear(copy)

    def _passes(self, error: duckdb.Error) -> bool:
        """Whether an error says nothing of the index that was copied."""
        return (
            isinstance(error, PASSING)
            or any(os.strerror(number) in str(error) for number in REFUSED)
            or (isinstance(error, DISK) and self.whole())
        )

    def _publish(self, path: Path, copy: Path, made: Mapping[str, Path], afresh: bool) -> int:
        _clear(copy)
        if afresh:
            _empty(copy)
        else:
            shutil.copyfile(path, copy)
        with duckdb.connect(local(copy)) as db:
            # Listed under the lock: what other runs kept, published or deleted while we waited for it counts.
            kept, indexed = self.kept(), _indexed(db)
            other = {address: folder for address, folder in kept.items() if address not in indexed | made.keys()}
            whole = {*made, *self._sound(other)}
            new = {address: folder for address, folder in kept.items() if address in whole}
            gone = sorted(indexed - kept.keys())
            db.execute("BEGIN")
            for table in types():
                db.execute(f'DELETE FROM "{table}" WHERE list_contains(?, unit)', [[*new, *gone]])
            db.execute("COMMIT")
            added = sum(self._insert(db, folder) for folder in new.values())
            self._take_notes(db)
            db.execute("CHECKPOINT")
        # Left by somebody who opened the index to write: it would be played back onto the new one.
        path.with_name(f"{INDEX}.wal").unlink(missing_ok=True)
        copy.replace(path)
        return added + len(gone)

    def _sound(self, units: Mapping[str, Path]) -> dict[str, Path]:
        """Return the units whose tables are what they were when they were made; the others are marked."""
        names, sound = {"unit.json", *(f"{table}.parquet" for table in types())}, {}
        for address, folder in units.items():
            if self.damage(folder):
                continue
            if damage := list(damages(folder, names)):
                self.mark(folder, damage)
            else:
                sound[address] = folder
        return sound

    def _insert(self, db: duckdb.DuckDBPyConnection, folder: Path) -> bool:
        """Insert all rows of a unit; if it says nothing that can be inserted, mark it, insert none and return False."""
        path = folder / "unit.json"
        db.execute("BEGIN")
        try:
            unit = json.loads(path.read_text())
            stage, content, needs = unit["stage"], canonical(unit["content"]), list(dict.fromkeys(unit["needs"]))
            path = folder / MADE
            made = json.loads(path.read_text())
            db.execute(
                "INSERT INTO unit VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    folder.name, stage, made["label"], content,
                    json.dumps(made["made_with"]), made["made_at"], made["seconds"],
                ],
            )  # fmt: skip
            for need in needs:
                db.execute("INSERT INTO need VALUES (?, ?)", [folder.name, need])
            for table in types():
                path = folder / f"{table}.parquet"
                if path.exists():
                    db.execute(f'INSERT INTO "{table}" BY NAME SELECT * FROM read_parquet(?)', [str(path)])
        except (OSError, ValueError, KeyError, TypeError, RecursionError, duckdb.Error) as error:
            db.execute("ROLLBACK")
            if any(os.strerror(number) in str(error) for number in REFUSED):
                raise
            damage = list(damages(folder, {"unit.json", *(f"{table}.parquet" for table in types())}))
            # Too little memory, a disk that fails for a while or Ctrl-C say nothing of the unit.
            if not damage and not isinstance(error, CONTENT):
                raise
            why = f"has no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
            self.mark(folder, damage or [Damage(path, why.splitlines()[0], as_made=True)])
            return False
        db.execute("COMMIT")
        return True

    def _take_notes(self, db: duckdb.DuckDBPyConnection) -> None:
        """Put the notes that there are in the place of those that there were."""
        files = notes.listed(self.root)
        db.execute("DELETE FROM note")
        told = [note._replace(made_at=note.made_at.replace(tzinfo=None)) for note in notes.every(files)]
        if told:
            columns = ", ".join("unnest(?)" for _ in notes.Note._fields)
            db.execute(f"INSERT INTO note SELECT {columns}", list(map(list, zip(*told, strict=True))))
        db.execute(f"COMMENT ON TABLE note IS '{notes.mark(files)}'")

    @contextmanager
    def db(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """Open the index to read, as it was last published; a run may replace it meanwhile.

        Raises:
            UserError: there is none.
            BrokenIndex: it is damaged; DuckDB notices that only where it reads.

        """
        path = self.root / INDEX
        if not path.exists():
            raise UserError(f"{path}: there is no index yet; `saefw run` makes one, `saefw index` rebuilds it")
        try:
            with duckdb.connect(local(path), read_only=True) as db:
                yield db
        except duckdb.Error as error:
            # A block that fails its checksum raises the plain class.
            kinds = duckdb.IOException, duckdb.InternalException, duckdb.FatalException, duckdb.SerializationException
            if (type(error) is duckdb.Error or isinstance(error, kinds)) and not self.whole():
                text = f"{path}: damaged; `saefw index` makes it anew from the folders of the units"
                raise BrokenIndex(text) from error
            raise

    def whole(self) -> bool:
        """Whether every block of the index that holds rows can be read, as far as memory and Ctrl-C let one see."""
        try:
            with duckdb.connect(local(self.root / INDEX), read_only=True) as db:
                for table in (*types(), "note"):
                    db.execute(f'SELECT max(hash(COLUMNS(*))) FROM "{table}"').fetchall()
        except duckdb.Error as error:
            return isinstance(error, PASSING)
        return True

    def drop(self) -> None:
        """Remove the index, so that the next run makes it anew.

        Raises:
            OSError: it cannot be removed.

        """
        with self._flock(self.root / "locks" / "index"):
            (self.root / INDEX).unlink(missing_ok=True)

    @contextmanager
    def _flock(self, path: Path, waiting: Callable[[str], None] = lambda holder: None) -> Iterator[None]:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+b", buffering=0)
        except OSError as error:
            raise refused(path, error) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                waiting(file.read().decode(errors="replace").strip() or "another run")
                fcntl.flock(file, fcntl.LOCK_EX)
            with writing(path):
                file.seek(0)
                file.truncate()
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            yield


def refused(path: Path, error: OSError) -> Exception:
    """Return what to raise where a file cannot be made: a full disk is said in one way everywhere."""
    return error if error.errno in REFUSED else UserError(f"{path}: cannot write there ({error.strerror})")


def local(path: Path) -> str:
    """Return a path that DuckDB takes for one: `md:x` is a service to it."""
    return str(path.absolute())


def quoted(path: Path) -> str:
    """Return a path as it stands between quotes in SQL."""
    return local(path).replace("'", "''")


def _clear(copy: Path) -> None:
    """Remove what is left of an index in the making: the file, and what DuckDB puts beside it."""
    for stale in copy.parent.glob(f"{copy.name}*"):
        if stale.is_dir():
            shutil.rmtree(stale)
        else:
            stale.unlink()


def _indexed(db: duckdb.DuckDBPyConnection) -> set[str]:
    """Return the addresses of the units that are in an index."""
    return {row[0] for row in db.execute("SELECT unit FROM unit").fetchall()}


def _version(path: Path) -> tuple[int, int] | None:
    """Tell one published file from the next."""
    facts = found(path)
    return (facts.st_ino, facts.st_mtime_ns) if facts else None


def _empty(path: Path) -> None:
    with duckdb.connect() as db:
        db.execute(f"ATTACH '{quoted(path)}' AS made (STORAGE_VERSION '{STORAGE}')")
        db.execute("USE made")
        db.execute(schema())
        db.execute(f"COMMENT ON VIEW final IS '{_schema_mark()}'")


def _schema_mark() -> str:
    """Tell one version of the schema from another: an index made with another is rebuilt."""
    return f"newest value of each metric; schema {sha256(schema().encode()).hexdigest()[:12]}"
