"""Records what the blocks put out.

Shapes: b batch, t n_tokens, e examples of a shard, d d_model; `acts_ted` has shape [t, e, d].
"""

import logging
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Annotated, Literal, NamedTuple, cast

import torch
from pydantic import Field
from torch import Tensor

from saefw import samples
from saefw.blocks import resolve
from saefw.forward import Forward
from saefw.originals import Unreadable, opened
from saefw.plugin import (
    Backbone,
    BackboneConfig,
    Dataset,
    DatasetConfig,
    Example,
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
from saefw.shards import DTYPES, Layout, Writer
from saefw.unit import canonical

log = logging.getLogger("saefw")

WORKERS = 16
"""The most threads that prepare images unless told: Python lets one of them at a time do what is not decoding."""


class Record(StageConfig):
    """Records the tokens after some blocks of a backbone, for every image of some datasets.

    The same settings on the same machine give the same bytes, unless the size of a batch is found by timing (on a GPU
    with batch_size null) or halved for lack of memory. Then, and with other knobs, the activations are the same up to
    the rounding of the matrix products, whose order of summation may depend on the size of a batch.
    """

    use: Literal["record"] = "record"

    backbone: Annotated[str, Names("backbones")]
    """The backbone; every member of its family is recorded."""

    datasets: Annotated[list[str], Names("datasets")] = Field(min_length=1)
    """The datasets, with every member of their families."""

    layers: list[int] = Field(min_length=1)
    """Blocks whose output is recorded, from 0, or from the end: -1 is the last."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What the activations are stored as."""

    precision: Annotated[Literal["float32", "bfloat16", "float16"], Late] = "float32"
    """What the matrix products of the backbone are computed in, by autocast."""

    broken: Annotated[Literal["fatal", "skip"], Late] = "fatal"
    """What an image that cannot be read is: fatal, or left out (zeros in its place), and in the table `broken`."""

    batch_size: Annotated[int | None, Knob] = Field(default=None, gt=0)
    """Images in one forward pass; null: 64 on a CPU, what is fastest on a GPU. Halved where memory runs out."""

    workers: Annotated[int | None, Knob] = Field(default=None, gt=0)
    """Threads that read and prepare images; null: one a core, at most 16."""

    shard_mb: Annotated[float, Knob] = Field(default=200, gt=0)
    """About how many MiB a file holds, and how much memory a layer takes while recording."""

    def units(self, run: Run) -> Iterable[Unit]:
        """List one unit a (backbone, dataset, layer)."""
        units: dict[Unit, None] = {}
        late = {name: value for name, value in self.content().items() if name in ("precision", "broken")}
        for backbone in run.family("backbones", [self.backbone]):
            model = cast(BackboneConfig, backbone.entry)
            n_blocks = model.describe().n_blocks
            for dataset in run.family("datasets", self.datasets):
                for layer in (resolve(layer, n_blocks) for layer in self.layers):
                    content = {
                        "revision": self.revision,
                        "backbone": model.content(),
                        "dataset": dataset.entry.content(),
                        "layer": layer,
                        "tokens": "all",
                        "dtype": self.dtype,
                        **late,
                    }
                    label = f"{backbone.label} on {dataset.label}, layer {layer}"
                    names = {"backbone": backbone.label, "dataset": dataset.label}
                    given = {"backbone": model, "dataset": dataset.entry, "names": names}
                    units.setdefault(Unit("record", content, label=label, given=given))
        return units

    def disk(self, unit: Unit, run: Run) -> int:
        """Return the bytes of the unit's activations."""
        n_examples = len(_dataset(unit, run))
        return n_examples * _layout(unit, n_examples).example_bytes

    def work(self, unit: Unit, run: Run) -> str:
        """Return how many images there are to record."""
        return f"{len(_dataset(unit, run)):,} images"

    def duration(self, units: Sequence[Unit], run: Run, pace: Pace) -> float:
        """Return the seconds of one pass a (backbone, dataset) up to its last layer, images prepared by the workers."""
        total = 0.0
        for group in _passes(units):
            n, n_blocks = len(_dataset(group[0], run)), 1 + max(unit.content["layer"] for unit in group)
            computing = n * n_blocks * samples.block(pace, samples.shape(group[0]), run.device, self.precision)
            preparing = n * samples.picture(pace, group[0], run) / min(self._workers, _cores())
            # On a CPU both share its cores; a GPU computes while they prepare.
            total += computing + preparing if run.device == "cpu" else max(computing, preparing)
        return total

    def make(self, units: Sequence[Unit], run: Run) -> None:
        """Record all layers of a (backbone, dataset) in one pass; complete shards of an earlier run are kept.

        A shard is not kept if the dataset has other images in its place now, or has split or labelled them otherwise.

        Raises:
            UserError: an image cannot be read (with `broken: skip`: more than half of them), or has an activation that
                is too large for the dtype.

        """
        groups = _passes(units)
        datasets = [_dataset(group[0], run) for group in groups]
        total, before = sum(len(dataset) for dataset in datasets), 0
        for group, dataset in zip(groups, datasets, strict=True):
            start = before
            for done in self._record(group, dataset, run):
                run.progress(start + done, total, "images")
            before += len(dataset)

    @property
    def _workers(self) -> int:
        return self.workers or min(_cores(), WORKERS)

    def _record(self, units: Sequence[Unit], dataset: Dataset, run: Run) -> Iterator[int]:
        """Record the layers of one backbone on one dataset; yield how many of its images are done."""
        examples = [dataset[i] for i in range(len(dataset))]
        _check_names(units[0].given["names"]["dataset"], examples, dataset.classes)
        writers = [
            Writer(run.folder(unit), _layout(unit, len(dataset)), examples, int(self.shard_mb * 2**20))
            for unit in units
        ]
        if other := {shard for writer in writers for shard in writer.other}:
            log.warning(
                "%s: %d of %d shards hold other images than the dataset has now; they are recorded again",
                units[0].given["names"]["dataset"], len(other), writers[0].n_shards,
            )  # fmt: skip
        # A shard that one layer lacks is recorded for all: what is broken may have changed, and is the same for all.
        shards = sorted({shard for writer in writers for shard in writer.missing()})
        done = len(dataset) - sum(len(writers[0].span(shard)) for shard in shards)
        yield done
        if shards:
            backbone = cast(BackboneConfig, units[0].given["backbone"]).build(run.device)
            layers = [writer.layout.layer for writer in writers]
            forward = Forward(backbone, layers, run.device, self.precision, self.batch_size)
            wanted = [examples[i] for shard in shards for i in writers[0].span(shard)]
            with closing(_prepared(wanted, backbone, self._workers, lambda: 2 * forward.batch_size)) as images:
                for shard in shards:
                    span = writers[0].span(shard)
                    acts = {writer.layout.layer: _empty(writer.layout, len(span)) for writer in writers}
                    faults: list[tuple[int, str]] = []
                    for n in self._fill(acts, span, examples, images, forward, faults):
                        yield done + n
                    done += len(span)
                    for writer in writers:
                        writer.forget(shard)
                    _refuse_most(units[0], writers, faults, examples)
                    for writer in writers:
                        writer.write(shard, acts[writer.layout.layer], faults)
        for unit, writer in zip(units, writers, strict=True):
            _describe(unit, writer, examples, dataset.classes, run)
        if broken := writers[0].broken:
            log.warning(
                "%s: left out %d of %d images, which cannot be read; the table `broken` names them",
                units[0].given["names"]["dataset"], len(broken), len(examples),
            )  # fmt: skip
        run.keep(*units)

    def _fill(
        self,
        acts: Mapping[int, Tensor],
        span: range,
        examples: Sequence[Example],
        images: Iterator["Tensor | Broken"],
        forward: Forward,
        faults: list[tuple[int, str]],
    ) -> Iterator[int]:
        """Run a shard's images and put what comes out into `acts`, [t, e, d] by layer; yield how many are done.

        Those that cannot be read get zeros, and are noted in `faults`.
        """
        start = 0
        while start < len(span):
            some = span[start : start + forward.batch_size]
            batch, unread = list[Tensor](), list[int]()
            for example in some:
                image = next(images)
                if isinstance(image, Broken):
                    if self.broken == "fatal":
                        raise UserError(
                            f"image {examples[example].key!r} cannot be read ({image.why}); mend it, or leave out what "
                            "cannot be read with broken: skip"
                        )
                    faults.append((example, image.why))
                    unread.append(example - span.start)
                    image = forward.blank
                batch.append(image)
            for found in forward.outputs(batch):
                n = len(next(iter(found.values())))
                for layer, tokens_btd in found.items():
                    named = [examples[i] for i in span[start : start + n]]
                    stored_btd = _stored(tokens_btd, acts[layer].dtype, layer, named)
                    acts[layer][:, start : start + n] = stored_btd.transpose(0, 1)
                start += n
            for acts_ted in acts.values():
                acts_ted[:, unread] = 0
            yield start


class Broken(NamedTuple):
    """Stands for an image that cannot be read."""

    why: str


def _passes(units: Sequence[Unit]) -> list[list[Unit]]:
    """Return the units of each (backbone, dataset), which are recorded together."""
    groups: dict[str, list[Unit]] = {}
    for unit in units:
        groups.setdefault(canonical([unit.content["backbone"], unit.content["dataset"]]), []).append(unit)
    return list(groups.values())


def _dataset(unit: Unit, run: Run) -> Dataset:
    dataset = run.dataset(cast(DatasetConfig, unit.given["dataset"]))
    if not len(dataset):
        raise UserError(f"{unit.label}: the dataset has no images")
    return dataset


def _check_names(dataset: str, examples: Sequence[Example], classes: Sequence[str]) -> None:
    """Refuse, before any work, a name that no table can hold: that of a file which is not in Unicode."""
    for what, names in (("image", (example.key for example in examples)), ("class", classes)):
        for name in names:
            try:
                name.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"{dataset}: {what} {name!r} is not called in Unicode; rename its file") from error


def _layout(unit: Unit, n_examples: int) -> Layout:
    info = cast(BackboneConfig, unit.given["backbone"]).describe()
    layer, dtype = unit.content["layer"], unit.content["dtype"]
    return Layout(n_examples, info.n_tokens, info.prefix, info.d_model, info.grid, layer, dtype)


def _empty(layout: Layout, n_examples: int) -> Tensor:
    return torch.empty(layout.n_tokens, n_examples, layout.d_model, dtype=DTYPES[layout.dtype])


def _cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepared(
    examples: Iterable[Example], backbone: Backbone, workers: int, ahead: Callable[[], int]
) -> Generator[Tensor | Broken]:
    """Yield the images in order, prepared by threads that are at most `ahead()` images in front."""
    waiting: deque[Future[Tensor | Broken]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for example in examples:
            waiting.append(pool.submit(_opened, example, backbone))
            if len(waiting) > ahead():
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _opened(example: Example, backbone: Backbone) -> Tensor | Broken:
    try:
        return backbone.prepare(opened(example))
    except Unreadable as error:
        return Broken(error.why)


def _refuse_most(
    unit: Unit, writers: Sequence[Writer], faults: Sequence[tuple[int, str]], examples: Sequence[Example]
) -> None:
    """Refuse a dataset of which most cannot be read, and forget that, so that it is read anew when it is mended."""
    broken = {**writers[0].broken, **dict(faults)}
    if 2 * len(broken) <= len(examples):
        return
    for writer in writers:
        for shard in range(writer.n_shards):
            if any(example in broken for example in writer.span(shard)):
                writer.forget(shard)
    first = min(broken)
    raise UserError(
        f"{unit.given['names']['dataset']}: more than half of the {len(examples)} images cannot be read, the first of "
        f"them {examples[first].key!r} ({broken[first]})"
    )


def _stored(tokens_btd: Tensor, dtype: torch.dtype, layer: int, examples: Sequence[Example]) -> Tensor:
    """Return a batch in the dtype to store.

    Raises:
        UserError: a value is not finite, or too large for the dtype.

    """
    stored_btd = tokens_btd.to(dtype)
    bad_b = ~torch.isfinite(stored_btd).flatten(1).all(dim=1)
    if bad_b.any():
        worst = int(bad_b.nonzero()[0])
        largest = float(tokens_btd[worst].abs().max())
        if not math.isfinite(largest):
            raise UserError(f"layer {layer}: the activations of image {examples[worst].key!r} are not finite")
        name = str(dtype).removeprefix("torch.")
        raise UserError(
            f"layer {layer}: image {examples[worst].key!r} has an activation of {largest:.0f}, and {name} ends at "
            f"{torch.finfo(dtype).max:.0f}; record with dtype: bfloat16 or float32"
        )
    return stored_btd


def _describe(unit: Unit, writer: Writer, examples: Sequence[Example], classes: Sequence[str], run: Run) -> None:
    """Write the statistics and the tables of a recording whose shards are all there."""
    shards, mean_norm = writer.finish()
    layout, broken = writer.layout, writer.broken
    run.put(
        unit,
        "acts",
        **unit.given["names"],
        layer=layout.layer,
        tokens=layout.tokens,
        d_model=layout.d_model,
        grid_h=layout.grid[0],
        grid_w=layout.grid[1],
        n_examples=layout.n_examples,
        n_tokens=layout.n_tokens,
        prefix=", ".join(layout.prefix),
        dtype=layout.dtype,
        mean_norm=mean_norm,
    )
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
    run.put(
        unit,
        "example",
        example=list(range(len(examples))),
        key=[example.key for example in examples],
        label=[example.label for example in examples],
        split=["broken" if i in broken else example.split for i, example in enumerate(examples)],
    )
    if broken:
        keys = [examples[i].key for i in broken]
        run.put(unit, "broken", example=list(broken), key=keys, why=list(broken.values()))
    run.put(unit, "class", label=list(range(len(classes))), name=list(classes))


@hookimpl
def saefw_stages() -> list[type[StageConfig]]:
    """Bring one: record."""
    return [Record]
