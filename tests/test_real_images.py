"""Real photos, where the variable SAEFW_DATA says that they are."""

import os
from collections import Counter
from pathlib import Path

import pytest
from trees import rows

from saefw.duplicates import Duplicates
from saefw.plugin import Place
from saefw.testing import check_dataset
from saefw_caltech101 import Caltech101
from saefw_image_folder import ImageFolder

DATA = os.environ.get("SAEFW_DATA")
IMAGES = Path(DATA or "") / "images"

pytestmark = pytest.mark.skipif(not DATA, reason="SAEFW_DATA, the folder with images/, is not set")


def test_caltech_images_in_split_folders() -> None:
    config = ImageFolder(root=Place("$SAEFW_DATA/images/caltech101"))
    check_dataset(config, Path())
    found = rows(config, Path())
    assert Counter(split for _, _, split in found) == {"train": 1212 - 121, "valid": 121, "test": 505}
    assert len({name for _, name, _ in found}) == 101
    assert {split for key, _, split in found if key.startswith("test/")} == {"test"}
    assert Counter(name for _, name, split in found if split == "test").most_common()[-1][1] == 5
    dataset, seen = config.model_copy(update={"limit": 200}).open(Path()), Duplicates()
    assert [*seen.watch(dataset)][-1] == 200 and not seen.unread


def test_caltech_images_as_class_folders() -> None:
    config = Caltech101(root=Place("$SAEFW_DATA/images/caltech101/train"), train=8, test=50)
    found = rows(config, Path())
    assert Counter(split for _, _, split in found) == {"train": 808 - 81, "valid": 81, "test": 404}
    assert len(config.open(Path()).classes) == 101


def test_imagenet_images_in_class_folders() -> None:
    config = ImageFolder(root=Place("$SAEFW_DATA/images/imagenet1k_sample"))
    found = rows(config, Path())
    assert Counter(split for _, _, split in found) == {"train": 800, "valid": 100, "test": 100}
    assert len({name for _, name, _ in found}) == 1000 and found[0][1] == "n01440764_tench"
    dataset = config.open(Path())
    assert all(dataset[i].load().mode == "RGB" for i in range(0, 1000, 25))
