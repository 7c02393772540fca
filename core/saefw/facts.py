"""What the feature tables say of each feature and class, for stages that choose features.

Shapes: s d_sae, c classes.
"""

from collections import Counter
from collections.abc import Hashable, Iterable
from typing import NamedTuple, TypeVar

import numpy as np
from duckdb import DuckDBPyConnection
from numpy.typing import NDArray

Class = TypeVar("Class", bound=Hashable)


class Facts(NamedTuple):
    """How often and how strongly each feature fires, all in all and for each class; 0 where nothing is known."""

    frequency_s: NDArray[np.float64]
    p99_s: NDArray[np.float64]
    rate_sc: NDArray[np.float64]
    share_sc: NDArray[np.float64]
    ap_sc: NDArray[np.float64]


class Name(NamedTuple):
    """How easily a person names a feature by its strongest images."""

    purity: float
    """Share of the commonest class among them."""

    place: float
    """Share of them whose strongest patch lies at most one patch from the commonest place; 0 of a feature of [CLS]."""


def facts(db: DuckDBPyConnection, features: str, classes: str, d_sae: int, n_classes: int) -> Facts:
    """Read them from two visuals units: one for the features' own statistics, one for those of classes."""
    frequency_s, p99_s = np.zeros(d_sae), np.zeros(d_sae)
    of_class = {name: np.zeros((d_sae, n_classes)) for name in ("rate", "share", "ap")}
    told = db.execute("SELECT feature, frequency, p99 FROM feature WHERE unit = ?", [features]).fetchnumpy()
    rows = db.execute(
        "SELECT feature, label, rate, share, ap FROM class_feature WHERE unit = ?", [classes]
    ).fetchnumpy()
    frequency_s[told["feature"]] = np.nan_to_num(np.ma.filled(told["frequency"], 0))
    p99_s[told["feature"]] = np.nan_to_num(np.ma.filled(told["p99"], 0))
    for name, table_sc in of_class.items():
        table_sc[rows["feature"], rows["label"]] = np.nan_to_num(np.ma.filled(rows[name], 0))
    return Facts(frequency_s, p99_s, of_class["rate"], of_class["share"], of_class["ap"])


def commonest(classes: Iterable[Class | None]) -> tuple[Class | None, int]:
    """Return the commonest class of a feature's images, and how many are of it; of equal ones that of the strongest.

    Args:
        classes: of its images, from the strongest on; None: it has none.

    """
    counted = Counter(one for one in classes if one is not None).most_common(1)  # of equal ones the first met
    return counted[0] if counted else (None, 0)


def names(db: DuckDBPyConnection, unit: str, top: int, grid: tuple[int, int]) -> dict[int, Name]:
    """Return how easily each feature is named, from the `top` images that a visuals unit lists."""
    rows = db.execute(
        "SELECT feature, label, token FROM top_example t LEFT JOIN example e "
        "ON e.unit = t.acts AND e.example = t.example WHERE t.unit = ?",
        [unit],
    ).fetchnumpy()
    labels, tokens = np.ma.filled(rows["label"], -1), np.ma.filled(rows["token"], -1)
    named = {}
    for feature in np.unique(rows["feature"]):
        here = rows["feature"] == feature
        label, place = labels[here], np.stack(np.divmod(tokens[here][tokens[here] >= 0], grid[1]), axis=1)
        counts = np.bincount(label[label >= 0], minlength=1)
        near = np.abs(place[:, None] - place[None]).max(axis=2) <= 1
        named[int(feature)] = Name(float(counts.max() / top), float(near.sum(axis=1).max(initial=0) / top))
    return named
