"""What is checked of a metric.

Shapes: n tokens, d d_model, k codes a token.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch

from saefw.plugin import Codes, Metric
from saefw.testing.contract import expect


def check_metric(metric: Callable[[], Metric]) -> None:
    """Check a metric: a number that does not depend on how the tokens were cut into batches."""
    generator = torch.Generator().manual_seed(0)
    x_nd = torch.randn(60, 8, generator=generator)
    x_hat_nd = x_nd + 0.3 * torch.randn(60, 8, generator=generator)
    indices_nk = torch.stack([torch.randperm(12, generator=generator)[:3] for _ in range(60)])
    values_nk = torch.rand(60, 3, generator=generator)
    found = []
    for cuts in ([0, 60], [0, 1, 30, 60]):
        one = metric()
        for start, stop in pairwise(cuts):
            one.add(x_nd[start:stop], x_hat_nd[start:stop], Codes(indices_nk[start:stop], values_nk[start:stop], 12))
        found.append(one.result())
        expect("metric.number", isinstance(found[-1], float), "a float", repr(found[-1]))
    near = bool(np.isclose(found[0], found[1], rtol=1e-6, equal_nan=True))
    expect("metric.cuts", near, found[0], found[1])
