"""CUB-200-2011: birds of 200 species."""

from collections.abc import Container
from pathlib import Path
from typing import Literal

from pydantic import Field

from saefw.plugin import (
    Dataset,
    DatasetConfig,
    Files,
    ImageFiles,
    Place,
    Source,
    Split,
    UserError,
    carve,
    clean,
    hookimpl,
    inside,
    read_lines,
)

FOLDER = "CUB_200_2011"


class Cub200(DatasetConfig):
    """CUB-200-2011, by its own split into 5,994 train and 5,794 test images; valid is carved from train.

    C. Wah, S. Branson, P. Welinder, P. Perona, S. Belongie: The Caltech-UCSD Birds-200-2011 Dataset, Caltech 2011.
    """

    use: Literal["cub200"] = "cub200"

    sources = (
        Source(
            "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
            1_150_585_339,
            "sha256:0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
            "TensorFlow Datasets",
        ),
    )
    n_images = 11_788
    terms = "CaltechDATA; for research and teaching alone."

    root: Place
    """The folder CUB_200_2011, or one that holds it."""

    valid: float = Field(0.1, ge=0, lt=1)
    """Share of the train images of each species that becomes valid."""

    seed: int = 0
    """Of the choice of these."""

    def build(self, base: Path) -> Dataset:
        """Read its lists; no image is looked for yet.

        Raises:
            UserError: a list is missing, has a fault, or does not fit the others.

        """
        root = inside(self.root.open(base), FOLDER, holds=["images.txt"])
        names = _table(root / "classes.txt", "class_id class_name")
        paths = _table(root / "images.txt", "image_id path")
        labels = _table(root / "image_class_labels.txt", "image_id class_id", paths, names)
        train = _table(root / "train_test_split.txt", "image_id is_training_image", paths, ("0", "1"))
        for path in paths.values():
            if not clean(path):
                raise UserError(f"{root / 'images.txt'}: a path is written from the folder images (got {path!r})")
        files = Files.of(root / "images", list(paths.values()))
        ids = {path: number for number, path in paths.items()}
        if len(ids) < len(paths):
            raise UserError(f"{root / 'images.txt'}: two images have one path")
        order = [ids[files.odd.get(key, key)] for key in files.keys]
        numbers = sorted(names, key=lambda number: names[number])
        index = {number: i for i, number in enumerate(numbers)}
        found = [index[labels[number]] for number in order]
        splits: list[Split] = ["train" if train[number] == "1" else "test" for number in order]
        carve(files.keys, found, splits, self.valid, 0, self.seed)
        classes = [names[number].split(".", 1)[-1].replace("_", " ") for number in numbers]
        return ImageFiles(files, found, splits, classes)


def _table(
    path: Path, line: str, rows: Container[str] | dict[str, str] | None = None, values: Container[str] | None = None
) -> dict[str, str]:
    """Return a list of pairs as {first: second}.

    With `rows`, each of them is there and no other; with `values`, what is paired is one of them.
    """
    first, second = line.split()
    found: dict[str, str] = {}
    for number, (key, value) in read_lines(path, 2, f"'{line}'"):
        if key in found:
            raise UserError(f"{path}:{number}: {first} {key} is there already")
        if rows is not None and key not in rows:
            raise UserError(f"{path}:{number}: images.txt has no {first} {key}")
        if values is not None and value not in values:
            raise UserError(f"{path}:{number}: there is no {second} {value}")
        found[key] = value
    if not found:
        raise UserError(f"{path}: is empty; a line is '{line}'")
    if isinstance(rows, dict) and len(found) < len(rows):
        missing = next(key for key in rows if key not in found)
        raise UserError(f"{path}: has no line for image {missing} ({rows[missing]})")
    return found


@hookimpl
def saefw_datasets() -> list[type[DatasetConfig]]:
    """Bring one: cub200."""
    return [Cub200]
