"""Opens recordings to read; the live ones give what a backbone puts out.

A live recording has the statistics and tables of any other and keeps no activations. Whoever reads them has the images
run through the backbone, and gets the same vectors in the same dtype, up to the rounding of the matrix products.

Shapes: t n_tokens, e examples, d d_model, n vectors; `acts_etd` has shape [e, t, d].
"""

from collections.abc import Generator, Iterator
from contextlib import closing
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import cast

import numpy as np
import torch
from torch import Tensor

from saefw.acts import Acts
from saefw.errors import UserError
from saefw.forward import ON_CPU, Forward
from saefw.originals import Unreadable, listed
from saefw.plugin import BackboneConfig, DatasetConfig, Run, Unit
from saefw.recording import WORKERS, Broken, cores, held, prepared, stored
from saefw.rows import Bytes
from saefw.shards import DTYPES
from saefw.stream import BUFFER_MB, SEGMENTS, Fill, Indices, Stream

IMAGES = ON_CPU
"""Images in a forward pass, at most: the same on every device, since it is part of what decides the order."""

MIXED = 64
"""Batches in which pairs are counted to say how well a stream mixes."""


def acts_of(recording: Unit, run: Run) -> Acts:
    """Open a recording that is made, live or not.

    Raises:
        UserError: a file is missing or cut short; or, of a live one, the dataset is not there.
        Unread: a file cannot be read, which says nothing of the recording.

    """
    folder = run.folder(recording)
    return Live(folder, recording, run) if recording.content.get("live") else Acts(folder)


class Live(Acts):
    """A live recording, opened to read."""

    def __init__(self, folder: Path, recording: Unit, run: Run) -> None:
        """Read its tables and list its images; the backbone is built when it is first needed."""
        super().__init__(folder)
        self._backbone_config = cast(BackboneConfig, recording.given["backbone"])
        self._dataset = run.dataset(cast(DatasetConfig, recording.given["dataset"]))
        self._device, self._precision = run.device, str(recording.content.get("precision", "float32"))
        self._turn = Lock()

    def read(self, tokens: str, examples: Indices | None = None, batch: int = 256) -> Iterator[tuple[Indices, Tensor]]:
        """Yield what `Acts.read` does: float32, rounded to the recording's dtype before.

        Raises:
            UserError: there are no such tokens, or an image cannot be read any more, or is another one.

        """
        wanted = self._tokens(tokens)
        examples = self._checked(np.arange(self.n_examples) if examples is None else examples)
        with closing(self._images(examples)) as images:
            for start in range(0, len(examples), batch):
                some = examples[start : start + batch]
                yield some, self._acts(some, images)[:, wanted].float()

    def shuffled(
        self, tokens: str, examples: Indices, batch_size: int, seed: int, buffer_mb: int = BUFFER_MB
    ) -> Stream:
        """Return what `Acts.shuffled` does, in an order of its own.

        The seed deals the images into groups. A group is run at once and is a block of the stream, so that it has the
        same bits each time: each epoch they are run in another random order, and single tokens of all that are in the
        buffer are drawn at random.

        Raises:
            UserError: there are no such tokens, or no examples. Reading it raises: an image cannot be read any more, or
                is another one.

        """
        wanted, examples = self._tokens(tokens), self._checked(examples)
        n_tokens = wanted.stop - wanted.start
        if not len(examples) or not n_tokens:
            raise UserError(f"{self.folder}: there are no {tokens} of the examples asked for")
        # The last number keeps it apart from what the stream draws.
        dealt = np.random.default_rng([seed, 0, 4]).permutation(examples)
        _ = self._forward  # before threads ask for it

        def fill(token: int, start: int, stop: int, into_nb: Bytes, cache: bool) -> bool:
            some = dealt[start // n_tokens : stop // n_tokens]
            with closing(self._images(some)) as images:
                x_nd = self._acts(some, images)[:, wanted].flatten(0, 1)
            into_nb[:] = x_nd.view(torch.uint8).numpy()
            return True

        shape = n_tokens, len(examples), self.d_model
        return by_groups(fill, shape, DTYPES[self.layout.dtype], batch_size, seed, buffer_mb)

    def mixing(self, tokens: str, examples: Indices, batch_size: int, seed: int) -> tuple[float, float]:
        """Return how well `shuffled` mixes with its usual buffer: what `mixing` says of some batches of an epoch."""
        wanted = self._tokens(tokens)
        shape = wanted.stop - wanted.start, len(examples), self.d_model
        return mixing(shape, DTYPES[self.layout.dtype], batch_size, seed, BUFFER_MB, MIXED)

    @cached_property
    def _forward(self) -> Forward:
        backbone = self._backbone_config.fresh(self._device)
        return Forward(backbone, [self.layer], self._device, self._precision, IMAGES)

    @cached_property
    def _broken(self) -> set[int]:
        return set(self.of_split("broken").tolist())

    def _images(self, examples: Indices) -> Generator[Tensor | Broken]:
        """Yield the images prepared, but for those that are broken."""
        found = (listed(self._dataset, i, self.keys[i]) for i in examples.tolist() if i not in self._broken)
        return prepared(found, self._forward.backbone, min(cores(), WORKERS), lambda: 2 * IMAGES, self._device)

    def _acts(self, examples: Indices, images: Iterator[Tensor | Broken]) -> Tensor:
        """Run the next of the images; return all that the recording holds of them, [e, t, d] in its dtype."""
        batch, keys = list[Tensor](), [self.keys[i] for i in examples]
        for i, key in zip(examples.tolist(), keys, strict=True):
            image = self._forward.blank if i in self._broken else next(images)
            if isinstance(image, Broken):
                raise Unreadable(key, image.why)
            batch.append(image)
        acts_etd = torch.empty(len(batch), self.n_tokens, self.d_model, dtype=DTYPES[self.layout.dtype])
        done = 0
        with self._turn:
            for found in self._forward.outputs(batch):
                tokens_btd = found[self.layer]
                named = keys[done : done + len(tokens_btd)]
                held_btd = held(tokens_btd, self._forward.backbone.info.n_prefix, self.layout, named)
                acts_etd[done : done + len(named)] = stored(held_btd, acts_etd.dtype, self.layer, named)
                done += len(named)
        acts_etd[[at for at, i in enumerate(examples.tolist()) if i in self._broken]] = 0
        return acts_etd


def by_groups(
    fill: Fill, shape: tuple[int, int, int], dtype: torch.dtype, batch_size: int, seed: int, buffer_mb: int
) -> Stream:
    """Return a stream whose blocks are groups of images with all their tokens, one image after the other.

    A group is at most a segment of the buffer.

    Args:
        fill: as of a stream of one token and n_tokens times as many examples.
        shape: tokens, images, d_model; each 1 or larger.
        dtype: see `Stream`, as the other ones.
        batch_size: see there.
        seed: see there.
        buffer_mb: see there.

    """
    n_tokens, n_images, d_model = shape
    in_buffer = (buffer_mb << 20) // (n_tokens * d_model * dtype.itemsize)
    group = max(1, min(IMAGES, in_buffer // SEGMENTS))
    return Stream(fill, (1, n_images * n_tokens, d_model), dtype, batch_size, seed, buffer_mb, group * n_tokens)


def mixing(
    shape: tuple[int, int, int], dtype: torch.dtype, batch_size: int, seed: int, buffer_mb: int, n_batches: int
) -> tuple[float, float]:
    """Return what `pairs` says of so many batches of `by_groups`, from the middle of its first epoch on.

    No image is run: each vector, of 8 bytes at least, is told by its numbers.
    """
    n_tokens, n_images, _ = shape

    def fill(token: int, start: int, stop: int, into_nb: Bytes, cache: bool) -> bool:
        image_n, token_n = np.divmod(np.arange(start, stop), n_tokens)
        number(into_nb, token_n, image_n)
        return False

    stream = by_groups(fill, shape, dtype, batch_size, seed, buffer_mb)
    in_epoch = stream.n_vectors // batch_size
    n_batches = max(1, min(n_batches, in_epoch))
    stream.seek((in_epoch - n_batches) // 2)
    return pairs(stream, n_batches, n_images, n_tokens)


def number(into_nb: Bytes, token: int | Indices, image_n: Indices) -> None:
    """Put the numbers of token and image into the first 8 bytes of each vector."""
    numbers_n2 = np.empty((len(image_n), 2), dtype=np.int32)
    numbers_n2[:, 0], numbers_n2[:, 1] = token, image_n
    into_nb[:, :8] = numbers_n2.view(np.uint8)


def pairs(stream: Stream, n_batches: int, n_images: int, n_tokens: int) -> tuple[float, float]:
    """Return how often two vectors of a batch are of one image, and of one token, beside pure chance; 1 if all are.

    Args:
        stream: its vectors have their numbers in them.
        n_batches: the next so many batches are looked at.
        n_images: it is made of so many.
        n_tokens: each of which has so many vectors.

    """
    same = np.zeros(2)
    for _ in range(n_batches):
        numbers_n2 = next(stream).view(torch.uint8)[:, :8].contiguous().numpy().view(np.int32)
        for i, numbers_n in enumerate(numbers_n2.T):
            counts = np.bincount(numbers_n)
            same[i] += (counts * (counts - 1)).sum()
    n, others = stream.batch_size, max(1, n_images * n_tokens - 1)
    by_chance = n_batches * n * (n - 1) * np.array([n_images - 1, n_tokens - 1]) / others
    token, image = np.divide(same, by_chance, out=np.ones(2), where=by_chance > 0)
    return float(image), float(token)
