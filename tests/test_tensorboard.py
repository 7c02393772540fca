"""Curves in TensorBoard: what is logged is what is drawn, and only where it is asked for."""

import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import saefw_tensorboard as curves
from saefw.errors import UserError
from saefw.unit import Unit

UNIT = Unit("train", {"k": 8}, label="topk k=8, ../vit on <digits>, layer 2")


def drawn(folder: Path) -> Iterator[tuple[str, int, float]]:
    """Yield the numbers of the event files in a folder: records of a length, its check, the event, its check."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.glob("events*")):
        data = path.read_bytes()
        while data:
            (n,) = struct.unpack_from("<Q", data)
            event = Event.FromString(data[12 : 12 + n])
            yield from ((value.tag, event.step, value.simple_value) for value in event.summary.value)
            data = data[16 + n :]


def test_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    curves.saefw_logged(UNIT, 3, {"nmse": 0.5})
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv(curves.FOLDER, "curves")
    curves.saefw_logged(UNIT, 3, {"nmse": 0.5, "l0": 8.0})
    curves.saefw_logged(UNIT, 6, {"nmse": 0.25})
    curves.saefw_kept(UNIT, tmp_path, 1.0)
    (folder,) = (tmp_path / "curves").iterdir()
    assert folder.name == f"topk k=8 .. vit on digits layer 2 {UNIT.address}"
    assert list(drawn(folder)) == [("nmse", 3, 0.5), ("l0", 3, 8.0), ("nmse", 6, 0.25)]


def test_a_long_name_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(curves.FOLDER, str(tmp_path))
    unit = Unit("train", {"k": 9}, label="ä" * 300)
    curves.saefw_logged(unit, 3, {"nmse": 0.5})
    curves.saefw_kept(unit, tmp_path, 1.0)
    (folder,) = tmp_path.iterdir()
    assert folder.name == f"{'ä' * 100} {unit.address}"


def test_a_folder_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(curves.FOLDER, str(tmp_path / "file"))
    with pytest.raises(UserError) as caught:
        curves.saefw_logged(UNIT, 3, {"nmse": 0.5})
    path = tmp_path / "file"
    assert str(caught.value) == f"SAEFW_TENSORBOARD: no curves can be written to {path} (Not a directory)"


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(curves.FOLDER, str(tmp_path))
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError) as caught:
        curves.saefw_logged(UNIT, 3, {"nmse": 0.5})
    assert str(caught.value) == "SAEFW_TENSORBOARD: curves want tensorboardX: pip install 'saefw[tensorboard]'"
