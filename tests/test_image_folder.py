"""Images of one's own, in every layout that is known, and what is said of the others."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
from trees import png, rows, tree

from saefw.errors import UserError
from saefw.images import EXTENSIONS
from saefw.imagesets import JUNK
from saefw.plugin import DatasetConfig, Files, Place, image_files
from saefw.testing import check_dataset
from saefw_image_folder import ImageFolder

CLASSES = [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(10)]


def told(config: DatasetConfig, base: Path) -> str:
    with pytest.raises(UserError) as error:
        config.open(base)
    return str(error.value).replace(str(base), "BASE")


def folder(root: str = "images", **settings: object) -> ImageFolder:
    return ImageFolder.model_validate({"root": root, **settings})


def test_class_folders(tmp_path: Path) -> None:
    tree(tmp_path / "images", CLASSES)
    check_dataset(folder(), tmp_path)
    found = rows(folder(), tmp_path)
    assert [key for key, _, _ in found] == sorted(CLASSES)
    assert all(key.startswith(f"{name}/") for key, name, _ in found)
    for name in ("cat", "dog"):
        assert Counter(split for _, other, split in found if other == name) == {"train": 8, "valid": 1, "test": 1}
    assert Counter(split for _, _, split in rows(folder(valid=0.2, test=0), tmp_path)) == {"train": 16, "valid": 4}
    assert rows(folder(seed=1), tmp_path) != found
    image = folder().open(tmp_path)[0].load()
    assert np.array_equal(np.asarray(image), np.asarray(folder().open(tmp_path)[0].load()))


def test_a_class_below_which_folders_lie_and_one_with_one_image(tmp_path: Path) -> None:
    paths = [f"{i:03d}/only.png" for i in range(20)] + ["020/a/b/deep.png", "020/a/c/deep.png"]
    tree(tmp_path / "images", paths)
    found = rows(folder(), tmp_path)
    assert [name for _, name, _ in found] == [key[:3] for key, _, _ in found]
    assert Counter(split for _, _, split in found) == {"train": 18, "valid": 2, "test": 2}


@pytest.mark.parametrize("valid", ["valid", "val", "VAL", "validation"])
def test_split_folders(tmp_path: Path, valid: str) -> None:
    names = {"train": 6, valid: 2, "test": 3}
    tree(tmp_path / "images", [f"{s}/{c}/{i}.png" for s, n in names.items() for c in ("cat", "dog") for i in range(n)])
    check_dataset(folder(), tmp_path)
    found = rows(folder(), tmp_path)
    assert {name for _, name, _ in found} == {"cat", "dog"}
    assert Counter(split for _, _, split in found) == {"train": 12, "valid": 4, "test": 6}
    assert all(split == {valid: "valid"}.get(key.split("/")[0], key.split("/")[0]) for key, _, split in found)


def test_valid_is_carved_from_train_where_there_is_none(tmp_path: Path) -> None:
    tree(
        tmp_path / "images", [f"{s}/{c}/{i}.png" for s in ("train", "test") for c in ("cat", "dog") for i in range(10)]
    )
    found = rows(folder(), tmp_path)
    assert Counter(split for _, _, split in found) == {"train": 18, "valid": 2, "test": 20}
    assert Counter(name for _, name, split in found if split == "valid") == {"cat": 1, "dog": 1}
    assert {split for key, _, split in found if key.startswith("test/")} == {"test"}
    assert Counter(split for _, _, split in rows(folder(valid=0), tmp_path)) == {"train": 20, "test": 20}


def test_no_labels(tmp_path: Path) -> None:
    tree(tmp_path / "images", [f"{i}.png" for i in range(20)])
    check_dataset(folder(), tmp_path)
    dataset = folder().open(tmp_path)
    assert dataset.classes == [] and {dataset[i].label for i in range(20)} == {-1}
    assert Counter(dataset[i].split for i in range(20)) == {"train": 16, "valid": 2, "test": 2}
    tree(tmp_path / "split", [f"{s}/{i}.png" for s in ("train", "val") for i in range(10)])
    found = rows(folder("split"), tmp_path)
    assert {name for _, name, _ in found} == {None}
    assert Counter(split for _, _, split in found) == {"train": 9, "valid": 10, "test": 1}
    tree(tmp_path / "deep", CLASSES)
    assert {name for _, name, _ in rows(folder("deep", layout="flat"), tmp_path)} == {None}


def test_a_glob(tmp_path: Path) -> None:
    tree(
        tmp_path / "images", ["cat/1_rgb.png", "cat/1_depth.png", "cat/x/2_rgb.png", "dog/3_rgb.png", "dog/.4_rgb.png"]
    )
    keys = [key for key, _, _ in rows(folder(glob="**/*_rgb.png"), tmp_path)]
    assert keys == ["cat/1_rgb.png", "cat/x/2_rgb.png", "dog/3_rgb.png"]
    assert [key for key, _, _ in rows(folder(glob="*/[0-9]_rgb.png"), tmp_path)] == ["cat/1_rgb.png", "dog/3_rgb.png"]
    check_dataset(folder(glob="**/*_rgb.png"), tmp_path)
    assert told(folder(glob="*.jpg"), tmp_path) == (
        "BASE/images: none of its 4 images is like '*.jpg'; one is cat/1_depth.png"
    )
    assert told(folder(glob="../*.jpg"), tmp_path) == (
        "glob: '../*.jpg' leaves BASE/images; a pattern counts from there"
    )


def test_a_csv(tmp_path: Path) -> None:
    tree(tmp_path / "images", ["a/1.png", "a/b c.png", "z.png", "left out.png"])
    (tmp_path / "images" / "list.csv").write_bytes(
        b'\xef\xbb\xbfpath,label,split\r\nz.png,dog,test\r\n"a/b c.png",cat,val\r\na/1.png,,train\r\n'
    )
    check_dataset(folder(csv="list.csv"), tmp_path)
    assert rows(folder(csv="list.csv"), tmp_path) == [
        ("a/1.png", None, "train"), ("a/b c.png", "cat", "valid"), ("z.png", "dog", "test"),
    ]  # fmt: skip
    (tmp_path / "images" / "a" / "few.csv").write_text("path\n1.png\nb c.png\n")
    assert rows(folder(csv="a/few.csv", valid=0.5, test=0), tmp_path)[0][:2] == ("1.png", None)


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "1: begins with the names of its columns: path, or path,label, or path,label,split"),
        ("label\n", "1: begins with the names of its columns: path, or path,label, or path,label,split"),
        ("path,lable\n", "1: no such column 'lable'; did you mean 'label'? (path, label, split)"),
        ("path,label\n1.png,cat\n1.png,dog\n", "3: '1.png' is listed already"),
        ("path,label\n1.png\n", "2: has 1 cells, and there are 2 columns"),
        ("path,split\n1.png,trian\n", "2: no such split; did you mean 'train'? (train, valid, test) (got 'trian')"),
        ("path\n2.png\n", "2: there is no '2.png' in BASE/images"),
        ("path\n../1.png\n", "2: a path is written from the folder of the CSV file, without . or .. (got '../1.png')"),
        ("path\n/1.png\n", "2: a path is written from the folder of the CSV file, without . or .. (got '/1.png')"),
        ("path\n./1.png\n", "2: a path is written from the folder of the CSV file, without . or .. (got './1.png')"),
        ('path\n"1.png\n', "2: not CSV (unexpected end of data)"),
    ],
)  # fmt: skip
def test_faults_of_a_csv(tmp_path: Path, text: str, said: str) -> None:
    png(tmp_path / "images" / "1.png")
    (tmp_path / "images" / "list.csv").write_text(text)
    assert told(folder(csv="list.csv"), tmp_path) == f"BASE/images/list.csv:{said}"


def test_other_faults_of_a_csv(tmp_path: Path) -> None:
    png(tmp_path / "images" / "1.png")
    path = tmp_path / "images" / "list.csv"
    assert told(folder(csv="list.csv"), tmp_path) == (
        "BASE/images/list.csv: cannot be read (No such file or directory)"
    )
    path.write_text("path\n")
    assert told(folder(csv="list.csv"), tmp_path) == "BASE/images/list.csv: lists no image"
    path.write_bytes(b"path\n\xff.png\n")
    assert told(folder(csv="list.csv"), tmp_path) == "BASE/images/list.csv: not UTF-8 (byte 0xff)"
    assert told(folder(csv="../list.csv"), tmp_path) == (
        "csv: '../list.csv' leaves BASE/images; a CSV file lies in root"
    )
    assert told(folder(csv="list.csv", glob="*"), tmp_path) == (
        "list.csv: a CSV file says all; leave out glob and layout"
    )


def test_what_is_not_clear_is_asked(tmp_path: Path) -> None:
    tree(tmp_path / "mixed", ["train/1.png", "bus/2.png"])
    assert told(folder("mixed"), tmp_path) == (
        "BASE/mixed: holds 'train', which may be a split, beside 'bus', which is none; "
        "say what its folders are: layout: classes, splits or flat"
    )
    assert [name for _, name, _ in rows(folder("mixed", layout="classes"), tmp_path)] == ["bus", "train"]
    assert told(folder("mixed", layout="splits"), tmp_path) == (
        "BASE/mixed: layout: splits: the folder 'bus' is none; "
        "they are called train, training, valid, val, validation, dev, test, testing"
    )
    tree(tmp_path / "above", ["set/cat/1.png", "set/dog/2.png"])
    assert told(folder("above"), tmp_path) == (
        "BASE/above: holds one folder, 'set', that holds folders; did you mean BASE/above/set? "
        "If not, say layout: classes or flat"
    )
    tree(tmp_path / "loose", ["cat/1.png", "dog/2.png", "me.png"])
    assert told(folder("loose"), tmp_path) == (
        "BASE/loose: 'me.png' lies beside folders of images (1 do); put it into one, or say layout: flat"
    )


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    tree(tmp_path / "images", ["1.png"])
    assert told(folder("image"), tmp_path) == "BASE/image: there is no such folder; did you mean 'images'?"
    assert told(folder("far/away"), tmp_path) == "BASE/far/away: there is no such folder"
    assert told(folder("images/1.png"), tmp_path) == (
        "BASE/images/1.png: is a file; the folder of the images is asked for"
    )
    (tmp_path / "empty").mkdir()
    assert told(folder("empty"), tmp_path) == "BASE/empty: holds no image; it holds nothing"
    (tmp_path / "empty" / "a.heic").touch()
    (tmp_path / "empty" / "b.heic").touch()
    (tmp_path / "empty" / "LICENSE").touch()
    assert told(folder("empty"), tmp_path) == "BASE/empty: holds no image; it holds 1 without an ending, 2 .heic"


def test_what_systems_leave_is_left_out(tmp_path: Path) -> None:
    root = tree(tmp_path / "images", ["cat/1.JPG", "cat/2.Jpeg", "dog/3.png"])
    tree(root, [".cache/4.png", "cat/._1.JPG", "__MACOSX/5.png", "dog/@eaDir/6.png"])
    (root / "cat" / "Thumbs.db").write_bytes(b"x")
    os.mkfifo(root / "dog" / "pipe.png")
    os.symlink(root / "dog" / "3.png", root / "dog" / "link.png")
    os.symlink("nowhere", root / "dog" / "lost.png")
    (tmp_path / "elsewhere").mkdir()
    png(tmp_path / "elsewhere" / "7.png")
    os.symlink(tmp_path / "elsewhere", root / "emu")
    assert [key for key, _, _ in rows(folder(), tmp_path)] == [
        "cat/1.JPG", "cat/2.Jpeg", "dog/3.png", "dog/link.png", "dog/lost.png", "emu/7.png",
    ]  # fmt: skip


def test_a_folder_that_links_to_itself_ends(tmp_path: Path) -> None:
    tree(tmp_path / "images", ["cat/1.png", "dog/1.png"])
    os.symlink(tmp_path / "images", tmp_path / "images" / "cat" / "round")
    assert told(folder(), tmp_path) == "BASE/images/cat/round: links to a folder that it lies in"


def test_order_and_keys_are_the_same_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorted by the bytes of UTF-8; composed, though one file system keeps names composed and one decomposed."""
    names = ["Zebra/a.png", "apple/B.png", "apple/a.png", "Äpfel/ü.png", "日本/1.png", "zoo/10.png", "zoo/9.png"]
    tree(tmp_path / "one" / "images", [normalize("NFC", name) for name in names])
    tree(tmp_path / "two" / "images", [normalize("NFD", name) for name in names])
    first = rows(folder(), tmp_path / "one")
    assert [key for key, _, _ in first] == sorted(names, key=lambda name: name.encode())
    assert rows(folder(), tmp_path / "two") == first
    image = folder().open(tmp_path / "two")[5].load()
    assert np.array_equal(np.asarray(image), np.asarray(folder().open(tmp_path / "one")[5].load()))
    real = os.scandir
    for seed in range(3):
        monkeypatch.setattr(os, "scandir", lambda path, seed=seed: Shuffled(real(path), seed))
        assert rows(folder(), tmp_path / "one") == first


class Shuffled:
    """What os.scandir gives, as another file system would order it."""

    def __init__(self, entries: "os._ScandirIterator[str]", seed: int) -> None:
        with entries:
            self.entries = list(entries)
        np.random.default_rng(seed).shuffle(self.entries)

    def __iter__(self) -> Iterator["os.DirEntry[str]"]:
        return iter(self.entries)

    def __enter__(self) -> "Shuffled":
        return self

    def __exit__(self, *raised: object) -> None:
        pass


@pytest.mark.parametrize("seed", range(20))
def test_folders_of_files_are_those_of_each_file(seed: int) -> None:
    """Also where folders lie beside files, and where names sort before and after the "/"."""
    rng = np.random.default_rng(seed)
    names = ["a", "a-b", "a0", "ab", "ä", "1"][: 2 + seed % 5]
    drawn = {"/".join(rng.choice(names, rng.integers(1, 4))) + f"/{i}" * (seed % 3 > 0) for i in range(60)}
    files = Files.of(Path(), [f"{path}.png" for path in drawn])
    found = list(files.folders())
    assert [i for _, indices in found for i in indices] == list(range(len(drawn)))
    each = [os.path.dirname(key) for key in files.keys]
    assert [folder for folder, indices in found for _ in indices] == each
    assert list(Files(Path(), [], {}).folders()) == []


@pytest.mark.parametrize("seed", range(3))
def test_what_is_listed_is_what_a_plain_walk_finds(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    folders, stems = ["a", ".b", "c.png", "__MACOSX", "d/e.JPEG", "ü"], ["x", ".y", "lost+found", "..z", "ä", "x.tar"]
    ends = [".png", ".JPEG", ".Jpg", "", ".", ".txt", "png", ".png~"]
    for folder, stem, end in zip(*(rng.choice(some, 100) for some in (folders, stems, ends)), strict=True):
        tree(tmp_path / "images", [f"{folder}/{stem}{end}"])
    assert image_files(tmp_path / "images").keys == sorted(
        key
        for path in (tmp_path / "images").rglob("*")
        if path.is_file() and path.suffix.lower() in EXTENSIONS
        for key in [path.relative_to(tmp_path / "images").as_posix()]
        if not any(part.startswith(".") or part in JUNK for part in key.split("/"))
    )


def test_names_that_cannot_be_keys_are_told(tmp_path: Path) -> None:
    root = tree(tmp_path / "images", [normalize("NFC", "ü.png"), normalize("NFD", "ü.png")])
    assert told(folder(), tmp_path) == (
        "BASE/images: two files have names that differ in their Unicode form alone ('ü.png')"
    )
    for path in root.iterdir():
        path.unlink()
    (root / os.fsdecode(b"\xe9.png")).touch()
    assert told(folder(), tmp_path) == "BASE/images: the name of a file is not UTF-8 (b'\\xe9.png')"


def test_moving_the_images_changes_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path / "images", CLASSES)
    monkeypatch.setenv("OURS", str(tmp_path))
    config = ImageFolder(root=Place("$OURS/images"))
    assert rows(config, Path("/nowhere")) == rows(folder(), tmp_path)
    assert config.content()["root"] == "$OURS/images"
