"""Activations on disk: write, read in order, read shuffled.

A recording's folder holds `acts.json` (its `Layout` and the list of its shards), the shards, and `stats.safetensors`.
A shard is a safetensors file of one tensor, `acts`, token-major: one token of many images lies in one piece, so that
the blocks read for training do not hold many patches of one image, and all [CLS] of a shard are one read. Beside each
shard lies `moments-00000.safetensors`: its checksum and its share of the statistics; it is written last, and says that
the shard is complete.

Shapes: t n_tokens, e examples, d d_model, n vectors; `acts_ted` has shape [t, e, d].
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saefw.errors import UserError
from saefw.store import checksum, write_atomically

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""What activations may be stored as."""

INDEX = "acts.json"
STATS = "stats.safetensors"
KINDS = ("patches", "cls")
"""The tokens that have statistics of their own."""

BLOCK_BYTES = 1 << 20
"""Length of the pieces read for shuffling; part of what decides the order."""

BUFFER_MB = 256
"""MiB of stored vectors that a stream shuffles at a time; part of what decides the order."""

Indices = NDArray[np.int64]


class Stats(NamedTuple):
    """What the activations of the train split are like."""

    mean: Tensor
    """float64 [d_model]."""

    var: Tensor
    """float64 [d_model]: mean square distance from the mean, by dimension."""

    scale: float
    """sqrt(mean over vectors of ||x - mean||^2 / d_model)."""

    n: int
    """Over how many vectors."""


@dataclass(frozen=True)
class Layout:
    """The shape of a recording."""

    n_examples: int
    n_tokens: int
    n_prefix: int
    d_model: int
    grid: tuple[int, int]
    layer: int
    dtype: str
    tokens: str = "all"

    @property
    def example_bytes(self) -> int:
        """Bytes of one image's activations."""
        return self.n_tokens * self.d_model * DTYPES[self.dtype].itemsize


class Moments:
    """Count, mean and squared deviations of vectors, taken in piece by piece in float64.

    Pieces are merged as in Chan, Golub & LeVeque 1979, so that a mean far from 0 costs no digits.
    """

    def __init__(self, n: int, mean_d: Tensor, squares_d: Tensor, norms: float) -> None:
        """Start from given moments; `norms` is the sum of the vectors' L2 norms."""
        self.n, self.mean_d, self.squares_d, self.norms = n, mean_d, squares_d, norms

    @classmethod
    def none(cls, d_model: int) -> "Moments":
        """Return those of no vectors."""
        zeros_d = torch.zeros(d_model, dtype=torch.float64)
        return cls(0, zeros_d, zeros_d.clone(), 0.0)

    def add(self, x_nd: Tensor) -> None:
        """Take in vectors of any floating dtype."""
        if len(x_nd):
            x_nd = x_nd.double()
            mean_d = x_nd.mean(0)
            squares_d = (x_nd - mean_d).square().sum(0)
            self.merge(Moments(len(x_nd), mean_d, squares_d, float(x_nd.norm(dim=1).sum())))

    def merge(self, other: "Moments") -> None:
        """Take in what another has taken in."""
        n = self.n + other.n
        if other.n:
            shift_d = other.mean_d - self.mean_d
            self.mean_d = self.mean_d + shift_d * (other.n / n)
            self.squares_d = self.squares_d + other.squares_d + shift_d.square() * (self.n * other.n / n)
            self.n, self.norms = n, self.norms + other.norms

    def tensors(self) -> dict[str, Tensor]:
        """Return all of it as tensors, to store."""
        return {
            "n": torch.tensor(self.n),
            "mean": self.mean_d,
            "squares": self.squares_d,
            "norms": torch.tensor(self.norms, dtype=torch.float64),
        }

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "Moments":
        """Return what `tensors` gave."""
        return cls(int(tensors["n"]), tensors["mean"], tensors["squares"], float(tensors["norms"]))


class Shard(NamedTuple):
    """One file of a recording."""

    file: str
    first: int
    """Its first example."""

    n: int
    """How many examples it holds."""

    bytes: int
    sha256: str


class Writer:
    """Writes a recording shard by shard; what an interrupted run left complete is kept."""

    def __init__(self, folder: Path, layout: Layout, train: NDArray[np.bool_], shard_bytes: int) -> None:
        """Look what is there already.

        Args:
            folder: exists.
            layout: the recording's shape.
            train: bool [n_examples], the examples that the statistics are of.
            shard_bytes: a shard holds as many whole examples as fit, at least one.

        """
        self.folder, self.layout, self.train = folder, layout, train
        self.per_shard = max(1, shard_bytes // layout.example_bytes)
        self.n_shards = -(-layout.n_examples // self.per_shard)
        self._done: dict[int, tuple[Shard, dict[str, Moments]]] = {}
        for i in range(self.n_shards):
            if (kept := self._kept(i)) is not None:
                self._done[i] = kept

    def span(self, shard: int) -> range:
        """Return the examples of a shard."""
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.layout.n_examples))

    def missing(self) -> list[int]:
        """Return the shards still to write."""
        return [i for i in range(self.n_shards) if i not in self._done]

    def write(self, shard: int, acts_ted: Tensor) -> None:
        """Write a shard, [t, e, d] in the layout's dtype; the file is there whole or not at all."""
        from safetensors.torch import save, save_file

        file, span = _name(shard), self.span(shard)
        part = self.folder / f"{file}.part"
        save_file({"acts": acts_ted}, part)
        with part.open("rb+") as opened:
            os.fsync(opened.fileno())
        entry = Shard(file, span.start, len(span), part.stat().st_size, checksum(part))
        moments = self._moments(acts_ted, self.train[span.start : span.stop])
        part.replace(self.folder / file)
        tensors = {f"{kind}.{key}": x for kind, each in moments.items() for key, x in each.tensors().items()}
        write_atomically(self.folder / _moments_name(shard), save(tensors, {"shard": json.dumps(entry._asdict())}))
        self._done[shard] = entry, moments

    def finish(self) -> tuple[list[Shard], float]:
        """Write the statistics and the list of shards, once none is missing.

        Returns the shards, and the mean L2 norm of a train patch (NaN without any).
        """
        from safetensors.torch import save

        totals = {kind: Moments.none(self.layout.d_model) for kind in KINDS}
        for i in range(self.n_shards):
            for kind, moments in self._done[i][1].items():
                totals[kind].merge(moments)
        tensors = {f"{kind}.{key}": x for kind, total in totals.items() for key, x in _stats(total).items()}
        write_atomically(self.folder / STATS, save(tensors))
        shards = [self._done[i][0] for i in range(self.n_shards)]
        text = json.dumps({**asdict(self.layout), "shards": [shard._asdict() for shard in shards]}, indent=1)
        write_atomically(self.folder / INDEX, text.encode())
        # A run interrupted at another shard size may have left more files than there are shards now.
        ours = {name(i) for i in range(self.n_shards) for name in (_name, _moments_name)}
        for path in [*self.folder.glob("acts-*.safetensors*"), *self.folder.glob("moments-*.safetensors*")]:
            if path.name not in ours:
                path.unlink()
        patches = totals["patches"]
        return shards, patches.norms / patches.n if patches.n else float("nan")

    def _kept(self, shard: int) -> tuple[Shard, dict[str, Moments]] | None:
        """Return a shard that is complete and undamaged, or None."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.folder / _moments_name(shard), framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}
                entry = Shard(**json.loads(file.metadata()["shard"]))
            moments = {
                kind: Moments.of({key: tensors[f"{kind}.{key}"] for key in ("n", "mean", "squares", "norms")})
                for kind in KINDS
            }
            span, path = self.span(shard), self.folder / entry.file
            if (entry.file, entry.first, entry.n) != (_name(shard), span.start, len(span)):
                return None
            if path.stat().st_size != entry.bytes or checksum(path) != entry.sha256:
                return None
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        return entry, moments

    def _moments(self, acts_ted: Tensor, train_e: NDArray[np.bool_]) -> dict[str, Moments]:
        """Take the moments of a shard's train examples, token by token, so that little is in float64 at a time."""
        moments = {kind: Moments.none(self.layout.d_model) for kind in KINDS}
        train = torch.from_numpy(np.flatnonzero(train_e))
        for t, acts_ed in enumerate(acts_ted):
            if t >= self.layout.n_prefix:
                moments["patches"].add(acts_ed[train])
            elif t == 0:
                moments["cls"].add(acts_ed[train])
        return moments


class Acts:
    """A recording, opened to read."""

    def __init__(self, folder: Path) -> None:
        """Read the list of shards and see that they are all there.

        Raises:
            UserError: a file is missing, cut short or cannot be read.

        """
        self.folder = folder
        try:
            index = json.loads((folder / INDEX).read_text())
            self.shards = [Shard(**shard) for shard in index.pop("shards")]
            self.layout = Layout(**{**index, "grid": tuple(index["grid"])})
            for shard in self.shards:
                if (folder / shard.file).stat().st_size != shard.bytes:
                    raise ValueError(f"{shard.file} is not {shard.bytes} bytes long")
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{folder}: the recording is damaged ({error}); delete the folder to make it again"
            ) from error
        self.n_examples, self.n_tokens, self.n_prefix = (
            self.layout.n_examples,
            self.layout.n_tokens,
            self.layout.n_prefix,
        )
        self.d_model, self.grid, self.layer = self.layout.d_model, self.layout.grid, self.layout.layer
        self._first = np.array([shard.first for shard in self.shards], dtype=np.int64)
        self._open: dict[int, Tensor] = {}

    # The examples

    @cached_property
    def keys(self) -> list[str]:
        """The images' keys."""
        return [str(key) for key in self._examples["key"]]

    @cached_property
    def labels(self) -> Indices:
        """The images' classes, int64; -1: none."""
        return np.asarray(self._examples["label"], dtype=np.int64)

    @cached_property
    def splits(self) -> NDArray[np.str_]:
        """The images' splits: train, valid or test."""
        return np.asarray(self._examples["split"], dtype=np.str_)

    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes, by label."""
        return [str(name) for name in self._table("class", "label")["name"]]

    def of_split(self, split: str) -> Indices:
        """Return the examples of a split, ascending."""
        return np.flatnonzero(self.splits == split)

    @cached_property
    def _examples(self) -> dict[str, NDArray[Any]]:
        return self._table("example", "example")

    def _table(self, table: str, order: str) -> dict[str, NDArray[Any]]:
        import duckdb

        path = self.folder / f"{table}.parquet"
        try:
            with duckdb.connect() as db:
                return db.execute(f"SELECT * FROM read_parquet(?) ORDER BY {order}", [str(path)]).fetchnumpy()
        except duckdb.Error as error:
            raise UserError(f"{path}: cannot be read; delete {self.folder} to make it again") from error

    # The numbers

    def stats(self, tokens: str) -> Stats:
        """Return mean, variance and scale of the train split's `patches` or `cls`.

        Raises:
            UserError: there are no such tokens, or no train images.

        """
        from safetensors import SafetensorError, safe_open

        self._tokens(tokens)
        path = self.folder / STATS
        try:
            with safe_open(path, framework="pt") as file:
                mean, var, scale, n = (file.get_tensor(f"{tokens}.{key}") for key in ("mean", "var", "scale", "n"))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read; delete {self.folder} to make it again") from error
        if not n:
            raise UserError(f"{self.folder}: has no train images, so no mean and scale of its {tokens}")
        return Stats(mean, var, float(scale), int(n))

    def read(self, tokens: str, examples: Indices | None = None, batch: int = 256) -> Iterator[tuple[Indices, Tensor]]:
        """Yield (examples [e], activations float32 [e, t, d]) in the order given, all tokens of an image together.

        Args:
            tokens: `patches`, `cls` (t = 1) or `all`.
            examples: which, in any order; all by default.
            batch: how many at a time; the last batch may be smaller.

        Raises:
            UserError: there are no such tokens.

        """
        wanted = self._tokens(tokens)
        examples = self._checked(np.arange(self.n_examples) if examples is None else examples)
        for start in range(0, len(examples), batch):
            some = examples[start : start + batch]
            acts_etd = torch.empty(len(some), wanted.stop - wanted.start, self.d_model)
            for acts_ted, at, within in self._pieces(some):
                acts_etd[at] = _picked(acts_ted[wanted], within, 1).transpose(0, 1).float()
            yield some, acts_etd

    def shuffled(
        self, tokens: str, examples: Indices, batch_size: int, seed: int, buffer_mb: int = BUFFER_MB
    ) -> "Stream":
        """Return an endless stream of single tokens of these examples, shuffled anew each epoch.

        Raises:
            UserError: there are no such tokens, or no examples.

        """
        return Stream(self, tokens, examples, batch_size, seed, buffer_mb)

    def _tokens(self, tokens: str) -> slice:
        """Return where tokens of a kind lie."""
        if tokens == "patches":
            return slice(self.n_prefix, self.n_tokens)
        if tokens == "all":
            return slice(0, self.n_tokens)
        if tokens == "cls":
            if not self.n_prefix:
                raise UserError(f"{self.folder}: has no [CLS]; its backbone has patches only")
            return slice(0, 1)
        raise UserError(f"tokens: '{tokens}' is none of patches, cls, all")

    def _checked(self, examples: Indices) -> Indices:
        examples = np.asarray(examples, dtype=np.int64)
        if len(examples) and not 0 <= examples.min() <= examples.max() < self.n_examples:
            raise IndexError(f"examples must lie in 0..{self.n_examples - 1}")
        return examples

    def _pieces(self, examples: Indices) -> Iterator[tuple[Tensor, Tensor, Indices]]:
        """Yield for each shard that holds some of the examples: it, their places among them, their places in it."""
        shard_e = np.searchsorted(self._first, examples, side="right") - 1
        for shard in np.unique(shard_e):
            at = np.flatnonzero(shard_e == shard)
            yield self._mapped(int(shard)), torch.from_numpy(at), examples[at] - self._first[shard]

    def _mapped(self, shard: int) -> Tensor:
        """Return a shard [t, e, d] in its stored dtype, mapped and not read."""
        if shard not in self._open:
            path = self.folder / self.shards[shard].file
            with path.open("rb") as file:
                start = 8 + int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(start - 8))
            shape = [self.n_tokens, self.shards[shard].n, self.d_model]
            if header["acts"]["shape"] != shape:
                raise UserError(f"{path}: holds {header['acts']['shape']}, not {shape}; delete {self.folder}")
            # Copy on write, because torch wants writable memory; nobody writes.
            mapped = np.memmap(path, dtype=np.uint8, mode="c", offset=start)
            self._open[shard] = torch.from_numpy(mapped).view(DTYPES[self.layout.dtype]).view(shape)
        return self._open[shard]


class _Epoch(NamedTuple):
    """The order in which an epoch's blocks are read, and where each buffer of them begins."""

    tokens: Indices
    ranges: Indices
    block_starts: Indices
    """[buffers + 1], counted in blocks."""

    vector_starts: Indices
    """[buffers + 1], counted in vectors."""


class Stream:
    """Single tokens in random order, without end: each vector exactly once an epoch.

    A block is one token of neighbouring examples. Blocks are read in random order until the buffer is full; batches
    are drawn from a permutation of the buffer. What is left at an epoch's end begins the next batch. The order depends
    on the seed, the epoch, the vectors' number and size, and the buffer's size; not on how they lie in shards. A buffer
    that holds everything gives a perfect shuffle.

    Blocks are dealt in rounds, each round every token once with a random range of examples, so that a buffer smaller
    than the recording still holds all tokens about equally often.
    """

    def __init__(
        self, acts: Acts, tokens: str, examples: Indices, batch_size: int, seed: int, buffer_mb: int = BUFFER_MB
    ) -> None:
        """Begin at batch 0 of epoch 0; `batch_size` and `buffer_mb` (MiB in the stored dtype) are 1 or larger."""
        self.acts, self.batch_size, self.seed = acts, batch_size, seed
        self.position = 0
        self._wanted, self._examples_e = acts._tokens(tokens), acts._checked(examples)
        n_tokens, n_examples = self._wanted.stop - self._wanted.start, len(self._examples_e)
        self.n_vectors = n_tokens * n_examples
        if not self.n_vectors:
            raise UserError(f"{acts.folder}: there are no {tokens} of these examples to train on")
        vector_bytes = acts.d_model * DTYPES[acts.layout.dtype].itemsize
        self._block = max(1, BLOCK_BYTES // vector_bytes)
        self._shape = n_tokens, -(-n_examples // self._block)
        buffer_n = (buffer_mb << 20) // vector_bytes
        n_blocks = n_tokens * self._shape[1]
        self._n_buffers = 1 if self.n_vectors <= buffer_n else -(-n_blocks // max(1, buffer_n // self._block))
        self._epoch: tuple[int, _Epoch] | None = None
        self._buffer: tuple[tuple[int, int], Tensor, Tensor] | None = None

    def seek(self, position: int) -> None:
        """Go to just before batch number `position`, counted from the very first."""
        self.position = position

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        """Return the next batch, float32 [batch_size, d]."""
        x_nd = torch.empty(self.batch_size, self.acts.d_model)
        start, filled = self.position * self.batch_size, 0
        while filled < self.batch_size:
            epoch, vector = divmod(start + filled, self.n_vectors)
            order = self._order(epoch)
            number = int(np.searchsorted(order.vector_starts, vector, side="right")) - 1
            buffer_nd, shuffle_n = self._shuffled(epoch, number)
            some_n = shuffle_n[vector - int(order.vector_starts[number]) :][: self.batch_size - filled]
            x_nd[filled : filled + len(some_n)] = buffer_nd[some_n]
            filled += len(some_n)
        self.position += 1
        return x_nd

    def _order(self, epoch: int) -> _Epoch:
        if self._epoch is None or self._epoch[0] != epoch:
            n_tokens, n_ranges = self._shape
            rng = np.random.default_rng([self.seed, epoch])
            range_tr = rng.permuted(np.tile(np.arange(n_ranges), (n_tokens, 1)), axis=1)
            token_rt = rng.permuted(np.tile(np.arange(n_tokens), (n_ranges, 1)), axis=1)
            ranges = range_tr[token_rt, np.arange(n_ranges)[:, None]].ravel()
            ends = np.cumsum(np.minimum(self._block, len(self._examples_e) - ranges * self._block))
            block_starts = np.arange(self._n_buffers + 1) * len(ranges) // self._n_buffers
            vector_starts = np.concatenate([[0], ends])[block_starts]
            self._epoch = epoch, _Epoch(token_rt.ravel(), ranges, block_starts, vector_starts)
        return self._epoch[1]

    def _shuffled(self, epoch: int, number: int) -> tuple[Tensor, Tensor]:
        """Return a buffer [n, d] of blocks as they were read, and the order in which to draw from it."""
        if self._buffer is None or self._buffer[0] != (epoch, number):
            self._buffer = None  # let go of the old one before filling the new
            order = self._order(epoch)
            blocks = slice(order.block_starts[number], order.block_starts[number + 1])
            n = int(order.vector_starts[number + 1] - order.vector_starts[number])
            buffer_nd = torch.empty(n, self.acts.d_model, dtype=DTYPES[self.acts.layout.dtype])
            start = 0
            for token, part in zip(order.tokens[blocks], order.ranges[blocks], strict=True):
                some = self._examples_e[part * self._block : (part + 1) * self._block]
                for acts_ted, at, within in self.acts._pieces(some):
                    buffer_nd[start + at] = _picked(acts_ted[self._wanted.start + token], within, 0)
                start += len(some)
            shuffle = np.random.default_rng([self.seed, epoch, number + 1]).permutation(n)
            self._buffer = (epoch, number), buffer_nd, torch.from_numpy(shuffle)
        return self._buffer[1], self._buffer[2]


def _picked(x: Tensor, indices: Indices, dim: int) -> Tensor:
    """Return some slices of a tensor; a run of neighbours is not copied."""
    first, n = int(indices[0]), len(indices)
    if indices[-1] - first == n - 1 and (n == 1 or (np.diff(indices) == 1).all()):
        return x.narrow(dim, first, n)
    return x.index_select(dim, torch.from_numpy(indices))


def _stats(total: Moments) -> dict[str, Tensor]:
    var_d = total.squares_d / max(total.n, 1)
    return {"mean": total.mean_d, "var": var_d, "scale": var_d.mean().sqrt(), "n": torch.tensor(total.n)}


def _name(shard: int) -> str:
    return f"acts-{shard:05d}.safetensors"


def _moments_name(shard: int) -> str:
    return f"moments-{shard:05d}.safetensors"
