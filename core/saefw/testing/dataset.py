"""What is checked of a dataset."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from saefw.plugin import Dataset, DatasetConfig, Example, Split
from saefw.testing.contract import expect
from saefw.testing.entry import check_entry

if TYPE_CHECKING:
    from PIL.Image import Image


def check_dataset(config: DatasetConfig, base: Path) -> None:
    """Check a dataset, opened from the folder `base`: keys, labels, splits, order, and some of its images."""
    check_entry(config)
    with _counted() as opened:
        dataset, again = config.open(base), config.open(base)
        examples = [dataset[i] for i in range(len(dataset))]
    expect("dataset.images", bool(examples), "some", "none")
    expect("dataset.lazy", not opened, "none", f"{len(opened)} opened")
    classes = list(dataset.classes)
    named = all(isinstance(name, str) for name in classes) and len(set(classes)) == len(classes)
    expect("dataset.classes", named, "names", classes[:5])
    key, times = Counter(example.key for example in examples).most_common(1)[0]
    expect("dataset.keys", times == 1, "each once", f"'{key}' {times} times")
    for example in examples:
        who = f"image '{example.key}'"
        good = isinstance(example.label, int) and -1 <= example.label < len(classes)
        expect("dataset.labels", good, f"-1 to {len(classes) - 1}", repr(example.label), who)
        expect("dataset.splits", example.split in get_args(Split), get_args(Split), repr(example.split), who)
    expect("dataset.order", len(again) == len(examples), f"{len(examples)} images", len(again))
    for i, example in enumerate(examples):
        expect("dataset.order", tuple(again[i][:3]) == tuple(example[:3]), example[:3], again[i][:3], f"image {i}")
    _check_loading(examples, again)


def _check_loading(examples: Sequence[Example], again: Dataset) -> None:
    """Load some images: here, again, and in a worker."""
    from PIL.Image import Image

    n = len(examples)
    for i in sorted({0, n // 3, n // 2, n - 1}):
        who, image = f"image '{examples[i].key}'", examples[i].load()
        expect("dataset.load", isinstance(image, Image), "a PIL image", type(image).__name__, who)
        same = np.array_equal(np.asarray(image), np.asarray(again[i].load()))
        expect("dataset.loaded", same, "the same pixels", "others", who)
    _check_spawned(examples[0])


def _check_spawned(example: Example) -> None:
    """Load an image in a spawned process, to which `load` goes as multiprocessing sends it."""
    who, worker = f"image '{example.key}'", _worker()
    worker.submit(_follow, list(sys.path), os.getcwd()).result()
    try:
        there = worker.submit(_pixels, example.load).result()
    except BrokenProcessPool:
        _worker.cache_clear()
        expect("dataset.spawn", False, "a load of a module that a worker can import", "a worker that fails", who)
    except Exception as error:
        expect("dataset.spawn", False, "a load that is no lambda, such as functools.partial", error, who)
    else:
        expect("dataset.spawn", there == _pixels(example.load), "the same pixels", "others", who)


@contextmanager
def _counted() -> Iterator[list[object]]:
    """Note what Pillow opens, or makes of pixels, in here."""
    from PIL import Image

    opened: list[object] = []
    before = {name: getattr(Image, name) for name in ("open", "fromarray")}

    def noted(name: str) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            opened.append(name)
            return before[name](*args, **more)

        return call

    try:
        for name in before:
            setattr(Image, name, noted(name))
        yield opened
    finally:
        for name, function in before.items():
            setattr(Image, name, function)


@cache
def _worker() -> ProcessPoolExecutor:
    """Return a spawned process; one serves all checks."""
    return ProcessPoolExecutor(1, get_context("spawn"))


def _follow(path: list[str], folder: str) -> None:
    """Look for modules and files where the sender does."""
    sys.path[:] = path
    os.chdir(folder)


def _pixels(load: Callable[[], "Image"]) -> tuple[str, tuple[int, int], bytes]:
    image = load()
    return image.mode, image.size, image.tobytes()
