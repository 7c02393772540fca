"""Says how each feature fires on each class and how well it detects it, from all pairs of an image and a feature.

Shapes: s d_sae, c classes, n pairs, g pairs of a feature and a class that fire together.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from saefw.spill import Spill

PAIR = np.dtype([("feature", "<u4"), ("label", "<u4"), ("score", "<f4")])
"""An image on which a feature fires: its class, and the score that it has with the feature."""

RUN = 1 << 22
"""So many pairs at most wait in memory before they are written, sorted by feature."""

BLOCK = 1 << 22
"""So many pairs are sorted at once, or those of one feature if they are more."""

Array = np.ndarray[Any, Any]


class Detected(NamedTuple):
    """What is said of each class and feature, [c, s]."""

    fired_cs: Array
    """int32: on how many images of the class the feature fires."""

    score_cs: Array
    """float64: the sum of its scores with them."""

    ap_cs: Array
    """float32: the average precision of its score as a detector of the class; 0 where it does not fire."""


class Pairs:
    """All pairs of an image with a class and a feature that fires on it, in a file: runs, each sorted by feature."""

    def __init__(self, spill: Spill, runs: Sequence[int] = ()) -> None:
        """Go on from so many pairs in each run."""
        self.spill, self.runs = spill, list(runs)
        self._waiting: list[Array] = []
        self._n = 0

    def add(self, feature_n: Array, label_n: Array, score_n: Array) -> None:
        """Take in pairs; their scores are above 0."""
        pair_n = np.empty(len(feature_n), dtype=PAIR)
        pair_n["feature"], pair_n["label"], pair_n["score"] = feature_n, label_n, score_n
        self._waiting.append(pair_n)
        self._n += len(pair_n)
        if self._n >= RUN:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if self._n:
            pair_n = np.concatenate(self._waiting)
            # Torch sorts numbers by their digits, NumPy so large ones by comparing them.
            order_n = torch.from_numpy(pair_n["feature"].astype(np.int32)).sort(stable=True).indices.numpy()
            self.spill.append(pair_n[order_n])
            self.runs.append(self._n)
        self._waiting, self._n = [], 0

    def detected(self, images_c: Array, pairs_s: Array) -> Detected:
        """Return what all pairs say of each class and feature.

        The average precision is as scikit-learn defines it: the sum of (R_n - R_n-1) P_n over the distinct scores,
        images on which the feature does not fire coming last together.

        Args:
            images_c: images of each class.
            pairs_s: pairs of each feature.

        """
        self.flush()
        shape = len(images_c), len(pairs_s)
        found = Detected(np.zeros(shape, np.int32), np.zeros(shape), np.zeros(shape, np.float32))
        # The images left over are recalled together at the very end, where the precision is the share of the class.
        share_c = images_c / max(1, images_c.sum())
        for first, last in self._blocks(pairs_s, len(images_c)):
            pair_n = self._of(first, last)
            label_g, feature_g, fired_g, score_g, sum_g = _precisions(pair_n, first, last, len(images_c))
            left_g = (images_c[label_g] - fired_g) * share_c[label_g]
            found.fired_cs[label_g, feature_g], found.score_cs[label_g, feature_g] = fired_g, score_g
            found.ap_cs[label_g, feature_g] = (sum_g + left_g) / images_c[label_g]
        return found

    def _blocks(self, pairs_s: Array, n_classes: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of features, so many in one that their pairs fit in memory and their numbers in 31 bits."""
        upto_s, first, most = np.cumsum(pairs_s), 0, max(1, (1 << 31) // max(1, n_classes))
        while first < len(upto_s):
            before = upto_s[first - 1] if first else 0
            last = int(np.searchsorted(upto_s, before + BLOCK, side="right"))
            last = min(max(first + 1, last), first + most)
            yield first, last
            first = last

    def _of(self, first: int, last: int) -> Array:
        """Return the pairs of a range of features."""
        stored_n, parts, start = np.asarray(self.spill.read()), [np.empty(0, dtype=PAIR)], 0
        for n in self.runs:
            feature_n = stored_n["feature"][start : start + n]
            low, high = (bisect_left(feature_n, feature) for feature in (first, last))
            parts.append(stored_n[start + low : start + high])
            start += n
        return np.concatenate(parts)


def _precisions(pair_n: Array, first: int, last: int, n_classes: int) -> tuple[Array, ...]:
    """Return class, feature, images, their scores' sum and that of the precisions at each, by feature and class."""
    feature_n = pair_n["feature"].astype(np.int64) - first
    falling_n = 0xFFFFFFFF - pair_n["score"].view(np.uint32).astype(np.int64)
    # Plain numbers sort many times faster than places: all by feature and falling score; the same with the class
    # between.
    all_n = np.sort((feature_n << 32) | falling_n)
    own_n = np.sort(((feature_n * n_classes + pair_n["label"]) << 32) | falling_n)
    group_n = own_n >> 32
    opens_g = np.flatnonzero(np.r_[np.ones(min(1, len(own_n)), dtype=bool), group_n[1:] != group_n[:-1]])
    group_g, size_g = group_n[opens_g], np.diff(np.r_[opens_g, len(own_n)])
    # At least so strong are those up to the last of equal scores.
    closes = np.flatnonzero(np.r_[own_n[1:] != own_n[:-1], np.ones(min(1, len(own_n)), dtype=bool)])
    hits_n = np.repeat(closes, np.diff(np.r_[-1, closes])) + 1 - np.repeat(opens_g, size_g)
    feature_n = group_n // n_classes
    start_f = np.searchsorted(all_n, np.arange(last - first) << 32)
    images_n = np.searchsorted(all_n, (feature_n << 32) | (own_n & 0xFFFFFFFF), side="right") - start_f[feature_n]
    score_n = (0xFFFFFFFF - (own_n & 0xFFFFFFFF)).astype(np.uint32).view(np.float32).astype(np.float64)
    score_g, sum_g = (np.add.reduceat(x, opens_g) if len(x) else np.empty(0) for x in (score_n, hits_n / images_n))
    return group_g % n_classes, group_g // n_classes + first, size_g, score_g, sum_g
