"""Images that cannot be read: named and fatal, or left out for good."""

import errno
import os
from collections.abc import Callable
from functools import partial, partialmethod
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import Field
from tiny import TinySet, desk
from torch import Tensor

from saefw.acts import Acts
from saefw.errors import UserError
from saefw.plugin import Dataset, DatasetConfig, Example, Run, Unit
from saefw.stages.record import Record

WHOLE = {i: TinySet().build(Path())[i] for i in range(60)}
"""The images of the tiny set: `Folder` has them in files."""


class Folder(DatasetConfig):
    """The first tiny images, as files `images/00.png` beside registry.yaml."""

    use: Literal["folder"] = "folder"

    n: int = Field(60, gt=0)
    """How many."""

    def build(self, base: Path) -> Dataset:
        return Files(base / "images", self.n)


class Files:
    """The images of Folder."""

    classes = ("red", "green", "blue")

    def __init__(self, root: Path, n: int) -> None:
        self.root, self.n = root, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Example:
        name = f"{index:02d}.png"
        return WHOLE[index]._replace(key=name, load=partial(Image.open, self.root / name))


def png(index: int) -> bytes:
    out = BytesIO()
    WHOLE[index].load().save(out, "PNG")
    return out.getvalue()


def bomb() -> bytes:
    out = BytesIO()
    Image.new("RGB", (64, 64)).save(out, "PNG")
    return out.getvalue()


FAULTS = {
    3: (png(3)[:200], "image file is truncated"),
    10: (b"", "it is no image"),
    20: (b"<!DOCTYPE html><html><body>404</body></html>", "it is no image"),
    21: (None, "it is missing"),
    35: (
        bomb(),
        "Image size (4096 pixels) exceeds limit of 2000 pixels, could be decompression bomb DOS attack.",
    ),
}
"""What is in some files, and how it is told."""


def put(path: Path, faults: dict[int, tuple[bytes | None, str]]) -> Path:
    """Write the files beside a registry, some of them broken."""
    (path / "images").mkdir(parents=True)
    for i in range(60):
        data, _ = faults.get(i, (png(i), ""))
        if data is not None:
            (path / "images" / f"{i:02d}.png").write_bytes(data)
    return path


def record(path: Path, run: Run | None = None, **settings: Any) -> tuple[Run, list[Unit]]:
    run = run or desk(path, {"datasets": {"files": Folder()}})
    stage = Record(
        **{"backbone": "tiny", "datasets": ["files"], "layers": [0, 2], "batch_size": 4, "dtype": "float32", **settings}
    )
    units = list(stage.units(run))
    stage.make([unit for unit in units if not run.store.has(unit)], run)
    return run, units


def everything(acts: Acts) -> Tensor:
    return torch.cat([x for _, x in acts.read("all")])


@pytest.fixture(autouse=True)
def _low_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)


@pytest.mark.parametrize("index", FAULTS)
def test_fatal_names_image_and_fault(index: int, tmp_path: Path) -> None:
    with pytest.raises(UserError) as told:
        record(put(tmp_path, {index: FAULTS[index]}))
    assert str(told.value) == (
        f"image '{index:02d}.png' cannot be read ({FAULTS[index][1]}); mend it, or leave out what cannot be read with "
        "broken: skip in the stage that records"
    )


@pytest.mark.parametrize("workers", [1, 4])
def test_skip_lists_them_and_uses_none(workers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, units = record(put(tmp_path / "a", FAULTS), broken="skip", workers=workers, shard_mb=0.01)
    _, (good, _) = whole = record(put(tmp_path / "b", {}))
    assert caplog.messages == ["files: left out 5 of 60 images, which cannot be read; the table `broken` names them"]
    with run.db() as db:
        for unit in units:
            rows = db.execute("SELECT example, key, why FROM broken WHERE unit = ? ORDER BY 1", [unit.address])
            assert rows.fetchall() == [(i, f"{i:02d}.png", why) for i, (_, why) in FAULTS.items()]
    fine = np.array([i not in FAULTS for i in range(60)])
    for unit, same in zip(units, whole[1], strict=True):
        acts, expected = Acts(run.folder(unit)), Acts(whole[0].folder(same))
        assert acts.keys == expected.keys and acts.labels.tolist() == expected.labels.tolist()
        assert acts.splits.tolist() == np.where(fine, expected.splits, "broken").tolist()
        assert acts.of_split("broken").tolist() == list(FAULTS)
        found, right = everything(acts), everything(expected)
        assert not found[~fine].any()
        torch.testing.assert_close(found[fine], right[fine], rtol=1e-5, atol=1e-5)
        train_nd = right[fine & (expected.splits == "train"), 1:].reshape(-1, 16).double()
        stats = acts.stats("patches")
        assert stats.n == len(train_nd)
        torch.testing.assert_close(stats.mean, train_nd.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stats.var, train_nd.var(0, unbiased=False), rtol=1e-5, atol=1e-6)
    assert units[0].content == {**good.content, "broken": "skip"}


def test_what_was_broken_stays_so_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Complete shards remember it; one that a layer lost is recorded anew for all, as the files are now."""
    settings: dict[str, Any] = {"broken": "skip", "shard_mb": 0.01}
    put(tmp_path, FAULTS)
    run = desk(tmp_path, {"datasets": {"files": Folder()}})
    with monkeypatch.context() as stopped:
        stopped.setattr(run, "keep", stop)
        with pytest.raises(KeyboardInterrupt):
            record(tmp_path, run, **settings)
    units = list(Record(backbone="tiny", datasets=["files"], layers=[0, 2], dtype="float32", broken="skip").units(run))
    # Nine images are a shard: 3 is in the first, 10 in the second, 20 and 21 are in the third.
    (run.folder(units[1]) / "acts-00002.safetensors").write_bytes(b"damaged")
    for i in (3, 10, 20):
        (tmp_path / "images" / f"{i:02d}.png").write_bytes(png(i))
    record(tmp_path, run, **settings)
    for unit in units:
        assert Acts(run.folder(unit)).of_split("broken").tolist() == [3, 10, 21, 35]
        assert Acts(run.folder(unit)).stats("cls").n == 42 - sum(WHOLE[i].split == "train" for i in (3, 10, 21, 35))


@pytest.mark.parametrize("broken", ["fatal", "skip"])
def test_a_fault_of_the_system_leaves_no_image_out(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does anything remember it: the next run records all images."""
    put(tmp_path, {})
    settings: dict[str, Any] = {"broken": broken, "shard_mb": 0.01}
    with monkeypatch.context() as failing:
        failing.setattr(Files, "__getitem__", partialmethod(failing_disk, Files.__getitem__))
        with pytest.raises(UserError) as told:
            record(tmp_path, **settings)
    assert str(told.value) == "image '30.png' could not be opened (Input/output error); run again once that is mended"
    run, units = record(tmp_path, **settings)
    assert len(Acts(run.folder(units[0])).of_split("broken")) == 0


def failing_disk(files: Files, whole: Callable[[Files, int], Example], index: int) -> Example:
    """Return an image, of which the 30th lies where the disk fails."""

    def load() -> Image.Image:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "images/30.png")

    return whole(files, index)._replace(load=load) if index == 30 else whole(files, index)


def stop(*units: Unit) -> None:
    raise KeyboardInterrupt


def test_more_than_half_is_an_error_that_is_not_remembered(tmp_path: Path) -> None:
    (put(tmp_path, {}) / "images").rename(tmp_path / "elsewhere")
    settings: dict[str, Any] = {"broken": "skip", "shard_mb": 0.01}
    with pytest.raises(UserError) as told:
        record(tmp_path, **settings)
    assert str(told.value) == (
        "files: more than half of the 60 images cannot be read, the first of them '00.png' (it is missing)"
    )
    (tmp_path / "elsewhere").rename(tmp_path / "images")
    run, units = record(tmp_path, **settings)
    with run.db() as db:
        assert db.execute("SELECT count(*) FROM broken").fetchall() == [(0,)]
    assert len(Acts(run.folder(units[0])).of_split("broken")) == 0
