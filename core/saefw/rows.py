"""Reads rows of a matrix in a file, from the system's cache or past it.

What the cache holds is copied from there. What it does not hold is read past it (O_DIRECT) unless it should stay there:
into memory in large pages a disk writes a piece of a MiB at once, whereas the cache is filled page by page, and in
random order without the reading ahead that makes up for it.

Shapes: n rows, d bytes of a row; `into_nd` is uint8.
"""

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


class _Scratch(threading.local):
    """Memory of a thread for what is read beside the rows that are wanted."""

    held: Bytes = np.empty(0, dtype=np.uint8)

    def of(self, n_bytes: int) -> Bytes:
        """Return so many bytes, which hold anything."""
        if len(self.held) < n_bytes:
            self.held = memory(max(n_bytes, MOST + 2 * PAGE))
        return self.held[:n_bytes]


_picked, _direct = _Scratch(), _Scratch()


def memory(n_bytes: int) -> Bytes:
    """Return memory, in large pages where the system has them; it is taken as it is written to."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.empty(n_bytes, dtype=np.uint8)
    mapped = mmap.mmap(-1, max(n_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        mapped.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without large pages
        pass
    return np.frombuffer(mapped, dtype=np.uint8, count=n_bytes)


def read(path: Path, start: int, rows_n: NDArray[np.int64], into_nd: Bytes, cache: bool) -> None:
    """Read some rows of a matrix into memory.

    Args:
        path: the file.
        start: the byte where row 0 begins.
        rows_n: which, in any order; ascending ones are read fastest.
        into_nd: [n, d], contiguous.
        cache: whether what is read should stay in the system's cache.

    Raises:
        OSError: the file cannot be read.
        EOFError: it ends too early.

    """
    d = into_nd.shape[1]
    handle = os.open(path, os.O_RDONLY)
    try:
        first, n = int(rows_n[0]), len(rows_n)
        steps = np.diff(rows_n)
        if (steps == 1).all():
            _fetch(path, handle, start + first * d, into_nd.reshape(-1), cache)
            return
        order = np.argsort(rows_n, kind="stable") if (steps < 0).any() else np.arange(n)
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
            into_nd[order[at : at + stop]] = read_nd[some_n]
            at += stop
    finally:
        os.close(handle)


def _fetch(path: Path, handle: int, start: int, into: Bytes, cache: bool) -> None:
    """Fill memory from a byte of a file on."""
    done = 0
    if not cache and hasattr(os, "RWF_NOWAIT") and hasattr(os, "O_DIRECT"):
        done = _at_hand(handle, start, into)
        if done < len(into):
            done += _past_the_cache(path, start + done, into[done:])
    while done < len(into):
        n = os.preadv(handle, [into[done:].data], start + done)
        if not n:
            raise EOFError(f"ends before byte {start + len(into)}")
        done += n


def _at_hand(handle: int, start: int, into: Bytes) -> int:
    """Read what the cache holds from a byte on; return how many bytes it is."""
    done = 0
    try:
        while done < len(into) and (n := os.preadv(handle, [into[done:].data], start + done, os.RWF_NOWAIT)):
            done += n
    except OSError:  # it holds no more, or the file system cannot tell
        pass
    return done


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
