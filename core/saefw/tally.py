"""Counts what each feature does over a recording, in one pass.

Shapes: e images of a batch, p patches, s d_sae, t top, c classes, d d_embed, g pairs of an image and a feature that
fires on it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saefw import histogram, monosemantic, ranking, tensors
from saefw.detection import PAIR, RUN, Pairs
from saefw.firing import Firing, firing, most_images
from saefw.sae import Sae
from saefw.spill import Spill

IMAGE_FEATURES = 32
"""How many of its strongest features are kept for an image."""

QUANTILES = {"p50": 0.50, "p90": 0.90, "p99": 0.99}
"""By column, what is said of a feature's positive values."""

DENSE = 1 << 26
"""Dense codes held at a time, in numbers: 256 MiB of float32."""

EMBEDDED = 256
"""Images whose scores with all features are held at a time where they have embeddings."""

PAIRS, IMAGES = "pairs.bin", "images.bin"
"""Files in a tally's folder that serve the counting alone."""

ROW_GROUP = 122_880
"""Rows that DuckDB stores together, with the least and the largest value of each column."""

_TOP = np.dtype([("example", "<i4"), ("rank", "<i4"), ("feature", "<i4"), ("score", "<f4")])

Array = np.ndarray[Any, Any]


def tile(n_classes: int, d_sae: int) -> tuple[int, int]:
    """Return the classes and features whose pairs lie together, about a row group of them.

    Sorted by class, the rows of a feature would lie in all row groups; in tiles, those of a class and those of a
    feature lie in few.
    """
    side = max(1, round((n_classes * d_sae / ROW_GROUP) ** 0.5))
    return max(1, -(-n_classes // side)), -(-d_sae // side)


def waiting(features: float) -> float:
    """Return the bytes that wait in files for each image with a class, on which so many features fire."""
    return features * PAIR.itemsize + min(features, IMAGE_FEATURES) * _TOP.itemsize


class Sizes(NamedTuple):
    """What decides how much a tally holds."""

    d_sae: int
    n_patches: int
    n_classes: int
    """0: images without labels."""

    top: int
    """How many images are kept of a feature."""

    d_embed: int = 0
    """Of the images' embeddings; 0: none are given."""

    @property
    def bytes(self) -> int:
        """How much a tally holds at most, whatever the number of images."""
        with torch.device("meta"):
            held = sum(x.nbytes for x in _sums(self).values())
        return held + 4 * RUN * PAIR.itemsize


def _sums(sizes: Sizes) -> dict[str, Tensor]:
    """Return what a tally adds up, before the first image."""
    d_sae, n_classes = sizes.d_sae, sizes.n_classes
    parts = {"top": ranking.kept(d_sae, sizes.n_patches, sizes.top)}
    if sizes.d_embed:
        parts["alike"] = monosemantic.sums(d_sae, sizes.d_embed)
    return {
        "fired_s": torch.zeros(d_sae, dtype=torch.int64),
        "total_s": torch.zeros(d_sae, dtype=torch.float64),
        "max_s": torch.zeros(d_sae),
        "count_sb": histogram.counts(d_sae),
        "images_c": torch.zeros(n_classes, dtype=torch.int64),
        "pairs_s": torch.zeros(d_sae, dtype=torch.int64),
        "mass_cs": torch.zeros(n_classes, d_sae, dtype=torch.float64),
        **{f"{part}.{name}": x for part, each in parts.items() for name, x in each.items()},
    }


def check(state: Mapping[str, Tensor], sizes: Sizes) -> None:
    """See that tensors are the state of a tally of these sizes.

    Raises:
        ValueError: they are not; the text says which is wrong, and how.

    """
    with torch.device("meta"):  # sizes without memory
        sums = tensors.form(_sums(sizes))
    whole: tensors.Form = dict.fromkeys(("seen", "pairs", "pairs_crc", "images", "images_crc"), (torch.int64, ()))
    tensors.check(state, {**sums, **whole, "runs": (torch.int64, (None,))})
    slot_st = state["top.slot_st"]
    if not torch.equal(slot_st.sort(dim=1).values, torch.arange(sizes.top).expand_as(slot_st)):
        raise ValueError("'top.slot_st' is no order of maps")
    bounds = {
        "count_sb": (0, 2**31 - 1),
        "top.label_st": (-1, sizes.n_classes - 1),
        "top.token_st": (0, sizes.n_patches - 1),
        "top.example_st": (0, 2**31 - 1),
    }
    for name, (least, most) in bounds.items():
        if not least <= int(state[name].min()) <= int(state[name].max()) <= most:
            raise ValueError(f"'{name}' is not within {least}..{most}")
    if int(state["runs"].sum()) != int(state["pairs"]) or (state["runs"] < 0).any():
        raise ValueError("'runs' do not add up")


class Tally:
    """What the features of one SAE do over the images of one recording, taken in batch after batch.

    Memory does not grow with the images: float maps of the top images [s, t, p], 8 bytes a class and feature (24 when
    it is told), 8 KiB a feature for its histogram. What the average precision and the features of an image need waits
    in files: 12 bytes a labelled image and feature that fires on it, 512 bytes an image.
    """

    def __init__(self, sizes: Sizes, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Begin with no images, or go on from a `state`; files to work in lie in `folder`, cut to what they held then.

        Raises:
            ValueError: a file no longer holds that; the text says so.

        """
        self.sizes = sizes
        told = {name: int(state[name]) if state else 0 for name in ("pairs", "pairs_crc", "images", "images_crc")}
        pairs = Spill(folder / PAIRS, PAIR, (told["pairs"], told["pairs_crc"]))
        self._images = Spill(folder / IMAGES, _TOP, (told["images"], told["images_crc"]))
        self._pairs = Pairs(pairs, state["runs"].tolist() if state else ())
        self.seen = int(state["seen"]) if state else 0
        self._sums = _sums(sizes)
        if state:
            self._sums = {name: state[name].clone() for name in self._sums}

    def add(self, example_e: Tensor, label_e: Tensor, fired: Firing, embedding_ed: Tensor | None = None) -> None:
        """Take in images, in ascending order of their index.

        Args:
            example_e: int64, their indices.
            label_e: int64, their classes; -1: none.
            fired: what fires on them.
            embedding_ed: of a tally with `d_embed`.

        """
        sums = self._sums
        one_each = len(fired.value_n) == len(fired.feature_g)
        feature_n = fired.feature_g if one_each else fired.feature_g.repeat_interleave(fired.length_g)
        histogram.add(sums["count_sb"], *_where(fired.value_n > 0, feature_n, fired.value_n))
        sums["fired_s"].scatter_add_(0, fired.feature_g, fired.fires_g)
        sums["total_s"].scatter_add_(0, fired.feature_g, fired.mass_g)
        sums["max_s"].scatter_reduce_(0, fired.feature_g, fired.peak_g, "amax")
        ranking.add(self._part("top"), example_e, label_e, fired)
        self._rank_features(example_e, fired)
        if self.sizes.n_classes:
            self._classify(label_e, fired)
        if embedding_ed is not None:
            monosemantic.add(self._part("alike"), fired.image_g, fired.feature_g, fired.score_g, embedding_ed)
        self.seen += len(example_e)

    def _part(self, part: str) -> dict[str, Tensor]:
        return {name.removeprefix(f"{part}."): x for name, x in self._sums.items() if name.startswith(f"{part}.")}

    def _rank_features(self, example_e: Tensor, fired: Firing) -> None:
        """Note the strongest features of each image; of equal ones the lower number comes first."""
        bits = (self.sizes.d_sae - 1).bit_length()
        falling_g = 0x7FFFFFFF - fired.score_g.view(torch.int32).long()
        packed_g = (((fired.image_g << 31) | falling_g) << bits) | fired.feature_g
        (packed_g,) = _where(fired.score_g > 0, packed_g)
        key_g = packed_g.sort().values.numpy()
        rank_g = ranking.places(key_g >> (31 + bits))
        key_n, rank_n = key_g[rank_g < IMAGE_FEATURES], rank_g[rank_g < IMAGE_FEATURES]
        record_n = np.empty(len(key_n), dtype=_TOP)
        record_n["example"], record_n["rank"] = example_e.numpy()[key_n >> (31 + bits)], rank_n
        record_n["feature"] = key_n & ((1 << bits) - 1)
        record_n["score"] = (0x7FFFFFFF - (key_n >> bits & 0x7FFFFFFF)).astype(np.uint32).view(np.float32)
        self._images.append(record_n)

    def _classify(self, label_e: Tensor, fired: Firing) -> None:
        """Count the labelled images."""
        sums, label_g = self._sums, label_e[fired.image_g]
        sums["images_c"] += torch.bincount(label_e[label_e >= 0], minlength=self.sizes.n_classes)
        label_g, feature_g, score_g, mass_g = _where(
            label_g >= 0, label_g, fired.feature_g, fired.score_g, fired.mass_g
        )
        sums["mass_cs"].view(-1).scatter_add_(0, label_g * self.sizes.d_sae + feature_g, mass_g)
        label_g, feature_g, score_g = _where(score_g > 0, label_g, feature_g, score_g)
        sums["pairs_s"] += torch.bincount(feature_g, minlength=self.sizes.d_sae)
        self._pairs.add(feature_g.numpy(), label_g.numpy(), score_g.numpy())

    # What came of it; columns as in schema.sql.

    def features(self) -> dict[str, Any]:
        """Return a row for every feature, also those that never fire: their values are 0."""
        fired_s = self._sums["fired_s"].numpy()
        found = {
            "feature": np.arange(self.sizes.d_sae),
            "frequency": fired_s / max(1, self.seen * self.sizes.n_patches),
            "mean": self._sums["total_s"].numpy() / np.maximum(fired_s, 1),
            **dict(zip(QUANTILES, histogram.quantiles(self._sums["count_sb"], list(QUANTILES.values())), strict=True)),
            "max": self._sums["max_s"].numpy(),
        }
        if self.sizes.d_embed:
            score_s = monosemantic.scores(self._part("alike"))
            found["monosemanticity"] = np.ma.masked_invalid(score_s)
        return found

    def histogram(self) -> dict[str, Any]:
        """Return how many values of each feature lie in each bin."""
        return histogram.rows(self._sums["count_sb"])

    def top_examples(self) -> dict[str, Any]:
        """Return the strongest images of each feature; of equal ones the lower index comes first."""
        found = ranking.rows(self._part("top"))
        return {name: found[name] for name in ("feature", "rank", "example", "token", "value", "score")}

    def maps(self) -> Tensor:
        """Return uint8 [s, t, p]: the values on the patches of the top images, 255 being the feature's largest."""
        return ranking.maps(self._part("top"), self._sums["max_s"])

    def top_features(self) -> dict[str, Any]:
        """Return the strongest features of each image; of equal ones the lower number comes first."""
        record_n = np.asarray(self._images.read())
        return {name: record_n[name] for name in ("example", "rank", "feature", "score")}

    def purity(self) -> Array:
        """Return by class and feature the share of its `top` images that are of the class, float32 [c, s].

        Of as many as were asked for, so a feature with fewer is less pure than it looks.
        """
        label_st = self._sums["top.label_st"].numpy()
        feature_n, rank_n = np.nonzero(label_st >= 0)
        count_cs = np.zeros((self.sizes.n_classes, self.sizes.d_sae), dtype=np.float32)
        np.add.at(count_cs, (label_st[feature_n, rank_n], feature_n), 1)
        count_cs /= self.sizes.top
        return count_cs

    def class_features(self) -> dict[str, Any]:
        """Return a row for every class and feature that fires on one of its images, over the labelled images.

        They lie in tiles, see `tile`; in a tile by class, then by feature.
        """
        images_c, pairs_s, mass_cs = (self._sums[name].numpy() for name in ("images_c", "pairs_s", "mass_cs"))
        found = self._pairs.detected(images_c, pairs_s)
        label, feature = _in_tiles(found.fired_cs)
        n = images_c[label]
        # Of a feature that fires on [CLS] alone there is no mass.
        mass_s = np.maximum(mass_cs.sum(axis=0), np.finfo(np.float64).tiny)
        return {
            "label": label,
            "feature": feature,
            "rate": (found.fired_cs[label, feature] / n).astype(np.float32),
            "mean": (found.score_cs[label, feature] / n).astype(np.float32),
            "share": (mass_cs[label, feature] / mass_s[feature]).astype(np.float32),
            "ap": found.ap_cs[label, feature],
            "purity": self.purity()[label, feature],
        }

    # Going on after a stop

    def state(self) -> dict[str, Tensor]:
        """Return all it knows, as tensors; what the files hold is on the disk when this returns."""
        self._pairs.flush()
        (pairs, pairs_crc), (images, images_crc) = self._pairs.spill.mark(), self._images.mark()
        told = {"pairs": pairs, "pairs_crc": pairs_crc, "images": images, "images_crc": images_crc, "seen": self.seen}
        runs = torch.tensor(self._pairs.runs, dtype=torch.int64)
        return {**self._sums, **{name: torch.tensor(value) for name, value in told.items()}, "runs": runs}


def _where(mask_g: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
    """Return what columns hold where a mask is set; mostly it is everywhere, and nothing is copied."""
    return columns if mask_g.all() else tuple(x[mask_g] for x in columns)


def _in_tiles(fired_cs: Array) -> tuple[Array, Array]:
    """Return class and feature, int32, of the pairs that are not 0."""
    classes, features = tile(*fired_cs.shape)
    none = np.empty(0, dtype=np.int32)
    label, feature = [none], [none]
    for c in range(0, fired_cs.shape[0], classes):
        for s in range(0, fired_cs.shape[1], features):
            found = np.nonzero(fired_cs[c : c + classes, s : s + features])
            label.append((c + found[0]).astype(np.int32))
            feature.append((s + found[1]).astype(np.int32))
    return np.concatenate(label), np.concatenate(feature)


@torch.no_grad()
def feed(
    tally: Tally,
    sae: Sae,
    example_e: Tensor,
    label_e: Tensor,
    x_epd: Tensor,
    score: str = "max",
    cls_ed: Tensor | None = None,
    embedding_ed: Tensor | None = None,
) -> None:
    """Encode images, as many at a time as fit, and count them; arguments as of `firing` and `Tally.add`."""
    n_patches = x_epd.shape[1]
    at_once = max(1, min(DENSE // (n_patches * sae.d_sae), most_images(sae.d_sae, n_patches)))
    if embedding_ed is not None:
        at_once = min(at_once, EMBEDDED)
    for first in range(0, len(x_epd), at_once):
        part = slice(first, first + at_once)
        cls, embedding = (None if x is None else x[part] for x in (cls_ed, embedding_ed))
        fired = firing(sae, x_epd[part], score, cls)
        tally.add(example_e[part], label_e[part], Firing(*(x.cpu() for x in fired)), embedding)
