"""Reads rows of a matrix in a file, from the system's cache or past it.

What the cache holds is best copied from there. What it does not hold is read past it (O_DIRECT), unless it should stay:
into memory in large pages a disk writes a piece of a MiB at once, whereas the cache is filled page by page, and in
random order without the reading ahead that makes up for it.

Shapes: n rows, d bytes of a row; `into_nd` is uint8.
"""

import ctypes
import mmap
import os
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

GAP = 32 << 10
"""Bytes between two rows up to which they are read together with what lies between."""

MOST = 4 << 20
"""Bytes that are read together, unless one row is longer."""

PAGE = 4096
"""Places and lengths of what is read past the cache are multiples of this."""


NEARLY = 0.9
"""Of a file in the cache: past it the rest would be read faster, but not all."""

PROBES, PROBE = 128, 16
"""In how many places of a file it is asked what the cache holds, and how many pages there: all would take ms."""

LARGE = 2 << 20
"""Bytes of a large page, on most machines."""


class _Scratch(threading.local):
    """Memory of a thread for what is read beside the rows that are wanted."""

    held: Bytes = np.empty(0, dtype=np.uint8)

    def of(self, n_bytes: int) -> Bytes:
        """Return so many bytes, which hold anything."""
        if len(self.held) < n_bytes:
            self.held = memory(max(n_bytes, MOST + 2 * PAGE))
        return self.held[:n_bytes]


_picked, _direct = _Scratch(), _Scratch()

_mincore = getattr(ctypes.CDLL(None), "mincore", None) if hasattr(os, "O_DIRECT") else None
"""The system's call that tells which pages of a mapped file lie in its cache."""

if _mincore is not None:
    _mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def memory(n_bytes: int) -> Bytes:
    """Return memory, in large pages where it fills them and the system has them; it is taken as it is written to."""
    if n_bytes < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.empty(n_bytes, dtype=np.uint8)
    # Whole large pages: else the system may begin between two of them.
    length = max(1, -(-n_bytes // LARGE)) * LARGE
    mapped = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        mapped.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without large pages
        pass
    return np.frombuffer(mapped, dtype=np.uint8, count=n_bytes)


def machine_memory() -> int:
    """Return the bytes of memory that the machine has; 0 where the system does not tell."""
    names = getattr(os, "sysconf_names", {})
    told = [os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_PAGE_SIZE") if name in names]
    return max(0, told[0] * told[1]) if len(told) == 2 else 0


def held(path: Path) -> bool:
    """Whether the system's cache holds nearly all of a file, or the system does not tell.

    To try to read without waiting would tell it too, but begin to fill the cache.

    Raises:
        OSError: the file cannot be read.

    """
    if _mincore is None:
        return True
    with path.open("rb") as file:
        try:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError):  # not a file to be mapped, or an empty one
            return True
    first, n_pages = np.frombuffer(mapped, dtype=np.uint8).ctypes.data, -(-len(mapped) // mmap.PAGESIZE)
    probe = n_pages if n_pages <= PROBES * PROBE else PROBE
    found = np.zeros(probe, dtype=np.uint8)
    places = np.linspace(0, n_pages - probe, 1 if probe == n_pages else PROBES).astype(np.int64)
    n = 0
    for at in (first + places * mmap.PAGESIZE).tolist():
        if _mincore(at, probe * mmap.PAGESIZE, found.ctypes.data):
            return True
        n += int((found & 1).sum())
    return n >= NEARLY * probe * len(places)


def read(path: Path, start: int, rows_n: range | NDArray[np.int64], into_nd: Bytes, cache: bool) -> None:
    """Read some rows of a matrix into memory.

    Args:
        path: the file.
        start: the byte where row 0 begins.
        rows_n: which, in any order; ascending ones are read faster, and fastest a range of neighbours.
        into_nd: [n, d], contiguous.
        cache: whether to read by way of the system's cache, where it then stays.

    Raises:
        OSError: the file cannot be read.
        EOFError: it ends too early.

    """
    d = into_nd.shape[1]
    handle = os.open(path, os.O_RDONLY)
    try:
        if isinstance(rows_n, range):
            _fetch(path, handle, start + rows_n.start * d, into_nd.reshape(-1), cache)
            return
        n, rising = len(rows_n), bool((np.diff(rows_n) > 0).all())
        order = np.arange(n) if rising else np.argsort(rows_n, kind="stable")
        at = 0
        while at < n:
            # Together: what follows without a wide gap, as much as fits.
            sorted_n = rows_n[order[at : at + max(1, MOST // d)]]
            apart = np.flatnonzero((np.diff(sorted_n) - 1) * d > GAP)
            far = np.flatnonzero((sorted_n - sorted_n[0] + 1) * d > max(MOST, d))
            stop = min(int(apart[0]) + 1 if len(apart) else n, int(far[0]) if len(far) else n, len(sorted_n))
            some_n = sorted_n[:stop] - sorted_n[0]
            read_nd = _picked.of((int(some_n[-1]) + 1) * d).reshape(-1, d)
            _fetch(path, handle, start + int(sorted_n[0]) * d, read_nd.reshape(-1), cache)
            if rising:
                np.take(read_nd, some_n, axis=0, out=into_nd[at : at + stop], mode="clip")
            else:
                into_nd[order[at : at + stop]] = read_nd[some_n]
            at += stop
    finally:
        os.close(handle)


def _fetch(path: Path, handle: int, start: int, into: Bytes, cache: bool) -> None:
    """Fill memory from a byte of a file on."""
    done = 0 if cache or not hasattr(os, "O_DIRECT") else _past_the_cache(path, start, into)
    while done < len(into):
        n = os.preadv(handle, [into[done:].data], start + done)
        if not n:
            raise EOFError(f"ends before byte {start + len(into)}")
        done += n


def _past_the_cache(path: Path, start: int, into: Bytes) -> int:
    """Read from a byte on without filling the cache; return how many bytes, 0 where the file system cannot."""
    before = start % PAGE
    length = -(-(before + len(into)) // PAGE) * PAGE
    scratch = _direct.of(length + PAGE)
    scratch = scratch[-scratch.ctypes.data % PAGE :][:length]
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return 0
    try:
        n = os.preadv(handle, [scratch.data], start - before)
    except OSError:
        return 0
    finally:
        os.close(handle)
    done = max(0, min(n - before, len(into)))
    into[:done] = scratch[before : before + done]
    return done
