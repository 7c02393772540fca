"""my-backbone keeps the contract of backbones."""

from saefw.testing import check_backbone

from my_backbone import MyBackbone


def test_my_backbone() -> None:
    """With its defaults."""
    check_backbone(MyBackbone())
