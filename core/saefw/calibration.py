"""How far a probe's confidence is its accuracy.

Shapes: n images.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BINS = 15
"""Of equal width, as in Guo et al. 2017 (arXiv:1706.04599)."""


class Bin(NamedTuple):
    """The images whose confidence, the largest probability, is above `low` and at most `high`."""

    bin: int
    low: float
    high: float
    n: int

    confidence: float
    """Their mean confidence."""

    accuracy: float
    """The share of them that is taken for its own class."""


def reliability(confidence_n: NDArray[np.floating], right_n: NDArray[np.bool_]) -> list[Bin]:
    """Return the bins that hold images, the least confident first.

    Args:
        confidence_n: above 0 and at most 1.
        right_n: whether the class of largest probability is the image's own.

    """
    confidence_n = confidence_n.astype(np.float64)
    of_n = np.clip(np.ceil(confidence_n * BINS).astype(int) - 1, 0, BINS - 1)
    found = []
    for i in np.unique(of_n).tolist():
        here = of_n == i
        told = float(confidence_n[here].mean()), float(right_n[here].mean())
        found.append(Bin(i, i / BINS, (i + 1) / BINS, int(here.sum()), *told))
    return found


def expected_error(bins: list[Bin]) -> float:
    """Return the expected calibration error: |accuracy - confidence| of the bins, weighted by their images."""
    n = sum(each.n for each in bins)
    return sum(each.n / n * abs(each.accuracy - each.confidence) for each in bins)
