"""my-stage keeps the contract of stages."""

from saefw.testing import check_stage

from my_stage import MyStage


def test_my_stage() -> None:
    """Its settings, and that it lists and makes units."""
    check_stage(MyStage(acts="acts"))
