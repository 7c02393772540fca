"""Caltech-101: objects of 101 kinds."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from saefw.plugin import (
    Dataset,
    DatasetConfig,
    ImageFiles,
    Place,
    Source,
    Split,
    UserError,
    carve,
    hookimpl,
    image_files,
    inside,
    stratified,
)

FOLDER = "101_ObjectCategories"
BACKGROUND = "BACKGROUND_Google"


class Caltech101(DatasetConfig):
    """Caltech-101, without its background class: seeded, up to 30 images of a class to train and 50 to test on.

    L. Fei-Fei, R. Fergus, P. Perona: Learning generative visual models from few training examples, CVPR workshop 2004.
    Images that are drawn for neither are left out, as is usual.
    """

    use: Literal["caltech101"] = "caltech101"

    sources = (
        Source(
            "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip",
            137_414_764,
            "md5:3138e1922a9193bfa496528edbbc45d0",
            "torchvision",
        ),
    )
    terms = "CaltechDATA; CC BY 4.0."

    root: Place
    """The folder 101_ObjectCategories, or one that holds it."""

    train: int = Field(30, gt=0)
    """Images of a class to train on, those that become valid among them."""

    test: int = Field(50, ge=0)
    """Images of a class to test on, at most."""

    valid: float = Field(0.1, ge=0, lt=1)
    """Share of the train images of each class that becomes valid."""

    seed: int = 0
    """Of all these choices."""

    def build(self, base: Path) -> Dataset:
        """List the images and draw.

        Raises:
            UserError: there are none, or not in class folders.

        """
        root = inside(self.root.open(base), FOLDER, f"caltech101/{FOLDER}", f"caltech-101/{FOLDER}")
        files = image_files(root).only(lambda key: not key.startswith(f"{BACKGROUND}/"))
        folders = [key.split("/")[0] for key in files.keys]
        odd = next((key for key in files.keys if key.count("/") != 1), None)
        if odd is not None or not folders:
            what = f"'{odd}' is not" if odd else "there are none"
            raise UserError(
                f"{root}: Caltech-101 is a folder for each class with images in it: {what}; "
                "for images in other folders there is image-folder"
            )
        of_class: dict[str, list[str]] = {}
        for key, name in zip(files.keys, folders, strict=True):
            of_class.setdefault(name, []).append(key)
        drawn: dict[str, Split] = {}
        for keys in of_class.values():
            train = {keys[i] for i in stratified(keys, [0] * len(keys), self.train, self.seed)}
            rest = [key for key in keys if key not in train]
            drawn |= dict.fromkeys(train, "train")
            drawn |= {rest[i]: "test" for i in stratified(rest, [0] * len(rest), self.test, self.seed)}
        files = files.only(drawn.__contains__)
        names = sorted(of_class)
        labels = [names.index(key.split("/")[0]) for key in files.keys]
        splits = [drawn[key] for key in files.keys]
        carve(files.keys, labels, splits, self.valid, 0, self.seed)
        return ImageFiles(files, labels, splits, [name.replace("_", " ") for name in names])


@hookimpl
def saefw_datasets() -> list[type[DatasetConfig]]:
    """Bring one: caltech101."""
    return [Caltech101]
