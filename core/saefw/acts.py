"""Reads activations from disk, in order or shuffled.

Shapes: t n_tokens, e examples, d d_model, n vectors; `acts_ted` has shape [t, e, d].
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saefw import rows
from saefw import tensors as files
from saefw.care import NOT_THERE, PASSING, Unread
from saefw.errors import UserError
from saefw.moments import Moments
from saefw.shards import DTYPES, INDEX, KINDS, STATS, STORED, Layout, Shard, shard_name, shard_of, stats_of
from saefw.stream import BUFFER_MB, Indices, Stream


class Stats(NamedTuple):
    """What the activations of the train split are like."""

    mean: Tensor
    """float64 [d_model]."""

    var: Tensor
    """float64 [d_model]: mean square distance from the mean, by dimension."""

    scale: float
    """sqrt(mean over vectors of ||x - mean||^2 / d_model)."""

    offset_ratio: float
    """||mean|| / ||standard deviations||: how far the vectors lie from 0, in units of their spread."""

    n: int
    """Over how many vectors."""


class Acts:
    """A recording, opened to read."""

    def __init__(self, folder: Path) -> None:
        """Read the list of shards and see that they are all there.

        Raises:
            UserError: a file is missing or cut short.
            Unread: a file cannot be read, which says nothing of the recording.

        """
        self.folder = folder
        try:
            index = files.parsed((folder / INDEX).read_text())
            shards = index.pop("shards")
            self.live = shards is None
            """Whether it has no activations, which a backbone then gives: see `saefw.live`."""
            self.shards = [shard_of(shard) for shard in shards or []]
            self.layout = Layout(**{**index, "grid": tuple(index["grid"]), "prefix": tuple(index["prefix"])})
            _check(self.layout, None if self.live else self.shards)
            for shard in self.shards:
                if (folder / shard.file).stat().st_size != shard.bytes:
                    raise ValueError(f"{shard.file} is not {shard.bytes} bytes long")
        except (OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, OSError) and error.errno not in NOT_THERE:
                raise Unread(Path(error.filename), error) from error
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
        self._starts: dict[int, int] = {}

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
        """The images' splits: train, valid or test, or `broken` of those that could not be read."""
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
                found = db.execute(f"SELECT * FROM read_parquet(?) ORDER BY {order}", [str(path)]).fetchnumpy()
            n = self.n_examples if table == "example" else len(found[order])
            if any(np.ma.is_masked(column) for column in found.values()) or not np.array_equal(
                found[order], np.arange(n)
            ):
                raise ValueError
            return found
        except PASSING as error:
            raise Unread(path, error) from error
        except (duckdb.Error, ValueError) as error:
            raise UserError(f"{path}: cannot be read; delete {self.folder} to make it again") from error

    def patches(self, examples: Indices) -> Indices:
        """Return which patches of each image it holds, int64 [e, patch], counted row by row."""
        return np.stack([self.layout.patches(self.keys[example]) for example in self._checked(examples)])

    # The numbers

    def stats(self, tokens: str) -> Stats:
        """Return mean, variance, scale and offset ratio of the train split's `patches` or `cls`.

        Raises:
            UserError: there are no such tokens, or no train images.

        """
        self._tokens(tokens)
        path, none = self.folder / STATS, stats_of(Moments.none(self.d_model))
        try:
            tensors, _ = files.read(path)
            files.check(tensors, files.form({f"{kind}.{key}": x for kind in KINDS for key, x in none.items()}))
        except ValueError as error:
            raise UserError(f"{path}: cannot be read ({error}); delete {self.folder} to make it again") from error
        mean, var, scale, offset_ratio, n = (tensors[f"{tokens}.{key}"] for key in none)
        if not n:
            raise UserError(f"{self.folder}: has no train images, so no mean and scale of its {tokens}")
        return Stats(mean, var, float(scale), float(offset_ratio), int(n))

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
            for shard, at, within in self._pieces(some):
                found_etd = _picked(self._mapped(shard)[wanted], within, 1).transpose(0, 1)
                if len(at) == len(some):
                    acts_etd.copy_(found_etd)
                else:
                    acts_etd[torch.from_numpy(at)] = found_etd.float()
            yield some, acts_etd

    def shuffled(
        self, tokens: str, examples: Indices, batch_size: int, seed: int, buffer_mb: int = BUFFER_MB
    ) -> Stream:
        """Return an endless stream of single tokens of these examples in their stored dtype, shuffled anew each epoch.

        Args:
            tokens: `patches`, `cls` or `all`.
            examples: which; ascending ones are read fastest.
            batch_size: vectors a batch.
            seed: zero or larger; decides the order, together with the buffer's size.
            buffer_mb: MiB of vectors that are shuffled at a time.

        Raises:
            UserError: there are no such tokens, or no examples.

        """
        wanted, examples = self._tokens(tokens), self._checked(examples)
        if not len(examples) or wanted.start == wanted.stop:
            raise UserError(f"{self.folder}: there are no {tokens} of the examples asked for")

        # Neighbours in one shard are read together.
        shard_e = self._shards_of(examples)
        within_e = examples - self._first[shard_e]
        cuts = (np.flatnonzero(np.diff(shard_e)) + 1).tolist()
        gaps_e = np.cumsum(np.diff(within_e, prepend=0) != 1)

        # What is larger pushes itself out of the cache, before it is read again.
        fits = 2 * sum(shard.bytes for shard in self.shards) < rows.machine_memory()
        paths = [self.folder / shard.file for shard in self.shards]
        held: dict[int, bool] = {}
        unread = dict.fromkeys(range(len(self.shards)), 0)  # vectors, until it is asked for again

        shape = wanted.stop - wanted.start, len(examples), self.d_model

        def fill(token: int, start: int, stop: int, into_nb: rows.Bytes, cache: bool) -> bool:
            waited = False
            inside = cuts[bisect_right(cuts, start) : bisect_left(cuts, stop)]
            for first, last in pairwise([start, *inside, stop]):
                shard = int(shard_e[first])
                path, n = paths[shard], self.shards[shard].n
                row = self._start(shard) + (wanted.start + token) * n * into_nb.shape[1]
                begin = int(within_e[first])
                near = gaps_e[first] == gaps_e[last - 1]
                wanted_n = range(begin, begin + last - first) if near else within_e[first:last]
                try:
                    if unread[shard] <= 0:
                        held[shard], unread[shard] = rows.held(path), shape[0] * n
                    unread[shard] -= last - first
                    by_cache = held[shard] or (cache and fits)
                    rows.read(path, row, wanted_n, into_nb[first - start : last - start], by_cache)
                    waited |= not held[shard]
                except (OSError, EOFError) as error:
                    raise UserError(f"{path}: cannot be read ({error})") from error
            return waited

        return Stream(fill, shape, DTYPES[self.layout.dtype], batch_size, seed, buffer_mb)

    def _tokens(self, tokens: str) -> slice:
        """Return where tokens of a kind lie."""
        if tokens == "patches":
            if self.layout.tokens == "cls":
                raise UserError(f"{self.folder}: has no patches; it was recorded with tokens: cls")
            return slice(self.n_prefix, self.n_tokens)
        if tokens == "all":
            return slice(0, self.n_tokens)
        if tokens == "cls":
            if self.layout.prefix[:1] != ("cls",):
                if self.layout.tokens == "all":
                    raise UserError(f"{self.folder}: has no [CLS]; its backbone has none")
                raise UserError(f"{self.folder}: has no [CLS]; it was recorded with tokens: {self.layout.tokens}")
            return slice(0, 1)
        raise UserError(f"tokens: '{tokens}' is none of patches, cls, all")

    def _checked(self, examples: Indices) -> Indices:
        examples = np.asarray(examples, dtype=np.int64)
        if len(examples) and not 0 <= examples.min() <= examples.max() < self.n_examples:
            raise IndexError(f"examples must lie in 0..{self.n_examples - 1}")
        return examples

    def _pieces(self, examples: Indices) -> Iterator[tuple[int, Indices, Indices]]:
        """Yield each shard that holds some of the examples, their places among them, and their places in it."""
        shard_e = self._shards_of(examples)
        for shard in np.unique(shard_e):
            at = np.flatnonzero(shard_e == shard)
            yield int(shard), at, examples[at] - self._first[shard]

    def _shards_of(self, examples: Indices) -> Indices:
        """Return in which shard each example lies."""
        if self.live:
            raise UserError(f"{self.folder}: keeps no activations (it was recorded with live: true)")
        return np.searchsorted(self._first, examples, side="right") - 1

    def _start(self, shard: int) -> int:
        """Return where the activations of a shard begin in its file, which was checked once."""
        if shard not in self._starts:
            shape = [self.n_tokens, self.shards[shard].n, self.d_model]
            self._starts[shard] = _start(self.folder / self.shards[shard].file, shape, self.layout.dtype)
        return self._starts[shard]

    def _mapped(self, shard: int) -> Tensor:
        """Return a shard [t, e, d] in its stored dtype, mapped and not read."""
        if shard not in self._open:
            path, shape = self.folder / self.shards[shard].file, [self.n_tokens, self.shards[shard].n, self.d_model]
            start = self._start(shard)
            end = start + self.shards[shard].n * self.layout.example_bytes
            # Unlike np.memmap this keeps no file open, of which a process may have a thousand; it is mapped to be
            # copied on write, and nobody writes. By way of numpy, activations may begin at any byte.
            mapped = torch.from_file(str(path), shared=False, size=end, dtype=torch.uint8).numpy()[start:]
            self._open[shard] = torch.from_numpy(mapped).view(DTYPES[self.layout.dtype]).view(shape)
        return self._open[shard]


def _check(layout: Layout, shards: list[Shard] | None) -> None:
    """Refuse, with a ValueError, a layout that no recording has, and shards that are not one after the other."""
    files.number(layout.n_examples, 0, 2**31 - 1, "n_examples")
    files.number(layout.d_model, 1, 2**31 - 1, "d_model")
    files.number(layout.n_prefix, 0, 2**15 - 1, "n_prefix")
    if not all(isinstance(token, str) for token in layout.prefix):
        raise ValueError("prefix must be words")
    files.number(layout.layer, 0, 2**15 - 1, "layer")
    rows, columns = (files.number(side, 1, 2**15 - 1, "grid") for side in layout.grid)
    files.number(layout.seed, -(2**63), 2**63 - 1, "seed")
    if layout.tokens not in ("all", "patches", "cls"):
        files.number(layout.tokens, 1, rows * columns, "tokens")
    n_patches = 0 if layout.tokens == "cls" else layout.n_drawn or rows * columns
    if layout.n_tokens != layout.n_prefix + n_patches:
        raise ValueError(f"n_tokens is {layout.n_tokens}, for {layout.n_prefix} and {n_patches} patches")
    if layout.dtype not in DTYPES:
        raise ValueError(f"dtype is {layout.dtype}")
    if shards is None:
        return
    first = 0
    for i, shard in enumerate(shards):
        # By its name alone a file elsewhere could be meant.
        if shard.file != shard_name(i) or shard.first != first:
            raise ValueError(f"shard {i} is {shard.file} from example {shard.first}")
        first += files.number(shard.n, 1, layout.n_examples, f"n of shard {i}")
    if first != layout.n_examples:
        raise ValueError(f"the shards hold {first} examples of {layout.n_examples}")


def _start(path: Path, shape: list[int], dtype: str) -> int:
    """Return where the activations of a shard begin in its file."""
    delete = f"delete {path.parent} to make it again"
    try:
        # The library checks that the sizes of the header are those of the file.
        with files.opened(path) as file:
            found = {name: file.get_slice(name) for name in file.keys()}
            told = {name: (x.get_dtype(), x.get_shape()) for name, x in found.items()}
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error}); {delete}") from error
    if told != {"acts": (STORED[dtype], shape)}:
        raise UserError(f"{path}: holds {told}, not {dtype} {shape}; {delete}")
    with path.open("rb") as opened:
        return 8 + int.from_bytes(opened.read(8), "little")


def _picked(x: Tensor, indices: Indices, dim: int) -> Tensor:
    """Return some slices of a tensor; a run of neighbours is not copied."""
    first, n = int(indices[0]), len(indices)
    if indices[-1] - first == n - 1 and (n == 1 or (np.diff(indices) == 1).all()):
        return x.narrow(dim, first, n)
    return x.index_select(dim, torch.from_numpy(indices))
