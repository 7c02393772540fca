"""Chooses images for a split or a subset, evenly over classes."""

from collections.abc import Hashable, Sequence
from hashlib import sha256
from typing import Literal

import numpy as np

Split = Literal["train", "valid", "test"]


def stratified(keys: Sequence[str], strata: Sequence[Hashable], n: int, seed: int = 0) -> list[int]:
    """Return the indices, ascending, of `n` images chosen so that each stratum gives its share, rounded.

    The share is one for all, near n / all of them, that rounds to `n` images in sum (Webster's method).
    The choice is a function of keys, strata and seed: neither the order of the images nor a library's random numbers
    count. What is chosen for a smaller `n` is also chosen for a larger one.

    Args:
        keys: one an image, unique.
        strata: one an image: its class, or whatever shares are to be kept of.
        n: how many; of fewer images all.
        seed: another one gives another choice.

    """
    return sorted(_turns(keys, strata, seed)[:n])


def carve(
    keys: Sequence[str], strata: Sequence[Hashable], splits: list[Split], valid: float, test: float, seed: int = 0
) -> None:
    """Move shares of the train images of each stratum to valid and to test, where `splits` has none of these yet.

    Args:
        keys: one an image, unique.
        strata: one an image.
        splits: one an image; changed in place.
        valid: share of the train images that becomes valid.
        test: share of the train images that becomes test; of a larger one the images of a smaller one are part.
        seed: another one gives another choice.

    """
    shares: tuple[tuple[Split, float], ...] = (("test", test), ("valid", valid))
    wanted = [(split, share) for split, share in shares if share and split not in splits]
    train = [index for index, split in enumerate(splits) if split == "train"]
    if not wanted or not train:
        return
    turns = _turns([keys[i] for i in train], [strata[i] for i in train], seed)
    first = 0
    for split, share in wanted:
        n = round(share * len(train))
        for i in turns[first : first + n]:
            splits[train[i]] = split
        first += n


def _turns(keys: Sequence[str], strata: Sequence[Hashable], seed: int) -> list[int]:
    """Return all indices in the order in which they are chosen."""
    if not keys:
        return []
    # Of a million images every step counts: no generator, and of the 32 bytes of a digest the first eight.
    digests = [sha256(f"{seed}:{key}".encode("utf-8", "surrogatepass")).digest() for key in keys]
    drawn = np.frombuffer(b"".join(digests), dtype=">u8")[::4].astype(np.uint64)
    del digests
    numbers = {name: number for number, name in enumerate(dict.fromkeys(strata))}
    stratum = np.fromiter(map(numbers.__getitem__, strata), dtype=np.int64, count=len(keys))
    order = np.lexsort((drawn, stratum))
    sizes = np.bincount(stratum)
    starts = np.cumsum(sizes) - sizes
    # The i-th of the m images of a stratum, in drawn order, is wanted once i + 1/2 of m are: so shares round evenly.
    place = np.empty(len(keys))
    place[order] = (np.arange(len(keys)) - starts[stratum[order]] + 0.5) / sizes[stratum[order]]
    turns: list[int] = np.lexsort((drawn, place)).tolist()
    return turns
