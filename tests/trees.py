"""Small image sets on disk, in the shape of the true ones."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from saefw.plugin import Dataset, DatasetConfig


def png(path: Path, seed: int = 0) -> Path:
    """Write a small image, another one for every seed, whatever the file is called."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "PNG")
    return path


def tree(root: Path, paths: Iterable[str]) -> Path:
    """Write an image at each path below a folder."""
    for seed, path in enumerate(paths):
        png(root / path, seed)
    return root


def rows(config: DatasetConfig, base: Path) -> list[tuple[str, str | None, str]]:
    """Open a dataset; return key, name of the class and split of each image."""
    dataset: Dataset = config.open(base)
    examples = [dataset[i] for i in range(len(dataset))]
    return [
        (example.key, dataset.classes[example.label] if example.label >= 0 else None, example.split)
        for example in examples
    ]


def caltech101(root: Path, sizes: dict[str, int]) -> Path:
    """101_ObjectCategories: a folder for each class, the background among them."""
    return tree(root, [f"{name}/image_{i:04d}.jpg" for name, n in sizes.items() for i in range(1, n + 1)])


def cub200(root: Path, per_class: int = 6) -> Path:
    """CUB_200_2011 of three species; of each the odd images are train."""
    species = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "200.Common_Yellowthroat"]
    (root / "images").mkdir(parents=True)
    paths = [f"{name}/{name[4:]}_{i:04d}_{7 * i}.jpg" for name in species for i in range(1, per_class + 1)]
    tree(root / "images", paths)
    numbers = {name: int(name[:3]) for name in species}
    texts = {
        "classes": [f"{numbers[name]} {name}" for name in species],
        "images": [f"{i} {path}" for i, path in enumerate(paths, 1)],
        "image_class_labels": [f"{i} {numbers[path.split('/')[0]]}" for i, path in enumerate(paths, 1)],
        "train_test_split": [f"{i} {i % 2}" for i in range(1, len(paths) + 1)],
    }
    for name, lines in texts.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def flowers102(root: Path, n: int = 204) -> Path:
    """jpg/ and the two .mat files, as MATLAB 5 wrote them; two images a class, more of them if n is larger."""
    from scipy.io import savemat

    tree(root, [f"jpg/image_{i:05d}.jpg" for i in range(1, n + 1)])
    numbers = np.arange(1, n + 1)
    savemat(root / "imagelabels.mat", {"labels": ((numbers - 1) % 102 + 1).astype(np.uint8)[None]})
    parts = {"tstid": numbers[numbers % 4 > 1], "trnid": numbers[numbers % 4 == 0], "valid": numbers[numbers % 4 == 1]}
    savemat(root / "setid.mat", {name: some.astype(np.uint16)[None] for name, some in parts.items()})
    return root


WNIDS = ("n01440764", "n02012849", "n03126707")
"""Tench, crane (the bird), crane (the machine)."""


def imagenet(root: Path, per_class: int = 4) -> Path:
    """train/ in folders of synsets, and val/ in such folders too."""
    return tree(
        root,
        [f"train/{wnid}/{wnid}_{i}.JPEG" for wnid in WNIDS for i in range(per_class)]
        + [f"val/{wnid}/ILSVRC2012_val_{k + 1:08d}.JPEG" for k, wnid in enumerate(WNIDS)],
    )


def parquet(path: Path, labels: list[int], names: list[str] | None, first: int = 0) -> Path:
    """Write a parquet file as the hub's ImageNet has them: image (bytes, path), label, and the names in its header."""
    import duckdb

    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.parent / "images"
    images: list[Any] = [png(folder / f"{i}.png", i).read_bytes() for i in range(first, first + len(labels))]
    header = json.dumps({"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}})
    kept = f", KV_METADATA {{huggingface: '{header}'}}" if names else ""
    with duckdb.connect() as db:
        db.execute("CREATE TABLE t (image STRUCT(bytes BLOB, path TEXT), label BIGINT)")
        for i, (data, label) in enumerate(zip(images, labels, strict=True)):
            db.execute("INSERT INTO t VALUES (struct_pack(bytes := ?, path := ?), ?)", [data, f"{i}.JPEG", label])
        db.execute(f"COPY t TO '{path}' (FORMAT parquet{kept})")
    for i in range(first, first + len(labels)):
        (folder / f"{i}.png").unlink()
    folder.rmdir()
    return path
