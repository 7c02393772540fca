"""my-probe keeps the contract of probes."""

from saefw.testing import check_probe

from my_probe import MyProbe


def test_my_probe() -> None:
    """With its defaults."""
    check_probe(MyProbe())
