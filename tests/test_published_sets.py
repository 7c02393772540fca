"""ImageNet, Caltech-101, CUB-200 and Flowers-102, in small copies of their true layouts."""

from collections import Counter
from pathlib import Path

import duckdb
import numpy as np
import pytest
from tiny import desk
from trees import caltech101, cub200, flowers102, imagenet, parquet, png, rows, tree

import saefw_imagenet
from saefw.errors import UserError
from saefw.pace import Pace
from saefw.plugin import DatasetConfig, ImageFiles, Place
from saefw.stages.record import Record
from saefw.testing import check_dataset, check_imports
from saefw_caltech101 import Caltech101
from saefw_cub200 import Cub200
from saefw_flowers102 import NAMES, Flowers102
from saefw_imagenet import ImageNet


@pytest.fixture(scope="module", autouse=True)
def light_modules() -> None:
    """All modules in one fresh Python, which the checks of single sets then need not start again."""
    check_imports(cls.__module__ for cls in (Caltech101, Cub200, Flowers102, ImageNet))


def told(config: DatasetConfig, base: Path) -> str:
    with pytest.raises(UserError) as error:
        config.open(base)
    return str(error.value).replace(str(base), "BASE")


def of_duckdb(path: Path, base: Path) -> str:
    """What DuckDB says when it is asked for labels that are not in a file."""
    with duckdb.connect() as db, pytest.raises(duckdb.Error) as caught:
        db.execute(
            "SELECT file_row_number, label FROM read_parquet(?, file_row_number = true) WHERE label >= 0", [str(path)]
        ).fetchall()
    return str(caught.value).splitlines()[0].replace(str(base), "BASE")


HERE = Place("set")


# Caltech-101


def test_caltech101(tmp_path: Path) -> None:
    sizes = {"Faces": 95, "Faces_easy": 31, "accordion": 7, "BACKGROUND_Google": 3}
    caltech101(tmp_path / "set" / "101_ObjectCategories", sizes)
    check_dataset(Caltech101(root=HERE), tmp_path)
    found = rows(Caltech101(root=HERE), tmp_path)
    dataset = Caltech101(root=HERE).open(tmp_path)
    assert dataset.classes == ["Faces", "Faces easy", "accordion"]
    counts = Counter((name, split) for _, name, split in found)
    assert counts["Faces", "train"] + counts["Faces", "valid"] == 30 and counts["Faces", "test"] == 50
    assert counts["Faces easy", "train"] + counts["Faces easy", "valid"] == 30 and counts["Faces easy", "test"] == 1
    assert counts["accordion", "train"] + counts["accordion", "valid"] == 7 and counts["accordion", "test"] == 0
    assert (counts["Faces", "valid"], counts["Faces easy", "valid"]) == (3, 3)
    assert [key for key, _, _ in found] == sorted(key for key, _, _ in found)
    assert rows(Caltech101(root=Place("set/101_ObjectCategories")), tmp_path) == found
    assert rows(Caltech101(root=HERE, seed=1), tmp_path) != found
    fewer = {key for key, _, split in rows(Caltech101(root=HERE, train=5), tmp_path) if split != "test"}
    assert fewer < {key for key, _, split in found if split != "test"}


def test_caltech101_in_other_folders_is_told(tmp_path: Path) -> None:
    tree(tmp_path / "set", ["train/Faces/1.jpg", "test/Faces/2.jpg"])
    assert told(Caltech101(root=HERE), tmp_path) == (
        "BASE/set: Caltech-101 is a folder for each class with images in it: 'test/Faces/2.jpg' is not; "
        "for images in other folders there is image-folder"
    )
    assert told(Caltech101(root=Place("sets")), tmp_path) == ("BASE/sets: there is no such folder; did you mean 'set'?")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "101_ObjectCategories.tar.gz").touch()
    assert told(Caltech101(root=Place("none")), tmp_path) == "BASE/none: holds no image; it holds 1 .gz"


# CUB-200


def test_cub200(tmp_path: Path) -> None:
    cub200(tmp_path / "set" / "CUB_200_2011")
    check_dataset(Cub200(root=HERE), tmp_path)
    found = rows(Cub200(root=HERE, valid=0.34), tmp_path)
    assert Cub200(root=HERE).open(tmp_path).classes == [
        "Black footed Albatross", "Laysan Albatross", "Common Yellowthroat",
    ]  # fmt: skip
    for key, name, split in found:
        number = int(key.split("_")[-2])
        assert (split == "test") == (number % 2 == 0) and key[4:].split("/")[0].replace("_", " ") == name
    assert Counter((name, split) for _, name, split in found if split == "valid") == {
        (name, "valid"): 1 for name in ("Black footed Albatross", "Laysan Albatross", "Common Yellowthroat")
    }
    assert rows(Cub200(root=Place("set/CUB_200_2011"), valid=0.34), tmp_path) == found


@pytest.mark.parametrize(
    "file, text, said",
    [
        ("images.txt", "1 a.jpg\n1 b.jpg\n", "images.txt:2: image_id 1 is there already"),
        ("images.txt", "1\n", "images.txt:1: must be 'image_id path' (got '1')"),
        ("images.txt", "", "images.txt: is empty; a line is 'image_id path'"),
        ("images.txt", None, ": holds no images.txt, nor does CUB_200_2011 in it; "
         "it holds classes.txt, image_class_labels.txt, images, train_test_split.txt"),
        ("classes.txt", None, "classes.txt: cannot be read (No such file or directory)"),
        ("classes.txt", b"1 \xff\n", "classes.txt: not UTF-8 (byte 0xff)"),
        ("image_class_labels.txt", "1 1\n99 2\n", "image_class_labels.txt:2: images.txt has no image_id 99"),
        ("image_class_labels.txt", "1 7\n", "image_class_labels.txt:1: there is no class_id 7"),
        ("image_class_labels.txt", "1 1\n", "image_class_labels.txt: has no line for image 2 "
         "(001.Black_footed_Albatross/Black_footed_Albatross_0002_14.jpg)"),
        ("train_test_split.txt", "1 2\n", "train_test_split.txt:1: there is no is_training_image 2"),
    ],
)  # fmt: skip
def test_faults_of_cub200(tmp_path: Path, file: str, text: str | bytes | None, said: str) -> None:
    root = cub200(tmp_path / "set")
    if text is None:
        (root / file).unlink()
    else:
        (root / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert told(Cub200(root=HERE), tmp_path) == f"BASE/set{'' if said.startswith(':') else '/'}{said}"


def test_paths_of_cub200_stay_in_its_folder(tmp_path: Path) -> None:
    root = cub200(tmp_path / "set", per_class=1)
    (root / "images.txt").write_text("1 ../../secret.jpg\n2 a.jpg\n3 b.jpg\n")
    assert told(Cub200(root=HERE), tmp_path) == (
        "BASE/set/images.txt: a path is written from the folder images (got '../../secret.jpg')"
    )
    (root / "images.txt").write_text("1 a.jpg\n2 a.jpg\n3 b.jpg\n")
    assert told(Cub200(root=HERE), tmp_path) == "BASE/set/images.txt: two images have one path"


# Flowers-102


def test_flowers102(tmp_path: Path) -> None:
    flowers102(tmp_path / "set" / "flowers-102")
    check_dataset(Flowers102(root=HERE), tmp_path)
    found = rows(Flowers102(root=HERE), tmp_path)
    assert found[0] == ("jpg/image_00001.jpg", "pink primrose", "valid")
    assert found[103] == ("jpg/image_00104.jpg", "hard-leaved pocket orchid", "train")
    assert found[-1] == ("jpg/image_00204.jpg", "blackberry lily", "train")
    assert Counter(split for _, _, split in found) == {"train": 51, "valid": 51, "test": 102}
    assert len(set(NAMES)) == 102 and (NAMES[53], NAMES[73], NAMES[77]) == ("sunflower", "rose", "lotus")


def test_faults_of_flowers102(tmp_path: Path) -> None:
    from scipy.io import loadmat, savemat

    root = flowers102(tmp_path / "set", 12)
    splits = {name: loadmat(root / "setid.mat")[name] for name in ("trnid", "valid", "tstid")}

    def with_splits(**parts: object) -> str:
        savemat(root / "setid.mat", splits | parts)
        return told(Flowers102(root=HERE), tmp_path)

    assert with_splits(valid=splits["trnid"]) == "BASE/set/setid.mat: image 4 is in two splits, or in one twice"
    assert with_splits(valid=[[13]]) == "BASE/set/setid.mat: 'valid' must be whole numbers from 1 to 12 (got 13)"
    assert with_splits(valid=[[1.5]]) == "BASE/set/setid.mat: 'valid' must be whole numbers from 1 to 12"
    savemat(root / "setid.mat", {"trnid": splits["trnid"]})
    assert told(Flowers102(root=HERE), tmp_path) == "BASE/set/setid.mat: holds no 'valid'"
    (root / "setid.mat").unlink()
    assert told(Flowers102(root=HERE), tmp_path) == "BASE/set/setid.mat: cannot be read (No such file or directory)"
    (root / "imagelabels.mat").write_bytes(b"<!DOCTYPE html>" * 20)
    with pytest.raises(Exception) as caught:
        loadmat(root / "imagelabels.mat")
    assert told(Flowers102(root=HERE), tmp_path) == (
        f"BASE/set/imagelabels.mat: is no MATLAB file, or damaged ({caught.value})"
    )
    (root / "imagelabels.mat").unlink()
    assert told(Flowers102(root=HERE), tmp_path) == (
        "BASE/set: holds no imagelabels.mat, nor does flowers-102 in it; it holds jpg"
    )


# ImageNet

READABLE = ["tench", "crane (n02012849)", "crane (n03126707)"]


@pytest.mark.parametrize("at", ["set", "set/ILSVRC/Data/CLS-LOC"])
def test_imagenet_folders(tmp_path: Path, at: str) -> None:
    imagenet(tmp_path / at)
    png(tmp_path / at / "test" / "ILSVRC2012_test_00000001.JPEG")
    check_dataset(ImageNet(root=HERE), tmp_path)
    found = rows(ImageNet(root=HERE), tmp_path)
    assert ImageNet(root=HERE).open(tmp_path).classes == READABLE
    assert Counter(split for _, _, split in found) == {"train": 12, "valid": 3}
    assert found[0] == ("train/n01440764/n01440764_0.JPEG", "tench", "train")
    assert found[-1] == ("val/n03126707/ILSVRC2012_val_00000003.JPEG", "crane (n03126707)", "valid")
    reported = rows(ImageNet(root=HERE, val="test", valid=0.25), tmp_path)
    assert Counter(split for _, _, split in reported) == {"train": 9, "valid": 3, "test": 3}
    assert {split for key, _, split in reported if key.startswith("val/")} == {"test"}
    assert Counter(split for _, _, split in rows(ImageNet(root=HERE, test=0.25), tmp_path)) == {
        "train": 9, "valid": 3, "test": 3,
    }  # fmt: skip


def test_the_time_is_guessed_without_carving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imagenet(tmp_path / "set")

    def carved(*_: object) -> None:
        raise AssertionError("of a million images this takes seconds")

    monkeypatch.setattr(saefw_imagenet, "carve", carved)
    run = desk(tmp_path, {"datasets": {"imagenet": ImageNet(root=HERE)}})
    stage = Record(backbone="tiny", datasets=["imagenet"], layers=[0])
    units = list(stage.units(run))
    assert 0 < stage.duration(units, run, Pace()) < 60
    assert {stage.work(unit, run) for unit in units} == {"15 images"}
    dataset = run.dataset(ImageNet(root=HERE))
    assert isinstance(dataset, ImageFiles)
    monkeypatch.undo()
    for i in range(15):
        assert dataset.unsplit(i)._replace(split=dataset[i].split)[:3] == dataset[i][:3]
        assert dataset.unsplit(i).load().tobytes() == dataset[i].load().tobytes()


def flat(root: Path) -> Path:
    """val/ as it comes: 3 images in one folder."""
    imagenet(root)
    for folder in (root / "val").iterdir():
        for path in folder.iterdir():
            path.rename(root / "val" / path.name)
        folder.rmdir()
    return root


def test_imagenet_as_kaggle_packs_it(tmp_path: Path) -> None:
    flat(tmp_path / "set" / "ILSVRC" / "Data" / "CLS-LOC")
    (tmp_path / "set" / "LOC_synset_mapping.txt").write_text(
        "n01440764 tench, Tinca tinca\nn02012849 crane bird\nn03126707 crane\n"
    )
    (tmp_path / "set" / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\nILSVRC2012_val_00000002,n01440764 1 2 3 4 \n"
        "ILSVRC2012_val_00000001,n03126707 111 108 441 193 n03126707 1 2 3 4 \n"
        "ILSVRC2012_val_00000003,n02012849 0 0 9 9 \n"
    )
    found = rows(ImageNet(root=HERE), tmp_path)
    assert found == rows(ImageNet(root=Place("set/ILSVRC/Data/CLS-LOC")), tmp_path)
    assert [row for row in found if row[2] == "valid"] == [
        ("val/ILSVRC2012_val_00000001.JPEG", "crane", "valid"),
        ("val/ILSVRC2012_val_00000002.JPEG", "tench", "valid"),
        ("val/ILSVRC2012_val_00000003.JPEG", "crane bird", "valid"),
    ]
    with (tmp_path / "set" / "LOC_val_solution.csv").open("a") as file:
        file.write("ILSVRC2012_val_00000004,\n")
    assert told(ImageNet(root=HERE), tmp_path) == (
        "BASE/set/LOC_val_solution.csv:5: must be an image, a comma and a synset with boxes "
        "(got ['ILSVRC2012_val_00000004', ''])"
    )


def test_imagenet_with_the_development_kit(tmp_path: Path) -> None:
    """Its numbers of synsets are in an order of their own, and inner nodes of WordNet have numbers too."""
    from scipy.io import savemat

    root = flat(tmp_path / "set")
    kit = root / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    synsets = np.zeros((4, 1), dtype=[("ILSVRC2012_ID", object), ("WNID", object), ("words", object)])
    for i, wnid in enumerate(["n03126707", "n01440764", "n02012849", "n00001740"]):
        synsets[i, 0] = (i + 1, wnid, "words, more words")
    savemat(kit / "meta.mat", {"synsets": synsets})
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n1\n3\n")
    assert [name for _, name, split in rows(ImageNet(root=HERE), tmp_path) if split == "valid"] == [
        "tench", "crane (n03126707)", "crane (n02012849)",
    ]  # fmt: skip
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n9\n3\n")
    assert told(ImageNet(root=HERE), tmp_path) == (
        "BASE/set/ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt:2: meta.mat has no synset 9"
    )
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n1\n")
    assert told(ImageNet(root=HERE), tmp_path) == (
        "BASE/set/val/ILSVRC2012_val_00000003.JPEG: the list of the validation images does not name it"
    )


def test_what_is_no_imagenet_is_told(tmp_path: Path) -> None:
    flat(tmp_path / "set")
    assert told(ImageNet(root=HERE), tmp_path) == (
        "BASE/set/val: its images lie in no folders of synsets, and neither LOC_val_solution.csv (Kaggle) nor "
        "ILSVRC2012_devkit_t12/data (image-net.org), which would say what they show, is in BASE/set"
    )
    assert told(ImageNet(root=Place("set/train")), tmp_path) == (
        "BASE/set/train: holds the folders of synsets themselves; did you mean BASE/set?"
    )
    tree(tmp_path / "names", ["train/tench/1.JPEG", "val/tench/2.JPEG"])
    assert told(ImageNet(root=Place("names")), tmp_path) == (
        "BASE/names/train/tench/1.JPEG: lies in no folder of a synset, as train/n01440764 is"
    )
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "ILSVRC2012_img_train.tar").touch()
    assert told(ImageNet(root=Place("tars")), tmp_path) == (
        "BASE/tars: holds no train or val, nor does ILSVRC/Data/CLS-LOC in it; it holds ILSVRC2012_img_train.tar"
    )
    assert told(ImageNet(root=Place("away")), tmp_path) == "BASE/away: there is no such folder"


def test_imagenet_in_parquet(tmp_path: Path) -> None:
    names = ["tench, Tinca tinca", "crane", "crane"]
    data = tmp_path / "set" / "data"
    parquet(data / "train-00000-of-00002.parquet", [0, 1, 2, 0, 1], names)
    parquet(data / "train-00001-of-00002.parquet", [2, 0], names, 5)
    parquet(data / "validation-00000-of-00001.parquet", [1, 2], names, 7)
    parquet(data / "test-00000-of-00001.parquet", [-1, -1], names, 9)
    check_dataset(ImageNet(root=HERE), tmp_path)
    found = rows(ImageNet(root=HERE), tmp_path)
    crane = ["tench", "crane (class 1)", "crane (class 2)"]
    assert ImageNet(root=HERE).open(tmp_path).classes == crane
    assert found == [
        *[(f"train-00000-of-00002/{i:05d}", crane[label], "train") for i, label in enumerate([0, 1, 2, 0, 1])],
        *[(f"train-00001-of-00002/{i:05d}", crane[label], "train") for i, label in enumerate([2, 0])],
        *[(f"validation-00000-of-00001/{i:05d}", crane[label], "valid") for i, label in enumerate([1, 2])],
    ]
    assert rows(ImageNet(root=Place("set/data")), tmp_path) == found
    dataset = ImageNet(root=HERE).open(tmp_path)
    for i in range(9):
        expected = np.random.default_rng(i).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        assert np.array_equal(np.asarray(dataset[i].load()), expected)


def test_rows_are_read_by_threads_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr(saefw_imagenet, "ROWS", 4)
    parquet(tmp_path / "set" / "train-00000-of-00001.parquet", [i % 3 for i in range(50)], ["a", "b", "c"])
    dataset = ImageNet(root=HERE).open(tmp_path)
    order = np.random.default_rng(0).permutation(np.tile(np.arange(50), 4)).tolist()
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda i: np.asarray(dataset[i].load()), order))
    for i, image in zip(order, images, strict=True):
        expected = np.random.default_rng(i).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        assert np.array_equal(image, expected)


def test_parquet_without_names_has_those_of_imagenet(tmp_path: Path) -> None:
    parquet(tmp_path / "set" / "train-00000-of-00001.parquet", [0, 134, 517, 999], None)
    dataset = ImageNet(root=HERE).open(tmp_path)
    assert len(dataset.classes) == len(set(dataset.classes)) == 1000
    assert [dataset.classes[dataset[i].label] for i in range(4)] == [
        "tench", "crane (class 134)", "crane (class 517)", "toilet tissue",
    ]  # fmt: skip


def test_faults_of_parquet(tmp_path: Path) -> None:

    path = parquet(tmp_path / "set" / "train-00000-of-00001.parquet", [0, 3], ["a", "b"])
    assert told(ImageNet(root=HERE), tmp_path) == f"BASE/set/{path.name}: there are names for 2 classes, and a label 3"
    parquet(path, [-1], ["a", "b"])
    assert told(ImageNet(root=HERE), tmp_path) == "BASE/set: the parquet files hold no image with a label"
    with duckdb.connect() as db:
        db.execute(f"COPY (SELECT 1 AS picture) TO '{path}' (FORMAT parquet)")
    assert told(ImageNet(root=HERE), tmp_path) == (
        f"BASE/set/{path.name}: must have the columns image (bytes, path) and label ({of_duckdb(path, tmp_path)})"
    )
    path.rename(path.with_name("trian.parquet"))
    assert told(ImageNet(root=HERE), tmp_path) == (
        "BASE/set/trian.parquet: the name begins with its split: train-, validation- or test-; did you mean 'train'?"
    )
    path.with_name("trian.parquet").unlink()
    path.write_bytes(b"no parquet")
    assert told(ImageNet(root=HERE), tmp_path) == (
        f"BASE/set/{path.name}: must have the columns image (bytes, path) and label ({of_duckdb(path, tmp_path)})"
    )
    with duckdb.connect() as db:
        db.execute(
            f"COPY (SELECT {{'bytes': NULL::BLOB, 'path': 'x'}} AS image, 0 AS label) TO '{path}' (FORMAT parquet)"
        )
    with pytest.raises(OSError) as error:
        ImageNet(root=HERE).open(tmp_path)[0].load()
    assert str(error.value) == "its row holds no bytes"


def test_a_limit_leaves_every_split_its_share(tmp_path: Path) -> None:
    """Of many classes too, with fewer images each in one split than in the other."""
    imagenet(tmp_path / "set", per_class=20)
    whole = rows(ImageNet(root=HERE), tmp_path)
    found = rows(ImageNet(root=HERE, limit=21), tmp_path)
    assert Counter(split for _, _, split in found) == {"train": 20, "valid": 1}
    assert set(Counter(name for _, name, split in found if split == "train").values()) == {6, 7}
    assert set(found) < set(rows(ImageNet(root=HERE, limit=22), tmp_path)) < set(whole)
