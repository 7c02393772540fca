"""Pictures that are in two splits, found by their pixels."""

from pathlib import Path

import numpy as np
from PIL import Image
from trees import png
from typer.testing import CliRunner

from saefw.cli import app
from saefw.duplicates import Copy, Duplicates
from saefw_image_folder import ImageFolder

REGISTRY = """\
saefw: 1
backbones: {vit: {use: digits-vit}}
datasets:
  ours: {use: image-folder, root: images}
  two: {use: image-folder, root: images, vary: {layout: [splits, flat]}}
stages:
  acts: {use: record, backbone: vit, datasets: [ours], layers: [-1]}
"""


def images(root: Path) -> Path:
    """Thirty pictures, one of them in three splits, one twice in train, and a file that is none."""
    for i in range(30):
        png(root / ("train" if i < 20 else "valid" if i < 25 else "test") / "cat" / f"{i:02d}.png", i)
    png(root / "valid" / "cat" / "copy.png", 3)
    # Other bytes, the same pixels.
    Image.open(root / "train" / "cat" / "03.png").save(root / "test" / "cat" / "copy.bmp")
    png(root / "train" / "cat" / "twice.png", 4)
    # The same bytes of pixels in another shape are another picture.
    pixels = np.asarray(Image.open(root / "train" / "cat" / "05.png"))
    Image.fromarray(pixels.reshape(8, 6, 3)).save(root / "test" / "cat" / "turned.png")
    (root / "test" / "cat" / "page.jpg").write_text("<html>")
    return root


def test_by_pixels(tmp_path: Path) -> None:
    images(tmp_path / "images")
    dataset, seen = ImageFolder.model_validate({"root": "images"}).open(tmp_path), Duplicates()
    assert list(seen.watch(dataset)) == list(range(1, len(dataset) + 1))
    assert seen.across() == [
        [
            Copy("test/cat/copy.bmp", "test"),
            Copy("train/cat/03.png", "train"),
            Copy("valid/cat/copy.png", "valid"),
        ]
    ]
    assert seen.unread == [
        "image 'test/cat/page.jpg' cannot be read (it is no image, but text that begins with '<html>')"
    ]
    naive: dict[bytes, set[str]] = {}
    for i in range(len(dataset)):
        if not dataset[i].key.endswith(".jpg"):
            image = dataset[i].load()
            naive.setdefault(image.tobytes() + str(image.size).encode(), set()).add(dataset[i].split)
    assert sum(len(splits) > 1 for splits in naive.values()) == 1


def test_on_the_command_line(tmp_path: Path) -> None:
    root = images(tmp_path / "images")
    path = tmp_path / "registry.yaml"
    path.write_text(REGISTRY)
    found = CliRunner().invoke(app, ["check", str(path), "--duplicates"])
    assert found.exit_code == 1, found.output
    said = found.output.split("fine; ")[1].splitlines()[1:]
    one = "one picture in test/cat/copy.bmp (test), train/cat/03.png (train), valid/cat/copy.png (valid)"
    lost = "image 'test/cat/page.jpg' cannot be read (it is no image, but text that begins with '<html>')"
    assert said[:3] == [f"ours: {one}", f"ours: {lost}", "ours: 35 images, 1 in more than one split"]
    assert [line.split(":")[0] for line in said[3:6]] == ["two layout=splits"] * 3
    for name in ("test/cat/copy.bmp", "valid/cat/copy.png"):
        (root / name).unlink()
    path.write_text(REGISTRY.replace("  two:", "  # two:"))
    found = CliRunner().invoke(app, ["check", str(path), "--duplicates"])
    assert found.exit_code == 0, found.output
    assert found.output.endswith(f"ours: {lost}\nours: 33 images, 0 in more than one split\n")
    path.write_text(REGISTRY.replace("  two:", "  # two:").replace("root: images}", "root: image}"))
    found = CliRunner().invoke(app, ["check", str(path), "--duplicates"])
    assert (found.exit_code, found.stderr) == (
        1,
        f"{path}:4:29: datasets.ours.root: {tmp_path / 'image'} is not there; what needs it cannot be made here\n"
        f"{path}:4:3: datasets.ours: {tmp_path / 'image'}: there is no such folder; did you mean 'images'?\n",
    )
