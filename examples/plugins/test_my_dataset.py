"""my-dataset keeps the contract of datasets."""

from pathlib import Path

from saefw.plugin import Place
from saefw.testing import check_dataset

from my_dataset import MyDataset

HERE = Path(__file__).parent


def test_my_dataset() -> None:
    """On the pictures beside this file."""
    check_dataset(MyDataset(root=Place("my_dataset_images")), HERE)
