"""Genuinely trained weights on real images reach the accuracies that are known of them.

The data are not part of the project: the variable SAEFW_DATA names their folder, with `weights/` and `images/` in it.
Where it is not set, or the folder is not there, these tests say so and are skipped.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saefw.plugin import Backbone, Place, open_image

BATCH = 10


@pytest.fixture(scope="module")
def data() -> Path:
    if "SAEFW_DATA" not in os.environ:
        pytest.skip("the variable SAEFW_DATA is not set: it names the folder of real weights and images")
    folder = Path(os.environ["SAEFW_DATA"])
    if not folder.is_dir():
        pytest.skip(f"the folder that SAEFW_DATA names is not there: {folder}")
    return folder


def run(backbone: Backbone, files: Sequence[Path], read: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what `read` makes of the last block's output, for every file, [file, ...]; threads decode the images."""

    def prepared(file: Path) -> Tensor:
        return backbone.prepare(open_image(file))

    with ThreadPoolExecutor(2) as pool, torch.inference_mode():
        return torch.cat(
            [
                read(backbone(torch.stack(list(pool.map(prepared, files[start : start + BATCH])))))
                for start in range(0, len(files), BATCH)
            ]
        )


def imagenet(data: Path) -> list[Path]:
    """Return one image of every class of ImageNet-1k, in the order of the labels."""
    files = sorted((data / "images/imagenet1k_sample").glob("*/*"))
    assert len(files) == len({file.parent for file in files}) == 1000
    return files


def caltech(data: Path, split: str) -> tuple[list[Path], list[int]]:
    """Return the images of a split of Caltech-101 and their labels."""
    folders = sorted((data / "images/caltech101" / split).iterdir())
    assert len(folders) == 101
    pairs = [(file, label) for label, folder in enumerate(folders) for file in sorted(folder.iterdir())]
    return [file for file, _ in pairs], [label for _, label in pairs]


def top(logits_nc: Tensor, k: int) -> float:
    """Return the share of rows whose own number is among their k largest entries."""
    hits = logits_nc.topk(k, dim=1).indices == torch.arange(len(logits_nc))[:, None]
    return float(hits.any(1).double().mean())


# DeiT-Tiny through the plugin timm


@pytest.fixture(scope="module")
def deit(data: Path) -> Any:
    from saefw_timm import Timm

    file = data / "weights/deit_tiny_patch16_224.fp16.safetensors"
    return Timm(model="deit_tiny_patch16_224", checkpoint=Place(file)).build("cpu")


def test_deit_tiny_classifies_imagenet(deit: Any, data: Path) -> None:
    def logits(tokens: Tensor) -> Tensor:
        found: Tensor = deit._model.head(deit.embedding(tokens))
        return found

    logits_nc = run(deit, imagenet(data), logits)
    assert top(logits_nc, 1) == pytest.approx(0.736, abs=0.0011)
    assert top(logits_nc, 5) == pytest.approx(0.921, abs=0.0011)


def test_a_linear_classifier_on_deit_tiny_learns_caltech(deit: Any, data: Path) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (train, y_train), (test, y_test) = caltech(data, "train"), caltech(data, "test")
    assert (len(train), len(test)) == (1212, 505)
    x = run(deit, [*train, *test], deit.embedding).numpy()
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    classifier.fit(x[: len(train)], y_train)
    assert classifier.score(x[len(train) :], y_test) == pytest.approx(0.850, abs=0.003)
