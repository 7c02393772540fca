"""Writes what the pages of a gallery read: scripts.

Pages opened from a folder cannot fetch files, but they can load scripts. Each calls `take(name, value)`, where the
value is JSON in ASCII without `<`, so that no text in it can end a script or a line.

Shapes: s d_sae, d d_model, k neighbours, t top, p patches.
"""

import base64
import json
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from saefw import pictures
from saefw.care import PASSING, Unread, writing
from saefw.errors import UserError, escaped
from saefw.facts import commonest

Array = np.ndarray[Any, Any]

SHARD = 32
"""Features whose pages read one script."""

SCRIPTS = 100
"""Scripts in a folder."""

AT_ONCE = 64 * SHARD
"""Features whose classes are read at a time."""

NEAR = 8
"""Neighbours of a feature."""

CLASSES, FOUND, DETECTORS = 8, 3, 16
"""Classes on the page of a feature; classes by which it is found, and features of a class that are found by it."""

MEASURES = ("ap", "rate", "share")
"""What is said of a feature and a class."""

ROWS = 1024
"""Features whose cosines with all others are held at a time."""


class Tables(NamedTuple):
    """The tables of a visuals unit, as arrays by column."""

    folder: Path
    features: dict[str, Array]
    """One row a feature, in order; NULL is nan."""

    top: dict[str, Array]
    """By feature, then rank; the token of one of [CLS] is -1."""

    label_n: Array
    """int64: the classes of the images in `top`; -1: none."""

    starts_s: Array
    """int64 [s + 1]: where the rows of each feature begin in `top`, and where the last ones end."""

    @classmethod
    def read(cls, folder: Path, label_e: Array) -> "Tables":
        """Read them; `label_e` holds the classes of all images of the recording.

        Raises:
            UserError: one cannot be read.

        """
        features = query(folder / "feature.parquet", "SELECT * FROM table ORDER BY feature")
        top = query(folder / "top_example.parquet", "SELECT * FROM table ORDER BY feature, rank")
        numbers = {
            name: np.asarray(np.ma.filled(features[name].astype(np.float64), np.nan))
            for name in ("frequency", "mean", "p50", "p90", "p99", "max", "monosemanticity")
        }
        top["token"] = np.ma.filled(top["token"], -1)
        starts_s = np.searchsorted(top["feature"], np.arange(len(features["feature"]) + 1))
        return cls(folder, numbers, top, label_e[top["example"]], starts_s)

    @property
    def d_sae(self) -> int:
        """How many features there are."""
        return len(self.features["frequency"])

    def commonest(self) -> tuple[Array, Array]:
        """Return the commonest class among the top images of each feature, -1 where none has one, and how many are."""
        labels = [None if label < 0 else label for label in self.label_n.tolist()]
        found = [commonest(labels[first:last]) for first, last in pairwise(self.starts_s.tolist())]
        label_s, most_s = zip(*found, strict=True)
        return np.array([-1 if label is None else label for label in label_s]), np.array(most_s)

    def best(self) -> Array:
        """Return the average precision of each feature as a detector of the class that it detects best; 0: of none."""
        rows = query(self.folder / "class_feature.parquet", "SELECT feature, max(ap) AS ap FROM table GROUP BY feature")
        ap_s = np.zeros(self.d_sae)
        ap_s[rows["feature"]] = rows["ap"]
        return ap_s


def query(path: Path, text: str, values: Sequence[Any] = ()) -> dict[str, Array]:
    """Return what a query gives, by column; `table` in it is a parquet file.

    Raises:
        UserError: the file cannot be read.

    """
    try:
        with duckdb.connect() as db:
            return db.execute(text.replace("table", "read_parquet(?)", 1), [str(path), *values]).fetchnumpy()
    except PASSING as error:
        raise Unread(path, error) from error
    except duckdb.Error as error:
        raise UserError(f"{path}: cannot be read; delete {path.parent} to make it again") from error


def script(path: Path, name: str, value: Any) -> None:
    """Write a script that hands a value, of JSON, to the page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    with writing(path):
        path.write_text(f"take({json.dumps(name)},{text});\n", encoding="ascii")


def rounded(numbers: Array) -> list[float | None]:
    """Return numbers as JSON has them, in four digits; nan is null."""
    return [None if np.isnan(x) else float(f"{x:.4g}") for x in numbers.tolist()]


@torch.no_grad()
def neighbours(w_dec_sd: Tensor, alive_s: Array, told: Callable[[int], None]) -> tuple[Array, Array]:
    """Return the features that fire whose decoder rows have the largest cosine with each, and the cosines.

    Args:
        w_dec_sd: the decoder rows.
        alive_s: bool; the others are neither neighbours nor do they have any.
        told: hears of how many features they are known.

    Returns:
        int64 [s, k], -1 where there is none, and float32 [s, k].

    """
    alive = np.flatnonzero(alive_s)
    k = max(0, min(NEAR, len(alive) - 1))
    near_sk, cosine_sk = np.full((len(alive_s), k), -1), np.zeros((len(alive_s), k), dtype=np.float32)
    rows_ad = normalize(w_dec_sd[torch.from_numpy(alive)].float(), dim=1)
    for first in range(0, len(alive) if k else 0, ROWS):
        cosine_na = rows_ad[first : first + ROWS] @ rows_ad.T
        cosine_na[torch.arange(len(cosine_na)), first + torch.arange(len(cosine_na))] = -2  # not its own neighbour
        best = cosine_na.topk(k, dim=1)
        here = alive[first : first + ROWS]
        near_sk[here], cosine_sk[here] = alive[best.indices.cpu().numpy()], best.values.cpu().numpy()
        told(first + len(here))
    return near_sk, cosine_sk


def classes(folder: Path, first: int, last: int) -> dict[str, Array]:
    """Return the classes of the features from `first` to before `last` that their pages or the search tell.

    Rows of `class_feature`; `by_feature` counts the classes of a feature from the one that it detects best, from 1 on,
    `by_class` its rank among these features as a detector of the class.
    """
    return query(
        folder / "class_feature.parquet",
        "SELECT * FROM (SELECT feature, label, ap, rate, share, "
        "row_number() OVER (PARTITION BY feature ORDER BY ap DESC, label) AS by_feature, "
        "row_number() OVER (PARTITION BY label ORDER BY ap DESC, feature) AS by_class "
        "FROM table WHERE feature >= ? AND feature < ?) WHERE by_feature <= ? OR by_class <= ? "
        "ORDER BY feature, by_feature",
        [first, last, CLASSES, DETECTORS],
    )


def searched(rows: dict[str, Array]) -> dict[str, list[Any]]:
    """Return by which classes features are found: those that a feature detects best, and the best detectors of each."""
    order = np.lexsort((rows["feature"], -rows["ap"], rows["label"]))
    label = rows["label"][order]
    rank = np.arange(len(order)) - np.searchsorted(label, label)
    kept = np.sort(order[(rank < DETECTORS) | (rows["by_feature"][order] <= FOUND)])
    return {
        "feature": rows["feature"][kept].tolist(),
        "label": rows["label"][kept].tolist(),
        "ap": rounded(rows["ap"][kept]),
    }


def histograms(folder: Path, first: int, last: int) -> dict[int, tuple[int, list[int]]]:
    """Return the histograms of the features from `first` to before `last`: the number of the first bin, and counts.

    Bin 8 e + i goes from 2^e (1 + i / 8) to 2^e (1 + (i + 1) / 8).
    """
    rows = query(
        folder / "feature_histogram.parquet",
        "SELECT feature, low, n FROM table WHERE feature >= ? AND feature < ? ORDER BY feature, low",
        [first, last],
    )
    mantissa, exponent = np.frexp(rows["low"].astype(np.float64))
    code = 8 * (exponent.astype(np.int64) - 1) + np.rint(8 * (2 * mantissa - 1)).astype(np.int64)
    found = {}
    feature_g, starts = np.unique(rows["feature"], return_index=True)
    for feature, start, stop in zip(feature_g.tolist(), starts, [*starts[1:], len(code)], strict=True):
        mine = code[start:stop]
        counts = np.zeros(int(mine[-1] - mine[0]) + 1, dtype=np.int64)
        counts[mine - mine[0]] = rows["n"][start:stop]
        found[feature] = int(mine[0]), counts.tolist()
    return found


def packed(maps_tp: Array) -> str:
    """Return uint8 maps as text: deflated, in base64."""
    return base64.b64encode(zlib.compress(maps_tp.tobytes())).decode()


def features(
    tables: Tables,
    chosen_s: Array,
    near: tuple[Array, Array],
    keys: Sequence[str],
    on_patches: bool,
    into: Path,
    told: Callable[[int], None],
) -> dict[str, list[Any]]:
    """Write the scripts of all features; return by which classes they are found.

    Args:
        tables: what there is to say.
        chosen_s: bool: which features show images.
        near: as from `neighbours`.
        keys: of all images of the recording.
        on_patches: whether there are maps of patches.
        into: the folder of the SAE.
        told: hears how many features are written.

    """
    found: list[dict[str, Array]] = []
    for first in range(0, tables.d_sae, AT_ONCE):
        last = min(first + AT_ONCE, tables.d_sae)
        rows, bins = classes(tables.folder, first, last), histograms(tables.folder, first, last)
        starts = np.searchsorted(rows["feature"], np.arange(first, last + 1))
        for begin in range(first, last, SHARD):
            pages = []
            for feature in range(begin, min(begin + SHARD, last)):
                mine = slice(*starts[feature - first : feature - first + 2].tolist())
                page: dict[str, Any] = {
                    "histogram": bins.get(feature, (0, [])),
                    "classes": [
                        [label, *rounded(np.array(numbers))]
                        for label, by_feature, *numbers in zip(
                            *(rows[name][mine].tolist() for name in ("label", "by_feature", *MEASURES)), strict=True
                        )
                        if by_feature <= CLASSES
                    ],
                    "near": [
                        [other, round(cosine, 3)]
                        for other, cosine in zip(near[0][feature].tolist(), near[1][feature].tolist(), strict=True)
                        if other >= 0
                    ],
                }
                if chosen_s[feature]:
                    page |= _images(tables, feature, keys, on_patches)
                pages.append(page)
            number = begin // SHARD
            script(into / str(number // SCRIPTS) / f"{number}.js", f"{into.name}/{number}", pages)
            told(begin + len(pages))
        found.append({name: rows[name] for name in ("feature", "label", "ap", "by_feature")})
    return searched({name: np.concatenate([rows[name] for rows in found]) for name in found[0]})


def _images(tables: Tables, feature: int, keys: Sequence[str], on_patches: bool) -> dict[str, Any]:
    """Return the images of a feature, and its maps of them."""
    mine = slice(*tables.starts_s[feature : feature + 2].tolist())
    examples, value, score = (tables.top[name][mine] for name in ("example", "value", "score"))
    told: dict[str, Any] = {
        "images": list(
            zip(
                examples.tolist(), tables.label_n[mine].tolist(), [escaped(keys[example]) for example in examples],
                rounded(value), rounded(score), tables.top["token"][mine].tolist(), strict=True,
            )
        ),
    }  # fmt: skip
    if on_patches:
        told["maps"] = packed(pictures.maps(tables.folder / "maps.safetensors", feature)[: len(examples)])
    return told


def index(tables: Tables, ap_s: Array, chosen_s: Array, found: dict[str, list[Any]]) -> dict[str, Any]:
    """Return what is said of all features at once: what they are listed, sorted and found by.

    Args:
        tables: what there is to say.
        ap_s: how well each detects the class that it detects best.
        chosen_s: bool: which features show images.
        found: as from `features`.

    """
    label_s, most_s = tables.commonest()
    return {
        "numbers": {name: rounded(column) for name, column in tables.features.items() if not np.isnan(column).all()},
        "ap": rounded(ap_s),
        "label": label_s.tolist(),
        "most": most_s.tolist(),
        "n_images": np.diff(tables.starts_s).tolist(),
        "shown": np.where(chosen_s, np.diff(tables.starts_s), 0).tolist(),
        "found": found,
    }
