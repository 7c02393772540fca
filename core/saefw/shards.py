"""Activations on disk: write, read in order, read shuffled.

A recording's folder holds `acts.json` (its `Layout` and the list of its shards), the shards, and `stats.safetensors`.
A shard is a safetensors file of one tensor, `acts`, token-major: one token of many images lies in one piece, so that
the blocks read for training do not hold many patches of one image, and all [CLS] of a shard are one read. Beside each
shard lies `moments-00000.safetensors`: its checksum, that of what the dataset says of its images, and its share of the
statistics; it is written last, and says that the shard is complete.

Shapes: t n_tokens, e examples, d d_model, n vectors; `acts_ted` has shape [t, e, d].
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saefw import sealed
from saefw import tensors as files
from saefw.care import checksum, write_atomically
from saefw.errors import UserError
from saefw.imagesets import Example
from saefw.moments import Moments
from saefw.stream import BUFFER_MB, Indices, Stream
from saefw.unit import canonical

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""What activations may be stored as."""

STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""The same in the words of safetensors."""

INDEX = "acts.json"
STATS = "stats.safetensors"
IMAGES = "images"
"""Under what a shard's share of the statistics has the checksum of what the dataset says of its images."""

KINDS = ("patches", "cls")
"""The tokens that have statistics of their own."""


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
    prefix: tuple[str, ...]
    """What the tokens before the patches are; [CLS], where there is one, comes first."""
    d_model: int
    grid: tuple[int, int]
    layer: int
    dtype: str
    tokens: str = "all"

    @property
    def n_prefix(self) -> int:
        """How many tokens come before the patches."""
        return len(self.prefix)

    @property
    def example_bytes(self) -> int:
        """Bytes of one image's activations."""
        return self.n_tokens * self.d_model * DTYPES[self.dtype].itemsize


class Shard(NamedTuple):
    """One file of a recording."""

    file: str
    first: int
    """Its first example."""

    n: int
    """How many examples it holds."""

    bytes: int
    sha256: str

    broken: Sequence[tuple[int, str]] = ()
    """Its images that could not be read, by example, and why: their activations are zeros and count nowhere."""


class Writer:
    """Writes a recording shard by shard; what an interrupted run left complete is kept."""

    def __init__(self, folder: Path, layout: Layout, examples: Sequence[Example], shard_bytes: int) -> None:
        """Look what is there already.

        Args:
            folder: exists.
            layout: the recording's shape.
            examples: of the dataset, all of them; the statistics are of those of split train.
            shard_bytes: a shard holds as many whole examples as fit, at least one.

        """
        self.folder, self.layout, self.examples = folder, layout, examples
        self.per_shard = max(1, shard_bytes // layout.example_bytes)
        self.n_shards = -(-layout.n_examples // self.per_shard)
        self._done: dict[int, tuple[Shard, dict[str, Moments]]] = {}
        self.other: list[int] = []
        """Shards that hold other images than the dataset has now: to write, as if they were not there."""
        for i in range(self.n_shards):
            if (kept := self._kept(i)) is not None:
                self._done[i] = kept

    def span(self, shard: int) -> range:
        """Return the examples of a shard."""
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.layout.n_examples))

    def missing(self) -> list[int]:
        """Return the shards still to write."""
        return [i for i in range(self.n_shards) if i not in self._done]

    @property
    def broken(self) -> dict[int, str]:
        """The images that could not be read and why, by example, as far as shards are written."""
        return {example: why for i in sorted(self._done) for example, why in self._done[i][0].broken}

    def forget(self, shard: int) -> None:
        """Make a shard count as missing."""
        (self.folder / _moments_name(shard)).unlink(missing_ok=True)
        self._done.pop(shard, None)

    def write(self, shard: int, acts_ted: Tensor, broken: Sequence[tuple[int, str]] = ()) -> None:
        """Write a shard, [t, e, d] in the layout's dtype; the file is there whole or not at all.

        Args:
            shard: which.
            acts_ted: zeros where an image could not be read.
            broken: these images, by example, and why.

        """
        file, span = _name(shard), self.span(shard)
        data = _safetensors(acts_ted)
        entry = Shard(file, span.start, len(span), len(data), sha256(data).hexdigest(), broken)
        train_e = np.array([self.examples[example].split == "train" for example in span], dtype=bool)
        train_e[[example - span.start for example, _ in broken]] = False
        moments = self._moments(acts_ted, train_e)
        write_atomically(self.folder / file, data)
        tensors = {f"{kind}.{key}": x for kind, each in moments.items() for key, x in each.tensors().items()}
        sealed.write(self.folder / _moments_name(shard), tensors, {**entry._asdict(), IMAGES: self._images(span)})
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
        none = Moments.none(self.layout.d_model).tensors()
        form = files.form({f"{kind}.{key}": x for kind in KINDS for key, x in none.items()})

        def check(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
            files.check(tensors, form)
            _sealed(about)

        found = sealed.read(self.folder / _moments_name(shard), check)
        if found is None:
            return None
        tensors, (entry, images) = found[0], _sealed(found[1])
        moments = {kind: Moments.of({key: tensors[f"{kind}.{key}"] for key in none}) for kind in KINDS}
        span, path = self.span(shard), self.folder / _name(shard)
        if (entry.file, entry.first, entry.n) != (path.name, span.start, len(span)):
            return None
        if images != self._images(span):
            self.other.append(shard)
            return None
        if not all(example in span for example, _ in entry.broken):
            return None
        try:
            if path.stat().st_size != entry.bytes or checksum(path) != entry.sha256:
                return None
        except OSError:
            return None
        return entry, moments

    def _images(self, span: range) -> str:
        """Return the SHA-256 of what decides a shard, but for the pixels: its images by name, and the layout."""
        named = [[example.key, int(example.label), example.split] for example in self.examples[span.start : span.stop]]
        # Images that were added elsewhere change nothing here.
        return sha256(canonical([asdict(replace(self.layout, n_examples=0)), named]).encode()).hexdigest()

    def _moments(self, acts_ted: Tensor, train_e: NDArray[np.bool_]) -> dict[str, Moments]:
        """Take the moments of a shard's train examples, token by token, so that little is in float64 at a time."""
        moments = {kind: Moments.none(self.layout.d_model) for kind in KINDS}
        train = torch.from_numpy(np.flatnonzero(train_e))
        for t, acts_ed in enumerate(acts_ted):
            if t >= self.layout.n_prefix:
                moments["patches"].add(acts_ed[train])
            elif self.layout.prefix[t] == "cls":
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
            index = files.parsed((folder / INDEX).read_text())
            self.shards = [_shard(shard) for shard in index.pop("shards")]
            self.layout = Layout(**{**index, "grid": tuple(index["grid"]), "prefix": tuple(index["prefix"])})
            _check(self.layout, self.shards)
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
        except (duckdb.Error, ValueError) as error:
            raise UserError(f"{path}: cannot be read; delete {self.folder} to make it again") from error

    # The numbers

    def stats(self, tokens: str) -> Stats:
        """Return mean, variance and scale of the train split's `patches` or `cls`.

        Raises:
            UserError: there are no such tokens, or no train images.

        """
        self._tokens(tokens)
        path, none = self.folder / STATS, _stats(Moments.none(self.d_model))
        try:
            tensors, _ = files.read(path)
            files.check(tensors, files.form({f"{kind}.{key}": x for kind in KINDS for key, x in none.items()}))
        except ValueError as error:
            raise UserError(f"{path}: cannot be read ({error}); delete {self.folder} to make it again") from error
        mean, var, scale, n = (tensors[f"{tokens}.{key}"] for key in ("mean", "var", "scale", "n"))
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
    ) -> Stream:
        """Return an endless stream of single tokens of these examples, shuffled anew each epoch.

        Args:
            tokens: `patches`, `cls` or `all`.
            examples: which; ascending ones are read fastest.
            batch_size: vectors a batch.
            seed: zero or larger; decides the order, together with the buffer's size.
            buffer_mb: MiB of vectors in their stored dtype that are shuffled at a time.

        Raises:
            UserError: there are no such tokens, or no examples.

        """
        wanted, examples = self._tokens(tokens), self._checked(examples)
        if not len(examples) or wanted.start == wanted.stop:
            raise UserError(f"{self.folder}: there are no {tokens} of the examples asked for")

        def fill(token: int, start: int, stop: int, into_nd: Tensor) -> None:
            for acts_ted, at, within in self._pieces(examples[start:stop]):
                into_nd[at] = _picked(acts_ted[wanted.start + token], within, 0)

        shape = wanted.stop - wanted.start, len(examples), self.d_model
        return Stream(fill, shape, DTYPES[self.layout.dtype], batch_size, seed, buffer_mb)

    def _tokens(self, tokens: str) -> slice:
        """Return where tokens of a kind lie."""
        if tokens == "patches":
            return slice(self.n_prefix, self.n_tokens)
        if tokens == "all":
            return slice(0, self.n_tokens)
        if tokens == "cls":
            if self.layout.prefix[:1] != ("cls",):
                raise UserError(f"{self.folder}: has no [CLS]; its backbone has none")
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
            path, shape = self.folder / self.shards[shard].file, [self.n_tokens, self.shards[shard].n, self.d_model]
            start = _start(path, shape, self.layout.dtype)
            end = start + self.shards[shard].n * self.layout.example_bytes
            # Unlike np.memmap this keeps no file open, of which a process may have a thousand; it is mapped to be
            # copied on write, and nobody writes. By way of numpy, activations may begin at any byte.
            mapped = torch.from_file(str(path), shared=False, size=end, dtype=torch.uint8).numpy()[start:]
            self._open[shard] = torch.from_numpy(mapped).view(DTYPES[self.layout.dtype]).view(shape)
        return self._open[shard]


def _check(layout: Layout, shards: list[Shard]) -> None:
    """Refuse, with a ValueError, a layout that no recording has, and shards that are not one after the other."""
    files.number(layout.n_examples, 0, 2**31 - 1, "n_examples")
    files.number(layout.d_model, 1, 2**31 - 1, "d_model")
    files.number(layout.n_prefix, 0, 2**15 - 1, "n_prefix")
    if not all(isinstance(token, str) for token in layout.prefix):
        raise ValueError("prefix must be words")
    files.number(layout.layer, 0, 2**15 - 1, "layer")
    rows, columns = (files.number(side, 1, 2**15 - 1, "grid") for side in layout.grid)
    if layout.n_tokens != layout.n_prefix + rows * columns:
        raise ValueError(f"n_tokens is {layout.n_tokens}, for {layout.n_prefix} and a grid of {rows} x {columns}")
    if layout.dtype not in DTYPES:
        raise ValueError(f"dtype is {layout.dtype}")
    first = 0
    for i, shard in enumerate(shards):
        # By its name alone a file elsewhere could be meant.
        if shard.file != _name(i) or shard.first != first:
            raise ValueError(f"shard {i} is {shard.file} from example {shard.first}")
        first += files.number(shard.n, 1, layout.n_examples, f"n of shard {i}")
    if first != layout.n_examples:
        raise ValueError(f"the shards hold {first} examples of {layout.n_examples}")


def _shard(told: Mapping[str, Any]) -> Shard:
    """Return a shard as JSON tells of it; raise ValueError if that is none."""
    try:
        shard = Shard(**told)
        for example, why in shard.broken:
            files.number(example, 0, 2**31 - 1, "broken")
            if not isinstance(why, str):
                raise ValueError("broken must say why")
    except TypeError as error:
        raise ValueError(str(error)) from error
    return shard


def _sealed(about: Mapping[str, Any]) -> tuple[Shard, str]:
    """Return a shard and the checksum of its images, as its share of the statistics tells; raise ValueError if none."""
    images = about.get(IMAGES)
    if not isinstance(images, str):
        raise ValueError("does not say of which images it is")
    return _shard({key: value for key, value in about.items() if key != IMAGES}), images


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


def _safetensors(acts_ted: Tensor) -> bytes:
    """Return the file of one tensor, with a single copy of it; the library's own way makes two, or a private file."""
    data = acts_ted.contiguous().view(torch.uint8).numpy()
    dtype = next(name for name, dtype in DTYPES.items() if dtype == acts_ted.dtype)
    entry = {"dtype": STORED[dtype], "shape": list(acts_ted.shape), "data_offsets": [0, data.nbytes]}
    header = json.dumps({"acts": entry}).encode()
    header += b" " * (-len(header) % 8)
    return b"".join([len(header).to_bytes(8, "little"), header, data.data])


def _stats(total: Moments) -> dict[str, Tensor]:
    var_d = total.squares_d / max(total.n, 1)
    return {"mean": total.mean_d, "var": var_d, "scale": var_d.mean().sqrt(), "n": torch.tensor(total.n)}


def _name(shard: int) -> str:
    return f"acts-{shard:05d}.safetensors"


def _moments_name(shard: int) -> str:
    return f"moments-{shard:05d}.safetensors"
