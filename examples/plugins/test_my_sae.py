"""my-sae keeps the contract of SAE variants."""

from saefw.testing import check_planted, check_sae

from my_sae import MySae


def test_my_sae() -> None:
    """With its defaults, and with a threshold that about three features pass."""
    check_sae(MySae())
    check_planted(MySae(times=1.5))
