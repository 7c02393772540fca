"""Images opened again after they were recorded: the same ones, or a sentence."""

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.Image import DecompressionBombError
from tiny import TinySet

from saefw.errors import UserError
from saefw.originals import Unreadable, again, opened
from saefw.plugin import Example


class Listed:
    """Images under some keys."""

    classes: Sequence[str] = ()

    def __init__(self, keys: Sequence[str], load: Callable[[], Image.Image]) -> None:
        self.keys, self.load = keys, load

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Example:
        return Example(self.keys[index], -1, "test", self.load)


def test_an_image_is_opened_again() -> None:
    dataset = TinySet().build(Path())
    found = again(dataset, 7, "tiny-007")
    np.testing.assert_array_equal(np.asarray(found), np.asarray(dataset[7].load()))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ["a", "c"],
            "image 1 of the dataset was 'b' when it was recorded and is 'c' now; put the images back as they were, "
            "or record them anew in another store",
        ),
        (
            ["a"],
            "image 1 of the dataset was 'b' when it was recorded and is not there now; put the images back as they "
            "were, or record them anew in another store",
        ),
    ],
)
def test_another_image_in_its_place_is_not_taken_for_it(keys: list[str], message: str) -> None:
    with pytest.raises(UserError) as told:
        again(Listed(keys, lambda: Image.new("RGB", (2, 2))), 1, "b")
    assert str(told.value) == message


def test_a_file_that_is_gone_or_too_large_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone.png"
    with pytest.raises(UserError) as told:
        again(Listed(["a"], lambda: Image.open(gone)), 0, "a")
    assert str(told.value) == "image 'a' cannot be read (it is missing)"
    Image.new("L", (300, 200)).save(gone)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError) as told:
        opened(Example("a", -1, "test", lambda: Image.open(gone)))
    assert isinstance(told.value.__cause__, DecompressionBombError)
    assert str(told.value) == (
        "image 'a' cannot be read (Image size (60000 pixels) exceeds limit of 2000 pixels, "
        "could be decompression bomb DOS attack.)"
    )


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ESTALE, errno.ENOMEM, errno.EACCES])
def test_a_fault_of_the_system_is_none_of_the_image(number: int) -> None:
    def load() -> Image.Image:
        raise OSError(number, os.strerror(number), "images/a.png")

    with pytest.raises(UserError) as told:
        opened(Example("a", -1, "test", load))
    assert not isinstance(told.value, Unreadable)
    assert str(told.value) == (f"image 'a' could not be opened ({os.strerror(number)}); run again once that is mended")
