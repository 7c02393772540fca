"""Records that wait on the disk, since there are too many of them for memory."""

import os
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from saefw.care import writing

Records = np.ndarray[Any, Any]


class Spill:
    """A file of records of one dtype, to which more are appended; a stopped run goes on from any length that it had."""

    def __init__(self, path: Path, dtype: np.dtype[Any], kept: tuple[int, int] = (0, 0)) -> None:
        """Begin, or go on from what `mark` returned; what was written after that is cut off.

        Raises:
            ValueError: the file no longer holds that; the text says so.

        """
        self.path, self.dtype = path, dtype
        n, self._sum = kept
        self._bytes = n * dtype.itemsize
        damaged = ValueError(f"{path}: damaged; it is not used, and what it held is made again")
        if not 0 <= self._bytes <= (path.stat().st_size if path.exists() else 0):
            raise damaged
        with writing(path), path.open("ab") as file:
            file.truncate(self._bytes)
        if _crc(path) != self._sum:
            raise damaged

    def __len__(self) -> int:
        return self._bytes // self.dtype.itemsize

    def append(self, record_n: Records) -> None:
        """Append records."""
        data = np.ascontiguousarray(record_n).view(np.uint8).data
        with writing(self.path), self.path.open("ab") as file:
            file.write(data)
        self._bytes, self._sum = self._bytes + len(data), crc32(data, self._sum)

    def mark(self) -> tuple[int, int]:
        """Return how many records there are, and their checksum; they are on the disk when this returns."""
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())
        return len(self), self._sum

    def read(self) -> Records:
        """Return all records, mapped and not read."""
        return np.memmap(self.path, dtype=self.dtype, mode="r") if len(self) else np.empty(0, dtype=self.dtype)


def _crc(path: Path) -> int:
    """Return the CRC-32 of a file."""
    found = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found = crc32(block, found)
    return found
