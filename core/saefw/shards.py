"""Writes activations to disk, shard by shard.

A recording's folder holds `acts.json` (its `Layout` and the list of its shards), the shards, and `stats.safetensors`.
A shard is a safetensors file of one tensor, `acts`, token-major: one token of many images lies in one piece, so that
the blocks read for training do not hold many patches of one image, and all [CLS] of a shard are one read. Beside each
shard lies `moments-00000.safetensors`: its checksum, that of what the dataset says of its images, and its share of the
statistics; it is written last, and says that the shard is complete. A live recording has all this but the shards.

Shapes: t n_tokens, e examples, d d_model, n vectors; `acts_ted` has shape [t, e, d].
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256, shake_256
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saefw import sealed
from saefw import tensors as files
from saefw.care import checksum, write_atomically
from saefw.errors import UserError
from saefw.imagesets import Example
from saefw.moments import BLOCK, Moments
from saefw.unit import Unit, canonical

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

Tokens = str | int
"""Which tokens are recorded: `all`, `patches`, `cls`, or so many patches of each image."""


@dataclass(frozen=True)
class Layout:
    """The shape of a recording, and which tokens of the backbone it holds."""

    n_examples: int
    n_tokens: int
    """How many tokens of an image it holds."""
    prefix: tuple[str, ...]
    """What its tokens before the patches are; [CLS], where there is one, comes first."""
    d_model: int
    grid: tuple[int, int]
    """Patches that the backbone has: rows, columns."""
    layer: int
    dtype: str
    tokens: Tokens = "all"
    seed: int = 0
    """Of the patches that are drawn."""

    @classmethod
    def of(
        cls,
        n_examples: int,
        prefix: tuple[str, ...],
        d_model: int,
        grid: tuple[int, int],
        layer: int,
        dtype: str,
        tokens: Tokens = "all",
        seed: int = 0,
    ) -> "Layout":
        """Return that of some tokens of a backbone with these tokens before its patches."""
        held = prefix if tokens == "all" else prefix[:1] if tokens == "cls" else ()
        n_patches = tokens if isinstance(tokens, int) else 0 if tokens == "cls" else grid[0] * grid[1]
        return cls(n_examples, len(held) + n_patches, held, d_model, grid, layer, dtype, tokens, seed)

    @property
    def n_prefix(self) -> int:
        """How many tokens come before the patches."""
        return len(self.prefix)

    @property
    def n_drawn(self) -> int:
        """How many patches are drawn of each image; 0: none are, so that it holds all or none."""
        return self.tokens if isinstance(self.tokens, int) else 0

    def patches(self, key: str) -> NDArray[np.int64]:
        """Return which patches it holds of an image, ascending and counted row by row.

        Those drawn are the ones with the smallest of the numbers of 64 bits that SHAKE-256 gives for `seed:key`: no
        library's random numbers count, nor do the other images, and of more patches drawn fewer are part.
        """
        n_patches = 0 if self.tokens == "cls" else self.grid[0] * self.grid[1]
        if not self.n_drawn:
            return np.arange(n_patches)
        digest = shake_256(f"{self.seed}:{key}".encode("utf-8", "surrogatepass")).digest(8 * n_patches)
        return np.sort(np.argsort(np.frombuffer(digest, dtype=">u8"), kind="stable")[: self.n_drawn])

    @property
    def example_bytes(self) -> int:
        """Bytes of one image's activations."""
        return self.n_tokens * self.d_model * DTYPES[self.dtype].itemsize


def check_tokens(stage: str, recording: Unit, *fits: str, drawn: bool = False) -> None:
    """Refuse a recording that does not hold the tokens that a stage needs.

    Args:
        stage: which, for the text.
        recording: the unit of the recording.
        fits: what may have been recorded: `all`, `patches` or `cls`.
        drawn: whether patches drawn from each image do as well.

    Raises:
        UserError: something else was recorded.

    """
    tokens = recording.content.get("tokens", "all")
    if tokens not in fits and not (drawn and isinstance(tokens, int)):
        held = {"cls": "[CLS] alone", "patches": "patches alone"}.get(tokens, f"{tokens} patches of each image")
        raise UserError(f"{stage}: {recording.label} holds {held}; record it with tokens: {' or '.join(fits)}")


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


class Examples(Protocol):
    """The images of a dataset by number."""

    def __getitem__(self, index: int, /) -> Example:
        """The image at an index, not yet loaded."""
        ...


class Writer:
    """Writes a recording shard by shard; what an interrupted run left complete is kept."""

    def __init__(self, folder: Path, layout: Layout, examples: Examples, shard_bytes: int, live: bool = False) -> None:
        """Look what is there already.

        Args:
            folder: exists.
            layout: the recording's shape.
            examples: of the dataset, all of them, asked for when they are needed; the statistics are of those of
                split train.
            shard_bytes: a shard holds as many whole examples as fit, at least one.
            live: whether the shards themselves are left out, and only what is known of them is written.

        """
        self.folder, self.layout, self.examples, self.live = folder, layout, examples, live
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

    def empty(self, shard: int) -> Tensor:
        """Return where to put the activations of a shard, [t, e, d] in the layout's dtype."""
        shape = self.layout.n_tokens, len(self.span(shard)), self.layout.d_model
        return torch.empty(shape, dtype=DTYPES[self.layout.dtype])

    def write(self, shard: int, acts_ted: Tensor, broken: Sequence[tuple[int, str]] = ()) -> None:
        """Write a shard, shaped as `empty` gives it, unless live; the file is there whole or not at all.

        Args:
            shard: which.
            acts_ted: zeros where an image could not be read.
            broken: these images, by example, and why.

        """
        file, span = shard_name(shard), self.span(shard)
        acts_ted = acts_ted.contiguous()
        if self.live:
            entry = Shard(file, span.start, len(span), 0, "", broken)
        else:
            header, data = _header(acts_ted), acts_ted.view(torch.uint8).numpy().data
            digest = sha256(header)
            digest.update(data)
            entry = Shard(file, span.start, len(span), len(header) + data.nbytes, digest.hexdigest(), broken)
        train_e = np.array([self.examples[example].split == "train" for example in span], dtype=bool)
        train_e[[example - span.start for example, _ in broken]] = False
        moments = self._moments(acts_ted, train_e)
        if not self.live:
            write_atomically(self.folder / file, header, data)
        tensors = {f"{kind}.{key}": x for kind, each in moments.items() for key, x in each.tensors().items()}
        sealed.write(self.folder / _moments_name(shard), tensors, {**entry._asdict(), IMAGES: self._images(span)})
        self._done[shard] = entry, moments

    def finish(self) -> tuple[list[Shard], dict[str, Moments]]:
        """Write the statistics and the list of shards, once none is missing; return the shards, and moments by kind.

        Live there are none.
        """
        from safetensors.torch import save

        totals = {kind: Moments.none(self.layout.d_model) for kind in KINDS}
        for i in range(self.n_shards):
            for kind, moments in self._done[i][1].items():
                totals[kind].merge(moments)
        tensors = {f"{kind}.{key}": x for kind, total in totals.items() for key, x in stats_of(total).items()}
        write_atomically(self.folder / STATS, save(tensors))
        shards = [] if self.live else [self._done[i][0] for i in range(self.n_shards)]
        listed = None if self.live else [shard._asdict() for shard in shards]
        text = json.dumps({**asdict(self.layout), "shards": listed}, indent=1)
        write_atomically(self.folder / INDEX, text.encode())
        # A run interrupted at another shard size may have left more files than there are shards now.
        ours = {name(i) for i in range(self.n_shards) for name in (shard_name, _moments_name)}
        for path in [*self.folder.glob("acts-*.safetensors*"), *self.folder.glob("moments-*.safetensors*")]:
            if path.name not in ours:
                path.unlink()
        return shards, totals

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
        span, path = self.span(shard), self.folder / shard_name(shard)
        if (entry.file, entry.first, entry.n) != (path.name, span.start, len(span)):
            return None
        if images != self._images(span):
            self.other.append(shard)
            return None
        if not all(example in span for example, _ in entry.broken):
            return None
        try:
            if not self.live and (path.stat().st_size != entry.bytes or checksum(path) != entry.sha256):
                return None
        except OSError:
            return None
        return entry, moments

    def _images(self, span: range) -> str:
        """Return the SHA-256 of what decides a shard, but for the pixels: its images by name, and the layout."""
        listed = [self.examples[i] for i in span]
        named = [[example.key, int(example.label), example.split] for example in listed]
        # Images that were added elsewhere change nothing here.
        return sha256(canonical([asdict(replace(self.layout, n_examples=0)), named]).encode()).hexdigest()

    def _moments(self, acts_ted: Tensor, train_e: NDArray[np.bool_]) -> dict[str, Moments]:
        """Take the moments of a shard's train examples, of so many tokens at once that they make a block."""
        prefix, of_train = self.layout.prefix, torch.from_numpy(train_e)
        spans = {kind: slice(at, at + 1) for at, kind in enumerate(prefix)} | {"patches": slice(len(prefix), None)}
        moments = {kind: Moments.none(self.layout.d_model) for kind in KINDS}
        for kind in KINDS:
            for some_ted in torch.split(acts_ted[spans.get(kind, slice(0))], max(1, BLOCK // max(len(train_e), 1))):
                moments[kind].add((some_ted if train_e.all() else some_ted[:, of_train]).flatten(0, 1))
        return moments


def shard_of(told: Mapping[str, Any]) -> Shard:
    """Return a shard as JSON tells of it.

    Raises:
        ValueError: it tells of none.

    """
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
    return shard_of({key: value for key, value in about.items() if key != IMAGES}), images


def _header(acts_ted: Tensor) -> bytes:
    """Return how the safetensors file of one tensor begins; its bytes follow, which the library's way copies twice."""
    dtype = next(name for name, dtype in DTYPES.items() if dtype == acts_ted.dtype)
    entry = {"dtype": STORED[dtype], "shape": list(acts_ted.shape), "data_offsets": [0, acts_ted.nbytes]}
    header = json.dumps({"acts": entry}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def stats_of(total: Moments) -> dict[str, Tensor]:
    """Return what is stored of the moments of a kind of tokens."""
    return {
        "mean": total.mean_d,
        "var": total.var_d,
        "scale": total.var_d.mean().sqrt(),
        "offset_ratio": torch.tensor(total.offset_ratio, dtype=torch.float64),
        "n": torch.tensor(total.n),
    }


def shard_name(shard: int) -> str:
    """Return the name of a shard's file."""
    return f"acts-{shard:05d}.safetensors"


def _moments_name(shard: int) -> str:
    return f"moments-{shard:05d}.safetensors"
