"""Chooses images for a split or a subset, evenly over classes."""

from collections.abc import Hashable, Sequence
from hashlib import sha256
from typing import Literal

Split = Literal["train", "valid", "test"]


def stratified(keys: Sequence[str], strata: Sequence[Hashable], n: int, seed: int = 0) -> list[int]:
    """Return the indices, ascending, of `n` images chosen so that each stratum gives its share, rounded.

    The choice is a function of keys, strata and seed: neither the order of the images nor a library's random numbers
    count. What is chosen for a smaller `n` is also chosen for a larger one.

    Args:
        keys: one an image, unique.
        strata: one an image: its class, or whatever shares are to be kept of.
        n: how many; of fewer images all.
        seed: another one gives another choice.

    """
    drawn = [sha256(f"{seed}:{key}".encode("utf-8", "surrogatepass")).digest() for key in keys]
    by_stratum: dict[Hashable, list[int]] = {}
    for index, stratum in enumerate(strata):
        by_stratum.setdefault(stratum, []).append(index)
    # The i-th of the m images of a stratum, in drawn order, is wanted once i + 1/2 of m are: so shares round evenly.
    turn: list[tuple[float, bytes, int]] = []
    for indices in by_stratum.values():
        indices.sort(key=lambda index: drawn[index])
        turn += [((i + 0.5) / len(indices), drawn[index], index) for i, index in enumerate(indices)]
    turn.sort()
    return sorted(index for _, _, index in turn[:n])


def carve(
    keys: Sequence[str], strata: Sequence[Hashable], splits: list[Split], valid: float, test: float, seed: int = 0
) -> None:
    """Move shares of the train images of each stratum to valid and to test, where `splits` has none of these yet.

    Args:
        keys: one an image, unique.
        strata: one an image.
        splits: one an image; changed in place.
        valid: share of the train images that becomes valid.
        test: share of the train images, as many as there were before, that becomes test.
        seed: another one gives another choice.

    """
    shares: list[tuple[Split, float]] = [("test", test), ("valid", valid)]
    wanted = [(split, share) for split, share in shares if share and split not in splits]
    whole = splits.count("train")
    for split, share in wanted:
        train = [index for index, other in enumerate(splits) if other == "train"]
        ours = stratified([keys[i] for i in train], [strata[i] for i in train], round(share * whole), seed)
        for i in ours:
            splits[train[i]] = split
