"""Chooses images for a split or a subset, evenly over classes."""

from collections.abc import Hashable, Sequence
from hashlib import sha256


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
