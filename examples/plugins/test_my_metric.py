"""my-metric keeps the contract of metrics."""

from saefw.testing import check_metric

from my_metric import MyMetric


def test_my_metric() -> None:
    """It is a number, however the tokens are cut into batches."""
    check_metric(MyMetric)
