"""An SAE variant: keeps the features that stand out from the others of their token."""

from typing import Literal

from pydantic import Field
from saefw.plugin import SaeConfig, hookimpl
from saefw.sae import Entries, Sae, where
from torch import Tensor


class MySae(SaeConfig):
    """Keeps features that are some times larger than is usual on their token."""

    use: Literal["my-sae"] = "my-sae"

    times: float = Field(default=2.0, gt=0)
    """How often the root mean square of its token a feature must be to fire."""

    def build(self, d_model: int) -> Sae:
        """Return a fresh one with these settings."""
        return MySaeModel(d_model, self.width(d_model), self.times)


class MySaeModel(Sae):
    """W_enc, a threshold relative to the token, W_dec."""

    def __init__(self, d_model: int, d_sae: int, times: float) -> None:
        """Start as every SAE does."""
        super().__init__(d_model, d_sae)
        self.times = times

    def select(self, pre_ns: Tensor) -> Entries:
        """Return which of the pre-activations [n, s] are active."""
        usual_n1 = pre_ns.square().mean(dim=1, keepdim=True).sqrt()
        return where(pre_ns > self.times * usual_n1)


@hookimpl
def saefw_saes() -> list[type[SaeConfig]]:
    """One: my-sae."""
    return [MySae]
