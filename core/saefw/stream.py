"""Vectors in random order, without end.

Shapes: n vectors, d d_model, t tokens of an example, r ranges of examples; `x_nd` has shape [n, d].
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK_BYTES = 1 << 20
"""Length of the pieces that are read; part of what decides the order."""

BUFFER_MB = 256
"""MiB of stored vectors that are shuffled at a time; part of what decides the order."""

Indices = NDArray[np.int64]

Fill = Callable[[int, int, int, Tensor], None]
"""fill(token, start, stop, into): put that token of examples start..stop into a tensor [stop - start, d]."""


class _Epoch(NamedTuple):
    """The order in which an epoch's blocks are read, and where each buffer of them begins."""

    tokens: Indices
    ranges: Indices
    block_starts: Indices
    """[buffers + 1], counted in blocks."""

    vector_starts: Indices
    """[buffers + 1], counted in vectors."""


class Stream:
    """Single tokens of examples in random order: each vector exactly once an epoch.

    A block is one token of neighbouring examples. Blocks are read in random order until the buffer is full; batches
    are drawn from a permutation of the buffer. What is left at an epoch's end begins the next batch. The order depends
    on the seed, the epoch, the number and size of the vectors and the buffer's size; not on how they lie in files. A
    buffer that holds everything gives a perfect shuffle.

    Blocks are dealt in rounds, each round every token once with a random range of examples, so that a buffer smaller
    than the recording still holds all tokens about equally often.
    """

    def __init__(
        self, fill: Fill, shape: tuple[int, int, int], dtype: torch.dtype, batch_size: int, seed: int, buffer_mb: int
    ) -> None:
        """Begin at batch 0 of epoch 0.

        Args:
            fill: reads a block.
            shape: tokens, examples, d_model; each 1 or larger.
            dtype: of the stored vectors, in which they wait in the buffer.
            batch_size: vectors a batch, 1 or larger.
            seed: zero or larger.
            buffer_mb: MiB of the buffer; at least one block is held.

        """
        self.position = 0
        """The number of the next batch, counted from the very first."""

        self.batch_size, self.seed = batch_size, seed
        self._fill, self._dtype = fill, dtype
        self._n_tokens, self._n_examples, self.d_model = shape
        self.n_vectors = self._n_tokens * self._n_examples
        vector_bytes = self.d_model * dtype.itemsize
        self._block = max(1, BLOCK_BYTES // vector_bytes)
        self._n_ranges = -(-self._n_examples // self._block)
        in_buffer = (buffer_mb << 20) // vector_bytes
        n_blocks = self._n_tokens * self._n_ranges
        self._n_buffers = 1 if self.n_vectors <= in_buffer else -(-n_blocks // max(1, in_buffer // self._block))
        self._epoch: tuple[int, _Epoch] | None = None
        self._buffer: tuple[tuple[int, int], Tensor, Tensor] | None = None

    def seek(self, position: int) -> None:
        """Go to just before batch number `position`, exactly; costs one buffer at most."""
        self.position = position

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        """Return the next batch, float32 [batch_size, d]."""
        x_nd = torch.empty(self.batch_size, self.d_model)
        start, filled = self.position * self.batch_size, 0
        while filled < self.batch_size:
            epoch, vector = divmod(start + filled, self.n_vectors)
            starts = self._order(epoch).vector_starts
            number = int(np.searchsorted(starts, vector, side="right")) - 1
            buffer_nd, shuffle_n = self._shuffled(epoch, number)
            some_n = shuffle_n[vector - int(starts[number]) :][: self.batch_size - filled]
            x_nd[filled : filled + len(some_n)] = buffer_nd[some_n]
            filled += len(some_n)
        self.position += 1
        return x_nd

    def _order(self, epoch: int) -> _Epoch:
        if self._epoch is None or self._epoch[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            range_tr = rng.permuted(np.tile(np.arange(self._n_ranges), (self._n_tokens, 1)), axis=1)
            token_rt = rng.permuted(np.tile(np.arange(self._n_tokens), (self._n_ranges, 1)), axis=1)
            ranges = range_tr[token_rt, np.arange(self._n_ranges)[:, None]].ravel()
            sizes = np.minimum(self._block, self._n_examples - ranges * self._block)
            block_starts = np.arange(self._n_buffers + 1) * len(ranges) // self._n_buffers
            vector_starts = np.concatenate([[0], np.cumsum(sizes)])[block_starts]
            self._epoch = epoch, _Epoch(token_rt.ravel(), ranges, block_starts, vector_starts)
        return self._epoch[1]

    def _shuffled(self, epoch: int, number: int) -> tuple[Tensor, Tensor]:
        """Return a buffer [n, d] of blocks as they were read, and the order in which to draw from it."""
        if self._buffer is None or self._buffer[0] != (epoch, number):
            self._buffer = None  # Let go of the old one before the new one is filled.
            order = self._order(epoch)
            blocks = slice(order.block_starts[number], order.block_starts[number + 1])
            n = int(order.vector_starts[number + 1] - order.vector_starts[number])
            buffer_nd = torch.empty(n, self.d_model, dtype=self._dtype)
            filled = 0
            for token, part in zip(order.tokens[blocks].tolist(), order.ranges[blocks].tolist(), strict=True):
                start, stop = part * self._block, min((part + 1) * self._block, self._n_examples)
                self._fill(token, start, stop, buffer_nd[filled : filled + stop - start])
                filled += stop - start
            shuffle = np.random.default_rng([self.seed, epoch, number + 1]).permutation(n)
            self._buffer = (epoch, number), buffer_nd, torch.from_numpy(shuffle)
        return self._buffer[1], self._buffer[2]
