"""ImageNet (ILSVRC 2012): its own folders, or the parquet files of the Hugging Face hub."""

import csv
import json
import re
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import accumulate, chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from saefw.plugin import (
    Dataset,
    DatasetConfig,
    Example,
    ImageFiles,
    Place,
    Split,
    UserError,
    carve,
    did_you_mean,
    folder,
    hookimpl,
    image_files,
    inside,
    mend_torchvision,
    open_image,
    read_lines,
)

if TYPE_CHECKING:
    from PIL.Image import Image

SYNSET = re.compile(r"n\d{8}")
KAGGLE = "ILSVRC/Data/CLS-LOC"
DEVKIT = "ILSVRC2012_devkit_t12/data"
TRUTH = "LOC_val_solution.csv"
MAPPING = "LOC_synset_mapping.txt"

ROWS = 64
"""Rows of a parquet file that are read at once: images are asked for in order, and every reading costs the same."""


class ImageNet(DatasetConfig):
    """ImageNet-1k, by its own split: train, and the 50,000 validation images.

    O. Russakovsky, J. Deng, et al.: ImageNet Large Scale Visual Recognition Challenge, IJCV 115, 2015. Its test images
    have no labels in public and are left out.
    """

    use: Literal["imagenet"] = "imagenet"

    root: Place
    """The folder that holds train/ and val/, or ILSVRC/, or data/ with parquet files."""

    val: Literal["valid", "test"] = "valid"
    """Which split its validation images are: those to choose by, or those to report on, as papers do."""

    valid: float = Field(0.01, ge=0, lt=1)
    """Share of the train images of each class that becomes valid, if `val` is not."""

    test: float = Field(0.01, ge=0, lt=1)
    """Share of the train images of each class that becomes test, if `val` is not."""

    seed: int = 0
    """Of the choice of these."""

    def build(self, base: Path) -> Dataset:
        """List the images.

        Raises:
            UserError: they are not there, or in no layout that is known.

        """
        root = self.root.open(base)
        for place in (root / "data", root):
            paths = sorted(place.glob("*.parquet"), key=lambda path: path.name)
            if paths:
                return self._parquet(paths)
        return self._folders(root)

    def _folders(self, root: Path) -> Dataset:
        """Open the folders of the challenge."""
        if any(SYNSET.fullmatch(name) for name in folder(root)):
            raise UserError(f"{root}: holds the folders of synsets themselves; did you mean {root.absolute().parent}?")
        data = inside(root, KAGGLE, "Data/CLS-LOC", holds=("train", "val"))
        files = image_files(data, [name for name in ("train", "val") if (data / name).is_dir()])
        # Lists lie beside the images or, as Kaggle packs them, beside the folder ILSVRC.
        lists = [root, data, *([data.parents[2]] if len(data.parents) > 2 else [])]
        # Of a million images only a thousand folders are looked at.
        folders = list(files.folders())
        truth: dict[str, str] = {}
        for place, indices in folders:
            parts = place.split("/")
            if place == "val":
                truth = truth or _truth(lists, data)
            elif len(parts) != 2 or not SYNSET.fullmatch(parts[1]):
                key = files.keys[indices[0]]
                raise UserError(f"{data / key}: lies in no folder of a synset, as train/n01440764 is")

        def told(key: str) -> str:
            name = key.removeprefix("val/").split(".")[0]
            if name not in truth:
                raise UserError(f"{data / key}: the list of the validation images does not name it")
            return truth[name]

        synsets: list[tuple[str, int]] = []
        for place, indices in folders:
            if place == "val":
                synsets += [(told(files.keys[i]), 1) for i in indices]
            else:
                synsets.append((place.partition("/")[2], len(indices)))
        wnids = sorted({wnid for wnid, _ in synsets})
        index = {wnid: i for i, wnid in enumerate(wnids)}
        labels = array("q", chain.from_iterable(repeat(index[wnid], n) for wnid, n in synsets))

        def splits() -> list[Split]:
            found: list[Split] = ["train" if key.startswith("train/") else self.val for key in files.keys]
            carve(files.keys, labels, found, self.valid, self.test, self.seed)
            return found

        mapped = _mapped(lists)
        return ImageFiles(files, labels, splits, lambda: _readable(_lemmas(mapped, wnids), wnids))

    def _parquet(self, paths: Sequence[Path]) -> Dataset:
        """Open parquet files named by split: train-00000-of-00294.parquet."""
        words: dict[str, Split] = {"train": "train", "validation": self.val, "val": self.val, "test": "test"}
        for path in paths:
            if (word := path.stem.split("-")[0]) not in words:
                near = did_you_mean(word, words)
                raise UserError(f"{path}: the name begins with its split: train-, validation- or test-{near}")
        rows = Rows(paths)
        splits = [words[paths[i].stem.split("-")[0]] for i, labels in enumerate(rows.labels) for _ in labels]
        labels = [label for some in rows.labels for label in some]
        carve([rows.key(i) for i in range(len(rows))], labels, splits, self.valid, self.test, self.seed)
        rows.splits = splits
        return rows


# The folders of the challenge


def _truth(lists: Sequence[Path], data: Path) -> dict[str, str]:
    """Return the synset of each validation image by its name, for the images that lie in one folder."""
    for place in lists:
        if (place / TRUTH).exists():
            return dict(_solution(place / TRUTH))
        if (place / DEVKIT).is_dir():
            return _devkit(place / DEVKIT)
    raise UserError(
        f"{data / 'val'}: its images lie in no folders of synsets, and neither {TRUTH} (Kaggle) nor {DEVKIT} "
        f"(image-net.org), which would say what they show, is in {lists[0]}"
    )


def _solution(path: Path) -> Iterator[tuple[str, str]]:
    """Yield image and synset of Kaggle's list."""
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.reader(file), 1):
            if number == 1:
                continue
            synset = row[1].split()[:1] if len(row) == 2 else []
            if not synset or not SYNSET.fullmatch(synset[0]):
                raise UserError(f"{path}:{number}: must be an image, a comma and a synset with boxes (got {row})")
            yield row[0], synset[0]


def _devkit(kit: Path) -> dict[str, str]:
    """Return image and synset of the development kit, whose numbers are not in the order of the synsets."""
    from scipy.io import loadmat

    try:
        synsets: Any = loadmat(kit / "meta.mat", squeeze_me=True, variable_names=["synsets"])["synsets"]
        by_number = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    except Exception as error:  # of damaged files scipy raises what it happens to meet
        raise UserError(f"{kit / 'meta.mat'}: cannot be read ({error})") from error
    found = {}
    path = kit / "ILSVRC2012_validation_ground_truth.txt"
    for number, (text,) in read_lines(path, 1, "the number of a synset"):
        if not text.isdecimal() or int(text) not in by_number:
            raise UserError(f"{path}:{number}: meta.mat has no synset {text}")
        found[f"ILSVRC2012_val_{number:08d}"] = by_number[int(text)]
    return found


def _mapped(lists: Sequence[Path]) -> dict[str, str] | None:
    """Return the words for synsets that a list beside the images has; None without a list."""
    for place in lists:
        if (place / MAPPING).exists():
            return {wnid: text for _, (wnid, text) in read_lines(place / MAPPING, 2, "a synset and its words")}
    return None


def _lemmas(mapped: Mapping[str, str] | None, wnids: Sequence[str]) -> list[str]:
    """Return the words for some synsets: those of the list beside the images, or else of WordNet, as timm has them."""
    if mapped is not None:
        return [mapped.get(wnid, wnid) for wnid in wnids]
    # Only when somebody asks for names: to import timm takes seconds.
    mend_torchvision()
    from timm.data.imagenet_info import ImageNetInfo

    info: Any = ImageNetInfo()
    known = info.label_descriptions(as_dict=True)
    return [known.get(wnid, wnid) for wnid in wnids]


def _readable(lemmas: Sequence[str], ids: Sequence[str]) -> list[str]:
    """Return the first word for each class; where two share it (crane), with the id."""
    first = [lemma.split(",")[0].strip() for lemma in lemmas]
    times = Counter(first)
    return [word if times[word] == 1 else f"{word} ({id})" for word, id in zip(first, ids, strict=True)]


# The parquet files of the hub


class Bytes:
    """Reads images out of parquet files; a copy for another process begins anew."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Read nothing yet."""
        import duckdb

        # One thread a reading: who asks for images asks from threads of his own.
        self.db = duckdb.connect(config={"threads": 1})
        self.paths = paths
        # Eight readings of photos of 100 kB are 50 MB; a read-ahead of threads seldom spans more than two.
        self._block = lru_cache(maxsize=8)(self._read)

    def __reduce__(self) -> tuple[type["Bytes"], tuple[Sequence[Path]]]:
        """Hand on the names of the files alone."""
        return Bytes, (self.paths,)

    def load(self, file: int, row: int) -> "Image":
        """Return the image in a row of a file."""
        data = self._block(file, row // ROWS).get(row)
        if data is None:
            raise OSError("its row holds no bytes")
        return open_image(data)

    def _read(self, file: int, block: int) -> dict[int, bytes | None]:
        """Return the bytes of some rows; DuckDB reads the part of the file that they lie in."""
        import duckdb

        query = (
            "SELECT file_row_number, image.bytes FROM read_parquet(?, file_row_number = true) "
            "WHERE file_row_number BETWEEN ? AND ?"
        )
        values = [str(self.paths[file]), block * ROWS, block * ROWS + ROWS - 1]
        try:
            with self.db.cursor() as cursor:  # a connection is for one thread, its cursors are others
                return dict(cursor.execute(query, values).fetchall())
        except duckdb.Error as error:
            raise OSError(f"{self.paths[file]}: {str(error).splitlines()[0]}") from error


class Rows:
    """The images in parquet files, in the order of the files' names and of their rows."""

    splits: Sequence[Split]

    def __init__(self, paths: Sequence[Path]) -> None:
        """Read the labels, no image yet; rows without a label, as those of the test files are, are left out."""
        import duckdb

        self._bytes = Bytes(paths)
        self._paths = paths
        self.labels: list[array[int]] = []
        self._rows: list[array[int]] = []
        for path in paths:
            try:
                found = self._bytes.db.execute(
                    "SELECT file_row_number, label FROM read_parquet(?, file_row_number = true) "
                    "WHERE label >= 0 ORDER BY file_row_number",
                    [str(path)],
                ).fetchall()
            except duckdb.Error as error:
                text = str(error).splitlines()[0]
                raise UserError(f"{path}: must have the columns image (bytes, path) and label ({text})") from error
            self._rows.append(array("q", [row[0] for row in found]))
            self.labels.append(array("q", [row[1] for row in found]))
        self._ends = list(accumulate(len(labels) for labels in self.labels))
        if not len(self):
            raise UserError(f"{paths[0].parent}: the parquet files hold no image with a label")
        self.classes: Sequence[str] = self._classes()

    def _classes(self) -> list[str]:
        """Return the names that the files bring, or else those of ImageNet-1k."""
        found = self._bytes.db.execute(
            "SELECT value FROM parquet_kv_metadata(?) WHERE key = 'huggingface'", [str(self._paths[0])]
        ).fetchone()
        most = max(max(labels, default=0) for labels in self.labels)
        try:
            words = json.loads(found[0])["info"]["features"]["label"]["names"] if found else None
        except (ValueError, KeyError, TypeError):
            words = None
        if words is None:
            mend_torchvision()
            from timm.data.imagenet_info import ImageNetInfo

            words = ImageNetInfo().label_descriptions()
        if most >= len(words):
            raise UserError(f"{self._paths[0]}: there are names for {len(words)} classes, and a label {most}")
        return _readable([str(word) for word in words], [f"class {i}" for i in range(len(words))])

    def __len__(self) -> int:
        """How many images."""
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        """The image at an index."""
        file, row = self._at(index)
        label = self.labels[file][index - self._ends[file]]
        return Example(self.key(index), label, self.splits[index], partial(self._bytes.load, file, row))

    def _at(self, index: int) -> tuple[int, int]:
        """Return the file of an image, and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(f"there is no image {index}")
        file = bisect_right(self._ends, index)
        return file, self._rows[file][index - self._ends[file]]

    def key(self, index: int) -> str:
        """Return the file and the row of an image, as its key."""
        file, row = self._at(index)
        return f"{self._paths[file].stem}/{row:05d}"


@hookimpl
def saefw_datasets() -> list[type[DatasetConfig]]:
    """Bring one: imagenet."""
    return [ImageNet]
