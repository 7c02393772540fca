"""A probe: reads the class whose mean token is nearest."""

from typing import Literal

import torch
from saefw.plugin import Probe, ProbeConfig, Task, hookimpl
from torch import Tensor


class MyProbe(ProbeConfig):
    """Reads the class whose mean token is nearest."""

    use: Literal["my-probe"] = "my-probe"

    def build(self, task: Task) -> Probe:
        """Return one that knows no means yet."""
        return MyProbeModel(task)

    def fit(self, task: Task, x_nd: Tensor, y_n: Tensor) -> Probe:
        """Return one with the means of tokens x of the classes y."""
        probe = MyProbeModel(task).to(x_nd.device)
        for label in set(y_n.tolist()):
            probe.mean_cd[label] = x_nd[y_n == label].mean(dim=0)
        return probe


class MyProbeModel(Probe):
    """The mean token of each class."""

    mean_cd: Tensor

    def __init__(self, task: Task) -> None:
        """Start with means at zero."""
        super().__init__()
        self.register_buffer("mean_cd", torch.zeros(len(task.classes), task.d_model))

    def forward(self, x_nd: Tensor) -> Tensor:
        """Return as logits [n, class] how near the means are."""
        return -torch.cdist(x_nd, self.mean_cd)


@hookimpl
def saefw_probes() -> list[type[ProbeConfig]]:
    """One: my-probe."""
    return [MyProbe]
