"""Records what the blocks put out."""

import logging
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import closing
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import Field, model_validator

from saefw import samples
from saefw.blocks import resolve
from saefw.forward import Forward
from saefw.origin import whose
from saefw.plugin import (
    BackboneConfig,
    Dataset,
    DatasetConfig,
    Knob,
    Late,
    Names,
    Pace,
    Run,
    StageConfig,
    Unit,
    UserError,
    hookimpl,
)
from saefw.recording import WORKERS, Recording, check_examples, check_room, cores, prepared
from saefw.shards import Layout, Writer
from saefw.unit import canonical

log = logging.getLogger("saefw")


class Record(StageConfig):
    """Records the tokens after some blocks of a backbone, for every image of some datasets.

    The same settings on the same machine give the same bytes, unless the size of a batch is found by timing (on a GPU
    with batch_size null) or halved for lack of memory. Then, and with other knobs, the activations are the same up to
    the rounding of the matrix products, whose order of summation may depend on the size of a batch.
    """

    revision: ClassVar[int] = 2

    use: Literal["record"] = "record"

    backbone: Annotated[str, Names("backbones")]
    """The backbone; every member of its family is recorded."""

    datasets: Annotated[list[str], Names("datasets")] = Field(min_length=1)
    """The datasets, with every member of their families."""

    layers: list[int] = Field(min_length=1)
    """Blocks whose output is recorded, from 0, or from the end: -1 is the last."""

    tokens: Literal["all", "patches", "cls"] | Annotated[int, Field(gt=0)] = "all"
    """The tokens that are kept of an image: all, its patches, its [CLS], or so many of its patches, drawn by the seed.

    Maps of features need all patches, probes need what they read, and steering needs all tokens.
    """

    seed: Annotated[int, Late] = 0
    """Of the patches that are drawn, other ones in each image."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    """What the activations are stored as; docs/formats.md has what each of them costs."""

    precision: Annotated[Literal["float32", "bfloat16", "float16"], Late] = "float32"
    """What the matrix products of the backbone are computed in, by autocast."""

    broken: Annotated[Literal["fatal", "skip"], Late] = "fatal"
    """What an image that cannot be read is: fatal, or left out (zeros in its place), and in the table `broken`."""

    live: Annotated[bool, Late] = False
    """Keep statistics and tables alone, and no activations: whatever reads them runs the images through the backbone.

    For those who have no room for them; docs/formats.md says what that costs.
    """

    batch_size: Annotated[int | None, Knob] = Field(default=None, gt=0)
    """Images in one forward pass; null: 64 on a CPU, what is fastest on a GPU. Halved where memory runs out."""

    workers: Annotated[int | None, Knob] = Field(default=None, gt=0)
    """Threads that read and prepare images; null: one a core, at most 16."""

    shard_mb: Annotated[float, Knob] = Field(default=200, gt=0)
    """About how many MiB a file holds, and half of the memory that a layer takes while recording."""

    @model_validator(mode="after")
    def _seed_of_something(self) -> Self:
        if self.seed and not isinstance(self.tokens, int):
            raise ValueError(f"seed is of the patches that are drawn; with tokens: {self.tokens} none are")
        return self

    def units(self, run: Run) -> Iterable[Unit]:
        """List one unit a (backbone, dataset, layer).

        Raises:
            UserError: a backbone has no such block, or not such tokens.

        """
        units: dict[Unit, None] = {}
        late = {
            name: value for name, value in self.content().items() if name in ("precision", "broken", "seed", "live")
        }
        for backbone in run.family("backbones", [self.backbone]):
            model = cast(BackboneConfig, backbone.entry)
            info = model.describe()
            if self.tokens == "cls" and not info.has_cls:
                raise UserError(f"record: tokens: {backbone.label} has no [CLS]; record patches, or all")
            if isinstance(self.tokens, int) and self.tokens > info.n_tokens - info.n_prefix:
                n_patches = info.n_tokens - info.n_prefix
                raise UserError(f"record: tokens: {backbone.label} has {n_patches} patches (got {self.tokens})")
            for dataset in run.family("datasets", self.datasets):
                for layer in (resolve(layer, info.n_blocks) for layer in self.layers):
                    content = {
                        "revision": self.revision,
                        "backbone": model.content(),
                        "dataset": dataset.entry.content(),
                        "layer": layer,
                        "tokens": self.tokens,
                        "dtype": self.dtype,
                        **late,
                    }
                    label = f"{backbone.label} on {dataset.label}, layer {layer}"
                    names = {"backbone": backbone.label, "dataset": dataset.label}
                    given = {"backbone": model, "dataset": dataset.entry, "names": names}
                    units.setdefault(Unit("record", content, label=label, given=given))
        return units

    def disk(self, unit: Unit, run: Run) -> int:
        """Return the bytes of the unit's activations, if they are kept."""
        if self.live:
            return 0
        n_examples = len(_dataset(unit, run))
        return n_examples * _layout(unit, n_examples).example_bytes

    def work(self, unit: Unit, run: Run) -> str:
        """Return how many images there are to record."""
        return f"{len(_dataset(unit, run)):,} images"

    def duration(self, units: Sequence[Unit], run: Run, pace: Pace) -> float:
        """Return the seconds of one pass a (backbone, dataset) up to its last layer, images prepared by the workers."""
        total = 0.0
        for group in chain.from_iterable(_passes(units)):
            last = max(group, key=lambda unit: int(unit.content["layer"]))
            total += samples.passing(pace, last, run, len(_dataset(last, run)), self._workers)
        return total

    def make(self, units: Sequence[Unit], run: Run) -> None:
        """Record all layers and datasets of a backbone in one pass; complete shards of an earlier run are kept.

        A shard is not kept if the dataset has other images in its place now, or has split or labelled them otherwise.

        Raises:
            UserError: there is too little room on the disk, an image cannot be read (with `broken: skip`: more than
                half of them), or has an activation that is too large for the dtype.

        """
        passes = [[(group, self._opened(group, run)) for group in groups] for groups in _passes(units)]
        recordings = [recording for whole in passes for _, recording in whole]
        check_room(run.store.root, 0 if self.live else sum(recording.disk for recording in recordings))
        total = sum(len(recording.dataset) for recording in recordings)
        done = total - sum(recording.missing for recording in recordings)
        run.progress(done, total, "images")
        for whole in passes:
            for n in self._pass(whole, run):
                run.progress(done + n, total, "images")
            done += sum(recording.missing for _, recording in whole)

    @property
    def _workers(self) -> int:
        return self.workers or min(cores(), WORKERS)

    def _opened(self, units: Sequence[Unit], run: Run) -> Recording:
        """Open the dataset of some layers, and see which of their shards are there."""
        dataset, name = _dataset(units[0], run), units[0].given["names"]["dataset"]
        check_examples(name, dataset, whose(type(units[0].given["dataset"])))
        shard_bytes = int(self.shard_mb * 2**20)
        writers = [
            Writer(run.folder(unit), _layout(unit, len(dataset)), dataset, shard_bytes, self.live) for unit in units
        ]
        if other := {shard for writer in writers for shard in writer.other}:
            log.warning(
                "%s: %d of %d shards hold other images than the dataset has now; they are recorded again",
                name, len(other), writers[0].n_shards,
            )  # fmt: skip
        return Recording(name, dataset, writers, self.broken == "skip")

    def _pass(self, whole: Sequence[tuple[Sequence[Unit], Recording]], run: Run) -> Iterable[int]:
        """Run the datasets of one backbone through it and keep their units; yield how many images are done."""
        missing = [recording for _, recording in whole if recording.shards]
        if not missing:
            for units, recording in whole:
                _keep(units, recording, run)
            return
        backbone = cast(BackboneConfig, whole[0][0][0].given["backbone"]).fresh(run.device)
        layers = {writer.layout.layer for recording in missing for writer in recording.writers}
        forward = Forward(backbone, layers, run.device, self.precision, self.batch_size)
        examples = chain.from_iterable(recording.examples() for recording in missing)
        done = 0
        images = prepared(examples, backbone, self._workers, lambda: 2 * forward.batch_size, run.device)
        with closing(images):
            for units, recording in whole:
                for n in recording.record(forward, images):
                    yield done + n
                done += recording.missing
                _keep(units, recording, run)


def _passes(units: Sequence[Unit]) -> list[list[list[Unit]]]:
    """Return the units that are recorded together: by backbone, and by dataset within it."""
    backbones: dict[str, dict[str, list[Unit]]] = {}
    for unit in units:
        datasets = backbones.setdefault(canonical(unit.content["backbone"]), {})
        datasets.setdefault(canonical(unit.content["dataset"]), []).append(unit)
    return [list(datasets.values()) for datasets in backbones.values()]


def _dataset(unit: Unit, run: Run) -> Dataset:
    dataset = run.dataset(cast(DatasetConfig, unit.given["dataset"]))
    if not len(dataset):
        raise UserError(f"{unit.label}: the dataset has no images")
    return dataset


def _layout(unit: Unit, n_examples: int) -> Layout:
    info, content = cast(BackboneConfig, unit.given["backbone"]).describe(), unit.content
    return Layout.of(
        n_examples,
        info.prefix,
        info.d_model,
        info.grid,
        content["layer"],
        content["dtype"],
        content["tokens"],
        content.get("seed", 0),
    )


def _keep(units: Sequence[Unit], recording: Recording, run: Run) -> None:
    """Write the statistics and the tables of recordings whose shards are all there, and keep them."""
    columns = _columns(recording.dataset, recording.writers[0].broken)
    for unit, writer in zip(units, recording.writers, strict=True):
        _describe(unit, writer, columns, recording.dataset.classes, run)
    if broken := recording.writers[0].broken:
        log.warning(
            "%s: left out %d of %d images, which cannot be read; the table `broken` names them",
            recording.name, len(broken), len(recording.dataset),
        )  # fmt: skip
    run.keep(*units)


def _columns(dataset: Dataset, broken: Container[int]) -> dict[str, list[Any]]:
    """Return the columns of the table of images."""
    columns: dict[str, list[Any]] = {"example": list(range(len(dataset))), "key": [], "label": [], "split": []}
    for i in columns["example"]:
        key, label, split, _ = dataset[i]
        columns["key"].append(key)
        columns["label"].append(label)
        columns["split"].append("broken" if i in broken else split)
    return columns


def _describe(unit: Unit, writer: Writer, columns: Mapping[str, list[Any]], classes: Sequence[str], run: Run) -> None:
    """Write the statistics and the tables of a recording."""
    shards, moments = writer.finish()
    layout, broken = writer.layout, writer.broken
    most = moments["cls" if layout.tokens == "cls" else "patches"]
    run.put(
        unit,
        "acts",
        **unit.given["names"],
        layer=layout.layer,
        tokens=str(layout.tokens),
        d_model=layout.d_model,
        grid_h=layout.grid[0],
        grid_w=layout.grid[1],
        n_examples=layout.n_examples,
        n_tokens=layout.n_tokens,
        prefix=", ".join(layout.prefix),
        dtype=layout.dtype,
        mean_norm=most.norms / most.n if most.n else float("nan"),
        offset_ratio=most.offset_ratio if most.n else float("nan"),
    )
    if shards:
        run.put(
            unit,
            "shard",
            shard=list(range(len(shards))),
            file=[shard.file for shard in shards],
            first_example=[shard.first for shard in shards],
            n_examples=[shard.n for shard in shards],
            bytes=[shard.bytes for shard in shards],
            sha256=[shard.sha256 for shard in shards],
        )
    run.put(unit, "example", **columns)
    if broken:
        keys = [columns["key"][i] for i in broken]
        run.put(unit, "broken", example=list(broken), key=keys, why=list(broken.values()))
    run.put(unit, "class", label=list(range(len(classes))), name=list(classes))


@hookimpl
def saefw_stages() -> list[type[StageConfig]]:
    """Bring one: record."""
    return [Record]
