"""Vectors in random order, without end.

Shapes: n vectors, d d_model, b bytes of a vector, t tokens of an example, r ranges of examples; `x_nd` has shape
[n, d].
"""

import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saefw.rows import Bytes, memory

BLOCK_BYTES = 1 << 20
"""Length of the pieces that are read, at least, where tokens have so many examples; part of what decides the order."""

BUFFER_MB = 256
"""MiB of stored vectors that are shuffled at a time; part of what decides the order."""

SEGMENTS = 16
"""Of the buffer, at most; part of what decides the order."""

AHEAD = 1
"""Segments that are read beyond the next one, in memory beyond the buffer, so that a disk is never idle."""

READERS = 2
"""Threads that read a segment where reading has to wait; they decide nothing."""

SPARE = 4
"""Batches whose memory is kept to be written again, at most."""

NUMBERS = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.int16}
"""As what NumPy holds the stored vectors: it has no type for bfloat16."""

Indices = NDArray[np.int64]

Fill = Callable[[int, int, int, Bytes, bool], bool]
"""fill(token, start, stop, into, cache): put that token of examples start..stop into memory [stop - start, b].

`cache` says whether the system should keep what is read: it will be read again. The answer says whether it had to wait,
so that another thread can help; while memory is copied, it could not. Called from several threads.
"""

Block = tuple[int, int, int, int]
"""Token, start, stop, and the row of the buffer where it goes."""


class _Epoch(NamedTuple):
    """The order in which an epoch's blocks are read, and where segments and phases begin."""

    tokens: Indices
    ranges: Indices
    block_starts: Indices
    """[segments + 1], counted in blocks."""

    vector_starts: Indices
    """[segments + 1], counted in vectors."""

    phase_starts: list[int]
    """Of each phase, and the end, counted in vectors."""


class _Batches:
    """Memory for batches, which is written again once nothing refers to it: new pages take long to clear.

    Nothing of it is handed out twice at a time.
    """

    def __init__(self, n: int, d: int, dtype: torch.dtype) -> None:
        self._shape, self._numbers, self._n_bytes = (n, d), NUMBERS[dtype], n * d * dtype.itemsize
        self._spare = deque[Bytes](maxlen=SPARE)

    def empty(self) -> NDArray[Any]:
        """Return memory [n, d] that holds anything, as what NumPy knows."""
        try:
            whole = self._spare.pop()
        except IndexError:
            whole = memory(self._n_bytes)
        lent = whole.view(self._numbers).reshape(self._shape)  # lives as long as any tensor made of it
        weakref.finalize(lent, self._spare.append, whole).atexit = False
        return lent


class _Reading:
    """A segment that is being read."""

    def __init__(self, n_blocks: int, cache: bool) -> None:
        self.cache, self.dropped = cache, False
        self.over = Future[None]()
        """Is told when nobody writes into its place any more."""

        self._left = n_blocks
        self._error: BaseException | None = None

    def count(self, error: BaseException | None) -> None:
        """Count a block that is read, or left out; with an error all that are left are left out."""
        self._left -= 1
        if error is not None:
            self._error, self.dropped = self._error or error, True
        if self._left == 0:
            self.over.set_exception(self._error) if self._error else self.over.set_result(None)

    def drop(self) -> None:
        """Leave out what is not yet read; return when nobody writes into its place any more."""
        self.dropped = True
        self.over.exception()


class Stream:
    """Single tokens of examples in random order: each vector exactly once an epoch.

    A block is one token of neighbouring examples. Blocks are read in random order into a buffer of segments. In a phase
    all segments but one are drawn from, in random order, while the next segment is read into that one: each gives an
    equal share in every phase in which it is there, so that the first of them is empty at the end and its place free.
    There is one place more, so that there is always a segment to read. What is left at an epoch's end begins the next
    batch. The order depends on the seed, the epoch, the number and size of the vectors and the buffer's size; not on
    threads, or on how the vectors lie in files. A buffer that holds everything gives a perfect shuffle, and is read
    once.

    Blocks are dealt in rounds, each round every token once with a random range of examples, so that a buffer smaller
    than the recording still holds all tokens about equally often.
    """

    def __init__(
        self,
        fill: Fill,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        batch_size: int,
        seed: int,
        buffer_mb: int,
        block: int | None = None,
    ) -> None:
        """Begin at batch 0 of epoch 0; nothing is read yet.

        Args:
            fill: reads a block.
            shape: tokens, examples, d_model; each 1 or larger.
            dtype: of the stored vectors.
            batch_size: vectors a batch, 1 or larger.
            seed: zero or larger.
            buffer_mb: MiB of the buffer; at least two blocks are held.
            block: examples of a block, but for the last; None: equally many in all, BLOCK_BYTES at least.

        """
        self.position = 0
        """The number of the next batch, counted from the very first."""

        self.batch_size, self.seed, self.dtype = batch_size, seed, dtype
        self._fill = fill
        self._n_tokens, self._n_examples, self.d_model = shape
        self.n_vectors = self._n_tokens * self._n_examples
        self._vector_bytes = vector_bytes = self.d_model * dtype.itemsize
        in_buffer = (buffer_mb << 20) // vector_bytes
        if block is None:
            self._n_ranges = max(1, self._n_examples * vector_bytes // BLOCK_BYTES)
            self._range_starts = np.arange(self._n_ranges + 1) * self._n_examples // self._n_ranges
            block = -(-self._n_examples // self._n_ranges)
        else:
            self._n_ranges = -(-self._n_examples // block)
            self._range_starts = np.minimum(np.arange(self._n_ranges + 1) * block, self._n_examples)
        n_blocks = self._n_tokens * self._n_ranges
        if self.n_vectors <= in_buffer:
            self._n_slots = self._n_segments = 1
            self._capacity = self.n_vectors
        else:
            self._n_slots = max(2, min(SEGMENTS, in_buffer // block))
            blocks = max(1, in_buffer // block // self._n_slots)
            self._n_segments = -(-n_blocks // blocks)
            self._capacity = blocks * block
        self._live = min(max(1, self._n_slots - 1), self._n_segments)
        self._n_phases = self._n_segments - self._live + 1
        self._n_places = 1 if self._n_segments == 1 else self._n_slots + AHEAD
        self._batches = _Batches(batch_size, self.d_model, dtype)
        self._buffer_nb: Bytes | None = None
        self._held: dict[int, int] = {}
        """Which segment lies whole in a place of the buffer."""

        self._reading: dict[int, _Reading] = {}
        """Segments that are being read into their places."""

        self._now: tuple[int, Indices] | None = None
        """The phase, and the rows of the buffer in the order in which it draws them."""

        self._ahead: tuple[int, Future[Indices]] | None = None
        """The same of the next phase."""

        self._orders: dict[int, _Epoch] = {}
        self._shuffles: dict[int, Indices] = {}
        self._blocks = deque[tuple[_Reading, Block]]()
        """To read, in this order."""

        self._at_work, self._wanted = 0, 1
        """Threads that read, and how many should."""

        self._turn = Lock()
        self._threads = ThreadPoolExecutor(READERS + 1, "saefw-read")

    def seek(self, position: int) -> None:
        """Go to just before batch number `position`, exactly; costs one buffer at most."""
        self.position = position

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        """Return the next batch [batch_size, d], in the dtype of the stored vectors."""
        batch = self._batches.empty()
        batch_nb = batch.view(np.uint8)
        start, filled = self.position * self.batch_size, 0
        while filled < self.batch_size:
            epoch, vector = divmod(start + filled, self.n_vectors)
            starts = self._order(epoch).phase_starts
            phase = bisect_right(starts, vector) - 1
            rows_n = self._rows(epoch * self._n_phases + phase)
            some_n = rows_n[vector - starts[phase] :][: self.batch_size - filled]
            # Not by torch, whose threads would wait for those that read. `clip` lets it write in place.
            into_nb = batch_nb[filled : filled + len(some_n)]
            np.take(self._buffer(), some_n, axis=0, out=into_nb, mode="clip")
            filled += len(some_n)
        self.position += 1
        # Each call of torch's lets go of Python and waits to have it again: one of three is a tenth of the time.
        batch_nd = torch.from_numpy(batch)
        return batch_nd if batch_nd.dtype == self.dtype else batch_nd.view(self.dtype)

    # Phases and segments are counted over all epochs; what the order of an epoch lists, within it.

    def _rows(self, phase: int) -> Indices:
        """Return the rows of the buffer in the order in which a phase draws them, once its segments are there."""
        if self._now is None or self._now[0] != phase:
            self._now = None
            ahead, segments = self._ahead, self._segments(phase)
            # There is a place for each of these.
            near = segments if self._n_segments == 1 else range(segments.start, segments.start + self._n_places)
            for segment in [segment for segment in self._reading if segment not in near]:
                self._reading.pop(segment).drop()  # Nothing else is read into its place before.
            self._begin(segments)
            try:
                for segment in segments:
                    if segment in self._reading:
                        self._help(self._reading[segment])
                        self._reading.pop(segment).over.result()
                        self._held[segment % self._n_places] = segment
            except Exception:
                while self._reading:  # What else went wrong meanwhile is not told later.
                    self._reading.popitem()[1].drop()
                raise
            rows_n = ahead[1].result() if ahead else None
            if ahead is None or rows_n is None or ahead[0] != phase:
                rows_n = self._drawn(phase, self._order_of(phase))
            self._now = phase, rows_n
            self._begin(near)
            self._ahead = phase + 1, self._threads.submit(self._drawn, phase + 1, self._order_of(phase + 1))
        return self._now[1]

    def _segments(self, phase: int) -> range:
        """Return the segments from which a phase draws."""
        epoch, within = divmod(phase, self._n_phases)
        first = 0 if self._n_segments == 1 else epoch * self._n_segments + within
        return range(first, first + self._live)

    def _begin(self, segments: range) -> None:
        """Begin to read segments into their places, but for those that are there."""
        for segment in segments:
            place = segment % self._n_places
            if self._held.get(place) == segment or segment in self._reading:
                continue
            self._held.pop(place, None)
            epoch, within = divmod(segment, self._n_segments)
            order = self._order(epoch)
            span = slice(order.block_starts[within], order.block_starts[within + 1])
            tokens, ranges = order.tokens[span], order.ranges[span]
            starts, stops = self._range_starts[ranges], self._range_starts[ranges + 1]
            at = place * self._capacity + np.cumsum(stops - starts) - (stops - starts)
            reading = self._reading[segment] = _Reading(len(at), epoch > 0)
            blocks = zip(tokens.tolist(), starts.tolist(), stops.tolist(), at.tolist(), strict=True)
            self._blocks += [(reading, block) for block in blocks]
        self._hire()

    def _hire(self) -> None:
        """Set more threads to work, if they are wanted."""
        with self._turn:
            new = max(0, min(self._wanted - self._at_work, len(self._blocks)))
            self._at_work += new
        for _ in range(new):
            self._threads.submit(self._work, self._buffer())

    def _work(self, buffer_nb: Bytes) -> None:
        """Read blocks until none is left, or fewer threads are wanted."""
        while True:
            with self._turn:
                if self._at_work > self._wanted or not self._blocks:
                    self._at_work -= 1
                    return
                reading, block = self._blocks.popleft()
            self._put(reading, block, buffer_nb)
            self._hire()

    def _help(self, reading: _Reading) -> None:
        """Read what is left of a segment beside the threads that do: who waits for it has nothing else to do."""
        while True:
            with self._turn:
                if not self._blocks or self._blocks[0][0] is not reading:
                    return
                _, block = self._blocks.popleft()
            self._put(reading, block, self._buffer())
            self._hire()

    def _put(self, reading: _Reading, block: Block, buffer_nb: Bytes) -> None:
        """Read a block into its place, unless it is no longer wanted."""
        token, start, stop, at = block
        error: BaseException | None = None
        if not reading.dropped:
            try:
                waited = self._fill(token, start, stop, buffer_nb[at : at + stop - start], reading.cache)
                self._wanted = READERS if waited else 1
            except BaseException as found:
                error = found
        with self._turn:
            reading.count(error)

    def _buffer(self) -> Bytes:
        """Return the buffer [n, b]."""
        if self._buffer_nb is None:
            n = self._n_places * self._capacity
            self._buffer_nb = memory(n * self._vector_bytes).reshape(n, self._vector_bytes)
        return self._buffer_nb

    def _drawn(self, phase: int, order: _Epoch) -> Indices:
        """Return the rows of the buffer in the order in which a phase draws them."""
        epoch, within = divmod(phase, self._n_phases)
        segments, before = self._segments(phase), self._shuffles
        self._shuffles = {i: before[i] if i in before else self._shuffled(order, i) for i in segments}
        sizes = np.array([len(self._shuffles[i]) for i in segments])
        starts, stops = self._share(np.array(segments) % self._n_segments, np.asarray(within), sizes)
        rows = [
            i % self._n_places * self._capacity + self._shuffles[i][start:stop]
            for i, start, stop in zip(segments, starts.tolist(), stops.tolist(), strict=True)
        ]
        rng = np.random.default_rng([self.seed, epoch, 3, within + 1])
        return rng.permutation(np.concatenate(rows))

    def _shuffled(self, order: _Epoch, segment: int) -> Indices:
        """Return the order in which a segment's vectors are drawn."""
        epoch, within = divmod(segment, self._n_segments)
        n = int(order.vector_starts[within + 1] - order.vector_starts[within])
        return np.random.default_rng([self.seed, epoch, 2, within + 1]).permutation(n)

    def _share(self, segment: Indices, phase: Indices, size: Indices) -> tuple[Indices, Indices]:
        """Return from where to where segments of such sizes are drawn in phases, counted in their vectors."""
        first, last = np.maximum(0, segment - self._live + 1), np.minimum(segment, self._n_phases - 1)
        n, gone = last - first + 1, phase - first
        return size * gone // n, size * (gone + 1) // n

    def _order_of(self, phase: int) -> _Epoch:
        return self._order(phase // self._n_phases)

    def _order(self, epoch: int) -> _Epoch:
        """Return an epoch's order; those of two neighbours are kept."""
        if epoch not in self._orders:
            self._orders = {i: order for i, order in self._orders.items() if abs(i - epoch) == 1}
            self._orders[epoch] = self._ordered(epoch)
        return self._orders[epoch]

    def _ordered(self, epoch: int) -> _Epoch:
        rounds, tokens = self._n_ranges, self._n_tokens
        range_tr, token_rt = np.tile(np.arange(rounds), (tokens, 1)), np.tile(np.arange(tokens), (rounds, 1))
        if self._n_segments > 1:  # else as any order, and what is in the buffer serves all epochs
            rng = np.random.default_rng([self.seed, epoch, 1])
            range_tr, token_rt = rng.permuted(range_tr, axis=1), rng.permuted(token_rt, axis=1)
        ranges = range_tr[token_rt, np.arange(rounds)[:, None]].ravel()
        block_starts = np.arange(self._n_segments + 1) * len(ranges) // self._n_segments
        vector_starts = np.concatenate([[0], np.cumsum(np.diff(self._range_starts)[ranges])])[block_starts]
        sizes, phases = np.diff(vector_starts), np.arange(self._n_phases)
        drawn_p = np.zeros(self._n_phases, dtype=np.int64)
        for i in range(self._live):
            start, stop = self._share(phases + i, phases, sizes[phases + i])
            drawn_p += stop - start
        phase_starts = np.concatenate([[0], np.cumsum(drawn_p)])
        return _Epoch(token_rt.ravel(), ranges, block_starts, vector_starts, phase_starts.tolist())
