"""Tries for a moment what several stages do, to guess their time.

Shapes: b images, t tokens, d d_model.
"""

import math
from collections import Counter
from contextlib import suppress
from functools import lru_cache, partial
from statistics import fmean
from time import perf_counter
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from saefw.acts import Acts
from saefw.originals import Unreadable, opened
from saefw.pace import Pace, timed
from saefw.plugin import BackboneConfig, BackboneInfo, DatasetConfig, ImageFiles, Run, Unit
from saefw.recording import WORKERS, cores

if TYPE_CHECKING:
    from PIL.Image import Image

PATCH = 16
"""Pixels of a patch's side, about: how many a model has is not known before it is built."""

IMAGES = 8
"""So many of a dataset's images are opened."""

NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 24, "mps": 1 << 22}
"""Numbers in the tokens that are sent through a block, by kind of device: enough to keep it busy."""


def sizes(recording: Unit, run: Run) -> Counter[str]:
    """Return how many images each split of a recording has, or will have; of one that is not made, by its dataset.

    Raises:
        UserError: the dataset is not there.

    """
    if run.store.has(recording):
        acts = Acts(run.folder(recording))
        return Counter({split: len(acts.of_split(split)) for split in ("train", "valid", "test")})
    return _listed(recording, run)


@lru_cache(maxsize=16)  # as many SAEs of a sweep ask for them
def _listed(recording: Unit, run: Run) -> Counter[str]:
    dataset = run.dataset(cast(DatasetConfig, recording.given["dataset"]))
    return Counter(dataset[i].split for i in range(len(dataset)))


def distinct(n: int, draws: int) -> float:
    """Return about how many of n things are drawn when one of them is drawn so often, each time out of all."""
    return -n * math.expm1(-draws / n) if n else 0.0


def shape(recording: Unit) -> BackboneInfo:
    """Return the shapes of a recording's backbone."""
    return cast(BackboneConfig, recording.given["backbone"]).describe()


def block(pace: Pace, info: BackboneInfo, device: str, precision: str = "float32") -> float:
    """Return the seconds of one image in one block: a plain one of these shapes, four times as wide inside."""
    what = f"an image of {info.n_tokens} tokens in a block of {info.d_model}, {precision}"
    return pace(what, partial(_block, info.n_tokens, info.d_model, device, precision))


def _block(n_tokens: int, d_model: int, device: str, precision: str) -> float:
    kind, dtype = device.partition(":")[0], getattr(torch, precision)
    heads = d_model // 64 if d_model % 64 == 0 else 1
    layer = torch.nn.TransformerEncoderLayer(
        d_model, heads, 4 * d_model, dropout=0, activation="gelu", batch_first=True, norm_first=True, device=device
    ).eval()
    n = max(1, NUMBERS[kind] // (n_tokens * d_model))
    x_btd = torch.randn(n, n_tokens, d_model, device=device)

    def run() -> float:
        with torch.inference_mode(), torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            return float(layer(x_btd)[0, 0, 0])

    return timed(run) / n


def passing(pace: Pace, recording: Unit, run: Run, n: int, workers: int) -> float:
    """Return the seconds of preparing so many images and running them up to the recorded block."""
    precision, n_blocks = recording.content.get("precision", "float32"), 1 + int(recording.content["layer"])
    computing = n * n_blocks * block(pace, shape(recording), run.device, precision)
    preparing = n * picture(pace, recording, run) / min(workers, cores())
    # On a CPU both share its cores; a GPU computes while they prepare.
    return computing + preparing if run.device == "cpu" else max(computing, preparing)


def reading(pace: Pace, recording: Unit, run: Run, n: int) -> float:
    """Return the seconds of reading the activations of so many images: none, unless the recording is live."""
    return passing(pace, recording, run, n, WORKERS) if recording.content.get("live") else 0.0


def picture(pace: Pace, recording: Unit, run: Run) -> float:
    """Return the seconds in which one thread opens an image of a recording's dataset and brings it to its size.

    Those that cannot be read are passed over; where none can be it is nan.

    Raises:
        UserError: the dataset is not there.

    """
    return pace(f"an image of {recording.given['names']['dataset']}", partial(_picture, recording, run))


def _picture(recording: Unit, run: Run) -> float:
    dataset = run.dataset(cast(DatasetConfig, recording.given["dataset"]))
    # The first time loads what decodes it.
    seconds = []
    for index in [0, *np.linspace(0, len(dataset) - 1, min(IMAGES, len(dataset))).astype(int).tolist()]:
        start = perf_counter()
        with suppress(Unreadable):
            np.asarray(view(recording, run, index), dtype=np.float32)
            seconds.append(perf_counter() - start)
    return fmean(seconds[1:]) if seconds[1:] else math.nan


def view(recording: Unit, run: Run, index: int) -> "Image":
    """Return an image of a recording's dataset, about as large as its model sees it.

    Raises:
        Unreadable: it cannot be read.

    """
    rows, columns = shape(recording).grid
    dataset = run.dataset(cast(DatasetConfig, recording.given["dataset"]))
    image = opened(dataset.unsplit(index) if isinstance(dataset, ImageFiles) else dataset[index])
    return image.convert("RGB").resize((PATCH * columns, PATCH * rows))
