"""Finds images that are in two splits of a dataset."""

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from typing import NamedTuple

from saefw.imagesets import Dataset, Example
from saefw.originals import Unreadable, opened
from saefw.splits import Split

WORKERS = 4
"""Threads that decode images: Pillow does so outside Python's lock."""

AHEAD = 64
"""Images that are being decoded or wait to be counted."""


class Copy(NamedTuple):
    """Where one picture is."""

    key: str
    split: Split


class Duplicates:
    """The pictures of a dataset by the hash of their pixels; the same pixels in another file are the same picture."""

    def __init__(self) -> None:
        """Know none yet."""
        self.unread: list[str] = []
        """A sentence for each image that cannot be read."""
        self._copies: dict[bytes, list[Copy]] = {}

    def watch(self, dataset: Dataset) -> Generator[int]:
        """Open every image once; yield how many are done. What cannot be read goes to `unread`."""
        waiting: deque[tuple[Example, Future[bytes | str]]] = deque()
        pool = ThreadPoolExecutor(WORKERS)
        done = 0
        try:
            for index in range(len(dataset)):
                example = dataset[index]
                waiting.append((example, pool.submit(_hash, example)))
                if len(waiting) > AHEAD:
                    self._count(*waiting.popleft())
                    done += 1
                    yield done
            while waiting:
                self._count(*waiting.popleft())
                done += 1
                yield done
        finally:
            pool.shutdown(cancel_futures=True)

    def _count(self, example: Example, found: "Future[bytes | str]") -> None:
        digest = found.result()
        if isinstance(digest, str):
            self.unread.append(digest)
        else:
            self._copies.setdefault(digest, []).append(Copy(example.key, example.split))

    def across(self) -> list[list[Copy]]:
        """Return the pictures that are in more than one split, each with all its copies, in the dataset's order."""
        return [copies for copies in self._copies.values() if len({copy.split for copy in copies}) > 1]


def _hash(example: Example) -> bytes | str:
    """Return the hash of an image's mode, size and pixels or, if it cannot be read, what is to be said of it."""
    try:
        image = opened(example)
    except Unreadable as error:
        return str(error)
    digest = blake2b(f"{image.mode} {image.size}".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.digest()
