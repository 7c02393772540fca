"""Chooses the features to show, by what the tables say of them.

Shapes: s d_sae.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from duckdb import DuckDBPyConnection
from numpy.typing import NDArray
from pydantic import Field

from saefw.entry import Entry
from saefw.errors import UserError
from saefw.run import Pick
from saefw.wording import got, or_listed

PUREST = Pick(highest="n_pure")
"""The SAE with most features whose top images are of one class."""


class Choice(Entry):
    """Which features are shown: `{order: ap, n: 20, log_frequency: [-3, -1]}`."""

    n: int = Field(64, ge=0)
    """How many: the first, in `order`, of those that fire and pass the filters."""

    order: Literal["lot", "frequency", "value", "purity", "ap"] = "lot"
    """Drawn by lot; or those first whose frequency, mean positive value, purity or average precision is largest."""

    seed: int = Field(0, ge=0)
    """Of the lot."""

    log_frequency: tuple[float, float] | None = None
    """Only features with log10 of the frequency strictly between these; null: any that fire."""

    log_value: tuple[float, float] | None = None
    """Only features with log10 of the mean positive value strictly between these; null: any that fire."""

    of_class: str | None = None
    """Only features that fire on images of this class, whose `purity` and `ap` then count; null: those of the class for
    which each feature's are largest."""

    include: list[int] = Field(default_factory=list)
    """Features that are shown in any case, before the others and beside their number."""

    def choose(self, db: DuckDBPyConnection, unit: str) -> list[int]:
        """Return the features: those to include, then the others in their order, by lot ascending.

        Args:
            db: the index.
            unit: the address of the feature tables, of a visuals unit.

        Raises:
            UserError: there is no such class or feature, or nothing to order them by.

        """
        found = db.execute(
            "SELECT frequency, mean, ap, purity FROM feature LEFT JOIN (SELECT feature, max(ap) AS ap, "
            "max(purity) AS purity FROM class_feature WHERE unit = $unit AND ($labels IS NULL OR "
            "list_contains($labels, label)) GROUP BY feature) USING (feature) WHERE unit = $unit ORDER BY feature",
            {"unit": unit, "labels": self._labels(db, unit)},
        ).fetchnumpy()
        told_s = {name: np.ma.filled(np.ma.asarray(column, dtype=np.float64), np.nan) for name, column in found.items()}
        d_sae = len(told_s["frequency"])
        wrong = [feature for feature in self.include if not 0 <= feature < d_sae]
        if wrong:
            raise UserError(f"include: there is no feature {wrong[0]}; there are {d_sae}, from 0 on")
        passing = self._order(np.flatnonzero(self._passes(told_s)), told_s)
        return list(dict.fromkeys([*self.include, *passing]))

    def _labels(self, db: DuckDBPyConnection, unit: str) -> list[int] | None:
        """Return the class that they are to be of, by its number; None: any."""
        if self.of_class is None:
            return None
        classes = db.execute(
            "SELECT name, label FROM class SEMI JOIN (FROM feature WHERE unit = ?) f ON f.acts = class.unit", [unit]
        ).fetchall()
        labels = [label for name, label in classes if name == self.of_class]
        if not labels:
            raise UserError(f"of_class: no such class{got(self.of_class)}{or_listed(self.of_class, dict(classes))}")
        return labels

    def _passes(self, told_s: Mapping[str, NDArray[np.float64]]) -> NDArray[np.bool_]:
        passes_s = told_s["frequency"] > 0
        if self.of_class is not None:
            passes_s &= np.isfinite(told_s["ap"])
        for bounds, name in ((self.log_frequency, "frequency"), (self.log_value, "mean")):
            if bounds is not None:
                with np.errstate(divide="ignore"):
                    log_s = np.log10(told_s[name])
                passes_s &= (log_s > bounds[0]) & (log_s < bounds[1])
        return passes_s

    def _order(self, features: NDArray[np.int64], told_s: Mapping[str, NDArray[np.float64]]) -> list[int]:
        """Return the first of some features; of equal ones the lower number comes first."""
        if self.order == "lot":
            lot: list[int] = np.random.default_rng(self.seed).permutation(features)[: self.n].tolist()
            return sorted(lot)
        by = told_s["mean" if self.order == "value" else self.order][features]
        if len(by) and np.isnan(by).all():
            raise UserError(f"order: no feature has this{got(self.order)}; the images have no classes")
        ranked: list[int] = features[np.argsort(-by, kind="stable")][: self.n].tolist()  # NaN comes last
        return ranked


def picked(db: DuckDBPyConnection, pick: Pick, whose: str, units: list[str]) -> tuple[str, str, dict[str, float]]:
    """Return the feature tables of the SAE that a pick chooses: their address, their label, their metrics.

    It goes by the metrics of the SAE (nmse, l0, dead) and by those of its features (n_pure, n_live). Where no image has
    a class, nothing is pure: instead of the most pure features the most that fire count.

    Args:
        db: the index.
        pick: how to choose.
        whose: the pick is, for errors: `figure feature-grid`.
        units: addresses of visuals units.

    Raises:
        UserError: none fits.

    """
    rows = db.execute(
        "SELECT u.unit, u.label, f.name, f.value FROM unit u JOIN need n ON n.unit = u.unit "
        "JOIN final f ON f.unit IN (u.unit, n.needs) WHERE list_contains(?, u.unit) ORDER BY u.label, u.unit",
        [units],
    ).fetchall()
    metrics: dict[tuple[str, str], dict[str, float]] = {}
    for unit, label, name, value in rows:
        metrics.setdefault((unit, label), {})[name] = value
    unlabelled = pick == PUREST and not any("n_pure" in known for known in metrics.values())
    unit, label = (Pick(highest="n_live") if unlabelled else pick).choose(whose, metrics)
    return unit, label, metrics[unit, label]


class Best(NamedTuple):
    """The class that a feature detects best."""

    name: str
    ap: float
    """Its average precision."""


def best_classes(db: DuckDBPyConnection, unit: str) -> dict[int, Best]:
    """Return by feature the class that it detects best, from the tables of a visuals unit; of equal ones the first."""
    rows = db.execute(
        "SELECT DISTINCT ON (p.feature) p.feature, c.name, p.ap FROM class_feature p JOIN class c ON c.unit = p.acts "
        "AND c.label = p.label WHERE p.unit = ? ORDER BY p.feature, p.ap DESC, p.label",
        [unit],
    ).fetchall()
    return {feature: Best(name, ap) for feature, name, ap in rows}
