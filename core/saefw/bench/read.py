"""How fast recordings are read, beside plain reading of their files.

A recording for this has numbers without a meaning in it; the files are as those of a real one.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from saefw import live
from saefw.acts import Acts
from saefw.bench.frame import Bench, at_least, at_most, memory
from saefw.rows import Bytes
from saefw.rows import memory as pages
from saefw.shards import DTYPES, INDEX, Layout, Shard, shard_name
from saefw.stream import BUFFER_MB, Stream

D_MODELS = (192, 768)
SIDE, PREFIX = 14, ("cls",)
DTYPE = "float16"
SIZE_MB = 3000
BATCH = 4096
SHARD_BYTES = 200 << 20
"""As `record` writes them by default."""

LARGER = 20
"""How many times the buffer a recording is whose mixing is measured; and how many GB one whose reading takes memory."""

CHUNK = 8 << 20
"""Bytes that plain reading asks for at once."""

NAIVE = 50
"""Batches that are gathered row by row."""

SPARE_MB = 300
"""What reading may take beyond its buffer."""


def bench(bench: Bench) -> None:
    """Measure reading from disk and from the system's cache, mixing, and memory."""
    size = (bench.size_mb or SIZE_MB) * 10**6
    bench.room(size)
    for d_model in D_MODELS:
        folder = bench.folder / f"d{d_model}"
        acts = recording(folder, d_model, size, full=True)
        bench.part(f"Reading {acts.n_examples:,} images, d_model {d_model}, {DTYPE}, {size / 1e9:g} GB, batch {BATCH}")
        _speed(bench, acts)
        for shard in acts.shards:
            (folder / shard.file).unlink()
    bench.part(f"Batches of {BATCH} in a recording {LARGER} times the buffer of {BUFFER_MB} MiB, beside pure chance")
    for d_model in D_MODELS:
        bench.told("mixing", D_MODELS.index(d_model), len(D_MODELS))
        image, token = mixing(d_model, BUFFER_MB, LARGER)
        bench.row(f"pairs of one image, d_model {d_model}", image, "times", bound=at_most(1.5, "value"))
        bench.row(f"pairs of one token, d_model {d_model}", token, "times", bound=at_most(1.5, "value"))
        n_tokens, dtype = SIDE**2, DTYPES[DTYPE]
        n_examples = LARGER * (BUFFER_MB << 20) // (n_tokens * d_model * dtype.itemsize)
        image, token = live.mixing((n_tokens, n_examples, d_model), dtype, BATCH, 0, BUFFER_MB, live.MIXED)
        bench.row(f"live, pairs of one image, d_model {d_model}", image, "times")
        bench.row(f"live, pairs of one token, d_model {d_model}", token, "times", bound=at_most(1.5, "value"))
    bench.part(f"Memory beyond that after imports, while {LARGER} GB are read (files with holes), not counting files")
    _memory(bench)


def recording(folder: Path, d_model: int, n_bytes: int, full: bool) -> Acts:
    """Write a recording of about so many bytes, its files full of numbers or holes; return it opened."""
    layout = Layout(0, len(PREFIX) + SIDE**2, PREFIX, d_model, (SIDE, SIDE), 0, DTYPE)
    per_shard = SHARD_BYTES // layout.example_bytes
    n_shards = max(1, n_bytes // (per_shard * layout.example_bytes))
    folder.mkdir()
    length = per_shard * layout.example_bytes
    entry = {"dtype": "F16", "shape": [layout.n_tokens, per_shard, d_model], "data_offsets": [0, length]}
    header = json.dumps({"acts": entry}).encode()
    header += b" " * (-len(header) % 8)
    start = len(header).to_bytes(8, "little") + header
    numbers = torch.randn(length // 2).half().numpy() if full else None
    shards = []
    for i in range(n_shards):
        with (folder / shard_name(i)).open("wb") as file:
            file.write(start)
            if numbers is None:
                file.truncate(len(start) + length)
            else:
                file.write(numbers.data)
                os.fsync(file.fileno())
        shards.append(Shard(shard_name(i), i * per_shard, per_shard, len(start) + length, ""))
    index = {**asdict(layout), "n_examples": n_shards * per_shard, "shards": [shard._asdict() for shard in shards]}
    (folder / INDEX).write_text(json.dumps(index))
    return Acts(folder)


def _speed(bench: Bench, acts: Acts) -> None:
    """Compare shuffled reading with plain reading of the same files, and with picking rows out of mapped files."""
    files = [acts.folder / shard.file for shard in acts.shards]
    buffer = pages(BUFFER_MB << 20).data
    n_vectors = acts.n_examples * acts.n_tokens
    n_batches = n_vectors // BATCH

    def plain() -> None:
        at = 0
        for file in files:
            with file.open("rb", buffering=0) as opened:
                while n := opened.readinto(buffer[at : at + CHUNK]):
                    at = (at + n) % (len(buffer) - CHUNK)

    def shuffled() -> None:
        stream = acts.shuffled("all", np.arange(acts.n_examples), BATCH, 0)
        for _ in range(n_batches):
            next(stream)

    endless = acts.shuffled("all", np.arange(acts.n_examples), BATCH, 0)

    def epoch() -> None:
        for _ in range(n_batches):
            next(endless)

    def in_order() -> None:
        for _ in acts.read("all"):
            pass

    mapped = [np.memmap(file, np.float16, "r", file.stat().st_size - acts.shards[0].n * acts.layout.example_bytes)
              .reshape(-1, acts.d_model) for file in files]  # fmt: skip
    order = np.random.default_rng(0).permutation(n_vectors)[: NAIVE * BATCH]

    def naive() -> None:
        for at in range(0, len(order), BATCH):
            shard_n, row_n = np.divmod(order[at : at + BATCH], len(mapped[0]))
            x_nd = np.empty((len(row_n), acts.d_model), np.float16)
            for shard in np.unique(shard_n):
                some = shard_n == shard
                x_nd[some] = mapped[shard][row_n[some]]

    def forget() -> None:
        for file in files:
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)

    title = f"d_model {acts.d_model}"
    if hasattr(os, "posix_fadvise"):
        taken = bench.seconds(f"{title}, from disk", {"plain": plain, "shuffled": shuffled}, forget)
        bench.row("plain, from disk", n_vectors / taken["plain"], "vectors/s")
        bench.row(
            "shuffled, from disk",
            n_batches * BATCH / taken["shuffled"],
            "vectors/s",
            "plain, from disk",
            at_least(0.85),
        )
    plain()
    subjects: dict[str, Callable[[], object]] = {
        "plain": plain,
        "shuffled": epoch,
        "order": in_order,
        "naive": naive,
    }
    taken = bench.seconds(f"{title}, from the cache", subjects)
    against = "plain, from the cache"
    bench.row(against, n_vectors / taken["plain"], "vectors/s")
    speed = n_batches * BATCH / taken["shuffled"]
    bench.row("shuffled, from the cache", speed, "vectors/s", against, at_least(0.3))
    bench.row("in order, as float32", n_vectors / taken["order"], "vectors/s", against)
    bench.row("rows of mapped files", len(order) / taken["naive"], "vectors/s", against)
    if acts.d_model == 768:
        bench.row("shuffled, in itself", speed, "vectors/s", bound=at_least(2e6, "value"))


def mixing(d_model: int, buffer_mb: int, larger: int) -> tuple[float, float]:
    """Return how often two vectors of a batch are of one image, and of one token, in an epoch, beside pure chance.

    Nothing is read: each vector is told by its numbers.
    """
    n_tokens, dtype = SIDE**2, DTYPES[DTYPE]
    n_examples = larger * (buffer_mb << 20) // (n_tokens * d_model * dtype.itemsize)

    def fill(token: int, start: int, stop: int, into_nb: Bytes, cache: bool) -> bool:
        live.number(into_nb, token, np.arange(start, stop))
        return False

    stream = Stream(fill, (n_tokens, n_examples, d_model), dtype, BATCH, 0, buffer_mb)
    return live.pairs(stream, stream.n_vectors // BATCH, n_examples, n_tokens)


def _memory(bench: Bench) -> None:
    """Measure how much memory another process takes to read a large recording."""
    for d_model in D_MODELS:
        what = f"shuffled, d_model {d_model}"
        bench.told("memory", D_MODELS.index(d_model), len(D_MODELS))
        folder = bench.folder / f"large{d_model}"
        recording(folder, d_model, LARGER * 10**9, full=False)
        call = [
            sys.executable,
            "-c",
            "import sys; from saefw.bench.read import reading; reading(sys.argv[1])",
            str(folder),
        ]
        peak = int(subprocess.run(call, check=True, capture_output=True, text=True).stdout)
        bound = at_most(((BUFFER_MB << 20) + SPARE_MB * 10**6) / 1e6, "value")
        reason = "" if memory() is not None else "the system does not tell how much memory a process takes"
        bench.row(what, peak / 1e6, "MB", bound=bound, reason=reason)


def reading(folder: str) -> None:
    """Read a recording once, shuffled; print the most memory that this took, in bytes."""
    from saefw.bench.frame import peak_memory

    with peak_memory() as peak:
        acts = Acts(Path(folder))
        stream = acts.shuffled("all", np.arange(acts.n_examples), BATCH, 0)
        for _ in range(stream.n_vectors // BATCH):
            next(stream)
    print(peak.bytes)
