"""A dataset: pictures in folders that are named by class."""

from pathlib import Path
from typing import Literal

from saefw.plugin import (
    DatasetConfig,
    ImageFiles,
    Place,
    Split,
    carve,
    hookimpl,
    image_files,
)


class MyDataset(DatasetConfig):
    """Pictures in folders that are named by class."""

    use: Literal["my-dataset"] = "my-dataset"

    root: Place
    """The folder of the class folders."""

    def build(self, base: Path) -> ImageFiles:
        """List the pictures and their classes; none is opened yet."""
        files = image_files(self.root.open(base))
        names = [key.split("/")[0] for key in files.keys]
        classes = sorted(set(names))
        labels = [classes.index(name) for name in names]
        splits: list[Split] = ["train"] * len(names)
        carve(files.keys, labels, splits, valid=0.1, test=0.2)
        return ImageFiles(files, labels, splits, classes)


@hookimpl
def saefw_datasets() -> list[type[DatasetConfig]]:
    """One: my-dataset."""
    return [MyDataset]
