"""Feeds every file that saefw reads with bytes nobody would write, led by coverage (atheris, no part of the set-up).

    python scripts/fuzz.py 65 /tmp/fuzz     # minutes, a folder for what is found

What comes must be a UserError or a file well read; anything else is a finding and lies, shortest first seen, under
`findings` in the folder, its traceback beside it. `tests/fuzz` holds the seeds: those to start from, made by
`python scripts/fuzz.py seeds`, and what once was a finding; `tests/test_fuzz.py` reads them all.

The first byte of an input says which file the rest is: see READERS.
"""

import json
import random
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

TOP = Path(__file__).parents[1]
SEEDS = TOP / "tests" / "fuzz"
LONGEST = 8192


# What is read


@cache
def _catalog() -> Any:
    import kinds  # the plugins of the tests, which build nothing

    from saefw.catalog import Catalog

    return Catalog([kinds], entry_points=False)


def read_registry(data: bytes, folder: Path) -> None:
    """Read a registry; every line of a fault begins with its place and is made of what prints."""
    from saefw.errors import UNPRINTED, UserError
    from saefw.registry import read

    path = folder / "registry.yaml"
    path.write_bytes(data)
    try:
        read(path, _catalog())
    except UserError as error:
        for line in str(error).split("\n"):
            assert re.match(rf"{re.escape(str(path))}:\d+:\d+: .", line), line
            assert not UNPRINTED.search(line), line


def _config() -> Any:
    from saefw_topk import TopK

    return TopK(k=2, expansion=2)


def _stats() -> Any:
    from saefw.acts import Stats

    return Stats(torch.zeros(3), torch.ones(3), 1.0, 0.0, 1)


def _training() -> Any:
    from saefw.plugin import Unit
    from saefw.training import Training

    return Training(Unit("train", {}, given={"sae": _config()}), 3, _stats(), 10, "cpu")


def read_sae(data: bytes, folder: Path) -> None:
    """Open a trained SAE with these weights and run it."""
    _sae(folder, weights=data)


def read_config(data: bytes, folder: Path) -> None:
    """Open a trained SAE of which this is said."""
    _sae(folder, config=data)


def read_sample(data: bytes, folder: Path) -> None:
    """Open a trained SAE with this sample."""
    _sae(folder, sample=data)


def _sae(folder: Path, weights: bytes = b"", config: bytes = b"", sample: bytes = b"") -> None:
    from saefw.trained import CONFIG, FILE, SAMPLE, open_sae

    good = _trained()
    for name, data in {FILE: weights, CONFIG: config, SAMPLE: sample}.items():
        (folder / name).write_bytes(data or good[name])
    open_sae(_config(), folder)(torch.ones(2, 3))


@cache
def _trained() -> dict[str, bytes]:
    """Return the files of an SAE, all but untrained."""
    from saefw.trained import write_sae

    training = _training()
    torch.manual_seed(0)
    training.advance(torch.randn(4, 3), 100)
    with tempfile.TemporaryDirectory() as where:
        write_sae(training.sae.eval(), _config(), Path(where), {}, torch.ones(4, 3))
        return {path.name: path.read_bytes() for path in Path(where).iterdir()}


def _run(folder: Path) -> Any:
    from saefw.run import Run
    from saefw.store import Store

    return Run(Store(folder / "runs"), folder, {}, {}, device="cpu")


def read_checkpoint(data: bytes, folder: Path) -> None:
    """Go on from a checkpoint by a step."""
    from saefw.training import CHECKPOINT

    training, run = _training(), _run(folder)
    (run.folder(training.unit) / CHECKPOINT).write_bytes(data)
    training.resume(run)
    training.advance(torch.ones(4, 3), 100)


def read_probe(data: bytes, folder: Path) -> None:
    """Open a probe and run it."""
    from saefw.plugin import Task
    from saefw.stages.probe import FILE, open_probe
    from saefw_linear import Linear

    (folder / FILE).write_bytes(data)
    open_probe(Linear(), folder, Task(3, ("a", "b")))(torch.ones(2, 3))


def _images() -> tuple[Any, list[Any]]:
    """Return the shape of a recording of four images, and these; the last of them is not to train on."""
    from PIL import Image

    from saefw.plugin import Example
    from saefw.shards import Layout

    examples = [Example(f"{i}.png", -1, "train" if i < 3 else "test", Image.Image) for i in range(4)]
    return Layout(4, 5, ("cls",), 3, (2, 2), 0, "float32"), examples


@cache
def _recording() -> dict[str, bytes]:
    """Return the files of a recording of four images in two shards."""
    from saefw.shards import Writer

    with tempfile.TemporaryDirectory() as where:
        layout, examples = _images()
        writer = Writer(Path(where), layout, examples, 2 * layout.example_bytes)
        for shard in writer.missing():
            writer.write(shard, torch.arange(30.0).reshape(5, 2, 3) + shard)
        writer.finish()
        return {path.name: path.read_bytes() for path in sorted(Path(where).iterdir())}


def _acts(folder: Path, changed: dict[str, bytes]) -> None:
    import numpy as np

    from saefw.acts import Acts

    for name, data in {**_recording(), **changed}.items():
        (folder / name).write_bytes(data)
    acts = Acts(folder)
    for tokens in ("patches", "cls") if acts.n_prefix else ("patches",):
        acts.stats(tokens)
    examples = np.arange(min(acts.n_examples, 8))
    for _ in acts.read("all", examples, 8):
        pass
    next(acts.shuffled("patches", examples, 4, 0, 1))


def read_acts(data: bytes, folder: Path) -> None:
    """Open a recording with this list of shards, and read it."""
    _acts(folder, {"acts.json": data})


def read_shard(data: bytes, folder: Path) -> None:
    """Read a recording with this as its first shard, of the length that the list says."""
    index = json.loads(_recording()["acts.json"])
    index["shards"][0]["bytes"] = len(data)
    _acts(folder, {"acts.json": json.dumps(index).encode(), "acts-00000.safetensors": data})


def read_stats(data: bytes, folder: Path) -> None:
    """Read a recording with these statistics."""
    _acts(folder, {"stats.safetensors": data})


def read_moments(data: bytes, folder: Path) -> None:
    """Go on with a recording that was interrupted, with this beside its first shard."""
    from saefw.shards import Writer

    for name, good in _recording().items():
        (folder / name).write_bytes(good)
    (folder / "moments-00000.safetensors").write_bytes(data)
    layout, examples = _images()
    Writer(folder, layout, examples, 2 * layout.example_bytes).missing()


SIZES = 4, 2, 2, 2


def read_tally(data: bytes, folder: Path) -> None:
    """Go on from what was counted of the features."""
    from saefw import sealed
    from saefw.tally import Sizes, Tally, check

    (folder / "tally.safetensors").write_bytes(data)
    for name, content in _spilt().items():
        (folder / name).write_bytes(content)
    found = sealed.read(folder / "tally.safetensors", lambda state, about: check(state, Sizes(*SIZES)))
    try:
        tally = Tally(Sizes(*SIZES), folder, found[0] if found else None)
    except ValueError:
        tally = Tally(Sizes(*SIZES), folder)
    _seen(tally)
    tally.features(), tally.histogram(), tally.top_examples(), tally.maps(), tally.top_features()


def _tally(folder: Path) -> Any:
    from saefw.tally import Sizes, Tally

    return _seen(Tally(Sizes(*SIZES), folder))


def _seen(tally: Any) -> Any:
    """Count one image on whose patches all fires."""
    from saefw.firing import grouped

    image, patch, feature = torch.ones(1, 2, 4).nonzero().unbind(dim=1)
    tally.add(torch.tensor([0]), torch.tensor([1]), grouped(image, patch, feature, torch.ones(8), 4, 2))
    return tally


@cache
def _spilt() -> dict[str, bytes]:
    """Return the files beside the good state, by name."""
    with tempfile.TemporaryDirectory() as where:
        _tally(Path(where)).state()
        return {path.name: path.read_bytes() for path in Path(where).iterdir()}


@cache
def _db() -> Any:
    import duckdb

    from saefw.index import schema

    db = duckdb.connect()
    db.execute(schema())
    return db


def _unit(folder: Path, unit: bytes, made: bytes) -> None:
    from saefw.care import damages
    from saefw.errors import UserError
    from saefw.index import Index

    (folder / "unit.json").write_bytes(unit)
    (folder / "made.json").write_bytes(made)
    list(damages(folder))
    index = Index(folder)
    try:
        if not index._insert(_db(), folder):
            raise UserError(str(index.damage(folder)[0]))
    finally:
        _db().execute("DELETE FROM unit; DELETE FROM need")


UNIT = b'{"content":{"n":1},"needs":["0123456789ab"],"stage":"fake"}'
MADE = (
    b'{"label": "x", "seconds": 1.5, "made_at": "2025-01-01T00:00:00+00:00", "made_with": {"saefw": "1"}, "files": {}}'
)


def read_unit(data: bytes, folder: Path) -> None:
    """Index a unit that says this of itself."""
    _unit(folder, data, MADE)


def read_made(data: bytes, folder: Path) -> None:
    """Index a unit with this note of how it was made."""
    _unit(folder, UNIT, data)


def read_log(data: bytes, folder: Path) -> None:
    """Go on with a log of measurements, as a checkpoint vouches for it."""
    from saefw.plugin import Unit
    from saefw.run import LOG, _mark, _rows

    run, unit = _run(folder), Unit("train", {})
    (run.folder(unit) / LOG).write_bytes(data)
    if run.rewind(unit, _mark(data)):
        assert all(isinstance(step, int) and isinstance(values, dict) for step, values in _rows(data))


READERS: dict[bytes, Callable[[bytes, Path], None]] = {
    b"r": read_registry,
    b"s": read_sae,
    b"j": read_config,
    b"n": read_sample,
    b"c": read_checkpoint,
    b"p": read_probe,
    b"a": read_acts,
    b"h": read_shard,
    b"t": read_stats,
    b"o": read_moments,
    b"y": read_tally,
    b"u": read_unit,
    b"m": read_made,
    b"l": read_log,
}
TENSORS, TEXTS = b"snctphoy", b"aujml"


def fed(data: bytes, folder: Path) -> None:
    """Read an input; what goes wrong without being the user's to mend is raised."""
    from saefw.errors import UserError

    reader = READERS.get(data[:1])
    if reader is not None:
        try:
            reader(data[1:], folder)
        except UserError:
            pass


# The seeds to start from


def seeds() -> dict[str, bytes]:
    """Return a good file of every kind, and some registries that use all of YAML."""
    from saefw import sealed

    found: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        training, run = _training(), _run(folder)
        for _ in range(2):
            training.advance(torch.randn(4, 3), 100)
        training.checkpoint(run)
        found["c-good"] = (run.folder(training.unit) / "checkpoint.safetensors").read_bytes()
        sealed.write(folder / "tally.safetensors", _tally(folder).state())
        found["y-good"] = (folder / "tally.safetensors").read_bytes()
    weights = {"weight": torch.ones(3, 2), "bias": torch.ones(2), "mean": torch.ones(3), "std": torch.ones(3)}
    found["p-good"] = save(weights, {"saefw": "{}"})
    files = _trained()
    found |= {"s-good": files["sae.safetensors"], "j-good": files["config.json"], "n-good": files["sample.safetensors"]}
    files = _recording()
    found |= {"a-good": files["acts.json"], "h-good": files["acts-00000.safetensors"]}
    found |= {"t-good": files["stats.safetensors"], "o-good": files["moments-00000.safetensors"]}
    found |= {"u-good": UNIT, "m-good": MADE, "l-good": b'\n[1, {"nmse": 0.5}]\n\n[2, {"nmse": NaN, "l0": 3}]\n'}
    for i, text in enumerate(REGISTRIES):
        found[f"r-{i}"] = text.encode()
    return {name: name[:1].encode() + data for name, data in found.items()}


REGISTRIES = (
    """saefw: 1
store: ../runs
device: cuda:1
backbones: {b: {use: open-clip, pretrained: openai}}
datasets: {d: {use: folder, root: $HOME/x}}
saes: {r: {use: relu, vary: {l1: [4e-4, 0.001], lr: [1.0e-3, 3e-3]}}, t: {use: topk, k: 8}}
stages:
  a: {use: record, backbone: b, datasets: [d], layers: [-2, -1]}
  s: {use: train, acts: a, saes: [r, t]}
  e: {use: steer, saes: s, sae: {layer: -2, lowest: nmse, below: {l0: 64}}, amounts: [0, 1]}
""",
    "saefw: 1\nsaes: &x\n  a: &a {use: topk, k: 3}\n  b: *a\n  c: {<<: *a}\nfoo: *x\n",
    'saefw: 1\nstore: "\\x1b\\U0001F600\\n"\n'
    "probes:\n  ? p\n  : use: linear\n    note: |-\n      x\n    widths: [0x1f, 0b1, 1:30]\n",
    "%YAML 1.1\n---\nsaefw: !!int 1\nplugins: [x.py, ~/y.py]\nsaes: {a: {use: relu, l1: .nan}}\n...\n",
    "\ufeffsaefw: 1\nfigures:\n  f: {use: pareto}\n  f: {use: paretto}\n"
    "stages: {s: {use: train, acts: f, saes: [\u7f8e]}}\n",
)


# The run


_NUMBERS = (0, -1, 1, 2, 3, 4, 5, 2**31, 2**53, 2**63, 2**64, 10**30, -(2**63), 1e308, float("nan"), float("inf"))
_PLAIN: tuple[Any, ...] = (
    *_NUMBERS,
    None,
    True,
    "",
    "../../x",
    "F32",
    "F64",
    "I64",
    "BF16",
    "\x00",
    "\ud800",
    [],
    {},
    [[]],
)


def _changed(value: Any, rng: random.Random) -> Any:
    """Return JSON with something in it replaced, doubled or left out."""
    if not value or not isinstance(value, dict | list) or rng.random() < 0.15:
        return rng.choice(_PLAIN)
    if isinstance(value, dict):
        key = rng.choice(list(value))
        if rng.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if rng.random() < 0.1:
            return {**value, str(rng.choice(_PLAIN)): value[key]}
        return {**value, key: _changed(value[key], rng)}
    i = rng.randrange(len(value))
    if rng.random() < 0.2:
        return value[:i] + value[i + 1 :] if rng.random() < 0.5 else [*value, value[i]]
    return [*value[:i], _changed(value[i], rng), *value[i + 1 :]]


def mutated(data: bytes, rng: random.Random, bytewise: Callable[[bytes], bytes]) -> bytes:
    """Return an input changed by what it means, or else byte by byte; the byte that says its kind stays."""
    kind, rest = data[:1], data[1:]
    if kind not in READERS or rng.random() < 0.3:
        return kind + bytewise(rest)
    try:
        if kind in TEXTS and kind != b"l":
            return kind + json.dumps(_changed(json.loads(rest), rng)).encode()
        if kind in TENSORS:
            n = int.from_bytes(rest[:8], "little")
            header, body = rest[8 : 8 + n], bytearray(rest[8 + n :])
            if rng.random() < 0.3 and body:
                at = rng.randrange(0, len(body), 4)
                body[at : at + 4] = rng.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff", b"\xff" * 4, bytes(4)))
            else:
                told = json.loads(header)
                inner = told.get("__metadata__", {}).get("saefw")
                if inner is not None and rng.random() < 0.4:
                    told["__metadata__"]["saefw"] = json.dumps(_changed(json.loads(inner), rng))
                else:
                    told = _changed(told, rng)
                header = json.dumps(told).encode()
            return kind + len(header).to_bytes(8, "little") + header + bytes(body)
    except (ValueError, AttributeError, TypeError, RecursionError):
        pass
    words = rest.split(b" ")
    word = rng.choice(words)
    i = rng.randrange(len(words))
    return kind + b" ".join([*words[:i], *([word] if rng.random() < 0.7 else []), *words[i + rng.randrange(2) :]])


def _child(seconds: int, out: Path) -> None:
    """Fuzz for so long; findings are written down and gone past."""
    import atheris

    sys.path.insert(0, str(TOP / "tests"))
    with atheris.instrument_imports(include=["saefw", "saefw_topk", "saefw_linear", "yaml", "kinds"]):
        import kinds
        import yaml

        import saefw.registry
        import saefw.stages.probe
        import saefw.stages.train
        import saefw.tally
        import saefw_linear
        import saefw_topk

        del kinds, saefw_linear, saefw_topk, yaml, saefw

    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=shared if shared.is_dir() else None))
    torch.set_num_threads(1)
    findings = out / "findings"
    seen: dict[str, int] = {}

    def one(data: bytes) -> None:
        try:
            fed(data, folder)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            where = "|".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-4:])
            name = sha256(f"{type(error).__name__} {where}".encode()).hexdigest()[:12]
            if seen.get(name, LONGEST + 2) > len(data):
                seen[name] = len(data)
                (findings / f"{data[:1].decode(errors='replace')}-{name}").write_bytes(data)
                (findings / f"{name}.txt").write_text(traceback.format_exc())
                print(f"FINDING {name}: {type(error).__name__} at {where}", flush=True)

    def custom(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        return mutated(data, rng, lambda rest: atheris.Mutate(rest, max(1, max_size - 1)))[:max_size]

    arguments = [
        sys.argv[0], f"-max_total_time={seconds}", f"-max_len={LONGEST}", "-timeout=30", "-rss_limit_mb=6000",
        "-print_final_stats=1", f"-artifact_prefix={findings}/crash-", str(out / "corpus"), str(SEEDS),
    ]  # fmt: skip
    atheris.Setup(arguments, one, custom_mutator=custom)
    atheris.Fuzz()


def main() -> None:
    """Write the seeds, or fuzz for some minutes, beginning anew where the process dies."""
    sys.path.insert(0, str(TOP / "tests"))
    if sys.argv[1] == "seeds":
        SEEDS.mkdir(exist_ok=True)
        for name, data in seeds().items():
            (SEEDS / name).write_bytes(data)
        return
    out = Path(sys.argv[2])
    for folder in ("corpus", "findings"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    if sys.argv[3:] == ["child"]:
        _child(int(sys.argv[1]), out)
        return
    begun, end = time.monotonic(), time.monotonic() + 60 * float(sys.argv[1])
    while (left := int(end - time.monotonic())) > 5:
        died = subprocess.run([sys.executable, __file__, str(left), str(out), "child"], check=False).returncode
        print(f"PART ended with {died} after {(time.monotonic() - begun) / 60:.1f} minutes", flush=True)
    n = len(list((out / "findings").glob("*.txt"))) + len(list((out / "findings").glob("crash-*")))
    print(f"DONE after {(time.monotonic() - begun) / 60:.1f} minutes: {n} findings", flush=True)


if __name__ == "__main__":
    main()
