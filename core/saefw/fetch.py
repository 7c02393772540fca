"""Downloads files: goes on where it broke off, and checks what came."""

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote, urlsplit

from saefw.errors import UserError

if TYPE_CHECKING:
    from http.client import HTTPResponse

PART = ".part"
"""The end of the name of a file that is still coming; beside it lies what tells its version, `.part.json`."""

TRIES = 5
"""How often a connection that broke off is made anew before the user is told."""

WAIT = 1.0
"""Seconds before the first new try; twice as long before each further one."""

TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as broken."""

BLOCK = 1 << 20

Told = Callable[[int, int], None]
"""Is told how many bytes are there, and of how many (0: not known)."""


class Source(NamedTuple):
    """A file on the web that a dataset is made of."""

    url: str
    """http or https; the last part of its path is the file's name."""

    bytes: int
    """Its size."""

    checksum: str = ""
    """`sha256:…` or `md5:…`, in hex, where somebody publishes one; empty: only the size is checked."""

    cited: str = ""
    """Who publishes the checksum."""

    @property
    def name(self) -> str:
        """The file's name."""
        return unquote(urlsplit(self.url).path).rsplit("/", 1)[-1]


class _Broken(Exception):
    """The connection broke off; another may go on."""


def fetch(source: Source, folder: Path, told: Told) -> Path:
    """Return the file of a source in a folder, downloaded if it is not there yet; a download that broke off goes on.

    Raises:
        UserError: the server does not give it, or what came is not what was asked for.
        OSError: the disk is full, or the folder cannot be written to.

    """
    path = folder / source.name
    if path.exists() and path.stat().st_size == source.bytes and not _wrong(path, source):
        told(source.bytes, source.bytes)
        return path
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + PART)
    have = part.stat().st_size if part.exists() else 0
    _room(folder, source.bytes - have)
    for left in reversed(range(TRIES)):
        try:
            _download(source, part, told)
            break
        except _Broken as error:
            there = part.stat().st_size if part.exists() else 0
            if not left and not there:
                raise UserError(
                    f"{source.url}: cannot be reached ({error}); run it again later, or put the file at {path} yourself"
                ) from error
            if not left:
                raise UserError(
                    f"{source.url}: broke off after {there:,} of {source.bytes:,} bytes ({error}); run it again and it "
                    f"goes on from there, or put the file at {path} yourself"
                ) from error
            time.sleep(WAIT * 2 ** (TRIES - 1 - left))
    wrong = _wrong(part, source)
    _version(part).unlink(missing_ok=True)
    if wrong:
        part.unlink()
        raise UserError(f"{source.url}: {wrong}; what came was deleted: try again later, or put the file at {path}")
    part.replace(path)
    return path


def _download(source: Source, part: Path, told: Told) -> None:
    """Bring the rest of a file.

    Raises:
        _Broken: it did not come whole.
        UserError: the server says that there is none.

    """
    from http.client import HTTPException
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    if urlsplit(source.url).scheme not in ("http", "https"):
        raise UserError(f"{source.url}: only http and https addresses are downloaded")
    have, version = (part.stat().st_size, _read(_version(part))) if part.exists() else (0, "")
    headers = {"User-Agent": "saefw", "Accept-Encoding": "identity"}
    if have and version:
        # If the file on the server is another one now, it is sent whole.
        headers |= {"Range": f"bytes={have}-", "If-Range": version}
    try:
        with urlopen(Request(source.url, headers=headers), timeout=TIMEOUT) as answer:
            _receive(answer, source, part, have, told)
    except HTTPError as error:
        error.close()
        if error.code == 416 and have == source.bytes:
            return
        if error.code == 416:
            part.unlink()
            raise _Broken("the server's file is another one now") from error
        if error.code >= 500 or error.code in (408, 429):
            raise _Broken(f"the server says {error.code} {error.reason}") from error
        path = part.with_suffix("")
        said = f"the server says {error.code} {error.reason}"
        raise UserError(f"{source.url}: {said}; put the file at {path} yourself and run it again") from error
    except URLError as error:
        raise _Broken(str(error.reason)) from error
    except (HTTPException, TimeoutError, ConnectionError) as error:
        raise _Broken(str(error) or type(error).__name__) from error


def _receive(answer: "HTTPResponse", source: Source, part: Path, have: int, told: Told) -> None:
    starts = answer.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    first = have if answer.status == 206 and starts == str(have) else 0
    if answer.status == 206 and not first:
        raise _Broken("the server sent another part than was asked for")
    version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
    # A weak tag promises only something alike, and If-Range may not name it.
    _version(part).write_text(json.dumps("" if version.startswith("W/") else version))
    try:
        with part.open("r+b" if first else "wb") as file:
            file.seek(first)
            while block := answer.read(BLOCK):
                first += len(block)
                if first > source.bytes:
                    raise UserError(
                        f"{source.url}: is longer than the {source.bytes:,} bytes that it should have; put the file at "
                        f"{part.with_suffix('')} yourself"
                    )
                file.write(block)
                told(first, source.bytes)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # of a full disk Python does not say which file it was
            raise OSError(error.errno, os.strerror(error.errno), str(part)) from error
        raise
    if first < source.bytes:
        raise _Broken("the connection was closed")


def _wrong(path: Path, source: Source) -> str:
    """Say what is wrong with a file, or nothing."""
    size = path.stat().st_size
    if size != source.bytes:
        return f"{size:,} bytes came, not {source.bytes:,}"
    if source.checksum:
        kind, _, wanted = source.checksum.partition(":")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, kind).hexdigest()
        if found != wanted:
            return f"its {kind.upper()} is {found}, and {source.cited} says {wanted}"
    return ""


def _room(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise OSError(errno.ENOSPC, f"{wanted:,} bytes are to come and {free:,} are free", str(folder))


def _version(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read(path: Path) -> str:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return ""
    return found if isinstance(found, str) else ""
