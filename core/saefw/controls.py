"""Chooses images, target classes, features of a class, and what an edit is compared with.

Every choice depends on a seed and on what it is for, never on who else is in the batch.

Shapes: n images, f features of an edit, d d_model, s d_sae, c classes.
"""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

POOL = 20
"""A control feature is drawn from so many whose frequency is nearest."""


def balanced(label_n: Ints, wanted: int, seed: int) -> Ints:
    """Return the places of `wanted` images, drawn evenly from the classes, ascending; all if there are no more."""
    if wanted >= len(label_n):
        return np.arange(len(label_n))
    order = np.random.default_rng([seed, 0]).permutation(len(label_n))
    by_class = order[np.argsort(label_n[order], kind="stable")]
    _, first, count = np.unique(label_n[by_class], return_index=True, return_counts=True)
    turn = np.arange(len(label_n)) - np.repeat(first, count)
    return np.sort(by_class[np.argsort(turn, kind="stable")[:wanted]])


def others(label_n: Ints, classes: Ints, seed: int) -> Ints:
    """Return for each image a class other than its own, each class about equally often; its own if alone."""
    rng = np.random.default_rng([seed, 1])
    used = np.zeros(len(classes), dtype=np.int64)
    target_n = label_n.copy()
    for n in rng.permutation(len(label_n)):
        tie = rng.random(len(classes))
        allowed = classes != label_n[n]
        if allowed.any():
            place = np.lexsort((tie, used, ~allowed))[0]
            used[place] += 1
            target_n[n] = classes[place]
    # The last images may have found only their own class wanting: let earlier ones make room.
    while (move := _move(target_n, label_n, classes, used)) is not None:
        n, high, low = move
        target_n[n] = classes[low]
        used[[high, low]] += [-1, 1]
    return target_n


def _move(target_n: Ints, label_n: Ints, classes: Ints, used: Ints) -> tuple[int, int, int] | None:
    """Return an image that may go from a class used too often to one used too seldom; None if there is none."""
    for high in np.argsort(-used, kind="stable"):
        for low in np.argsort(used, kind="stable"):
            if used[high] - used[low] <= 1:
                break
            movable = np.flatnonzero((target_n == classes[high]) & (label_n != classes[low]) & (label_n != target_n))
            if len(movable):
                return int(movable[0]), int(high), int(low)
    return None


def strongest(score_sc: NDArray[np.float64], usable_s: NDArray[np.bool_], n: int) -> Ints:
    """Return for each class the n usable features of largest score, the largest first, [c, n]; of equals the first."""
    scored = np.where(usable_s[:, None], score_sc, -np.inf)
    return np.argsort(-scored, axis=0, kind="stable")[:n].T.copy()


class Drawn:
    """The controls of an edit: features of like frequency, and a random direction."""

    def __init__(
        self,
        chosen_cf: Ints,
        frequency_s: NDArray[np.float64],
        usable_s: NDArray[np.bool_],
        d_model: int,
        seed: int,
    ) -> None:
        """Know the features of each class, from which the control must differ, and who could stand for them."""
        self.chosen_cf, self.d_model, self.seed = chosen_cf, d_model, seed
        self._usable = np.flatnonzero(usable_s)
        self._log_frequency_s = np.log10(np.where(usable_s, frequency_s, 1))
        self._pools: dict[int, list[Ints]] = {}

    def pools(self, target: int) -> list[Ints]:
        """Return for each feature of a class those nearest to it in log frequency, without the class's own."""
        if target not in self._pools:
            chosen_f = self.chosen_cf[target]
            free = self._usable[~np.isin(self._usable, chosen_f)]
            size = max(POOL, len(chosen_f))
            distance = [np.abs(self._log_frequency_s[free] - self._log_frequency_s[feature]) for feature in chosen_f]
            self._pools[target] = [free[np.argsort(far, kind="stable")[:size]] for far in distance]
        return self._pools[target]

    def firing(self, example: int, target: int, fires_s: NDArray[np.bool_]) -> Ints:
        """Return features [f], none twice, for an edit that changes only what fires on the image.

        Each is drawn from those that fire there, nearest in log frequency; from all, as for other edits, where none of
        them is left.
        """
        rng = np.random.default_rng([self.seed, 3, example, target])
        chosen_f = self.chosen_cf[target]
        free = self._usable[fires_s[self._usable] & ~np.isin(self._usable, chosen_f)]
        taken: list[int] = []
        for feature, pool in zip(chosen_f, self.pools(target), strict=True):
            left = free[~np.isin(free, taken)]
            far = np.abs(self._log_frequency_s[left] - self._log_frequency_s[feature])
            near = left[np.argsort(far, kind="stable")[:POOL]]
            taken.append(int(rng.choice(near if len(near) else pool[~np.isin(pool, taken)])))
        return np.array(taken)

    def __call__(self, example: int, target: int) -> tuple[Ints, NDArray[np.float64]]:
        """Return features [f], none twice, and a unit direction [d], for an edit of an image towards a class."""
        rng = np.random.default_rng([self.seed, 2, example, target])
        taken: list[int] = []
        for pool in self.pools(target):
            taken.append(int(rng.choice(pool[~np.isin(pool, taken)])))
        direction_d = rng.standard_normal(self.d_model)
        return np.array(taken), direction_d / np.linalg.norm(direction_d)
