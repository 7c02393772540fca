"""A metric: the largest error of a token, on average."""

from collections.abc import Mapping

from saefw.plugin import Codes, Metric, PerToken, hookimpl
from torch import Tensor


class MyMetric(PerToken):
    """Largest error among the dimensions of a token, mean over tokens."""

    def of(self, x_nd: Tensor, x_hat_nd: Tensor, codes: Codes) -> Tensor:
        """Return it of each token [n]."""
        return (x_nd - x_hat_nd).abs().amax(dim=1)


@hookimpl
def saefw_metrics() -> Mapping[str, type[Metric]]:
    """One: my-metric."""
    return {"my-metric": MyMetric}
