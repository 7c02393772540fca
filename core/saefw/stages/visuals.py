"""Finds each feature's strongest images, and says what it fires on.

An SAE of [CLS] has one token an image: its features light no patch, and what is said of patches is said of images.

Shapes: e images, p patches (1 where [CLS] is looked at), d d_model, s d_sae, t top, c classes.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import save

from saefw import pictures, samples, sealed
from saefw import tensors as files
from saefw.acts import Acts
from saefw.care import write_atomically
from saefw.firing import grouped
from saefw.live import acts_of
from saefw.originals import Unreadable
from saefw.plugin import (
    Backbone,
    BackboneInfo,
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
from saefw.shards import check_tokens
from saefw.stages.train import Clock, narrow
from saefw.tally import IMAGES, PAIRS, Sizes, Tally, feed, waiting
from saefw.tally import check as check_state
from saefw.trained import open_sae
from saefw.views import PNGS, Views

log = logging.getLogger("saefw")

Array = np.ndarray[Any, Any]

MAPS = "maps.safetensors"
PICTURES = "picture.parquet"
CHECKPOINT = "tally.safetensors"

PURE = 0.8
"""A feature is pure when so large a share of its top images is of one class."""

READ = 8192
"""Tokens read from disk at a time, or those of one image."""

FIRING = 32
"""Features that fire on a token, where the time and the disk of counting are guessed."""

SELDOM = 20
"""A checkpoint comes at the soonest after so many times as long as the last one took."""


class Visuals(StageConfig):
    """Finds the strongest images of every feature, its classes and its statistics."""

    use: Literal["visuals"] = "visuals"
    revision: ClassVar[int] = 2

    saes: Annotated[str, Names("stages")]
    """The stage that trained the SAEs."""

    acts: Annotated[str, Names("stages")]
    """The stage whose recordings to look at: for each SAE those of its backbone and layer, one unit each."""

    tokens: Literal["patches", "cls"] | None = None
    """The tokens to look at; null: those that the SAE was trained on."""

    top: int = Field(16, gt=0)
    """How many images to keep for a feature."""

    rank_by: Literal["max", "sum", "cls"] = "max"
    """What an image counts for with a feature: its largest value over the patches, their sum, or its value on [CLS]."""

    monosemanticity: bool = False
    """Also say how alike the images are on which a feature fires, by the backbone's own embeddings of them."""

    split: Split = "train"
    """Which images to rank and to count over; everything this stage says is of this split alone."""

    checkpoint_every: Annotated[float, Knob] = Field(60.0, ge=0)
    """Seconds between two checkpoints of the pass over the images."""

    memory_mb: Annotated[float, Knob] = Field(2048.0, gt=0)
    """About how many MiB the SAEs looked at in one pass may take; what does not fit waits for another, one at least."""

    def units(self, run: Run) -> Iterator[Unit]:
        """List one unit for each SAE and recording of its backbone and layer.

        Raises:
            UserError: an SAE has no such recording, or one that does not hold what is looked at.

        """
        content = {name: value for name, value in self.content().items() if name != "use"}
        recordings = run.made_by(self.acts, "record")
        for sae in run.made_by(self.saes, "train"):
            (trained_on,) = sae.needs
            found = [unit for unit in recordings if _where(unit) == _where(trained_on)]
            if not found:
                raise UserError(
                    f"visuals: '{self.acts}' has no recording of the backbone and layer of {sae.label}; "
                    f"record layer {trained_on.content['layer']} there"
                )
            for acts in found:
                self._check(acts, sae)
                label = sae.label if acts == trained_on else f"{sae.label}, seen on {acts.label}"
                yield Unit("visuals", content, needs=(sae, acts), label=label)

    def _check(self, acts: Unit, sae: Unit) -> None:
        """See that a recording holds what is looked at.

        Raises:
            UserError: it does not.

        """
        info: BackboneInfo = acts.given["backbone"].describe()
        looked = self.tokens or sae.content["tokens"]
        if self.monosemanticity and not info.d_embed:
            raise UserError(f"visuals: monosemanticity: the backbone of {acts.label} gives no image embedding")
        if "cls" in (looked, self.rank_by) and not info.has_cls:
            place = "tokens" if looked == "cls" else "rank_by"
            raise UserError(f"visuals: {place}: the backbone of {acts.label} has no [CLS]; it has patches")
        check_tokens("visuals: acts", acts, *dict.fromkeys(("all", "all" if self._whole(looked) else looked)))

    def _whole(self, looked: str) -> bool:
        """Whether all tokens of an image are read, not only those that features are looked for on."""
        return self.monosemanticity or (self.rank_by == "cls" and looked == "patches")

    def disk(self, unit: Unit, run: Run) -> int:
        """Return about the bytes of maps and pictures, and of what waits in files until all images are counted."""
        (sae, recording), n = unit.needs, samples.sizes(unit.needs[1], run)[self.split]
        grid, n_features = samples.shape(recording).grid, d_sae(sae)
        n_patches = grid[0] * grid[1] if looked_at(unit) == "patches" else 1
        maps = n_features * self.top * n_patches
        views = samples.distinct(n, n_features * self.top) * _picture_bytes(recording, run)
        return int(maps + views + n * waiting(samples.distinct(n_features, FIRING * n_patches)))

    def duration(self, units: Sequence[Unit], run: Run, pace: Pace) -> float:
        """Return the seconds of encoding and counting, and of the pictures of the top images."""
        total = 0.0
        for (recording, tokens), group in _groups(units).items():
            info, n = samples.shape(recording), samples.sizes(recording, run)[self.split]
            n_tokens = n * (info.grid[0] * info.grid[1] if tokens == "patches" else 1)
            picture = samples.picture(pace, recording, run) + pace(
                f"a picture, {recording.label}", partial(_picture_seconds, recording, run)
            )
            shown = [samples.distinct(n, d_sae(unit.needs[0]) * self.top) for unit in group]
            total += samples.reading(pace, recording, run, n)
            total += picture * (max(shown) if max(shown) <= PNGS else sum(shown))
            counted = pace(f"a token of {FIRING} features, counted", _count_seconds)
            for unit in group:
                config = unit.needs[0].given["sae"]
                encoded = pace(
                    f"a token and feature of a {config.use} SAE of {info.d_model}, encoded",
                    partial(_encode_seconds, config, info.d_model, run.device),
                )
                total += n_tokens * (encoded * d_sae(unit.needs[0]) + counted)
        return total

    def make(self, units: Sequence[Unit], run: Run) -> None:
        """Make the units of each recording and kind of token together, in as few passes over it as memory allows.

        Raises:
            UserError: a recording has no image in the split.

        """
        for (recording, tokens), group in _groups(units).items():
            acts = acts_of(recording, run)
            examples = acts.of_split(self.split)
            if not len(examples):
                raise UserError(f"{recording.label}: no image is in the {self.split} split, on which features are seen")
            views = Views(recording, acts.keys, run)
            n_patches = acts.grid[0] * acts.grid[1] if tokens == "patches" else 1
            n_classes = len(acts.classes) if (acts.labels >= 0).any() else 0
            d_embed = recording.given["backbone"].describe().d_embed if self.monosemanticity else 0
            jobs = [
                Job(unit, run.folder(unit), Sizes(d_sae(unit.needs[0]), n_patches, n_classes, self.top, d_embed))
                for unit in group
            ]
            for some in _fitting(jobs, self.memory_mb * 2**20):
                for job, tally in zip(some, self._watch(some, tokens, acts, examples, run), strict=True):
                    self._write(job, tally, views, run)

    def _watch(self, jobs: Sequence["Job"], tokens: str, acts: Acts, examples: Array, run: Run) -> Iterator[Tally]:
        """Feed the images to every SAE's tally, going on where an earlier run stopped; yield the tallies."""
        saes = [open_sae(job.unit.needs[0].given["sae"], run.folder(job.unit.needs[0]), run.device) for job in jobs]
        tallies = [_begun(job, len(examples)) for job in jobs]
        first = min(tally.seen for tally in tallies)
        saving, telling = Clock(self.checkpoint_every), Clock(0.1)
        backbone: Backbone | None = None
        if self.monosemanticity:
            backbone = jobs[0].unit.needs[1].given["backbone"].fresh(run.device)
        whole = self._whole(tokens)
        read, n_tokens = ("all", acts.n_tokens) if whole else (tokens, jobs[0].sizes.n_patches)
        for indices, x_etd in acts.read(read, examples[first:], max(1, READ // n_tokens)):
            first += len(indices)
            x_etd = x_etd.to(run.device)
            cls_ed = x_etd[:, 0] if whole and self.rank_by == "cls" and tokens == "patches" else None
            embedding_ed = _embedded(backbone, x_etd, acts.layer) if backbone else None
            if whole:
                x_etd = x_etd[:, acts.n_prefix :] if tokens == "patches" else x_etd[:, :1]
            images = torch.from_numpy(indices), torch.from_numpy(acts.labels[indices])
            for sae, tally in zip(saes, tallies, strict=True):
                if tally.seen < first:
                    feed(tally, sae, *images, x_etd, self.rank_by, cls_ed, embedding_ed)
            if saving.due():
                begun = time.monotonic()
                for job, tally in zip(jobs, tallies, strict=True):
                    sealed.write(job.folder / CHECKPOINT, tally.state())
                saving.restart(max(self.checkpoint_every, SELDOM * (time.monotonic() - begun)))
            if telling.due() or first == len(examples):
                run.progress(first, len(examples), "images")
                telling.restart(0.1)
        while tallies:
            yield tallies.pop(0)  # one that is written down is let go

    def _write(self, job: "Job", tally: Tally, views: Views, run: Run) -> None:
        """Write tables, maps and pictures of a unit, and keep it."""
        unit = job.unit
        whose: dict[str, Any] = {"sae": unit.needs[0].address, "acts": unit.needs[1].address}
        features, top = tally.features(), tally.top_examples()
        run.put(unit, "feature", **whose, **features)
        run.put(unit, "feature_histogram", **tally.histogram())
        run.put(unit, "top_example", **{**whose, **top, **({"token": None} if looked_at(unit) == "cls" else {})})
        run.put(unit, "top_feature", **whose, **tally.top_features())
        run.put(unit, "class_feature", **whose, **tally.class_features())
        write_atomically(job.folder / MAPS, save({"maps": tally.maps()}))
        views.write(job.folder / PICTURES, unit, np.unique(top["example"]))
        measured: dict[str, float] = {"n_live": int((features["frequency"] > 0).sum()), "n_images": tally.seen}
        if job.sizes.n_classes:
            # Of as many images as were asked for: a feature with fewer is less pure than it looks.
            measured["n_pure"] = int((tally.purity().max(axis=0) >= PURE).sum())
        if job.sizes.d_embed and (told := features["monosemanticity"]).count():
            measured["monosemanticity"] = float(told.mean())
        run.log(unit, 0, **measured)
        run.keep(unit, without=[CHECKPOINT, PAIRS, IMAGES])


class Job(NamedTuple):
    """One unit in the making: what the pass over the images needs to know."""

    unit: Unit
    folder: Path
    sizes: Sizes

    @property
    def bytes(self) -> int:
        """About how much its SAE and its tally will hold."""
        d_model: int = self.unit.needs[1].given["backbone"].describe().d_model
        return 8 * self.sizes.d_sae * d_model + self.sizes.bytes


def _groups(units: Sequence[Unit]) -> dict[tuple[Unit, str], list[Unit]]:
    """Return the units of each recording and kind of token, which look at it together."""
    groups: dict[tuple[Unit, str], list[Unit]] = {}
    for unit in units:
        groups.setdefault((unit.needs[1], looked_at(unit)), []).append(unit)
    return groups


@torch.no_grad()
def _encode_seconds(config: SaeConfig, d_model: int, device: str) -> float:
    """Return the seconds in which a token is encoded by a narrow SAE, for each of its features."""
    sae = narrow(config, d_model).build(d_model).to(device).eval()
    x_nd = torch.randn(1024, d_model, device=device)
    return timed(lambda: sae.encode(x_nd).values.cpu()) / len(x_nd) / sae.d_sae


def _count_seconds() -> float:
    """Return the seconds in which the features of a token are counted."""
    images, n_patches, d_sae = 8, 196, 4096
    image_n, patch_n, _ = torch.ones(images, n_patches, FIRING).nonzero().unbind(dim=1)
    feature_n, value_n = torch.randint(d_sae, (len(image_n),)), torch.rand(len(image_n))
    label_e, example_e = torch.full((images,), -1), torch.arange(images)
    with TemporaryDirectory() as folder:
        tally = Tally(Sizes(d_sae, n_patches, 0, 16), Path(folder))
        return timed(
            lambda: tally.add(example_e, label_e, grouped(image_n, patch_n, feature_n, value_n, d_sae, n_patches))
        ) / (images * n_patches)


def _picture_seconds(recording: Unit, run: Run) -> float:
    """Return the seconds in which an image becomes a PNG; nan if the first one cannot be read."""
    try:
        view = samples.view(recording, run, 0)
    except Unreadable:
        return math.nan
    return timed(lambda: pictures.png(view))


def _picture_bytes(recording: Unit, run: Run) -> int:
    """Return the bytes of the first image as a PNG; 0 if it cannot be read."""
    try:
        return len(pictures.png(samples.view(recording, run, 0)))
    except Unreadable:
        return 0


def d_sae(sae: Unit) -> int:
    """Return how many features an SAE has."""
    config: SaeConfig = sae.given["sae"]
    backbone: BackboneInfo = sae.needs[0].given["backbone"].describe()
    return config.width(backbone.d_model)


def looked_at(unit: Unit) -> str:
    """Return the tokens that a visuals unit looks at: `patches` or `cls`."""
    return str(unit.content["tokens"] or unit.needs[0].content["tokens"])


def _where(recording: Unit) -> tuple[Any, int]:
    """Say which stream of vectors a recording holds: only an SAE trained there can read it."""
    return recording.content["backbone"], recording.content["layer"]


def _fitting(jobs: Sequence[Job], memory: float) -> Iterator[list[Job]]:
    """Yield jobs in groups that fit in memory together, at least one at a time."""
    group: list[Job] = []
    for job in jobs:
        if group and sum(one.bytes for one in [*group, job]) > memory:
            yield group
            group = []
        group.append(job)
    yield group


def _begun(job: Job, n_images: int) -> Tally:
    """Return the tally that an interrupted run left whole in the unit's folder, or a fresh one."""

    def check(state: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
        check_state(state, job.sizes)
        files.number(int(state["seen"]), 0, n_images, "seen")

    found = sealed.read(job.folder / CHECKPOINT, check)
    try:
        return Tally(job.sizes, job.folder, found[0] if found else None)
    except ValueError as error:
        log.warning(str(error))
        return Tally(job.sizes, job.folder)


@torch.no_grad()
def _embedded(backbone: Backbone, x_etd: torch.Tensor, layer: int) -> torch.Tensor:
    """Return the embeddings of images from all tokens after a block."""
    return backbone.embedding(backbone.tail(x_etd, layer + 1)).cpu()


@hookimpl
def saefw_stages() -> list[type[StageConfig]]:
    """One: visuals."""
    return [Visuals]
