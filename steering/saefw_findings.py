"""Reads what the Explore and Compare tabs show, from the store alone: no model is loaded.

Shapes: f features, d d_model.
"""

from base64 import b64encode
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from saefw import pictures, tensors
from saefw.errors import UserError, escaped
from saefw.index import INDEX
from saefw.outcome import KINDS, ROLES
from saefw.stages.visuals import MAPS, PICTURES
from saefw.store import Store

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

SIDE = 112
"""Pixels of the longer side of a picture on a feature's page."""


class Look(NamedTuple):
    """An SAE as it was looked at on a recording: a visuals unit."""

    unit: str
    label: str
    sae: str
    acts: str
    grid: tuple[int, int]


class Features(NamedTuple):
    """What the tables say of all features of an SAE: the best detectors of a class first, then what fires most."""

    feature_f: Ints
    frequency_f: Floats
    mean_f: Floats
    p99_f: Floats
    max_f: Floats
    monosemanticity_f: Floats
    """NaN where it was not asked for."""

    label_f: Ints
    """The class that a feature detects best, -1: none."""

    ap_f: Floats
    purity_f: Floats
    """Average precision and purity for that class; NaN without one."""

    classes: dict[int, str]
    """Names by label, escaped as for any eye."""


class Seen(NamedTuple):
    """What the page of a feature shows."""

    top: list[tuple[int, str, str, float]]
    """Its top images, the strongest first: example, key, name of its class or nothing, largest value."""

    classes: list[tuple[str, float, float, float, float]]
    """The classes that it detects best: name, average precision, share of its mass, purity, rate."""

    bins: list[tuple[float, float, int]]
    """Of the histogram of its positive values: from, to below, how many."""

    quantiles: dict[str, float]
    """`p50`, `p90`, `p99`."""


def looks(store: Store) -> list[Look]:
    """List the SAEs that were looked at, first the one with the most pure features.

    Raises:
        UserError: there are none; the text says what to do.

    """
    with store.db() as db:
        rows = db.execute(
            "SELECT u.unit, u.label, s.unit, a.unit, a.grid_h, a.grid_w FROM unit u JOIN need n ON n.unit = u.unit "
            "JOIN sae s ON s.unit = n.needs JOIN need m ON m.unit = u.unit JOIN acts a ON a.unit = m.needs "
            "LEFT JOIN final f ON f.unit = u.unit AND f.name = 'n_pure' WHERE u.stage = 'visuals' "
            "ORDER BY f.value DESC NULLS LAST, u.label, u.unit"
        ).fetchall()
    if not rows:
        raise UserError("No SAE was looked at yet: add a stage with `use: visuals`, and run `saefw run`.")
    return [Look(unit, escaped(label), sae, acts, (rows_, columns)) for unit, label, sae, acts, rows_, columns in rows]


def features(store: Store, look: Look) -> Features:
    """Return what is known of all features, which is read once a process and index.

    Raises:
        UserError: the index is gone or damaged.

    """
    try:
        facts = (store.root / INDEX).stat()
    except OSError:
        facts = None
    return _features(store.root, facts and (facts.st_ino, facts.st_mtime_ns), look)


@lru_cache(maxsize=8)
def _features(root: Path, _version: tuple[int, int] | None, look: Look) -> Features:
    with Store(root).db() as db:
        said = db.execute(
            "SELECT feature, frequency, mean, p99, max, monosemanticity FROM feature WHERE unit = ? ORDER BY feature",
            [look.unit],
        ).fetchnumpy()
        best = db.execute(
            "SELECT feature, arg_max(label, ap) AS label, max(ap) AS ap, arg_max(purity, ap) AS purity "
            "FROM class_feature WHERE unit = ? AND ap > 0 GROUP BY feature",
            [look.unit],
        ).fetchnumpy()
        named = db.execute("SELECT label, name FROM class WHERE unit = ? ORDER BY label", [look.acts]).fetchall()
    feature_f = np.asarray(said["feature"], dtype=np.int64)
    n = len(feature_f)
    label_f, ap_f, purity_f = np.full(n, -1), np.full(n, np.nan), np.full(n, np.nan)
    at = np.searchsorted(feature_f, np.asarray(best["feature"]))
    label_f[at], ap_f[at], purity_f[at] = best["label"], best["ap"], best["purity"]
    frequency, mean, p99, most, monosemanticity = (
        _floats(said[name]) for name in ("frequency", "mean", "p99", "max", "monosemanticity")
    )
    columns = [feature_f, frequency, mean, p99, most, monosemanticity, label_f, ap_f, purity_f]
    order = np.lexsort((feature_f, -np.nan_to_num(most), -np.nan_to_num(ap_f)))
    sorted_f: list[Any] = [column[order] for column in columns]
    return Features._make([*sorted_f, {label: escaped(name) for label, name in named}])


def seen(store: Store, look: Look, feature: int) -> Seen:
    """Return what the tables say of one feature.

    Raises:
        UserError: the index is gone or damaged.

    """
    of = [look.unit, feature]
    with store.db() as db:
        top = db.execute(
            "SELECT t.example, e.key, coalesce(c.name, ''), t.score FROM top_example t "
            "JOIN example e ON e.unit = t.acts AND e.example = t.example "
            "LEFT JOIN class c ON c.unit = e.unit AND c.label = e.label "
            "WHERE t.unit = ? AND t.feature = ? ORDER BY t.rank",
            of,
        ).fetchall()
        classes = db.execute(
            "SELECT c.name, f.ap, f.share, f.purity, f.rate FROM class_feature f JOIN class c ON c.unit = f.acts "
            "AND c.label = f.label WHERE f.unit = ? AND f.feature = ? ORDER BY f.ap DESC, f.label LIMIT 8",
            of,
        ).fetchall()
        bins = db.execute(
            "SELECT low, high, n FROM feature_histogram WHERE unit = ? AND feature = ? AND low > 0 ORDER BY low", of
        ).fetchall()
        quantiles = db.execute("SELECT p50, p90, p99 FROM feature WHERE unit = ? AND feature = ?", of).fetchall()
    return Seen(
        [(example, escaped(key), escaped(name), value) for example, key, name, value in top],
        [(escaped(name), *measured) for name, *measured in classes],
        bins,
        {name: x for name, x in zip(("p50", "p90", "p99"), *quantiles, strict=True) if x} if quantiles else {},
    )


def tiles(store: Store, look: Look, feature: int, examples: list[int]) -> list[str]:
    """Return the top images of a feature with its patches lit, as data URIs; empty where a picture is not kept.

    Raises:
        UserError: the pictures cannot be read.

    """
    folder = store.root / "visuals" / look.unit
    views = pictures.read(folder / PICTURES, examples)
    maps_tp = pictures.maps(folder / MAPS, feature)
    drawn = []
    for rank, example in enumerate(examples):
        if example not in views or rank >= len(maps_tp):
            drawn.append("")
            continue
        lit = pictures.lit(views[example], pictures.on_grid(maps_tp[rank], look.grid), SIDE)
        drawn.append(f"data:image/png;base64,{b64encode(pictures.png(lit)).decode()}")
    return drawn


def neighbours(store: Store, look: Look, feature: int, n: int) -> list[tuple[int, float]]:
    """Return the features whose decoder rows are most like that of a feature, with the cosine, the most alike first.

    Raises:
        UserError: the SAE cannot be read.

    """
    unit_fd = _decoder(store.root / "train" / look.sae)
    cosine_f = unit_fd @ unit_fd[feature]
    cosine_f[feature] = -2
    values, found = cosine_f.topk(min(n, len(cosine_f) - 1))
    return list(zip(found.tolist(), values.tolist(), strict=True))


@lru_cache(maxsize=2)
def _decoder(folder: Path) -> torch.Tensor:
    """Return the decoder rows of an SAE at length 1."""
    path = folder / "sae.safetensors"
    try:
        with tensors.opened(path) as file:
            w_fd: torch.Tensor = file.get_tensor("W_dec")
        if w_fd.ndim != 2 or not w_fd.is_floating_point():
            raise ValueError("W_dec is no matrix")
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error}); delete {folder} to make it again") from error
    return torch.nn.functional.normalize(w_fd.float(), dim=1)


def _floats(values: Any) -> Floats:
    found: Floats = np.ma.filled(np.ma.asarray(values, dtype=np.float64), np.nan)
    return found


# What runs are compared by

MEASURED = {
    "logit": "change of the target’s logit",
    "probability": "change of the target’s probability, %",
    "flip": "taken for the target, % of images that were not",
    "others": "mean change of all other logits",
    "spread": "mean size of the change of all other logits",
}
"""What the measures of steering are."""


class Sae(NamedTuple):
    """An SAE as it was measured."""

    unit: str
    label: str
    recording: str
    """Label of what it was trained on."""

    variant: str
    l0: float
    nmse: float
    dead: float


class Probed(NamedTuple):
    """A probe as it was measured."""

    label: str
    recording: str
    config: str
    """Its settings, JSON."""

    valid_accuracy: float
    valid_loss: float
    test_accuracy: float
    n_test: float


class Outcome(NamedTuple):
    """What edits of one kind and amount did on average, over all targets."""

    unit: str
    label: str
    way: str
    kind: str
    measure: str
    dose: float
    n: int
    mean: float
    low: float
    high: float


def saes(db: "DuckDBPyConnection") -> list[Sae]:
    """Return all SAEs that were measured, by what they were trained on, and L0."""
    rows = db.execute(
        "SELECT p.sae, u.label, r.label, p.variant, p.l0, p.nmse, coalesce(p.dead, 'nan') FROM pareto p "
        "JOIN sae s ON s.unit = p.sae JOIN unit u ON u.unit = p.sae JOIN unit r ON r.unit = s.acts "
        "WHERE isfinite(p.l0) AND isfinite(p.nmse) ORDER BY r.label, p.l0, p.sae"
    ).fetchall()
    return [Sae(unit, escaped(label), escaped(of), variant, *values) for unit, label, of, variant, *values in rows]


def probes(db: "DuckDBPyConnection") -> list[Probed]:
    """Return all probes that were measured, by what they read."""
    rows = db.execute(
        "SELECT u.label, r.label, p.config, m.valid_accuracy, coalesce(m.valid_loss, 'nan'), "
        "coalesce(m.test_accuracy, 'nan'), coalesce(m.n_test, 0) FROM probe p JOIN unit u ON u.unit = p.unit "
        "JOIN unit r ON r.unit = p.acts JOIN (PIVOT final ON name IN ('valid_accuracy', 'valid_loss', "
        "'test_accuracy', 'n_test') USING first(value) GROUP BY unit) m ON m.unit = p.unit "
        "WHERE isfinite(m.valid_accuracy) ORDER BY r.label, u.label, p.unit"
    ).fetchall()
    return [Probed(escaped(label), escaped(of), *values) for label, of, *values in rows]


def outcomes(db: "DuckDBPyConnection") -> list[Outcome]:
    """Return what edits towards another class did, and their controls."""
    rows = db.execute(
        "SELECT o.unit, u.label, o.way, CASE WHEN chosen_by = way THEN ? ELSE chosen_by END, measure, dose, n, mean, "
        "CASE WHEN isfinite(low) THEN low ELSE mean END, CASE WHEN isfinite(high) THEN high ELSE mean END "
        "FROM outcome o JOIN unit u ON u.unit = o.unit WHERE role = ? AND target IS NULL AND against IS NULL AND n > 0 "
        "ORDER BY u.label, o.unit, way, measure, dose",
        [KINDS[0], ROLES[1]],
    ).fetchall()
    return [Outcome(unit, escaped(label), *rest) for unit, label, *rest in rows]
