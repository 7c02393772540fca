"""Counts the values of each feature by their size.

Shapes: s d_sae, b bins, n values, q quantiles.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

LOWEST, OCTAVES, STEPS = -20, 32, 64
"""Bins are `STEPS` equal steps of each of the `OCTAVES` from 2^`LOWEST` on, where each doubles the one before."""

ERROR = 1 / (2 * STEPS)
"""A quantile is the middle of a bin, so it is off by at most so much of itself."""

COARSE = 8
"""Steps an octave of the histogram that is stored."""

AT_ONCE = 4096
"""Features whose bins are added up at a time."""

_BINS = OCTAVES * STEPS
_BITS = 23 - (STEPS.bit_length() - 1)
"""Bits of a float32 below those that tell its octave and step."""

Array = np.ndarray[Any, Any]


def counts(d_sae: int) -> Tensor:
    """Return the bins of a histogram without values, int32 [s, b]."""
    return torch.zeros(d_sae, _BINS, dtype=torch.int32)


def add(count_sb: Tensor, feature_n: Tensor, value_n: Tensor) -> None:
    """Count positive float32 values and the int64 features they are of; values outside count as the nearest bin."""
    step_n = (value_n.view(torch.int32) >> _BITS) - ((127 + LOWEST) << (23 - _BITS))
    slot_n = feature_n * _BINS + step_n.clamp_(0, _BINS - 1)
    count_sb.view(-1).scatter_add_(0, slot_n, torch.ones_like(step_n))


def quantiles(count_sb: Tensor, shares: list[float]) -> Array:
    """Return quantiles (0 to 1) of each feature's values, float64 [q, s]; 0 where it has none.

    That of share q is the value of rank floor(q (n - 1)), the smallest of n having rank 0: numpy's method `lower`,
    within `ERROR` of itself while it lies between 2^-20 and 2^12.
    """
    found_qs = np.zeros((len(shares), len(count_sb)))
    for first in range(0, len(count_sb), AT_ONCE):
        upto_fb = count_sb[first : first + AT_ONCE].numpy().cumsum(axis=1, dtype=np.int64)
        n_f = upto_fb[:, -1]
        for q, share in enumerate(shares):
            rank_f = np.floor(share * (n_f - 1)).astype(np.int64)
            bin_f = (upto_fb <= rank_f[:, None]).sum(axis=1)
            found_qs[q, first : first + AT_ONCE] = np.where(n_f > 0, _edge(bin_f + 0.5, STEPS), 0)
    return found_qs


def rows(count_sb: Tensor) -> dict[str, Array]:
    """Return the counts in bins of `COARSE` steps an octave, those that are not empty: feature, low, high, n."""
    feature, at = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int32)
    n = np.empty(0, dtype=np.int64)
    for first in range(0, len(count_sb), AT_ONCE):
        some_fb = count_sb[first : first + AT_ONCE].numpy()
        coarse_fc = some_fb.reshape(len(some_fb), -1, STEPS // COARSE).sum(axis=2, dtype=np.int64)
        f, c = np.nonzero(coarse_fc)
        feature, at, n = np.r_[feature, (first + f).astype(np.int32)], np.r_[at, c], np.r_[n, coarse_fc[f, c]]
    return {"feature": feature, "low": _edge(at, COARSE), "high": _edge(at + 1, COARSE), "n": n}


def _edge(place: Array, steps: int) -> Array:
    """Return the value at a place counted in steps from the lowest; what lies between two steps is between them."""
    octave, part = np.divmod(place, steps)
    edge: Array = np.exp2(LOWEST + octave) * (1 + part / steps)
    return edge
