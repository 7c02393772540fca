"""Images of your own: class folders, split folders, one flat folder, a glob, or a CSV file."""

import csv
import glob
import os
from collections.abc import Sequence
from pathlib import Path
from sys import intern
from typing import Literal

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

Said = tuple[str | None, Split]
"""What a CSV file says of an image: its class, if it has one, and its split."""


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
            files, names, splits = _listed(root, self.csv)
        else:
            files = image_files(root) if self.glob is None else _globbed(root, self.glob)
            names, splits = _sorted(files, self.layout)
        classes = sorted({name for name in names if name is not None})
        index: dict[str | None, int] = {None: -1} | {name: i for i, name in enumerate(classes)}
        labels = [index[name] for name in names]

        def carved() -> list[Split]:
            carve(files.keys, labels, splits, self.valid, self.test, self.seed)
            return splits

        return ImageFiles(files, labels, carved, classes)


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


def _sorted(files: Files, layout: str) -> tuple[list[str | None], list[Split]]:
    """Return class and split of each image, by the folders that it lies in."""
    tops = {key.partition("/")[0] for key in files.keys if "/" in key}
    if layout == "auto":
        layout = _layout(files, tops)
    n = len(files.keys)
    if layout == "flat":
        return [None] * n, ["train"] * n
    if layout == "classes":
        return _folders(files, 0), ["train"] * n
    strange = sorted(top for top in tops if top.lower() not in SPLITS)
    if strange or not tops:
        what = f"the folder '{strange[0]}' is none" if strange else "there is no folder"
        raise UserError(f"{files.root}: layout: splits: {what}; they are called {', '.join(SPLITS)}")
    return _folders(files, 1), [SPLITS[str(top).lower()] for top in _folders(files, 0)]


def _layout(files: Files, tops: set[str]) -> str:
    """Say what the folders are, by their names."""
    if not tops:
        return "flat"
    splits = {top for top in tops if top.lower() in SPLITS}
    if splits and splits != tops:
        raise UserError(
            f"{files.root}: holds '{min(splits)}', which may be a split, beside '{min(tops - splits)}', which is none; "
            "say what its folders are: layout: classes, splits or flat"
        )
    if not splits and len(tops) == 1 and all(key.count("/") > 1 for key in files.keys):
        raise UserError(
            f"{files.root}: holds one folder, '{min(tops)}', that holds folders; did you mean "
            f"{files.root / min(tops)}? If not, say layout: classes or flat"
        )
    return "splits" if splits else "classes"


def _folders(files: Files, depth: int) -> list[str | None]:
    """Return the name of the folder of each image at some depth below root; none, if there are none so deep.

    Raises:
        UserError: images lie beside folders of images.

    """
    found: list[str | None] = []
    for key in files.keys:
        parts = key.split("/", depth + 1)
        found.append(intern(parts[depth]) if len(parts) > depth + 1 else None)
    loose = [key for key, name in zip(files.keys, found, strict=True) if name is None]
    if 0 < len(loose) < len(found):
        raise UserError(
            f"{files.root}: '{loose[0]}' lies beside folders of images ({len(loose):,} do); put it into one, "
            "or say layout: flat"
        )
    return found


def _listed(root: Path, name: str) -> tuple[Files, list[str | None], list[Split]]:
    """Return what a CSV file lists, with class and split, in the order of the keys."""
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise UserError(f"csv: '{name}' leaves {root}; a CSV file lies in root")
    path = root / name
    rows: dict[str, Said] = {}
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
    said = [rows[files.odd.get(key, key)] for key in files.keys]
    return files, [name for name, _ in said], [split for _, split in said]


def _check_header(path: Path, header: Sequence[str]) -> None:
    for column in header:
        if column not in COLUMNS:
            raise UserError(f"{path}:1: no such column '{column}'{did_you_mean(column, COLUMNS)} (path, label, split)")
    if "path" not in header or len(set(header)) < len(header):
        raise UserError(f"{path}:1: begins with the names of its columns: path, or path,label, or path,label,split")


def _row(place: str, cells: dict[str, str], header: Sequence[str], row: Sequence[str]) -> tuple[str, Said]:
    """Return the path in a row, and what it says."""
    if len(row) != len(header):
        raise UserError(f"{place}: has {len(row)} cells, and there are {len(header)} columns")
    key = cells["path"]
    if not clean(key):
        raise UserError(f"{place}: a path is written from the folder of the CSV file, without . or .. (got {key!r})")
    split = cells.get("split", "train")
    if split.lower() not in SPLITS:
        raise UserError(f"{place}: no such split{did_you_mean(split, SPLITS)} (train, valid, test) (got {split!r})")
    return key, (cells.get("label", "").strip() or None, SPLITS[split.lower()])


@hookimpl
def saefw_datasets() -> list[type[DatasetConfig]]:
    """Bring one: image-folder."""
    return [ImageFolder]
