"""Finds each feature's strongest images and draws them.

Shapes: e images, p patches, d d_model, s d_sae, t top.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import save

from saefw import pictures
from saefw import tensors as files
from saefw.pictures import Tile
from saefw.plugin import (
    Backbone,
    BackboneConfig,
    BackboneInfo,
    Dataset,
    DatasetConfig,
    Knob,
    Names,
    Run,
    SaeConfig,
    Split,
    StageConfig,
    Unit,
    UserError,
    hookimpl,
)
from saefw.sae import Sae
from saefw.shards import Acts
from saefw.stages.train import Clock, open_sae
from saefw.store import write_atomically
from saefw.tally import EXACT, IMAGE_FEATURES, Tally

if TYPE_CHECKING:
    from PIL.Image import Image

Array = np.ndarray[Any, Any]

MAPS = "maps.safetensors"
PICTURES = "picture.parquet"
CHECKPOINT = "tally.safetensors"
PAIRS = "pairs.bin"

TILE = 5000
"""Bytes that an image takes on a sheet, about."""

PURE = 0.8
"""A feature is pure when so large a share of its top images is of one class."""

READ = 64
"""Images read from disk at a time."""

DENSE = 1 << 26
"""Dense codes held at a time, in numbers: 256 MiB of float32."""

TOGETHER = 2 << 30
"""Bytes that the tallies of SAEs fed from one stream may hold together."""


class Visuals(StageConfig):
    """Finds the strongest images of every feature, its classes and its statistics, and draws contact sheets."""

    use: Literal["visuals"] = "visuals"

    saes: Annotated[str, Names("stages")]
    """The stage that trained the SAEs."""

    acts: Annotated[str, Names("stages")]
    """The stage whose recordings to look at: for each SAE those of its backbone and layer, one unit each."""

    top: int = Field(16, gt=0)
    """How many images to keep for a feature."""

    split: Split = "train"
    """Which images to rank and to count over; everything this stage says is of this split alone."""

    n_features: int = Field(64, ge=0)
    """How many features get a contact sheet, drawn by lot from those that fire and pass the filters."""

    log_frequency: tuple[float, float] | None = None
    """Sheets only for features with log10 of the frequency strictly between these; null: any that fire."""

    log_value: tuple[float, float] | None = None
    """Sheets only for features with log10 of the mean positive value strictly between these; null: any that fire."""

    include: list[int] = Field(default_factory=list)
    """Features that get a sheet in any case, beside those drawn by lot."""

    seed: int = Field(0, ge=0)
    """Of the lot."""

    checkpoint_every: Annotated[float, Knob] = Field(60.0, ge=0)
    """Seconds between two checkpoints of the pass over the images."""

    def units(self, run: Run) -> Iterator[Unit]:
        """List one unit for each SAE and recording of its backbone and layer.

        Raises:
            UserError: an SAE has no such recording, or was trained on [CLS].

        """
        content = {name: value for name, value in self.content().items() if name != "use"}
        recordings = run.made_by(self.acts)
        for sae in run.made_by(self.saes):
            if sae.content["tokens"] != "patches":
                raise UserError(f"visuals: {sae.label} was trained on {sae.content['tokens']}, which cover no patch")
            (trained_on,) = sae.needs
            found = [unit for unit in recordings if _where(unit) == _where(trained_on)]
            if not found:
                raise UserError(
                    f"visuals: '{self.acts}' has no recording of the backbone and layer of {sae.label}; "
                    f"record layer {trained_on.content['layer']} there"
                )
            for acts in found:
                label = sae.label if acts == trained_on else f"{sae.label}, seen on {acts.label}"
                yield Unit("visuals", content, needs=(sae, acts), label=label)

    def disk(self, unit: Unit, run: Run) -> int:
        """Return about the bytes of the sheets and maps; how well pictures pack is not known before."""
        sae: SaeConfig = unit.needs[0].given["sae"]
        backbone: BackboneInfo = unit.needs[1].given["backbone"].describe()
        d_sae = sae.expansion * backbone.d_model
        sheets = min(d_sae, len(self.include) + self.n_features)
        return d_sae * self.top * backbone.grid[0] * backbone.grid[1] + sheets * self.top * TILE

    def make(self, units: Sequence[Unit], run: Run) -> None:
        """Make the units of each recording together, in one pass over it.

        Raises:
            UserError: a recording has no image in the split, or `include` names a feature that an SAE does not have.

        """
        groups: dict[Unit, list[Unit]] = {}
        for unit in units:
            groups.setdefault(unit.needs[1], []).append(unit)
        for recording, group in groups.items():
            acts = Acts(run.folder(recording))
            examples = acts.of_split(self.split)
            if not len(examples):
                raise UserError(f"{recording.label}: no image is in the {self.split} split, on which features are seen")
            gallery = Gallery(recording, run)
            jobs = [self._job(unit, acts, run) for unit in group]
            for some in _fitting(jobs, len(examples)):
                self._watch(some, acts, examples, run)
                for job in some:
                    self._write(job, acts, gallery, run)
                    del job.tally

    def _job(self, unit: Unit, acts: Acts, run: Run) -> "Job":
        sae = open_sae(unit.needs[0].given["sae"], run.folder(unit.needs[0]), run.device)
        wrong = [feature for feature in self.include if not 0 <= feature < sae.d_sae]
        if wrong:
            raise UserError(f"visuals: include: feature {wrong[0]} is not among the {sae.d_sae} of {unit.label}")
        n_patches = acts.grid[0] * acts.grid[1]
        n_classes = len(acts.classes) if (acts.labels >= 0).any() else 0
        return Job(unit, run.folder(unit), sae, self.top, n_patches, n_classes)

    def _watch(self, jobs: Sequence["Job"], acts: Acts, examples: Array, run: Run) -> None:
        """Feed the images to every SAE's tally, going on where an earlier run stopped."""
        tallies = [_begun(job, len(examples)) for job in jobs]
        first = min(tally.seen for tally in tallies)
        saving, telling = Clock(self.checkpoint_every), Clock(0.1)
        for indices, x_epd in acts.read("patches", examples[first:], READ):
            first += len(indices)
            x_epd = x_epd.to(run.device)
            for job, tally in zip(jobs, tallies, strict=True):
                if tally.seen < first:
                    _feed(tally, job.sae, indices, acts.labels[indices], x_epd)
            if saving.due():
                for job, tally in zip(jobs, tallies, strict=True):
                    write_atomically(job.folder / CHECKPOINT, save(tally.state()))
                saving.restart(self.checkpoint_every)
            if telling.due() or first == len(examples):
                run.progress(first, len(examples), "images")
                telling.restart(0.1)
        for job, tally in zip(jobs, tallies, strict=True):
            job.tally = tally

    def _write(self, job: "Job", acts: Acts, gallery: "Gallery", run: Run) -> None:
        """Write tables, maps, pictures and sheets of a unit, and keep it."""
        unit, tally = job.unit, job.tally
        whose: dict[str, Any] = {"sae": unit.needs[0].address, "acts": unit.needs[1].address}
        found = Findings.of(tally, acts.labels)
        run.put(unit, "feature", **whose, **found.features)
        run.put(unit, "top_example", **whose, **found.top)
        run.put(unit, "top_feature", **whose, **tally.top_features())
        run.put(unit, "class_feature", **whose, **tally.class_features())
        write_atomically(job.folder / MAPS, save({"maps": tally.maps()}))
        gallery.write(job.folder / PICTURES, unit, np.unique(found.top["example"]))
        chosen = self.choose(found.features["frequency"], found.features["mean"])
        (job.folder / "features").mkdir(exist_ok=True)
        shown = found.top["example"][np.isin(found.top["feature"], chosen)]
        views = pictures.read(job.folder / PICTURES, np.unique(shown).tolist())
        for i, feature in enumerate(chosen):
            drawn = self._sheet(feature, found, acts, views)
            # Not forced to the disk one by one: an interrupted run draws them all again.
            (job.folder / "features" / f"{feature}.png").write_bytes(pictures.png(drawn))
            run.progress(i + 1, len(chosen), "sheets")
        measured = {"n_live": int((found.features["frequency"] > 0).sum()), "n_images": tally.seen}
        if job.n_classes:
            measured["n_pure"] = int((found.share_s >= PURE).sum())
        run.log(unit, 0, **measured)
        run.keep(unit, without=[CHECKPOINT, PAIRS])

    def _sheet(self, feature: int, found: "Findings", acts: Acts, views: Mapping[int, "Image"]) -> "Image":
        """Draw the contact sheet of a feature."""
        rows = found.top["feature"] == feature
        examples = found.top["example"][rows].tolist()
        tiles = [
            Tile(
                views[example],
                found.maps_stp[feature, rank].reshape(acts.grid),
                acts.classes[acts.labels[example]] if acts.labels[example] >= 0 else acts.keys[example],
            )
            for rank, example in enumerate(examples)
        ]
        said = [f"fires on {percent(found.features['frequency'][feature])} of patches"]
        if found.share_s[feature] > 0:
            n, name = round(found.share_s[feature] * self.top), acts.classes[found.label_s[feature]]
            said.append(f"{n} of {len(tiles)} images: {name}")
        if tiles:
            said.append(f"largest value {found.features['max'][feature]:.3g}")
        return pictures.sheet(tiles, f"Feature {feature}", " · ".join(said), columns=min(8, max(4, len(tiles))))

    def choose(self, frequency_s: Array, mean_s: Array) -> list[int]:
        """Return the features that get a sheet, ascending."""
        with np.errstate(divide="ignore"):
            logs = (self.log_frequency, np.log10(frequency_s)), (self.log_value, np.log10(mean_s))
        passes_s = frequency_s > 0
        for bounds, log_s in logs:
            if bounds is not None:
                passes_s &= (log_s > bounds[0]) & (log_s < bounds[1])
        lot = np.random.default_rng(self.seed).permutation(np.flatnonzero(passes_s))
        return sorted({*self.include, *lot[: self.n_features].tolist()})


class Job:
    """One unit in the making."""

    tally: Tally

    def __init__(self, unit: Unit, folder: Path, sae: Sae, top: int, n_patches: int, n_classes: int) -> None:
        """Hold what the pass over the images needs."""
        self.unit, self.folder, self.sae = unit, folder, sae
        self.top, self.n_patches, self.n_classes = top, n_patches, n_classes

    def bytes(self, n_images: int) -> int:
        """Return about how much its tally will hold."""
        maps = self.sae.d_sae * self.top * (4 * self.n_patches + 12)
        return maps + 24 * self.n_classes * self.sae.d_sae + 12 * n_images * IMAGE_FEATURES + 8 * EXACT


def _where(recording: Unit) -> tuple[Any, int]:
    """Say which stream of vectors a recording holds: only an SAE trained there can read it."""
    return recording.content["backbone"], recording.content["layer"]


def _fitting(jobs: Sequence[Job], n_images: int) -> Iterator[list[Job]]:
    """Yield jobs in groups that fit in memory together, at least one at a time."""
    group: list[Job] = []
    for job in jobs:
        if group and sum(one.bytes(n_images) for one in [*group, job]) > TOGETHER:
            yield group
            group = []
        group.append(job)
    yield group


def _begun(job: Job, n_images: int) -> Tally:
    """Return the tally that an interrupted run left in the unit's folder, or a fresh one."""
    sizes = job.sae.d_sae, job.n_patches, job.n_classes, job.top, job.folder / PAIRS
    path = job.folder / CHECKPOINT
    if not path.exists():
        return Tally(*sizes)
    try:
        state, _ = files.read(path)
        tally = Tally(*sizes, state)
        files.number(tally.seen, 0, n_images, "seen")
        return tally
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error}); delete {path.parent} to begin anew") from error


@torch.no_grad()
def _feed(tally: Tally, sae: Sae, indices: Any, labels: Any, x_epd: torch.Tensor) -> None:
    """Encode images, as many at a time as fit, and count them."""
    n_patches, d_model = x_epd.shape[1:]
    at_once = max(1, DENSE // (n_patches * sae.d_sae))
    example_e, label_e = torch.from_numpy(indices), torch.from_numpy(labels)
    for first in range(0, len(x_epd), at_once):
        part = slice(first, first + at_once)
        codes_eps = sae.dense(x_epd[part].reshape(-1, d_model)).view(-1, n_patches, sae.d_sae)
        tally.add(example_e[part], label_e[part], codes_eps)


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
    def of(cls, tally: Tally, labels: Array) -> "Findings":
        """Read them off a tally; `labels` [n_examples] are those of the recording."""
        top = tally.top_examples()
        label_r = labels[top["example"]]
        known_r = label_r >= 0
        count_sc = np.zeros((tally.d_sae, max(1, tally.n_classes)), dtype=np.int64)
        np.add.at(count_sc, (top["feature"][known_r], label_r[known_r]), 1)
        most_s = count_sc.max(axis=1)
        label_s = np.where(most_s > 0, count_sc.argmax(axis=1), -1)
        return cls(tally.features(), top, tally.maps().numpy(), most_s / tally.top, label_s)


def percent(share: float) -> str:
    """Return a share as people write it: `3.4 %`, `0.012 %`."""
    return f"{float(f'{100 * share:.2g}'):.12g} %"


class Gallery:
    """The images of a recording as its model saw them, opened when first asked for."""

    def __init__(self, recording: Unit, run: Run) -> None:
        """Open nothing yet."""
        self._backbone_config: BackboneConfig = recording.given["backbone"]
        self._dataset_config: DatasetConfig = recording.given["dataset"]
        self._run = run
        self._parts: tuple[Backbone, Dataset] | None = None
        # The SAEs of a sweep share many of their top images.
        self._png = lru_cache(maxsize=4096)(self._drawn)

    def _drawn(self, example: int) -> bytes:
        if self._parts is None:
            self._parts = self._backbone_config.build("cpu"), self._dataset_config.build(self._run.base)
        backbone, dataset = self._parts
        return pictures.png(backbone.view(dataset[example].load()).convert("RGB"))

    def write(self, path: Path, unit: Unit, examples: Array) -> None:
        """Write the views of some images as a parquet file (unit, example, png), few of them in memory at a time."""
        import duckdb

        work = path.with_suffix(".part")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        with duckdb.connect(str(work / "picture.duckdb")) as db:
            db.execute("CREATE TABLE picture (unit TEXT, example INTEGER, png BLOB)")
            for first in range(0, len(examples), 1024):
                some = examples[first : first + 1024]
                pngs = np.array([self._png(example) for example in some.tolist()], dtype=object)
                rows = {"unit": np.full(len(some), unit.address, dtype=object), "example": some, "png": pngs}
                db.register("rows", rows)
                db.execute("INSERT INTO picture BY NAME SELECT * FROM rows")
                self._run.progress(first + len(some), len(examples), "pictures")
            target = str(work / path.name).replace("'", "''")
            db.execute(f"COPY (FROM picture ORDER BY example) TO '{target}' (FORMAT parquet)")
        (work / path.name).replace(path)
        shutil.rmtree(work)


@hookimpl
def saefw_stages() -> list[type[StageConfig]]:
    """One: visuals."""
    return [Visuals]
