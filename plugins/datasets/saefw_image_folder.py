"""Images of your own: class folders, split folders, one flat folder, a glob, or a CSV file."""

import csv
import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field

from saefw.plugin import (
    Dataset,
    DatasetConfig,
    Files,
    ImageFiles,
    Place,
    Split,
    UserError,
    carve,
    clean,
    did_you_mean,
    hookimpl,
    image_files,
)

SPLITS: dict[str, Split] = {
    "train": "train", "training": "train", "valid": "valid", "val": "valid", "validation": "valid", "dev": "valid",
    "test": "test", "testing": "test",
}  # fmt: skip
"""What the folder of a split, or a cell of the CSV file, may be called."""

COLUMNS = ("path", "label", "split")


class ImageFolder(DatasetConfig):
    """Images in a folder: in class folders, split into such, or flat without labels; picked by a glob; or by a CSV."""

    use: Literal["image-folder"] = "image-folder"

    root: Place
    """The folder."""

    layout: Literal["auto", "classes", "splits", "flat"] = "auto"
    """What its folders are: classes; splits (train, valid or val, test) that hold classes or images; flat: nothing, so
    that no image has a label; auto: what their names say."""

    glob: str | None = None
    """Only images whose path from root is like this, as `**/*_rgb.png`; ** stands for any folders."""

    csv: str | None = None
    """A CSV file in root with columns path and, if you like, label and split; paths count from its folder."""

    valid: float = Field(0.1, ge=0, lt=1)
    """Share of the train images of each class that becomes valid, if no image is."""

    test: float = Field(0.1, ge=0, lt=1)
    """Share of the train images of each class that becomes test, if no image is."""

    seed: int = 0
    """Of the choice of these."""

    def build(self, base: Path) -> Dataset:
        """List the images.

        Raises:
            UserError: there are none, what the folders mean is not clear, or the CSV file has a fault.

        """
        root = self.root.open(base)
        if self.csv is not None:
            if self.glob is not None or self.layout != "auto":
                raise UserError(f"{self.csv}: a CSV file says all; leave out glob and layout")
            files, found = _listed(root, self.csv)
        else:
            files = image_files(root) if self.glob is None else _globbed(root, self.glob)
            found = _sorted(files, self.layout)
        classes = sorted({name for name, _ in found if name is not None})
        index = {name: i for i, name in enumerate(classes)}
        labels = [-1 if name is None else index[name] for name, _ in found]
        splits = [split for _, split in found]
        carve(files.keys, labels, splits, self.valid, self.test, self.seed)
        return ImageFiles(files, labels, splits, classes)


class Found(NamedTuple):
    """What is said of an image."""

    name: str | None
    """Of its class."""

    split: Split


def _globbed(root: Path, pattern: str) -> Files:
    """Return the images that a pattern finds."""
    if os.path.isabs(pattern) or ".." in Path(pattern).parts:
        raise UserError(f"glob: '{pattern}' leaves {root}; a pattern counts from there")
    files = image_files(root)
    wanted = {path.replace(os.sep, "/") for path in glob.iglob(pattern, root_dir=root, recursive=True)}
    picked = files.only(lambda key: files.odd.get(key, key) in wanted)
    if not picked.keys:
        raise UserError(f"{root}: none of its {len(files.keys):,} images is like '{pattern}'; one is {files.keys[0]}")
    return picked


def _sorted(files: Files, layout: str) -> list[Found]:
    """Return class and split of each image, by the folders that it lies in."""
    paths = [key.split("/") for key in files.keys]
    tops = {path[0] for path in paths if len(path) > 1}
    if layout == "auto":
        layout = _layout(files, paths, tops)
    if layout == "flat":
        return [Found(None, "train")] * len(paths)
    if layout == "classes":
        return _classes(files, paths, ["train"] * len(paths))
    strange = sorted(tops - {top for top in tops if top.lower() in SPLITS})
    if strange or len(tops) == 0:
        what = f"the folder '{strange[0]}' is none" if strange else "there is no folder"
        raise UserError(f"{files.root}: layout: splits: {what}; they are called {', '.join(SPLITS)}")
    _no_loose(files, paths)
    return _classes(files, [path[1:] for path in paths], [SPLITS[path[0].lower()] for path in paths])


def _layout(files: Files, paths: Sequence[list[str]], tops: set[str]) -> str:
    """Say what the folders are, by their names."""
    if not tops:
        return "flat"
    splits = {top for top in tops if top.lower() in SPLITS}
    if splits and splits != tops:
        raise UserError(
            f"{files.root}: holds '{min(splits)}', which may be a split, beside '{min(tops - splits)}', which is none; "
            "say what its folders are: layout: classes, splits or flat"
        )
    if not splits and len(tops) == 1 and all(len(path) > 2 for path in paths):
        raise UserError(
            f"{files.root}: holds one folder, '{min(tops)}', that holds folders; did you mean "
            f"{files.root / min(tops)}? If not, say layout: classes or flat"
        )
    return "splits" if splits else "classes"


def _classes(files: Files, paths: Sequence[list[str]], splits: Sequence[Split]) -> list[Found]:
    """Return classes by the first folder of each path; if no image lies in a folder, none has a class."""
    if all(len(path) == 1 for path in paths):
        return [Found(None, split) for split in splits]
    _no_loose(files, paths)
    return [Found(path[0], split) for path, split in zip(paths, splits, strict=True)]


def _no_loose(files: Files, paths: Sequence[list[str]]) -> None:
    """Refuse images that lie beside folders of images."""
    loose = [key for key, path in zip(files.keys, paths, strict=True) if len(path) == 1]
    if loose:
        raise UserError(
            f"{files.root}: '{loose[0]}' lies beside folders of images ({len(loose):,} do); put it into one, "
            "or say layout: flat"
        )


def _listed(root: Path, name: str) -> tuple[Files, list[Found]]:
    """Return what a CSV file lists, in the order of the keys."""
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise UserError(f"csv: '{name}' leaves {root}; a CSV file lies in root")
    path = root / name
    rows: dict[str, Found] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            _check_header(path, header)
            for row in reader:
                if row:
                    key, found = _row(f"{path}:{reader.line_num}", dict(zip(header, row, strict=False)), header, row)
                    if key in rows:
                        raise UserError(f"{path}:{reader.line_num}: '{key}' is listed already")
                    if not rows and not (path.parent / key).exists():
                        raise UserError(f"{path}:{reader.line_num}: there is no '{key}' in {path.parent}")
                    rows[key] = found
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte 0x{error.object[error.start]:02x})") from None
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not CSV ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if not rows:
        raise UserError(f"{path}: lists no image")
    files = Files.of(path.parent, list(rows))
    return files, [rows[files.odd.get(key, key)] for key in files.keys]


def _check_header(path: Path, header: Sequence[str]) -> None:
    for column in header:
        if column not in COLUMNS:
            raise UserError(f"{path}:1: no such column '{column}'{did_you_mean(column, COLUMNS)} (path, label, split)")
    if "path" not in header or len(set(header)) < len(header):
        raise UserError(f"{path}:1: begins with the names of its columns: path, or path,label, or path,label,split")


def _row(place: str, cells: dict[str, str], header: Sequence[str], row: Sequence[str]) -> tuple[str, Found]:
    """Return the path in a row, and what it says."""
    if len(row) != len(header):
        raise UserError(f"{place}: has {len(row)} cells, and there are {len(header)} columns")
    key = cells["path"]
    if not clean(key):
        raise UserError(f"{place}: a path is written from the folder of the CSV file, without . or .. (got {key!r})")
    split = cells.get("split", "train")
    if split.lower() not in SPLITS:
        raise UserError(f"{place}: no such split{did_you_mean(split, SPLITS)} (train, valid, test) (got {split!r})")
    return key, Found(cells.get("label", "").strip() or None, SPLITS[split.lower()])


@hookimpl
def saefw_datasets() -> list[type[DatasetConfig]]:
    """Bring one: image-folder."""
    return [ImageFolder]
