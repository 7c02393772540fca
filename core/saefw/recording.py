"""Runs a dataset through a backbone, shard by shard.

Three things go on at once: threads read and prepare the images that come next, the backbone runs those that are ready,
and threads write the shards that are full. Of each layer one shard is filled while the one before it is written.

Shapes: b batch, t n_tokens, e examples of a shard, d d_model; `acts_ted` has shape [t, e, d].
"""

import math
import os
import shutil
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, get_args

import numpy as np
import torch
from torch import Tensor

from saefw.forward import Forward
from saefw.originals import Unreadable, opened
from saefw.plugin import Backbone, Dataset, Example, UserError
from saefw.shards import Layout, Writer
from saefw.splits import Split
from saefw.wording import got

WORKERS = 16
"""The most threads that prepare images unless told: Python lets one of them at a time do what is not decoding."""

LAST = 19
"""The lowest priority of a thread on Linux."""


class Broken(NamedTuple):
    """Stands for an image that cannot be read."""

    why: str


class Recording:
    """Some layers of a backbone over one dataset, of which complete shards may be there already."""

    def __init__(self, name: str, dataset: Dataset, writers: Sequence[Writer], skip: bool) -> None:
        """Take the name of the dataset, a writer for each layer, and whether images that cannot be read are skipped."""
        self.name, self.dataset, self.writers, self.skip = name, dataset, writers, skip
        # A shard that one layer lacks is recorded for all: what is broken may have changed, and is the same for all.
        self.shards = sorted({shard for writer in writers for shard in writer.missing()})
        """Those to record."""

    @property
    def missing(self) -> int:
        """How many images are to be run."""
        return sum(len(self.writers[0].span(shard)) for shard in self.shards)

    @property
    def disk(self) -> int:
        """Bytes of the activations that are to be written."""
        return self.missing * sum(writer.layout.example_bytes for writer in self.writers)

    def examples(self) -> Iterator[Example]:
        """Yield the images to run, in order."""
        return (self.dataset[i] for shard in self.shards for i in self.writers[0].span(shard))

    def record(self, forward: Forward, images: Iterator[Tensor | Broken]) -> Iterator[int]:
        """Run the images and write what comes out; yield how many are run.

        Args:
            forward: the backbone, watched after these layers at least.
            images: prepared, in the order of `examples`; no more are taken.

        Raises:
            UserError: an image cannot be read (if those are skipped: more than half of them), or has an activation that
                is too large for the dtype.

        """
        done = 0
        with Hands(len(self.writers), forward.device) as hands:
            for shard in self.shards:
                acts = {writer.layout.layer: writer.empty(shard) for writer in self.writers}
                faults: list[tuple[int, str]] = []
                for n in self._fill(acts, self.writers[0].span(shard), images, forward, faults):
                    yield done + n
                done += len(self.writers[0].span(shard))
                hands.wait()
                for writer in self.writers:
                    writer.forget(shard)
                self._refuse_most(faults)
                hands.take([partial(writer.write, shard, acts[writer.layout.layer], faults) for writer in self.writers])

    def _fill(
        self,
        acts: Mapping[int, Tensor],
        span: range,
        images: Iterator[Tensor | Broken],
        forward: Forward,
        faults: list[tuple[int, str]],
    ) -> Iterator[int]:
        """Run a shard's images and put what comes out into `acts`, [t, e, d] by layer; yield how many are done.

        Those that cannot be read get zeros, and are noted in `faults`.
        """
        start, layouts = 0, {writer.layout.layer: writer.layout for writer in self.writers}
        while start < len(span):
            some = span[start : start + forward.batch_size]
            batch, unread = list[Tensor](), list[int]()
            for example, image in zip(some, islice(images, len(some)), strict=True):
                if isinstance(image, Broken):
                    if not self.skip:
                        raise UserError(
                            f"image {self.dataset[example].key!r} cannot be read ({image.why}); mend it, or leave out "
                            "what cannot be read with broken: skip in the stage that records"
                        )
                    faults.append((example, image.why))
                    unread.append(example - span.start)
                    image = forward.blank
                batch.append(image)
            for found in forward.outputs(batch):
                n = len(next(iter(found.values())))
                named = [self.dataset[i].key for i in span[start : start + n]]
                for layer, acts_ted in acts.items():
                    held_btd = held(found[layer], forward.backbone.info.n_prefix, layouts[layer], named)
                    acts_ted[:, start : start + n] = stored(held_btd, acts_ted.dtype, layer, named).transpose(0, 1)
                start += n
            for acts_ted in acts.values():
                acts_ted[:, unread] = 0
            yield start

    def _refuse_most(self, faults: Sequence[tuple[int, str]]) -> None:
        """Refuse a dataset of which most cannot be read, and forget that, so that it is read anew when it is mended."""
        broken = {**self.writers[0].broken, **dict(faults)}
        if 2 * len(broken) <= len(self.dataset):
            return
        for writer in self.writers:
            for shard in range(writer.n_shards):
                if any(example in broken for example in writer.span(shard)):
                    writer.forget(shard)
        first = min(broken)
        raise UserError(
            f"{self.name}: more than half of the {len(self.dataset)} images cannot be read, the first of them "
            f"{self.dataset[first].key!r} ({broken[first]})"
        )


class Hands:
    """Threads that write while others go on; of what is handed to them, one lot is waited for before the next.

    Where the device is the CPU, they leave its cores to the forward pass and write in its gaps.
    """

    def __init__(self, n: int, device: str) -> None:
        """Start them: `n`, but no more than there are cores."""
        self._pool = _pool(min(n, cores()), device)
        self._lot: list[Future[None]] = []

    def take(self, work: Sequence[Callable[[], None]]) -> None:
        """Do some work, in no order; what it raises, `wait` raises."""
        self._lot = [self._pool.submit(one) for one in work]

    def wait(self) -> None:
        """Wait until all is done."""
        lot, self._lot = self._lot, []
        for future in lot:
            future.result()

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Wait for what is being written, also after an error or a stop: a shard that is full is worth having."""
        self._pool.shutdown()
        if error is None:
            self.wait()


def prepared(
    examples: Iterable[Example], backbone: Backbone, workers: int, ahead: Callable[[], int], device: str
) -> Generator[Tensor | Broken]:
    """Yield the images in order, prepared by threads that are at most `ahead()` images in front.

    Where the device is the CPU, they leave its cores to the forward pass and work in its gaps.
    """
    waiting: deque[Future[Tensor | Broken]] = deque()
    pool = _pool(workers, device)
    try:
        for example in examples:
            waiting.append(pool.submit(_opened, example, backbone))
            if len(waiting) > ahead():
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _pool(n: int, device: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n, initializer=_stand_back if device == "cpu" else None)


def _stand_back() -> None:
    """Let other threads go first: those of a matrix product all wait for the one among them that has no core."""
    if sys.platform == "linux":  # elsewhere a priority is that of the whole process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LAST)


def _opened(example: Example, backbone: Backbone) -> Tensor | Broken:
    try:
        return backbone.prepare(opened(example))
    except Unreadable as error:
        return Broken(error.why)


def held(tokens_btd: Tensor, n_prefix: int, layout: Layout, keys: Sequence[str]) -> Tensor:
    """Return those tokens of a batch that a recording holds; with `keys` of its images, by which patches are drawn.

    Args:
        tokens_btd: all that the backbone has, `n_prefix` of them before the patches.
        n_prefix: see there.
        layout: says which are held.
        keys: of the images.

    """
    if layout.n_drawn:
        at_bt = torch.from_numpy(np.stack([layout.patches(key) for key in keys])).to(tokens_btd.device) + n_prefix
        return tokens_btd.gather(1, at_bt[..., None].expand(-1, -1, tokens_btd.shape[2]))
    if layout.tokens == "cls":
        return tokens_btd[:, :1]
    return tokens_btd[:, n_prefix:] if layout.tokens == "patches" else tokens_btd


def stored(tokens_btd: Tensor, dtype: torch.dtype, layer: int, keys: Sequence[str]) -> Tensor:
    """Return a batch in the dtype to store, on the CPU.

    Raises:
        UserError: a value is not finite, or too large for the dtype.

    """
    stored_btd = tokens_btd.to(dtype)
    # Both are NaN where any value is.
    if bool(torch.stack(torch.aminmax(stored_btd)).isfinite().all()):
        return stored_btd.cpu()
    worst = int((~torch.isfinite(stored_btd).flatten(1).all(dim=1)).nonzero()[0])
    largest = float(tokens_btd[worst].abs().max())
    if not math.isfinite(largest):
        raise UserError(f"layer {layer}: the activations of image {keys[worst]!r} are not finite")
    name = str(dtype).removeprefix("torch.")
    raise UserError(
        f"layer {layer}: image {keys[worst]!r} has an activation of {largest:.0f}, and {name} ends at "
        f"{torch.finfo(dtype).max:.0f}; record with dtype: bfloat16 or float32"
    )


def check_examples(dataset: str, images: Dataset, who: str) -> None:
    """Refuse, before any work, what no table can hold: keys that are doubled, labels and splits that mean nothing.

    And names that are not in Unicode, as that of a file may be.

    Args:
        dataset: how the registry calls it.
        images: all of them; none is opened.
        who: brought it: `plugin 'noise' of …`.

    Raises:
        UserError: there is such a one.

    """
    for what, names in (("image", (images[i].key for i in range(len(images)))), ("class", images.classes)):
        for name in names:
            try:
                name.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"{dataset}: {what} {name!r} is not called in Unicode; rename its file") from error
    keys, n_classes = set[str](), len(images.classes)
    for i in range(len(images)):
        key, label, split, _ = images[i]
        if key in keys:
            raise UserError(f"{dataset}: {who}: two images have the key {key!r}; each needs one of its own")
        keys.add(key)
        if not -1 <= label < n_classes:
            allowed = f"must be -1 or a number of a class, at most {n_classes - 1}"
            raise UserError(f"{dataset}: {who}: the label of {key!r} {allowed}{got(label)}")
        if split not in get_args(Split):
            raise UserError(f"{dataset}: {who}: the split of {key!r} must be train, valid or test{got(split)}")


def check_room(folder: Path, n_bytes: int) -> None:
    """Refuse, before any work, to record what the disk has no room for.

    Raises:
        UserError: so many bytes are not free where the folder lies.

    """
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise UserError(
            f"{folder}: {n_bytes:,} bytes are to be recorded, and {free:,} are free on its disk; make "
            "room, put the store elsewhere, or record fewer layers or tokens"
        )


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
