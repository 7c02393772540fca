"""Unpacks archives that nobody vouches for."""

import errno
import lzma
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from saefw.errors import UserError

GROWTH = 20
"""An archive may unpack to so many times its own size, and SLACK: images hardly shrink, bombs do."""

SLACK = 10_000_000

FILES = 2_000_000
"""How many files an archive may hold."""

SUFFIXES = (".tar.gz", ".tgz", ".tar", ".zip")
"""How the names of archives end. Those inside an archive are unpacked where they lie, but not those inside them."""

BLOCK = 1 << 20

DAMAGED = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError
)  # fmt: skip
"""What the libraries raise of an archive that is damaged, encrypted or of a kind that they do not know."""


class _Item(NamedTuple):
    name: str
    size: int
    folder: bool
    plain: bool
    open: Callable[[], IO[bytes]]


def unpack(archive: Path, into: Path, told: Callable[[int, int], None]) -> None:
    """Unpack a zip or tar archive and the archives in it; into a folder that does not exist yet, which appears whole.

    Only plain files and folders are made, inside `into`, with this user's default permissions.

    Args:
        archive: its contents tell what it is, not its name.
        into: the new folder.
        told: is told how many bytes are unpacked, and of how many (0: not known).

    Raises:
        UserError: it is no such archive, is damaged, reaches outside its folder, or is a bomb; nothing is left of it.
        OSError: the disk is full.

    """
    part = into.with_name(f"{into.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        budget = _Budget(archive, told)
        _unpack(archive, archive.name, part, budget)
        for inner in sorted(path for path in part.rglob("*") if path.name.lower().endswith(SUFFIXES)):
            if inner.is_file():
                name = f"{inner.relative_to(part)} in {archive}"
                _unpack(inner, name, inner.parent, budget)
                inner.unlink()
        part.replace(into)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


class _Budget:
    """How much may still be unpacked."""

    def __init__(self, archive: Path, told: Callable[[int, int], None]) -> None:
        self.archive, self.told = archive, told
        self.most = GROWTH * archive.stat().st_size + SLACK
        self.bytes = self.files = self.total = 0

    def expect(self, n_bytes: int, folder: Path) -> None:
        """Be told beforehand how much there is to come, where the archive says it."""
        self.total += n_bytes
        free = shutil.disk_usage(folder).free
        if n_bytes > free:
            raise OSError(errno.ENOSPC, f"{n_bytes:,} bytes are to be unpacked and {free:,} are free", str(folder))

    def spend(self, n_bytes: int, n_files: int = 0) -> None:
        self.bytes, self.files = self.bytes + n_bytes, self.files + n_files
        if self.bytes > self.most:
            raise UserError(
                f"{self.archive}: unpacks to more than {GROWTH} times its size, as no image archive does; refused"
            )
        if self.files > FILES:
            raise UserError(f"{self.archive}: holds more than {FILES:,} files; refused")
        self.told(self.bytes, self.total)


def _unpack(archive: Path, name: str, into: Path, budget: _Budget) -> None:
    where = name if archive.name != name else str(archive)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                budget.expect(sum(info.file_size for info in opened.infolist()), into)
                for item in _zip_items(opened):
                    _put(item, where, into, budget)
        elif tarfile.is_tarfile(archive):
            with tarfile.open(archive) as opened_tar:
                for item in _tar_items(opened_tar):
                    _put(item, where, into, budget)
                # What follows the last file holds the checksum of a compressed archive, checked when it is read.
                while opened_tar.fileobj and (rest := opened_tar.fileobj.read(BLOCK)):
                    budget.spend(len(rest))
        else:
            raise UserError(f"{where}: is neither a zip nor a tar archive")
    except DAMAGED as error:
        raise UserError(f"{where}: is damaged or not a plain archive ({error}); delete it and get it again") from error
    except OSError as error:
        if error.errno is None:  # gzip's and bz2's word for damage
            raise UserError(f"{where}: is damaged ({error}); delete it and get it again") from error
        raise


def _zip_items(opened: zipfile.ZipFile) -> Iterator[_Item]:
    for info in opened.infolist():
        kind = (info.external_attr >> 16) & 0o170000
        plain = info.is_dir() or kind in (0, 0o100000)
        yield _Item(info.filename, info.file_size, info.is_dir(), plain, partial(opened.open, info))


def _tar_items(opened: tarfile.TarFile) -> Iterator[_Item]:
    for info in opened:
        plain = info.isdir() or info.isreg()
        yield _Item(info.name, info.size, info.isdir(), plain, partial(_plain, opened, info))


def _plain(opened: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    found = opened.extractfile(info)
    assert found is not None, "a regular file"
    return found


def _put(item: _Item, archive: str, into: Path, budget: _Budget) -> None:
    """Write one file or folder of an archive."""
    parts = PurePosixPath(item.name).parts
    bad = item.name.startswith("/") or ".." in parts or any(sign in item.name for sign in ("\\", "\0", ":"))
    if bad or not item.plain:
        what = "lies outside its folder" if bad else "is a link or a device"
        raise UserError(f"{archive}: holds {item.name!r}, which {what}; refused")
    path = into.joinpath(*parts)
    if item.folder:
        path.mkdir(parents=True, exist_ok=True)
        return
    budget.spend(0, 1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with item.open() as source, path.open("xb") as target:
            while block := source.read(BLOCK):
                budget.spend(len(block))
                target.write(block)
    except FileExistsError:
        how = "twice" if path.exists() else "inside a file"
        raise UserError(f"{archive}: holds {item.name!r} {how}; refused") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # of a full disk Python does not say which file it was
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        if error.errno in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EILSEQ):
            why = os.strerror(error.errno)
            raise UserError(f"{archive}: holds {item.name[:80]!r}, which cannot be written ({why}); refused") from error
        raise
