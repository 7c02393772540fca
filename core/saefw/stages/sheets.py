"""Draws contact sheets of features: their strongest images, with the patches lit on which they fire.

Shapes: n images, h height, w width, c colours, t top, p patches.
"""

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field

from saefw import pictures, samples, sealed
from saefw.care import settle, writing
from saefw.choice import Best, Choice, best_classes, picked
from saefw.facts import commonest
from saefw.originals import Unreadable
from saefw.pictures import Tile
from saefw.plugin import Names, Pace, Pick, Run, StageConfig, Unit, UserError, hookimpl, timed
from saefw.stages.train import Clock
from saefw.stages.visuals import MAPS, PICTURES, d_sae, looked_at

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection
    from PIL.Image import Image

FOLDER = "features"
"""Of the sheets, each called by the number of its feature."""

BYTES = 5000
"""That an image takes on a sheet, about."""

SMALL = "small.bin"
"""The images as they stand on sheets, one after the other; serves the drawing alone."""

DRAWN = "drawn.safetensors"
"""The sheets that are on the disk, for a run that goes on; serves the drawing alone."""

CHECKPOINT = 60.0
"""Seconds between two looks at what is on the disk."""


class Sheets(StageConfig):
    """Draws features, each with its strongest images, what they are of, and the patches that it fires on."""

    use: Literal["sheets"] = "sheets"

    visuals: Annotated[str, Names("stages")]
    """The stage that found the images of the features."""

    sae: Pick | None = None
    """Which SAE, by its own metrics (nmse, l0, dead) or those of its features (n_pure, n_live); null: each."""

    features: Choice = Choice()
    """Which features get a sheet; all are in the table `feature`."""

    images: int | None = Field(None, gt=0)
    """How many images of each, from the strongest on; null: all that were kept."""

    side: int = Field(128, ge=16, le=1024)
    """Of an image, the longer one, in pixels."""

    def units(self, run: Run) -> Iterator[Unit]:
        """List one unit for each SAE and recording, or for the one that is picked.

        Raises:
            NotYet: the SAE is picked by what is not measured yet.
            UserError: no SAE fits, or `include` names a feature that one does not have.

        """
        tables = run.made_by(self.visuals, "visuals")
        if self.sae is not None:
            address = tables[0].address
            if run.decided(self.visuals, tables):
                with run.db() as db:
                    address, _, _ = picked(db, self.sae, self.visuals, [unit.address for unit in tables])
            tables = [unit for unit in tables if unit.address == address]
        content = {name: value for name, value in self.content().items() if name not in ("use", "sae")}
        for unit in tables:
            n = d_sae(unit.needs[0])
            beyond = [feature for feature in self.features.include if not 0 <= feature < n]
            if beyond:
                raise UserError(f"sheets: include: feature {beyond[0]} is not among the {n} of {unit.label}")
            yield Unit("sheets", content, needs=(unit,), label=unit.label)

    def disk(self, unit: Unit, run: Run) -> int:
        """Return about the bytes of the sheets."""
        return self._n(unit) * self._images(unit) * BYTES

    def duration(self, units: Sequence[Unit], run: Run, pace: Pace) -> float:
        """Return the seconds of as many sheets, each of other images."""
        total = 0.0
        for unit in units:
            recording = unit.needs[0].needs[1]
            sheet = partial(_sheet_seconds, recording, run, self._images(unit), self.side)
            total += self._n(unit) * pace(f"a sheet, {recording.label}", sheet)
        return total

    def _n(self, unit: Unit) -> int:
        return min(d_sae(unit.needs[0].needs[0]), self.features.n + len(self.features.include))

    def _images(self, unit: Unit) -> int:
        top: int = unit.needs[0].content["top"]
        return min(top, self.images or top)

    def make(self, units: Sequence[Unit], run: Run) -> None:
        """Draw each unit; sheets drawn by an interrupted run are not drawn again.

        Raises:
            UserError: there is no such class or feature, or nothing to order features by.

        """
        for unit in units:
            self._draw(unit, run)

    def _draw(self, unit: Unit, run: Run) -> None:
        (tables,), n_images = unit.needs, self._images(unit)
        folder, source = run.folder(unit), run.folder(tables)
        with run.db() as db:
            try:
                chosen = sorted(self.features.choose(db, tables.address))
            except UserError as error:
                raise UserError(f"sheets: features: {error}") from error
            told = _told(db, tables.address, chosen)
            grid = pictures.grid(db, tables.address)
        (folder / FOLDER).mkdir(exist_ok=True)
        drawn = _drawn(folder)
        missing = [feature for feature in chosen if feature not in drawn]
        shown = {example for feature in missing for example, _ in told[feature].images[:n_images]}
        small = Small(folder / SMALL, source / PICTURES, sorted(shown), self.side, run)
        saving, fresh = Clock(CHECKPOINT), []
        for i, feature in enumerate(missing):
            maps_tp = pictures.maps(source / MAPS, feature)
            tiles = [
                Tile(small.view(example), pictures.on_grid(maps_tp[rank], grid), caption)
                for rank, (example, caption) in enumerate(told[feature].images[:n_images])
            ]
            fresh.append(path := folder / FOLDER / f"{feature}.webp")
            data = pictures.webp(_sheet(feature, told[feature], tiles, looked_at(tables), self.side))
            with writing(path):
                path.write_bytes(data)
            drawn[feature] = zlib.crc32(data)
            if saving.due():
                _note(folder, drawn, fresh)
                saving.restart(CHECKPOINT)
            run.progress(i + 1, len(missing), "sheets")
        files = [f"{FOLDER}/{feature}.webp" for feature in chosen]
        run.put(unit, "sheet", visuals=tables.address, feature=np.array(chosen, dtype=np.int32), file=files)
        run.keep(unit, without=[SMALL, DRAWN])


# What is said of a feature


class Told(NamedTuple):
    """What the tables say of a feature."""

    frequency: float
    largest: float
    """Of its values."""

    best: Best | None
    """The class that it detects best."""

    images: list[tuple[int, str]]
    """Its images, from the strongest on: each with what is written below it, its class or its name."""

    commonest: str | None
    """The class that most of them are of; None without classes."""

    n_commonest: int


def _told(db: "DuckDBPyConnection", unit: str, features: Sequence[int]) -> dict[int, Told]:
    """Return what the tables of a visuals unit say of some features."""
    asked = {"unit": unit, "features": list(features)}
    some = "SEMI JOIN (SELECT unnest($features::INTEGER[]) AS feature) USING (feature)"
    images: dict[int, list[tuple[int, str, str | None]]] = {}
    for feature, *image in db.execute(
        f"SELECT feature, t.example, e.key, c.name FROM top_example t {some} JOIN example e ON e.unit = t.acts AND "
        "e.example = t.example LEFT JOIN class c ON c.unit = e.unit AND c.label = e.label WHERE t.unit = $unit "
        "ORDER BY feature, t.rank",
        asked,
    ).fetchall():
        images.setdefault(feature, []).append(tuple(image))
    told, classes = {}, best_classes(db, unit)
    for feature, frequency, largest in db.execute(
        f"SELECT feature, frequency, max FROM feature {some} WHERE unit = $unit", asked
    ).fetchall():
        ours = images.get(feature, [])
        most = commonest(name for _, _, name in ours)
        captions = [(example, key if name is None else name) for example, key, name in ours]
        told[feature] = Told(frequency, largest, classes.get(feature), captions, *most)
    return told


def _sheet(feature: int, told: Told, tiles: Sequence[Tile], tokens: str, side: int) -> "Image":
    said = [f"fires on {percent(told.frequency)} of {'patches' if tokens == 'patches' else 'images'}"]
    if told.commonest:
        said.append(f"{told.n_commonest} of {len(told.images)} images: {told.commonest}")
    if told.best:
        said.append(f"detects {told.best.name} with average precision {told.best.ap:.2f}")
    largest = told.largest if tokens == "patches" else None
    return pictures.sheet(
        tiles, f"Feature {feature}", " · ".join(said), columns=min(8, max(4, len(tiles))), side=side, largest=largest
    )


def percent(share: float) -> str:
    """Return a share as people write it: `3.4 %`, `0.012 %`."""
    return f"{float(f'{100 * share:.2g}'):.12g} %"


# Images, each decoded once


class Small:
    """Images as they stand on sheets, each decoded once, in a file: memory does not grow with their number."""

    def __init__(self, path: Path, source: Path, examples: Sequence[int], side: int, run: Run) -> None:
        """Bring some images of a `picture.parquet` to their size.

        Args:
            path: the file to write them to.
            source: the `picture.parquet`.
            examples: which.
            side: of each, the longer one, in pixels.
            run: is told how many are done.

        """
        self._rows: dict[int, int] = {}
        shape: tuple[int, ...] = ()
        with writing(path), path.open("wb") as file:
            for example, view in pictures.each(source, examples):
                x_hwc = np.asarray(pictures.enlarged(view, side))
                shape = x_hwc.shape  # of all: the crop of one model
                file.write(x_hwc.tobytes())
                self._rows[example] = len(self._rows)
                run.progress(len(self._rows), len(examples), "pictures")
        if self._rows:
            self._x_nhwc = np.memmap(path, np.uint8, "r").reshape(-1, *shape)

    def view(self, example: int) -> "Image":
        """Return an image, RGB."""
        from PIL import Image

        return Image.fromarray(self._x_nhwc[self._rows[example]])


# Going on after a stop


def _drawn(folder: Path) -> dict[int, int]:
    """Return the sheets that an interrupted run left whole, each with its checksum."""
    form = {"feature": (torch.int64, (None,)), "crc": (torch.int64, (None,))}
    found, drawn = sealed.read(folder / DRAWN, form), {}
    for feature, crc in zip(*(found[0][name].tolist() for name in form), strict=True) if found else ():
        path = folder / FOLDER / f"{feature}.webp"
        if path.is_file() and zlib.crc32(path.read_bytes()) == crc:
            drawn[feature] = crc
    return drawn


def _note(folder: Path, drawn: Mapping[int, int], fresh: list[Path]) -> None:
    """Note the sheets that are drawn, once those that are new are on the disk."""
    while fresh:
        settle(fresh.pop())
    noted = {"feature": torch.tensor(list(drawn)), "crc": torch.tensor(list(drawn.values()))}
    sealed.write(folder / DRAWN, noted)


def _sheet_seconds(recording: Unit, run: Run, images: int, side: int) -> float:
    """Return the seconds in which a sheet is drawn; nan if the first image cannot be read."""
    try:
        view = samples.view(recording, run, 0)
    except Unreadable:
        return math.nan
    map_hw = np.random.default_rng(0).integers(0, 256, samples.shape(recording).grid, dtype=np.uint8)
    data = pictures.png(view)
    told = Told(0.1, 1.0, Best("class", 0.5), [(0, "caption")] * images, "class", images)

    def draw() -> bytes:
        tiles = [Tile(pictures.opened(data), map_hw, "caption") for _ in range(images)]
        return pictures.webp(_sheet(0, told, tiles, "patches", side))

    return timed(draw)


@hookimpl
def saefw_stages() -> list[type[StageConfig]]:
    """One: sheets."""
    return [Sheets]
