"""Draws contact sheets of features.

Shapes: p patches, s d_sae, t top, c classes.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from saefw import pictures, samples
from saefw.acts import Acts
from saefw.originals import Unreadable
from saefw.pictures import Tile
from saefw.plugin import Run, Unit, timed
from saefw.tally import Tally

if TYPE_CHECKING:
    from PIL.Image import Image

Array = np.ndarray[Any, Any]

TILE = 5000
"""Bytes that an image takes on a sheet, about."""


class Findings(NamedTuple):
    """What the sheets of an SAE show."""

    features: dict[str, Any]
    """Rows of `feature`."""

    top: dict[str, Any]
    """Rows of `top_example`."""

    maps_stp: Array
    """uint8: how strongly each patch of the top images is lit."""

    share_s: Array
    """Share of the commonest class among the top images: of as many as were asked for, so a feature with fewer is less
    pure than it looks."""

    label_s: Array
    """That class; -1: none."""

    @classmethod
    def of(cls, tally: Tally) -> "Findings":
        """Read them off a tally."""
        purity_cs = tally.purity()
        share_s = purity_cs.max(axis=0, initial=0)
        label_s = np.where(share_s > 0, purity_cs.argmax(axis=0), -1) if len(purity_cs) else share_s.astype(int) - 1
        return cls(tally.features(), tally.top_examples(), tally.maps().numpy(), share_s, label_s)


def sheet(
    feature: int, found: Findings, acts: Acts, views: Mapping[int, "Image"], top: int, on_patches: bool
) -> "Image":
    """Draw the contact sheet of a feature from its `top` images."""
    rows = found.top["feature"] == feature
    examples = found.top["example"][rows].tolist()
    tiles = [
        Tile(
            views[example],
            pictures.on_grid(found.maps_stp[feature, rank], acts.grid),
            acts.classes[acts.labels[example]] if acts.labels[example] >= 0 else acts.keys[example],
        )
        for rank, example in enumerate(examples)
    ]
    share = percent(found.features["frequency"][feature])
    said = [f"fires on {share} of {'patches' if on_patches else 'images'}"]
    if found.share_s[feature] > 0:
        n, name = round(found.share_s[feature] * top), acts.classes[found.label_s[feature]]
        said.append(f"{n} of {len(tiles)} images: {name}")
    if tiles:
        said.append(f"largest value {found.features['max'][feature]:.3g}")
    return pictures.sheet(tiles, f"Feature {feature}", " · ".join(said), columns=min(8, max(4, len(tiles))))


def percent(share: float) -> str:
    """Return a share as people write it: `3.4 %`, `0.012 %`."""
    return f"{float(f'{100 * share:.2g}'):.12g} %"


def picture_seconds(recording: Unit, run: Run) -> float:
    """Return the seconds in which an image becomes a PNG; nan if the first one cannot be read."""
    try:
        view = samples.view(recording, run, 0)
    except Unreadable:
        return math.nan
    return timed(lambda: pictures.png(view))


def sheet_seconds(recording: Unit, run: Run, top: int) -> float:
    """Return the seconds in which a sheet is drawn; nan if the first image cannot be read."""
    try:
        view = samples.view(recording, run, 0)
    except Unreadable:
        return math.nan
    map_hw = np.random.default_rng(0).integers(0, 256, samples.shape(recording).grid, dtype=np.uint8)
    data = pictures.png(view)

    def draw() -> bytes:
        tiles = [Tile(pictures.opened(data), map_hw, "caption") for _ in range(top)]
        return pictures.png(pictures.sheet(tiles, "title", "", columns=min(8, max(4, top))))

    return timed(draw)
