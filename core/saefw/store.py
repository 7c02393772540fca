"""Folders are the truth, DuckDB is their index.

A unit is a folder `<store>/<stage>/<address>/` that came into being by one rename; until then it is
`<address>.partial/`. Each table's rows of a unit lie in it as `<table>.parquet`. `saefw.duckdb` holds them all for
queries; it is only ever replaced whole, so a reader neither waits for a run nor delays one.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from saefw.care import (
    MADE,
    PART,
    Damage,
    Unread,
    checksum,
    damages,
    found,
    listed,
    remove,
    settle,
    write_atomically,
    writing,
)
from saefw.errors import UserError
from saefw.index import Index, quoted, refused, types
from saefw.unit import Unit

log = logging.getLogger("saefw")

SAVED = "saved"
"""The stage of what people saved on the page: no registry needs it, and it stays until somebody deletes it."""

PARTIAL, GONE = ".partial", ".gone"
"""The ends of the names of a folder in which a unit is made, and of one that is being deleted."""

_SINGLE = (str, bytes, int, float, np.generic, type(None))


class Store(Index):
    """The units of one folder, and their index."""

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
        return self.root / unit.stage / f"{unit.address}{PARTIAL}"

    def has(self, unit: Unit) -> bool:
        """Whether the unit was kept: a folder without made.json (half a copy, say) is not, nor one found damaged.

        Raises:
            UserError: the folder of its address holds another unit, or cannot be read.

        """
        folder = self.folder(unit)
        if not found(folder / MADE) or self.damage(folder):
            return False
        if _says(folder, unit):
            return True
        if damage := list(damages(folder, {"unit.json"})):
            self.mark(folder, damage)
            return False
        raise UserError(f"{folder}: holds another unit than '{unit.label}'; delete it to make that one")

    def begin(self, unit: Unit) -> Path:
        """Return the folder to work in; what an interrupted run left there is still in it.

        Raises:
            UserError: it cannot be written to, or what lies there cannot be read.

        """
        folder = self.partial(unit)
        if found(folder / "unit.json"):
            if _says(folder, unit):
                return folder
            log.warning("%s: is not what it should be; '%s' is begun anew", folder / "unit.json", unit.label)
            remove(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "unit.json", unit.text.encode())
        except OSError as error:
            raise refused(folder, error) from error
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
            with writing(part.with_suffix("")):
                self._memory.execute(
                    f"COPY (SELECT {casts} FROM rows) TO '{quoted(part)}' (FORMAT parquet, COMPRESSION zstd)"
                )
                part.replace(part.with_suffix(""))
        finally:
            self._memory.unregister("rows")
            self._memory.unregister("single")
            part.unlink(missing_ok=True)

    def keep(self, unit: Unit, seconds: float, made_with: Mapping[str, str], without: Sequence[str] = ()) -> Path:
        """Turn the working folder into the unit: the rename is the commit. Returns the folder.

        Files called as in `without` served the making alone and are dropped, once all else is on the disk, so that a
        run killed in between has lost nothing.
        """
        partial = self.begin(unit)
        for stale in [path for path in partial.rglob(f"*{PART}") if path.is_file()]:
            stale.unlink()
        entries = sorted(partial.rglob("*"))
        for path in entries:
            settle(path)
        made = {
            "label": unit.label,
            "seconds": round(seconds, 3),
            "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "made_with": dict(made_with),
            "files": {
                path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "sha256": checksum(path)}
                for path in entries
                if path.is_file() and path.name not in (MADE, *without)
            },
        }
        write_atomically(partial / MADE, json.dumps(made, indent=1).encode())
        return self._commit(unit)

    def settled(self, unit: Unit) -> bool:
        """Whether the unit is kept; one that was whole when its run was killed, all but renamed, is kept now.

        For those who hold its lock.
        """
        if self.has(unit):
            return True
        partial = self.partial(unit)
        if not found(partial / MADE):
            return False
        # Or a damaged one that was being set back.
        if not _says(partial, unit) or any(damages(partial)):
            (partial / MADE).unlink()
            return False
        self._commit(unit)
        return True

    def _commit(self, unit: Unit) -> Path:
        """Drop from a working folder what made.json does not list, and rename it; a kept unit of that name stays."""
        partial, folder = self.partial(unit), self.folder(unit)
        whole = {MADE, *listed(partial)}
        for path in [path for path in partial.rglob("*") if path.is_file()]:
            if path.relative_to(partial).as_posix() not in whole:
                path.unlink()
        if self.has(unit):  # another machine put it there meanwhile
            remove(partial)
            return folder
        if found(folder):
            if not any(damages(folder)):  # whole after all, whatever was thought of it
                self.forgive(folder)
                remove(partial)
                return folder
            remove(folder)
        partial.rename(folder)
        settle(folder.parent)
        return folder

    def set_back(self, folder: Path, damage: Sequence[Damage]) -> None:
        """Turn a damaged unit into one in the making, without its damaged files, under its lock.

        What is whole stays in the working folder, for a stage that can go on from it. Nothing happens if another run
        has set the unit back or made it again meanwhile.

        Raises:
            OSError: the store cannot be written to.
            Unread: a file of it cannot be read; nothing is changed.

        """
        if found(folder / MADE):
            with self._flock(self.root / "locks" / folder.name):
                self.unkeep(folder, damage)

    def unkeep(self, folder: Path, damage: Sequence[Damage]) -> bool:
        """Do what `set_back` does, for one who holds the lock; return False if its files are not damaged.

        Raises:
            OSError: the store cannot be written to.
            Unread: a file of it cannot be read; nothing is changed.

        """
        names = {one.file.relative_to(folder).as_posix() for one in damage}
        damage = list(damages(folder, names)) if found(folder / MADE) else []
        if not damage:
            return False
        # In this order: killed anywhere in between, the unit is either known to be damaged or no longer kept.
        for file in dict.fromkeys(one.file for one in damage):
            if file.name != MADE:
                file.unlink(missing_ok=True)
        partial = folder.with_name(folder.name + PARTIAL)
        if partial.exists():
            remove(partial)
        folder.rename(partial)
        (partial / MADE).unlink(missing_ok=True)
        settle(partial.parent)
        return True

    @contextmanager
    def lock(self, unit: Unit, waiting: Callable[[str], None]) -> Iterator[None]:
        """Hold the right to make a unit; `waiting` is told who has it. A lock dies with its holder."""
        with self.hold(unit.address, waiting):
            yield

    @contextmanager
    def hold(self, address: str, waiting: Callable[[str], None]) -> Iterator[None]:
        """Hold the lock of the unit at an address."""
        with self._flock(self.root / "locks" / address, waiting):
            yield

    def delete(self, folder: Path, waiting: Callable[[str], None]) -> None:
        """Delete the folder of a unit, kept or begun, under its lock.

        It is renamed first: a kill leaves one that is half deleted, for the next time, and none that is half there.

        Raises:
            UserError: it cannot be deleted.

        """
        gone = folder.with_suffix(GONE)
        with self.hold(folder.stem, waiting):
            try:
                if folder.is_symlink():
                    raise UserError(f"{folder}: is a link, and stays; delete it and what it leads to yourself")
                if folder != gone and folder.exists():
                    if gone.exists():
                        remove(gone)
                    folder.rename(gone)
                    settle(gone.parent)
                if gone.exists():
                    remove(gone)
            except OSError as error:
                raise UserError(f"{error.filename or folder}: cannot be deleted ({error.strerror or error})") from error


def _array(value: Any) -> np.ndarray[Any, Any]:
    """Return a column that DuckDB takes: text as objects, the rest as it is."""
    array: np.ndarray[Any, Any] = np.asanyarray(value)  # a masked value becomes NULL
    return array.astype(object) if array.dtype.kind in "US" else array


def _says(folder: Path, unit: Unit) -> bool:
    """Whether a folder's unit.json is that of a unit; raise Unread if it is there and cannot be read."""
    path = folder / "unit.json"
    try:
        return path.read_bytes() == unit.text.encode()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise Unread(path, error) from error
