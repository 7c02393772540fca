"""Reads off what edits did: changes, flips, intervals against controls, the example to show first.

Shapes: e images, r roles, w ways, k kinds (ROLES, WAYS, KINDS), a amounts, l logits kept, m MEASURES, n images of a
target, v columns, c classes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ROLES = ("own class", "other class")
"""Whose features an image is edited with; in the order of the arrays."""

WAYS = ("effect", "mass", "ap", "single")
"""How an edit's features may be chosen: those of largest predicted effect on the class, of largest mass in it, of
largest average precision as its detectors; or the one of largest predicted effect alone."""

KINDS = ("features", "like features", "random directions")
"""An edit, and its two controls; in the order of the arrays."""

MEASURES = ("logit", "probability", "flip", "others", "spread")
"""What is measured of an edit: the change of its target's logit and probability; whether an image that was not taken
for the target is after it; the mean change of all other classes' logits, and the mean size of that change."""

DRAWS = 1000
"""Samples of a bootstrap."""


class Readout:
    """What the probe said of the target, and what it said first, before and after each edit."""

    def __init__(
        self,
        label_erwkal: NDArray[Any],
        before_erwkal: NDArray[Any],
        after_erwkal: NDArray[Any],
        target_er: Ints,
    ) -> None:
        """Read it off the logits that were kept; label -1: none."""
        self.label, self.before, self.after = label_erwkal, before_erwkal, after_erwkal
        self._target = target_er[:, :, None, None, None]
        self.target_er = target_er
        is_target = label_erwkal == self._target[..., None]
        self.shift_erwka = np.where(is_target, after_erwkal.astype(np.float64) - before_erwkal, 0).sum(axis=-1)
        self.predicted_before, self.predicted_after = (self._predicted(x) for x in (before_erwkal, after_erwkal))

    def _predicted(self, logits: NDArray[Any]) -> NDArray[Any]:
        best = np.where(self.label >= 0, logits, -np.inf).argmax(axis=-1)
        found: NDArray[Any] = np.take_along_axis(self.label, best[..., None], axis=-1)[..., 0]
        return found

    def flips(self) -> Floats:
        """Return 1 where an edit made the target of another answer, 0 where not, NaN where it was the target before."""
        flipped: Floats = (self.predicted_after == self._target).astype(np.float64)
        flipped[self.predicted_before == self._target] = np.nan
        return flipped

    def probabilities(self, place: tuple[int, ...]) -> tuple[dict[int, float], dict[int, float]]:
        """Return the softmax of the logits kept of an edit, by label, before and after."""
        kept = self.label[place] >= 0
        labels = self.label[place][kept].tolist()
        before, after = (_softmax(x[place][kept]).tolist() for x in (self.before, self.after))
        return dict(zip(labels, before, strict=True)), dict(zip(labels, after, strict=True))


def resampled(values_nv: Floats, seed: int) -> Floats:
    """Return the means of columns over rows that are drawn anew, [DRAWS, v], each over the rows that are not NaN.

    All columns are drawn together, so that what is compared is compared on the same images; NaN where none is drawn.
    (Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.)
    """
    there_nv = ~np.isnan(values_nv)
    n, filled_nv = len(values_nv), np.nan_to_num(values_nv)
    rng, means = np.random.default_rng(seed), []
    # Not all draws at once: of 50,000 images they would take 400 MB.
    for draws in np.array_split(np.arange(DRAWS), max(1, DRAWS * n // 4_000_000)):
        times = rng.multinomial(n, np.full(n, 1 / n), size=len(draws)).astype(np.float64)
        drawn = times @ there_nv
        means.append(np.divide(times @ filled_nv, drawn, out=np.full(drawn.shape, np.nan), where=drawn > 0))
    return np.concatenate(means)


def bootstrap(values_nv: Floats, seed: int) -> tuple[Floats, Floats]:
    """Return the 95 % percentile intervals of the means of columns, [v] each, over the rows that are not NaN.

    Without bounds where fewer than two rows are there.
    """
    few = (~np.isnan(values_nv)).sum(axis=0) < 2
    whole = np.where(few, 0, resampled(values_nv, seed))
    low, high = np.nanpercentile(whole, [2.5, 97.5], axis=0)
    return np.where(few, -np.inf, low), np.where(few, np.inf, high)


class Found(NamedTuple):
    """What edits did on average: of the images of a target, or of all."""

    role: str
    way: str
    chosen_by: str
    """The way, or which control."""

    against: str | None
    """The control that was taken away, image by image; None: none was."""

    dose: float
    target: int | None
    """None: of all targets."""

    measure: str
    n: int
    mean: float
    low: float
    high: float


def found(values_erwkam: Floats, target_er: Ints, ways: Sequence[str], amounts: Sequence[float]) -> list[Found]:
    """Return means with 95 % bootstrap intervals of each role, way, amount, target and measure.

    Of the edits, of each control, and of the difference between an edit and each control of the same image. A value
    that is NaN was not measured.
    """
    rows = []
    for r, w, a in np.ndindex(values_erwkam.shape[1], len(ways), len(amounts)):
        for target in (None, *np.unique(target_er[:, r]).tolist()):
            some = slice(None) if target is None else target_er[:, r] == target
            values_nkm = values_erwkam[some, r, w, :, a]
            columns_nvm = np.concatenate([values_nkm, values_nkm[:, :1] - values_nkm[:, 1:]], axis=1)
            names = [(ways[w], None), *((kind, None) for kind in KINDS[1:]), *((ways[w], kind) for kind in KINDS[1:])]
            flat_nv = columns_nvm.reshape(len(columns_nvm), -1)
            low, high = bootstrap(flat_nv, 0)
            n_v = (~np.isnan(flat_nv)).sum(axis=0)
            mean_v = np.nansum(flat_nv, axis=0) / np.where(n_v > 0, n_v, np.nan)
            for i, ((chosen_by, against), measure) in enumerate(
                (name, measure) for name in names for measure in MEASURES
            ):
                told = int(n_v[i]), float(mean_v[i]), float(low[i]), float(high[i])
                rows.append(Found(ROLES[r], ways[w], chosen_by, against, amounts[a], target, measure, *told))
    return rows


def summary(rows: Sequence[Found], dose: float) -> dict[str, float]:
    """Return what is told of a unit, for edits towards another class at one dose, by way.

    `shift_<way>`: the mean change of the target's logit; `shift_<way>_<control>`: that of its control;
    `flip_rate_...`: of the images that were not taken for the target, the share that is after the edit;
    `classes_above_controls_<way>`: targets for which the edits' change is larger than that of either control, with all
    of its 95 % interval; `tpp_<way>`: the change of the target's logit less the mean change of all others, mean over
    the targets (after the targeted probe perturbation of SAEBench, which counts accuracy where this counts logits).
    """
    here = [row for row in rows if row.role == ROLES[1] and row.dose == dose]
    told: dict[str, float] = {}
    for way in dict.fromkeys(row.way for row in here):
        ours = [row for row in here if row.way == way]
        for row in ours:
            if row.target is None and row.against is None and row.measure in ("logit", "flip"):
                name = way if row.chosen_by == way else f"{way}_{row.chosen_by.replace(' ', '_')}"
                told[f"{'shift' if row.measure == 'logit' else 'flip_rate'}_{name}"] = row.mean
        alone = {(row.target, row.measure): row.mean for row in ours if row.chosen_by == way and row.against is None}
        targets = sorted(target for target, measure in alone if target is not None and measure == "logit")
        least = {(row.target, row.against): row.low for row in ours if row.against and row.measure == "logit"}
        above = [all(least[target, kind] > 0 for kind in KINDS[1:]) for target in targets]
        told[f"classes_above_controls_{way}"] = sum(above)
        told[f"tpp_{way}"] = float(np.mean([alone[t, "logit"] - alone[t, "others"] for t in targets]))
    return told


def agreement(predicted: Floats, measured: Floats) -> float:
    """Return the rank correlation of Spearman; NaN of fewer than three pairs, or where either is constant."""
    from scipy.stats import rankdata

    if len(predicted) < 3 or not (np.ptp(predicted) and np.ptp(measured)):
        return np.nan
    return float(np.corrcoef(rankdata(predicted), rankdata(measured))[0, 1])


def first(read: Readout, rank_c: Floats, amounts: Floats) -> tuple[int, int, int, int, int] | None:
    """Choose the example to show first: an edit of the first way that turns a right answer into another class.

    Clear ones go first: sure before (0.9) and after (0.8), while neither control of the same image, target and amount
    turns it. Then those whose target ranks highest in `rank_c`, then smaller amounts, then the surest. Returns its
    image, role, way, kind and amount by number; None if no edit turns an answer.
    """
    own_e1, target_e1 = read.target_er[:, :1], read.target_er[:, 1:]
    turned_eka = read.predicted_after[:, 1, 0] == target_e1[..., None]
    turned_ea = (read.predicted_before[:, 1, 0, 0] == own_e1) & turned_eka[:, 0] & (own_e1 != target_e1)
    places = [(int(e), 1, 0, 0, int(a)) for e, a in np.argwhere(turned_ea)]

    def rank(place: tuple[int, int, int, int, int]) -> tuple[bool, float, float, float]:
        e, _, _, _, a = place
        own, target = int(own_e1[e, 0]), int(target_e1[e, 0])
        before, after = read.probabilities(place)
        clear = before[own] > 0.9 and after[target] > 0.8 and not turned_eka[e, 1:, a].any()
        return clear, float(rank_c[target]), -abs(float(amounts[a])), after[target]

    return max(places, key=rank, default=None)


def _softmax(logits: NDArray[Any]) -> Floats:
    powers = np.exp(logits.astype(np.float64) - logits.max())
    shares: Floats = powers / powers.sum()
    return shares
