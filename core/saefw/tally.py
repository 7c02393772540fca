"""Counts what each feature does over a recording, in one pass.

Shapes: e images of a batch, p patches, s d_sae, t top, c classes, f features kept an image; `codes_eps` has shape
[e, p, s].
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from saefw import tensors
from saefw.care import writing

IMAGE_FEATURES = 32
"""How many of its strongest features are kept for an image."""

EXACT = 1 << 24
"""Up to so many positive values are kept, 8 bytes each, and their percentiles are exact."""

BLOCK = 1 << 24
"""So many (feature, image) pairs at most are sorted at once for the average precision."""

_LOWEST, _OCTAVES, _STEPS = -20, 32, 64
_PAIR = np.dtype([("feature", "<u4"), ("label", "<u4"), ("value", "<f4")])


def most(d_sae: int) -> int:
    """Return the bytes that the percentiles of an SAE hold at most: its values, then a histogram."""
    return max(8 * EXACT, 4 * _OCTAVES * _STEPS * d_sae)


class Percentiles:
    """Percentiles of the positive values of each feature.

    Exact (numpy's linear interpolation) while there are at most `exact` values in all. Beyond that a histogram: 64
    equal steps an octave from 2^-20 to 2^12, so what it returns is within 1/128 (0.8 %) of the value at that rank;
    values outside count as the nearest step.
    """

    STATE = ("keys", "histogram", "n")

    def __init__(self, d_sae: int, exact: int = EXACT) -> None:
        """Begin with no values."""
        self.d_sae, self.exact = d_sae, exact
        self.n = 0
        self._keys: list[Tensor] = []
        self._histogram: Tensor | None = None

    def add(self, feature_n: Tensor, value_n: Tensor) -> None:
        """Take in positive float32 values and the int64 features they are of."""
        # The bits of a positive float sort as the float does, so one int64 holds feature and value in order.
        key_n = (feature_n << 32) | value_n.view(torch.int32).long()
        self.n += len(key_n)
        if self._histogram is not None:
            self._count(self._histogram, key_n)
            return
        self._keys.append(key_n)
        if self.n > self.exact:
            self._histogram = torch.zeros(self.d_sae * _OCTAVES * _STEPS, dtype=torch.int32)
            for key_n in self._keys:
                self._count(self._histogram, key_n)
            self._keys = []

    def _count(self, histogram: Tensor, key_n: Tensor) -> None:
        # Exponent and the six bits after it: 64 equal steps an octave.
        step_n = ((key_n & 0xFFFFFFFF) >> 17) - ((127 + _LOWEST) << 6)
        slot_n = (key_n >> 32) * (_OCTAVES * _STEPS) + step_n.clamp(0, _OCTAVES * _STEPS - 1)
        histogram.scatter_add_(0, slot_n, torch.ones_like(slot_n, dtype=torch.int32))

    def result(self, q: float) -> np.ndarray[Any, Any]:
        """Return the percentile `q` (0 to 100) of each feature, float64 [s]; 0 where it has no values."""
        if self._histogram is not None:
            return self._from_histogram(self._histogram.view(self.d_sae, -1).numpy(), q)
        key_n = np.sort(torch.cat([torch.empty(0, dtype=torch.int64), *self._keys]).numpy())
        value_n = (key_n & 0xFFFFFFFF).astype(np.uint32).view(np.float32).astype(np.float64)
        first_s = np.searchsorted(key_n, np.arange(self.d_sae + 1, dtype=np.int64) << 32)
        n_s = np.diff(first_s)
        live_s = n_s > 0
        place_s = (n_s[live_s] - 1) * q / 100
        below_s = first_s[:-1][live_s] + np.floor(place_s).astype(np.int64)
        above_s = first_s[:-1][live_s] + np.ceil(place_s).astype(np.int64)
        found_s = np.zeros(self.d_sae)
        found_s[live_s] = value_n[below_s] + (value_n[above_s] - value_n[below_s]) * (place_s % 1)
        return found_s

    def _from_histogram(self, count_sb: np.ndarray[Any, Any], q: float) -> np.ndarray[Any, Any]:
        found_s = np.zeros(self.d_sae)
        for feature in np.flatnonzero(count_sb.any(axis=1)):
            upto_b = np.cumsum(count_sb[feature], dtype=np.int64)
            step = int(np.searchsorted(upto_b, int((upto_b[-1] - 1) * q / 100), side="right"))
            octave, part = divmod(step, _STEPS)
            found_s[feature] = 2.0 ** (_LOWEST + octave) * (1 + (part + 0.5) / _STEPS)
        return found_s

    def state(self) -> dict[str, Tensor]:
        """Return all it knows, as tensors."""
        empty = torch.empty(0, dtype=torch.int64)
        return {
            "keys": torch.cat([empty, *self._keys]),
            "histogram": empty if self._histogram is None else self._histogram,
            "n": torch.tensor(self.n),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        self._keys, self.n = [state["keys"]], int(state["n"])
        self._histogram = state["histogram"].clone() if len(state["histogram"]) else None


def _sums(d_sae: int, n_patches: int, n_classes: int, top: int) -> dict[str, Tensor]:
    """Return what a tally adds up, before the first image."""
    return {
        "fired_s": torch.zeros(d_sae, dtype=torch.int64),
        "total_s": torch.zeros(d_sae, dtype=torch.float64),
        "top_value_st": torch.zeros(d_sae, top),
        "top_example_st": torch.zeros(d_sae, top, dtype=torch.int64),
        "map_stp": torch.zeros(d_sae, top, n_patches),
        "images_c": torch.zeros(n_classes, dtype=torch.int64),
        "fired_cs": torch.zeros(n_classes, d_sae, dtype=torch.int64),
        "peak_cs": torch.zeros(n_classes, d_sae, dtype=torch.float64),
        "mass_cs": torch.zeros(n_classes, d_sae, dtype=torch.float64),
    }


def check(state: Mapping[str, Tensor], d_sae: int, n_patches: int, n_classes: int, top: int) -> None:
    """See that tensors are the state of a tally of these sizes.

    Raises:
        ValueError: they are not; the text says which is wrong, and how.

    """
    with torch.device("meta"):  # sizes without memory
        sums = tensors.form(_sums(d_sae, n_patches, n_classes, top))
    whole: tensors.Form = dict.fromkeys(("seen", "pairs", "pairs_crc", "percentiles.n"), (torch.int64, ()))
    n_kept = min(IMAGE_FEATURES, d_sae)
    kept: tensors.Form = {
        "images.example": (torch.int64, (None,)),
        "images.feature": (torch.int64, (None, n_kept)),
        "images.value": (torch.float32, (None, n_kept)),
    }
    bins = state.get("percentiles.histogram", torch.empty(0))
    # Its counts are int32; where values are still exact it is empty.
    counted = {"percentiles.histogram": (bins.dtype, (d_sae * _OCTAVES * _STEPS if len(bins) else 0,))}
    keys = {"percentiles.keys": (torch.int64, (None,))}
    tensors.check(state, {**sums, **whole, **kept, **counted, **keys})
    for name, key_n in (
        ("images.feature", state["images.feature"].flatten()),
        ("percentiles.keys", state["percentiles.keys"] >> 32),
    ):
        if len(key_n) and not 0 <= int(key_n.min()) <= int(key_n.max()) < d_sae:
            raise ValueError(f"'{name}' speaks of features that are none")


class Tally:
    """What the features of one SAE do over the images of one recording, taken in batch after batch.

    Memory: [s, t, p] floats for the maps of the top images, 24 bytes a class and feature, 12 f bytes an image. The
    (feature, image) pairs that the average precision needs wait in the file `pairs`, 12 bytes each.
    """

    def __init__(
        self,
        d_sae: int,
        n_patches: int,
        n_classes: int,
        top: int,
        pairs: Path,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Begin with no images, or go on from a `state`; `pairs` is a file to work in, cut to what it held then.

        Raises:
            ValueError: the file no longer holds that; the text says so.

        """
        self.d_sae, self.n_patches, self.n_classes, self.top = d_sae, n_patches, n_classes, top
        self.seen = 0
        self.percentiles = Percentiles(d_sae)
        self._pairs = pairs
        self._kept = min(IMAGE_FEATURES, d_sae)
        self._images: list[tuple[Tensor, Tensor, Tensor]] = []
        self._sums = _sums(d_sae, n_patches, n_classes, top)
        self._sum = 0
        damaged = ValueError(f"{pairs}: damaged; it is not used, and what it held is made again")
        kept = int(state["pairs"]) if state else 0
        if not 0 <= kept <= (pairs.stat().st_size if pairs.exists() else 0):
            raise damaged
        with writing(pairs), pairs.open("ab") as file:
            file.truncate(kept)
        if state:
            self._sum = _crc(pairs)
            if self._sum != int(state["pairs_crc"]):
                raise damaged
            self.seen = int(state["seen"])
            self._sums = {name: state[name].clone() for name in self._sums}
            self._images = [(state["images.example"], state["images.feature"], state["images.value"])]
            self.percentiles.load({name: state[f"percentiles.{name}"] for name in Percentiles.STATE})

    def add(self, example_e: Tensor, label_e: Tensor, codes_eps: Tensor) -> None:
        """Take in images, in ascending order of their index: int64 indices and labels (-1: none), dense codes."""
        peak_es = codes_eps.amax(dim=1).float().cpu()
        mass_es = codes_eps.sum(dim=1, dtype=torch.float32).cpu()
        fires_eps = codes_eps > 0
        feature_n, value_n = fires_eps.nonzero()[:, 2], codes_eps[fires_eps].float()
        self.percentiles.add(feature_n.cpu(), value_n.cpu())
        sums = self._sums
        sums["fired_s"] += torch.bincount(feature_n, minlength=self.d_sae).cpu()
        sums["total_s"] += mass_es.sum(dim=0, dtype=torch.float64)
        self._rank(example_e, peak_es, codes_eps)
        # A stable sort: of equal features the lower number comes first.
        value_es, feature_es = peak_es.sort(dim=1, descending=True, stable=True)
        self._images.append((example_e, feature_es[:, : self._kept].clone(), value_es[:, : self._kept].clone()))
        labelled = label_e >= 0
        if labelled.any():
            self._classify(label_e[labelled], peak_es[labelled], mass_es[labelled])
        self.seen += len(example_e)

    def _rank(self, example_e: Tensor, peak_es: Tensor, codes_eps: Tensor) -> None:
        """Merge a batch into the top images of the features that it changes."""
        sums, top = self._sums, self.top
        # Strictly above: of equal images the earlier one stays.
        rows = (peak_es.amax(dim=0) > sums["top_value_st"][:, -1]).nonzero()[:, 0]
        if not len(rows):
            return
        value_rm = torch.cat([sums["top_value_st"][rows], peak_es[:, rows].T], dim=1)
        example_rm = torch.cat([sums["top_example_st"][rows], example_e.expand(len(rows), -1)], dim=1)
        value_rm, order_rm = value_rm.sort(dim=1, descending=True, stable=True)
        order_rt = order_rm[:, :top]
        sums["top_value_st"][rows] = value_rm[:, :top]
        sums["top_example_st"][rows] = example_rm.gather(1, order_rt)
        old_rtp = sums["map_stp"][rows]
        map_rtp = old_rtp.gather(1, order_rt.clamp(max=top - 1).unsqueeze(2).expand(-1, -1, self.n_patches))
        row, rank = (order_rt >= top).nonzero(as_tuple=True)
        source = (order_rt[row, rank] - top).to(codes_eps.device)
        map_rtp[row, rank] = codes_eps[source, :, rows[row].to(codes_eps.device)].float().cpu()
        sums["map_stp"][rows] = map_rtp

    def _classify(self, label_e: Tensor, peak_es: Tensor, mass_es: Tensor) -> None:
        sums = self._sums
        sums["images_c"] += torch.bincount(label_e, minlength=self.n_classes)
        for label in sorted(set(label_e.tolist())):
            of = label_e == label
            sums["fired_cs"][label] += (peak_es[of] > 0).sum(dim=0)
            sums["peak_cs"][label] += peak_es[of].sum(dim=0, dtype=torch.float64)
            sums["mass_cs"][label] += mass_es[of].sum(dim=0, dtype=torch.float64)
        image, feature = (peak_es > 0).nonzero(as_tuple=True)
        pair_n = np.empty(len(image), dtype=_PAIR)
        pair_n["feature"], pair_n["label"], pair_n["value"] = feature, label_e[image], peak_es[image, feature]
        data = pair_n.tobytes()
        with writing(self._pairs), self._pairs.open("ab") as file:
            file.write(data)
        self._sum = crc32(data, self._sum)

    # What came of it; columns as in schema.sql.

    def features(self) -> dict[str, Any]:
        """Return a row for every feature, also those that never fire: their values are 0."""
        fired_s = self._sums["fired_s"].numpy()
        return {
            "feature": np.arange(self.d_sae),
            "frequency": fired_s / max(1, self.seen * self.n_patches),
            "mean": self._sums["total_s"].numpy() / np.maximum(fired_s, 1),
            "p99": self.percentiles.result(99),
            "max": self._sums["top_value_st"][:, 0].numpy(),
        }

    def top_examples(self) -> dict[str, Any]:
        """Return the strongest images of each feature; of equal ones the lower index comes first."""
        value_st = self._sums["top_value_st"].numpy()
        feature, rank = np.nonzero(value_st > 0)
        return {
            "feature": feature,
            "rank": rank,
            "example": self._sums["top_example_st"].numpy()[feature, rank],
            "token": self._sums["map_stp"].numpy().argmax(axis=2)[feature, rank],
            "value": value_st[feature, rank],
        }

    def maps(self) -> Tensor:
        """Return uint8 [s, t, p]: the values on the patches of the top images, 255 being the feature's largest."""
        largest_s = self._sums["top_value_st"][:, 0].clamp(min=torch.finfo(torch.float32).tiny)
        return (self._sums["map_stp"] / largest_s[:, None, None] * 255).round().to(torch.uint8)

    def top_features(self) -> dict[str, Any]:
        """Return the strongest features of each image; of equal ones the lower number comes first."""
        example_n, feature_nf, value_nf = (torch.cat(parts).numpy() for parts in zip(*self._images, strict=True))
        row, rank = np.nonzero(value_nf > 0)
        return {
            "example": example_n[row],
            "rank": rank,
            "feature": feature_nf[row, rank],
            "value": value_nf[row, rank],
        }

    def class_features(self) -> dict[str, Any]:
        """Return a row for every class and feature that fires on one of its images, over the labelled images.

        `ap` is the average precision as scikit-learn defines it, the sum of (R_n - R_n-1) P_n over the distinct
        values, images on which the feature does not fire coming last together.
        """
        sums = {name: tensor.numpy() for name, tensor in self._sums.items()}
        label, feature = np.nonzero(sums["fired_cs"])
        n = sums["images_c"][label]
        return {
            "label": label,
            "feature": feature,
            "rate": sums["fired_cs"][label, feature] / n,
            "mean": sums["peak_cs"][label, feature] / n,
            "share": sums["mass_cs"][label, feature] / sums["mass_cs"].sum(axis=0)[feature],
            "ap": self._average_precision()[label, feature],
        }

    def _average_precision(self) -> np.ndarray[Any, Any]:
        fired_cs, images_c = self._sums["fired_cs"].numpy(), self._sums["images_c"].numpy()
        found_cs = np.zeros((self.n_classes, self.d_sae))
        for pair_n in self._blocks(fired_cs.sum(axis=0)):
            # Sorted by feature, then class, then falling value: the last of equal values says how many of the class
            # are at least so strong; the same without the class says how many images are.
            feature_n, label_n = pair_n["feature"].astype(np.int64), pair_n["label"].astype(np.int64)
            falling_n = 0xFFFFFFFF - pair_n["value"].view(np.uint32).astype(np.int64)
            hits_n = _at_least((feature_n * self.n_classes + label_n), falling_n)
            precision_n = hits_n / _at_least(feature_n, falling_n)
            np.add.at(found_cs, (label_n, feature_n), precision_n)
        # The images left over are recalled together at the very end, where the precision is the share of the class.
        found_cs += (images_c[:, None] - fired_cs) * (images_c[:, None] / max(1, images_c.sum()))
        found_cs /= np.maximum(images_c, 1)[:, None]
        return found_cs

    def _blocks(self, pairs_s: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
        """Yield all pairs of a range of features at a time, so many ranges that a block fits in memory."""
        if not self._pairs.stat().st_size:
            return
        block_s = np.cumsum(pairs_s) // BLOCK
        stored_n = np.memmap(self._pairs, dtype=_PAIR, mode="r")
        for block in np.unique(block_s):
            parts = []
            for first in range(0, len(stored_n), BLOCK):
                part_n = np.asarray(stored_n[first : first + BLOCK])
                parts.append(part_n[block_s[part_n["feature"]] == block])
            yield np.concatenate(parts)

    # Going on after a stop

    def state(self) -> dict[str, Tensor]:
        """Return all it knows, as tensors; what the file of pairs holds is on the disk when this returns."""
        with self._pairs.open("rb+") as file:
            os.fsync(file.fileno())
        example, feature, value = (torch.cat(parts) for parts in zip(*self._images, strict=True))
        return {
            **self._sums,
            **{f"percentiles.{name}": tensor for name, tensor in self.percentiles.state().items()},
            "images.example": example,
            "images.feature": feature,
            "images.value": value,
            "seen": torch.tensor(self.seen),
            "pairs": torch.tensor(self._pairs.stat().st_size),
            "pairs_crc": torch.tensor(self._sum),
        }


def _crc(path: Path) -> int:
    """Return the CRC-32 of a file."""
    found = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found = crc32(block, found)
    return found


def _at_least(group_n: np.ndarray[Any, Any], falling_n: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return for each item how many of its group are at least as strong, itself included."""
    order_n = np.lexsort((falling_n, group_n))
    group_n, falling_n = group_n[order_n], falling_n[order_n]
    place_n = np.arange(len(group_n))
    opens_n = np.r_[True, group_n[1:] != group_n[:-1]]
    closes_n = np.r_[opens_n[1:] | (falling_n[1:] != falling_n[:-1]), True]
    first_n = np.maximum.accumulate(np.where(opens_n, place_n, 0))
    last_n = place_n[closes_n][np.cumsum(closes_n) - closes_n]
    counts_n = np.empty(len(group_n), dtype=np.int64)
    counts_n[order_n] = last_n - first_n + 1
    return counts_n
