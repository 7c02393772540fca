"""Files that are there whole or not at all, and whether they still are.

A kept unit's `made.json` lists its files with their sizes and SHA-256. What a stopped run leaves in a working folder
has no such list: what a stage goes on from has a checksum of its own (see `saefw.sealed`).
"""

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath

import duckdb

from saefw.errors import UserError

PART = ".part"
"""The end of the name of a file that is being written; one that a killed run left is never kept."""

MADE = "made.json"
"""The file that makes a folder a kept unit, and lists its files."""

REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""How the system says that a disk is full or may not be written to."""

NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
"""How the system says that there is no such file, as against one that cannot be read now."""

PASSING = duckdb.InterruptException, duckdb.OutOfMemoryException
"""What DuckDB raises that says nothing of the file that it reads."""

BLOCK = 1 << 20
"""Bytes read at a time for a checksum."""


# Writing


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name a file in the system's errors that come of writing it, also in those that DuckDB hands on.

    Raises:
        OSError: with its number, its text and the file.

    """
    try:
        yield
    except OSError as error:
        if error.errno is None or (error.filename is not None and PART not in Path(str(error.filename)).name):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except duckdb.Error as error:
        for number in REFUSED:
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), str(path)) from error
        raise


def write_atomically(path: Path, *data: bytes | memoryview) -> None:
    """Write a file, one piece after the other, so that it is there whole or not at all, also after a power cut.

    Raises:
        OSError: the disk is full, say; nothing is left of what was written.

    """
    part = path.with_name(path.name + PART)
    with writing(path):
        try:
            with part.open("wb", buffering=0) as file:
                for piece in data:
                    left = memoryview(piece).cast("B")
                    while left:
                        left = left[file.write(left) :]
                os.fsync(file.fileno())
        except OSError:
            part.unlink(missing_ok=True)
            raise
        part.replace(path)
        settle(path.parent)


def settle(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(folder: Path) -> None:
    """Delete a folder and all in it; of a link to one, the link alone.

    Raises:
        OSError: something in it cannot be deleted.

    """
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


# Checking


class Unread(UserError):
    """A file cannot be read, which says nothing of what it holds: for that nothing is set back or deleted."""

    def __init__(self, path: Path, error: OSError | duckdb.Error) -> None:
        """Say which file, and why."""
        why = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        super().__init__(
            f"{path}: cannot be read ({why}); nothing is deleted for that; make it readable, or delete it, "
            "and its unit is made again"
        )


def found(path: Path) -> os.stat_result | None:
    """Return the facts of a file or folder, or None if it is not there.

    Raises:
        Unread: the system cannot say.

    """
    try:
        return path.stat()
    except OSError as error:
        if error.errno in NOT_THERE:
            return None
        raise Unread(path, error) from error


def checksum(path: Path, told: Callable[[int], None] = lambda n: None) -> str:
    """Return the SHA-256 of a file, in hex; `told` hears of every block how many bytes it has."""
    digest, block = sha256(), memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(block):
            digest.update(block[:n])
            told(n)
    return digest.hexdigest()


@dataclass(frozen=True)
class Damage:
    """A file of a kept unit that is not what it was when the unit was made."""

    file: Path
    why: str
    as_made: bool = False
    """Whether its checksum is right all the same: it was made so, or changed along with made.json."""

    def __str__(self) -> str:
        """Say which file it is, and what is wrong with it."""
        return f"{self.file}: damaged ({self.why})"


def listed(folder: Path) -> dict[str, tuple[int, str]]:
    """Return the files of a kept unit by name, with their bytes and SHA-256, as its made.json has them.

    Raises:
        OSError: it cannot be read.
        ValueError: it does not say so, or names a file outside the folder.

    """
    files: dict[str, tuple[int, str]] = {}
    try:
        for name, facts in json.loads((folder / MADE).read_bytes())["files"].items():
            place = PurePosixPath(name)
            # Encoding refuses half characters, which no file name holds; neither does one hold a NUL.
            if place.is_absolute() or ".." in place.parts or b"\0" in name.encode():
                raise ValueError(name)
            files[name] = int(facts["bytes"]), str(facts["sha256"])
        if "unit.json" not in files:
            raise ValueError("unit.json")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError("does not list the files of its unit") from error
    return files


def damages(
    folder: Path, only: Collection[str] | None = None, told: Callable[[int], None] = lambda n: None
) -> Iterator[Damage]:
    """Yield the files of a kept unit that are damaged.

    Args:
        folder: the unit's.
        only: look at these files alone, those that it has.
        told: hears how many bytes were read.

    Raises:
        Unread: a file cannot be read, whatever it holds.

    """
    path = folder / MADE
    facts = found(path)
    if not facts or not stat.S_ISREG(facts.st_mode):
        yield Damage(path, "is not a file" if facts else "is not there")
        return
    try:
        files = listed(folder)
    except OSError as error:
        raise Unread(path, error) from error
    except ValueError as error:
        yield Damage(path, str(error))
        return
    for name, (size, digest) in files.items():
        if only is None or name in only:
            why = _differs(folder / name, size, digest, told)
            if why:
                yield Damage(folder / name, why)


def weight(folder: Path) -> int:
    """Return how many bytes the files of a kept unit have together; 0 if its made.json does not say."""
    try:
        return sum(size for size, _ in listed(folder).values())
    except (OSError, ValueError):
        return 0


def said(damage: Sequence[Damage]) -> str:
    """Say what is damaged of a unit: the first file, and how many more."""
    more = len(damage) - 1
    return str(damage[0]) + (f", as {'is' if more == 1 else 'are'} {more} more of its unit" if more else "")


def _differs(path: Path, size: int, digest: str, told: Callable[[int], None]) -> str:
    """Say what is wrong with a file, or nothing."""
    facts = found(path)
    if not facts:
        return "is not there"
    if not stat.S_ISREG(facts.st_mode):  # to open a pipe is to wait for whoever writes to it
        return "is not a file"
    if facts.st_size != size:
        return f"{facts.st_size:,} bytes, not {size:,}"
    try:
        return "" if checksum(path, told) == digest else f"its SHA-256 is not the one in {MADE}"
    except OSError as error:
        raise Unread(path, error) from error
