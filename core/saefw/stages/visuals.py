"""Finds each feature's strongest images and draws them.

An SAE of [CLS] has one token an image: its features light no patch, and what is said of patches is said of images.

Shapes: e images, p patches (1 for an SAE of [CLS]), d d_model, s d_sae, t top.
"""

import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import save

from saefw import pictures, samples, sealed
from saefw import tensors as files
from saefw.acts import Acts
from saefw.care import write_atomically, writing
from saefw.originals import Unreadable, again
from saefw.pictures import Tile
from saefw.plugin import (
    Backbone,
    BackboneConfig,
    BackboneInfo,
    Dataset,
    DatasetConfig,
    Knob,
    Names,
    Pace,
    Run,
    SaeConfig,
    Split,
    StageConfig,
    Unit,
    UserError,
    hookimpl,
    timed,
)
from saefw.sae import Sae
from saefw.shards import check_tokens
from saefw.stages.train import Clock, narrow
from saefw.tally import IMAGE_FEATURES, Tally, most
from saefw.tally import check as check_state
from saefw.trained import open_sae

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger("saefw")

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


PNGS = 4096
"""Pictures of images, as PNG, that are held for the next SAE."""

FIRING = 32
"""Features that fire on a token, where the time of counting is tried."""


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

    memory_mb: Annotated[float, Knob] = Field(2048.0, gt=0)
    """About how many MiB the SAEs looked at in one pass may take; what does not fit waits for another, one at least."""

    def units(self, run: Run) -> Iterator[Unit]:
        """List one unit for each SAE and recording of its backbone and layer.

        Raises:
            UserError: an SAE has no such recording, or one without its tokens, or `include` names a feature that it
                does not have.

        """
        content = {name: value for name, value in self.content().items() if name != "use"}
        recordings = run.made_by(self.acts)
        for sae in run.made_by(self.saes):
            (trained_on,) = sae.needs
            found = [unit for unit in recordings if _where(unit) == _where(trained_on)]
            if not found:
                raise UserError(
                    f"visuals: '{self.acts}' has no recording of the backbone and layer of {sae.label}; "
                    f"record layer {trained_on.content['layer']} there"
                )
            wrong = [feature for feature in self.include if not 0 <= feature < _d_sae(sae)]
            if wrong:
                raise UserError(f"visuals: include: feature {wrong[0]} is not among the {_d_sae(sae)} of {sae.label}")
            for acts in found:
                check_tokens("visuals: acts", acts, "all", sae.content["tokens"])
                label = sae.label if acts == trained_on else f"{sae.label}, seen on {acts.label}"
                yield Unit("visuals", content, needs=(sae, acts), label=label)

    def disk(self, unit: Unit, run: Run) -> int:
        """Return about the bytes of the sheets and maps; how well pictures pack is not known before."""
        d_sae = _d_sae(unit.needs[0])
        grid = unit.needs[1].given["backbone"].describe().grid
        n_patches = grid[0] * grid[1] if _tokens(unit) == "patches" else 1
        sheets = min(d_sae, len(self.include) + self.n_features)
        return d_sae * self.top * n_patches + sheets * self.top * TILE

    def duration(self, units: Sequence[Unit], run: Run, pace: Pace) -> float:
        """Return the seconds of encoding and counting, of the pictures of the top images, and of the sheets."""
        total = 0.0
        for (recording, tokens), group in _groups(units).items():
            info, n = samples.shape(recording), samples.sizes(recording, run)[self.split]
            n_tokens = n * (info.grid[0] * info.grid[1] if tokens == "patches" else 1)
            sheet = pace(f"a sheet, {recording.label}", partial(_sheet_seconds, recording, run, self.top))
            picture = samples.picture(pace, recording, run) + pace(
                f"a picture, {recording.label}", partial(_picture_seconds, recording, run)
            )
            # As many of the images as so many draws with replacement would show.
            shown = [-n * math.expm1(-_d_sae(unit.needs[0]) * self.top / n) if n else 0.0 for unit in group]
            total += picture * (max(shown) if max(shown) <= PNGS else sum(shown))
            for unit in group:
                config, d_sae = unit.needs[0].given["sae"], _d_sae(unit.needs[0])
                each = pace(
                    f"a token and feature of a {config.use} SAE of {info.d_model}, counted",
                    partial(_count_seconds, config, info.d_model, run.device),
                )
                total += each * n_tokens * d_sae + sheet * min(d_sae, len(self.include) + self.n_features)
        return total

    def make(self, units: Sequence[Unit], run: Run) -> None:
        """Make the units of each recording and kind of token together, in as few passes over it as memory allows.

        Raises:
            UserError: a recording has no image in the split.

        """
        for (recording, tokens), group in _groups(units).items():
            acts = Acts(run.folder(recording))
            examples = acts.of_split(self.split)
            if not len(examples):
                raise UserError(f"{recording.label}: no image is in the {self.split} split, on which features are seen")
            gallery = Gallery(recording, acts.keys, run)
            n_patches = acts.grid[0] * acts.grid[1] if tokens == "patches" else 1
            n_classes = len(acts.classes) if (acts.labels >= 0).any() else 0
            jobs = [Job(unit, run.folder(unit), self.top, n_patches, n_classes) for unit in group]
            for some in _fitting(jobs, len(examples), self.memory_mb * 2**20):
                for job, tally in zip(some, self._watch(some, tokens, acts, examples, run), strict=True):
                    self._write(job, tally, acts, gallery, run)

    def _watch(self, jobs: Sequence["Job"], tokens: str, acts: Acts, examples: Array, run: Run) -> Iterator[Tally]:
        """Feed the images to every SAE's tally, going on where an earlier run stopped; yield the tallies."""
        saes = [open_sae(job.unit.needs[0].given["sae"], run.folder(job.unit.needs[0]), run.device) for job in jobs]
        tallies = [_begun(job, len(examples)) for job in jobs]
        first = min(tally.seen for tally in tallies)
        saving, telling = Clock(self.checkpoint_every), Clock(0.1)
        for indices, x_epd in acts.read(tokens, examples[first:], READ):
            first += len(indices)
            x_epd = x_epd.to(run.device)
            for sae, tally in zip(saes, tallies, strict=True):
                if tally.seen < first:
                    _feed(tally, sae, indices, acts.labels[indices], x_epd)
            if saving.due():
                for job, tally in zip(jobs, tallies, strict=True):
                    sealed.write(job.folder / CHECKPOINT, tally.state())
                saving.restart(self.checkpoint_every)
            if telling.due() or first == len(examples):
                run.progress(first, len(examples), "images")
                telling.restart(0.1)
        while tallies:
            yield tallies.pop(0)  # one that is written down is let go

    def _write(self, job: "Job", tally: Tally, acts: Acts, gallery: "Gallery", run: Run) -> None:
        """Write tables, maps, pictures and sheets of a unit, and keep it."""
        unit, on_patches = job.unit, _tokens(job.unit) == "patches"
        whose: dict[str, Any] = {"sae": unit.needs[0].address, "acts": unit.needs[1].address}
        found = Findings.of(tally, acts.labels)
        run.put(unit, "feature", **whose, **found.features)
        run.put(unit, "top_example", **{**whose, **found.top, **({} if on_patches else {"token": None})})
        run.put(unit, "top_feature", **whose, **tally.top_features())
        run.put(unit, "class_feature", **whose, **tally.class_features())
        write_atomically(job.folder / MAPS, save({"maps": tally.maps()}))
        gallery.write(job.folder / PICTURES, unit, np.unique(found.top["example"]))
        chosen = self.choose(found.features["frequency"], found.features["mean"])
        (job.folder / "features").mkdir(exist_ok=True)
        shown = found.top["example"][np.isin(found.top["feature"], chosen)]
        views = pictures.read(job.folder / PICTURES, np.unique(shown).tolist())
        for i, feature in enumerate(chosen):
            drawn = self._sheet(feature, found, acts, views, on_patches)
            # Not forced to the disk one by one: an interrupted run draws them all again.
            path = job.folder / "features" / f"{feature}.png"
            with writing(path):
                path.write_bytes(pictures.png(drawn))
            run.progress(i + 1, len(chosen), "sheets")
        measured = {"n_live": int((found.features["frequency"] > 0).sum()), "n_images": tally.seen}
        if job.n_classes:
            measured["n_pure"] = int((found.share_s >= PURE).sum())
        run.log(unit, 0, **measured)
        run.keep(unit, without=[CHECKPOINT, PAIRS])

    def _sheet(
        self, feature: int, found: "Findings", acts: Acts, views: Mapping[int, "Image"], on_patches: bool
    ) -> "Image":
        """Draw the contact sheet of a feature."""
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


class Job(NamedTuple):
    """One unit in the making: what the pass over the images needs to know."""

    unit: Unit
    folder: Path
    top: int
    n_patches: int
    n_classes: int

    @property
    def d_sae(self) -> int:
        """Of its SAE."""
        return _d_sae(self.unit.needs[0])

    def bytes(self, n_images: int) -> int:
        """Return about how much its SAE and its tally will hold."""
        d_model: int = self.unit.needs[1].given["backbone"].describe().d_model
        maps = self.top * (4 * self.n_patches + 12)
        return (
            self.d_sae * (8 * d_model + maps + 24 * self.n_classes) + 12 * n_images * IMAGE_FEATURES + most(self.d_sae)
        )


def _groups(units: Sequence[Unit]) -> dict[tuple[Unit, str], list[Unit]]:
    """Return the units of each recording and kind of token, which look at it together."""
    groups: dict[tuple[Unit, str], list[Unit]] = {}
    for unit in units:
        groups.setdefault((unit.needs[1], _tokens(unit)), []).append(unit)
    return groups


def _count_seconds(config: SaeConfig, d_model: int, device: str) -> float:
    """Return the seconds in which a token is encoded by a narrow SAE and counted, for each of its features."""
    sae = narrow(config, d_model).build(d_model).to(device).eval()
    images, n_patches = 4, 196
    x_nd = torch.randn(images * n_patches, d_model, device=device)
    codes_ns = torch.zeros(len(x_nd), sae.d_sae, device=device)
    feature_nk = torch.randint(sae.d_sae, (len(x_nd), FIRING), device=device)
    codes_ns.scatter_(1, feature_nk, torch.rand(len(x_nd), FIRING, device=device))
    label_e, example_e = torch.full((images,), -1), torch.arange(images)
    with TemporaryDirectory() as folder, torch.no_grad():
        tally = Tally(sae.d_sae, n_patches, 0, 16, Path(folder, PAIRS))

        def count() -> None:
            sae.dense(x_nd)
            tally.add(example_e, label_e, codes_ns.view(images, n_patches, sae.d_sae))

        return timed(count) / len(x_nd) / sae.d_sae


def _picture_seconds(recording: Unit, run: Run) -> float:
    """Return the seconds in which an image becomes a PNG; nan if the first one cannot be read."""
    try:
        view = samples.view(recording, run, 0)
    except Unreadable:
        return math.nan
    return timed(lambda: pictures.png(view))


def _sheet_seconds(recording: Unit, run: Run, top: int) -> float:
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


def _d_sae(sae: Unit) -> int:
    """Return how many features an SAE has."""
    config: SaeConfig = sae.given["sae"]
    backbone: BackboneInfo = sae.needs[0].given["backbone"].describe()
    return config.width(backbone.d_model)


def _tokens(unit: Unit) -> str:
    """Return the tokens that the SAE of a visuals unit was trained on: `patches` or `cls`."""
    return str(unit.needs[0].content["tokens"])


def _where(recording: Unit) -> tuple[Any, int]:
    """Say which stream of vectors a recording holds: only an SAE trained there can read it."""
    return recording.content["backbone"], recording.content["layer"]


def _fitting(jobs: Sequence[Job], n_images: int, memory: float) -> Iterator[list[Job]]:
    """Yield jobs in groups that fit in memory together, at least one at a time."""
    group: list[Job] = []
    for job in jobs:
        if group and sum(one.bytes(n_images) for one in [*group, job]) > memory:
            yield group
            group = []
        group.append(job)
    yield group


def _begun(job: Job, n_images: int) -> Tally:
    """Return the tally that an interrupted run left whole in the unit's folder, or a fresh one."""
    sizes = job.d_sae, job.n_patches, job.n_classes, job.top

    def check(state: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
        check_state(state, *sizes)
        files.number(int(state["seen"]), 0, n_images, "seen")

    found = sealed.read(job.folder / CHECKPOINT, check)
    try:
        return Tally(*sizes, job.folder / PAIRS, found[0] if found else None)
    except ValueError as error:
        log.warning(str(error))
        return Tally(*sizes, job.folder / PAIRS)


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

    def __init__(self, recording: Unit, keys: Sequence[str], run: Run) -> None:
        """Open nothing yet; `keys` are those of the images when they were recorded."""
        self._backbone_config: BackboneConfig = recording.given["backbone"]
        self._dataset_config: DatasetConfig = recording.given["dataset"]
        self._keys, self._run = keys, run
        self._parts: tuple[Backbone, Dataset] | None = None
        # The SAEs of a sweep share many of their top images.
        self._png = lru_cache(maxsize=PNGS)(self._drawn)

    def _drawn(self, example: int) -> bytes:
        if self._parts is None:
            self._parts = self._backbone_config.build("cpu"), self._run.dataset(self._dataset_config)
        backbone, dataset = self._parts
        return pictures.png(backbone.view(again(dataset, example, self._keys[example])).convert("RGB"))

    def write(self, path: Path, unit: Unit, examples: Array) -> None:
        """Write the views of some images as a parquet file (unit, example, png), few of them in memory at a time."""
        import duckdb

        work = path.with_suffix(".part")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        with writing(path), duckdb.connect(str(work / "picture.duckdb")) as db:
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
