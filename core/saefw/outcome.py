"""Reads off what edits did: shifts, flips, intervals against controls, the example to show first.

Shapes: e images, r roles, k kinds (ROLES, KINDS), a amounts, l logits kept.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

ROLES = ("own class", "other class")
"""Whose features an image is edited with; in the order of the arrays."""

KINDS = ("effect", "mass", "like features", "random directions")
"""How an edit's features were chosen, or of which control it is; in the order of the arrays."""


class Readout:
    """What the probe said of the target, and what it said first, before and after each edit."""

    def __init__(
        self,
        label_erkal: NDArray[Any],
        before_erkal: NDArray[Any],
        after_erkal: NDArray[Any],
        target_er: NDArray[np.int64],
    ) -> None:
        """Read it off the logits that were kept; label -1: none."""
        self.label, self.before, self.after = label_erkal, before_erkal, after_erkal
        is_target = label_erkal == target_er[:, :, None, None, None]
        self.target_er = target_er
        self.shift_erka = np.where(is_target, after_erkal.astype(np.float64) - before_erkal, 0).sum(axis=-1)
        self.predicted_before, self.predicted_after = (self._predicted(x) for x in (before_erkal, after_erkal))

    def _predicted(self, logits: NDArray[Any]) -> NDArray[Any]:
        best = np.where(self.label >= 0, logits, -np.inf).argmax(axis=-1)
        found: NDArray[Any] = np.take_along_axis(self.label, best[..., None], axis=-1)[..., 0]
        return found

    def probabilities(self, place: tuple[int, int, int, int]) -> tuple[dict[int, float], dict[int, float]]:
        """Return the softmax of the logits kept of an edit, by label, before and after."""
        kept = self.label[place] >= 0
        labels = self.label[place][kept].tolist()
        before, after = (_softmax(x[place][kept]).tolist() for x in (self.before, self.after))
        return dict(zip(labels, before, strict=True)), dict(zip(labels, after, strict=True))


def summary(read: Readout, amount: int) -> dict[str, float]:
    """Return what is told of a unit, for edits towards another class at one amount (its number).

    `shift_<kind>`: the mean change of the target's logit; `flip_rate_<kind>`: of the images that were not taken for
    the target, the share that is after the edit; `classes_above_controls`: targets whose 95 % interval of the change,
    of features chosen by effect, lies wholly above those of both controls; `..._by_mass`: the same of those by mass.
    The interval is Student's t over the test images with that target. Edits whose shift is NaN were left out.
    """
    shift_ek, target_e = read.shift_erka[:, 1, :, amount], read.target_er[:, 1]
    there_ek = ~np.isnan(shift_ek)
    wrong_ek = there_ek & (read.predicted_before[:, 1, :, amount] != target_e[:, None])
    flipped_ek = (read.predicted_after[:, 1, :, amount] == target_e[:, None]) & wrong_ek
    told = {}
    for k, kind in enumerate(KINDS):
        shift_n = shift_ek[there_ek[:, k], k]
        told[f"shift_{kind.replace(' ', '_')}"] = float(shift_n.mean()) if len(shift_n) else np.nan
        told[f"flip_rate_{kind.replace(' ', '_')}"] = float(flipped_ek[:, k].sum() / max(1, wrong_ek[:, k].sum()))
    above = np.zeros(2, dtype=int)
    for target in np.unique(target_e):
        bounds = [interval(shift_ek[there_ek[:, k] & (target_e == target), k]) for k in range(len(KINDS))]
        highest = max(bounds[2][1], bounds[3][1])
        above += [bounds[0][0] > highest, bounds[1][0] > highest]
    return {**told, "classes_above_controls": int(above[0]), "classes_above_controls_by_mass": int(above[1])}


def interval(values: NDArray[Any]) -> tuple[float, float]:
    """Return the 95 % interval of a mean by Student's t; without bounds for fewer than two values."""
    from scipy.special import stdtrit

    n = len(values)
    if n < 2:
        return -np.inf, np.inf
    half = stdtrit(n - 1, 0.975) * values.std(ddof=1) / np.sqrt(n)
    return float(values.mean() - half), float(values.mean() + half)


def first(read: Readout, rank_c: NDArray[np.float64], amounts: NDArray[np.float64]) -> tuple[int, int, int, int] | None:
    """Choose the example to show first: an edit by effect that turns a right answer into another class.

    Clear ones go first: sure before (0.9) and after (0.8), while neither control of the same image, target and amount
    turns it. Then those whose target ranks highest in `rank_c`, then smaller amounts, then the surest. Returns its
    image, role, kind and amount by number; None if no edit turns an answer.
    """
    own_e1, target_e1 = read.target_er[:, :1], read.target_er[:, 1:]
    turned_eka = read.predicted_after[:, 1] == target_e1[..., None]
    turned_ea = (read.predicted_before[:, 1, 0] == own_e1) & turned_eka[:, 0] & (own_e1 != target_e1)
    places = [(int(e), 1, 0, int(a)) for e, a in np.argwhere(turned_ea)]

    def rank(place: tuple[int, int, int, int]) -> tuple[bool, float, float, float]:
        e, _, _, a = place
        own, target = int(own_e1[e, 0]), int(target_e1[e, 0])
        before, after = read.probabilities(place)
        clear = before[own] > 0.9 and after[target] > 0.8 and not turned_eka[e, 2:, a].any()
        return clear, float(rank_c[target]), -abs(float(amounts[a])), after[target]

    return max(places, key=rank, default=None)


def _softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    powers = np.exp(logits.astype(np.float64) - logits.max())
    shares: NDArray[np.float64] = powers / powers.sum()
    return shares
