"""The handwritten digits that come with scikit-learn, shown as 32 x 32 images."""

from collections.abc import Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from saefw.plugin import Dataset, DatasetConfig, Example, Split, hookimpl

if TYPE_CHECKING:
    from PIL.Image import Image


class Digits(DatasetConfig):
    """1,797 handwritten digits of 43 people, 8 x 8 grey values each (E. Alpaydin and C. Kaynak, UCI 1998)."""

    use: Literal["digits"] = "digits"

    def build(self, base: Path) -> Dataset:
        """Read them from scikit-learn; `base` is not used."""
        from sklearn.datasets import load_digits

        data: Any = load_digits()
        return DigitImages(data.images, data.target)


class DigitImages:
    """The images, in scikit-learn's order.

    Within a class, examples are ordered by a hash of their key: the first two ninths are test, the next ninth is
    valid, the rest train. So the split hangs on no library's random numbers.
    """

    def __init__(self, values: "np.ndarray[Any, Any]", labels: "np.ndarray[Any, Any]") -> None:
        """Take grey values [n, 8, 8] from 0 to 16 and labels [n]."""
        self.classes: Sequence[str] = [str(digit) for digit in range(10)]
        self._pixels = np.round(values / 16 * 255).astype(np.uint8)
        self._labels = [int(label) for label in labels]
        self._splits = _splits(self._labels)

    def __len__(self) -> int:
        """How many images."""
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        """The image at an index."""
        if not 0 <= index < len(self):
            raise IndexError(f"there is no digit {index}")
        return Example(_key(index), self._labels[index], self._splits[index], partial(self._image, index))

    def _image(self, index: int) -> "Image":
        from PIL import Image

        grey = Image.fromarray(self._pixels[index])
        return grey.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB")


def _key(index: int) -> str:
    return f"digit-{index:04d}"


def _splits(labels: Sequence[int]) -> list[Split]:
    splits: list[Split] = ["train"] * len(labels)
    for label in set(labels):
        ours = [index for index, other in enumerate(labels) if other == label]
        ours.sort(key=lambda index: sha256(f"saefw-digits:{_key(index)}".encode()).hexdigest())
        n_test, n_valid = round(len(ours) * 2 / 9), round(len(ours) / 9)
        for index in ours[:n_test]:
            splits[index] = "test"
        for index in ours[n_test : n_test + n_valid]:
            splits[index] = "valid"
    return splits


@hookimpl
def saefw_datasets() -> list[type[DatasetConfig]]:
    """Bring one: digits."""
    return [Digits]
