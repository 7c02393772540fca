"""How fast images are recorded, beside the bare forward pass.

Backbones have random weights, which costs the same; images are photographs' size.
"""

import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial
from itertools import count
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from saefw import heap
from saefw.bench.frame import Bench, at_least, at_most
from saefw.blocks import outputs
from saefw.catalog import Catalog
from saefw.errors import UserError
from saefw.forward import Forward
from saefw.images import open_image
from saefw.imagesets import Example
from saefw.plugin import Backbone, BackboneConfig
from saefw.recording import Broken, Recording, cores, prepared
from saefw.shards import Layout, Writer

LAYERS, DTYPE = [8, 10], "float16"
"""Blocks that are recorded, of 12, and in which dtype."""

MODELS = (("vit_tiny_patch16_224", 64, 256), ("vit_base_patch16_224", 8, 32))
"""Backbones of timm, of width 192 and 768: with their batch size, and how many images."""

PHOTO = 500, 375
"""Pixels of a JPEG file: width and height, as most photographs of ImageNet have."""

CLASSES, EACH = 1000, 1331
"""Of the listed image set, which has as many files as ImageNet."""

REGISTRY = """\
saefw: 1
backbones:
  vit: {use: timm, model: vit_tiny_patch16_224, pretrained: false}
datasets:
  imagenet: {use: imagenet, root: images}
stages:
  acts: {use: record, backbone: vit, datasets: [imagenet], layers: [-2]}
"""

DRY = """\
import resource, subprocess, sys
done = subprocess.run([sys.executable, "-m", "saefw", "run", "--dry"], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(done.returncode)
"""
"""Prints the KiB of a dry run at its peak. A program of its own: the peak of a process counts from what it was forked
from, and a bench that ran backbones is larger than a dry run."""


class Images(list[Example]):
    """Images of one class."""

    classes = ("thing",)


def bench(bench: Bench) -> None:
    """Measure recording from memory and from JPEG files, and the dry run of a million files."""
    for model, batch_size, n in MODELS:
        _models(bench, model, batch_size, n if bench.size_mb is None else min(n, bench.size_mb))
    _dry(bench, EACH if bench.size_mb is None else 1)


def _models(bench: Bench, model: str, batch_size: int, n: int) -> None:
    """Measure one backbone over n images."""
    backbone = _backbone(model)
    forward = Forward(backbone, LAYERS, "cpu", "float32", batch_size)
    ready = list(torch.randn(n, 3, 224, 224))
    batches = [torch.stack(ready[start : start + batch_size]) for start in range(0, n, batch_size)]
    photos, names = _photos(bench.folder / model, n), count()

    def images() -> Generator[Tensor | Broken]:
        return prepared(photos, backbone, cores(), lambda: 2 * batch_size, "cpu")

    def run() -> None:
        for batch in batches:
            with torch.inference_mode():
                outputs(backbone, batch, LAYERS)

    def record(found: Iterator[Tensor | Broken]) -> None:
        folder = bench.folder / model / str(next(names))
        writers = []
        for layer in LAYERS:
            info, into = backbone.info, folder / str(layer)
            into.mkdir(parents=True)
            layout = Layout.of(n, info.prefix, info.d_model, info.grid, layer, DTYPE)
            # A shard holds one batch, so that there are several.
            writers.append(Writer(into, layout, photos, batch_size * layout.example_bytes))
        with heap.kept():  # as in a stage; the bare forward is that of a script without it
            for _ in Recording("photos", photos, writers, skip=False).record(forward, found):
                pass
        for writer in writers:
            writer.finish()

    def from_files() -> None:
        with closing(images()) as found:
            record(found)

    taken = bench.seconds(
        model,
        {
            "forward": run,
            "memory": lambda: record(iter(ready)),
            "decode": lambda: deque(images(), maxlen=0),
            "files": from_files,
        },
    )
    speed = {name: n / seconds for name, seconds in taken.items()}
    both = 1 / (1 / speed["decode"] + 1 / speed["forward"])
    threads = f"{torch.get_num_threads()} threads of torch, {cores()} that decode"
    bench.part(f"{model}: {n} images, blocks 8 and 10 in {DTYPE}, batches of {batch_size}, {threads}")
    bench.row("forward alone", speed["forward"], "images/s")
    bench.row("recording from memory", speed["memory"], "images/s", "forward alone", at_least(0.95))
    bench.row("decoding alone", speed["decode"], "images/s")
    bench.row("decoding, then forward", both, "images/s")
    bench.row("recording JPEG files", speed["files"], "images/s", "decoding, then forward", at_least(0.9))


def _backbone(model: str) -> Backbone:
    """Return a backbone of timm with random weights, by way of its plugin."""
    config = cast(type[BackboneConfig], Catalog().lookup("backbones")["timm"])
    return config.model_validate({"use": "timm", "model": model, "pretrained": False}).build("cpu")


def _photos(folder: Path, n: int) -> Images:
    """Write photographs of noise that is as hard to decode as a real one, about; return them."""
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (PHOTO[1] // 4, PHOTO[0] // 4, 3), dtype=np.uint8))
        coarse.resize(PHOTO, Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
    paths = [folder / f"{i}.jpg" for i in range(n)]
    return Images(Example(path.name, 0, "train", partial(open_image, path)) for path in paths)


def _dry(bench: Bench, each: int) -> None:
    """Measure `saefw run --dry` on empty files in the folders of ImageNet."""
    for i in range(CLASSES):
        folder = bench.folder / f"images/train/n{i:08d}"
        folder.mkdir(parents=True)
        for name in range(each):
            (folder / f"n{i:08d}_{name}.JPEG").touch()
        bench.told("files are made", i, CLASSES)
    (bench.folder / "registry.yaml").write_text(REGISTRY)
    peaks: list[float] = []

    def dry() -> None:
        done = subprocess.run([sys.executable, "-c", DRY], cwd=bench.folder, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(f"{bench.folder}: `saefw run --dry` ended with {done.returncode}")
        peaks.append(int(done.stdout) / 1024)

    taken = bench.seconds("dry run", {"dry": dry})
    bench.part(f"saefw run --dry over {CLASSES * each:,} files")
    bench.row("time", taken["dry"], "s", bound=at_most(10, "value"))
    bench.row("memory, at its peak", max(peaks), "MiB", bound=at_most(1024, "value"))
