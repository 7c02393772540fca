"""How the weights of an SAE start, where its settings ask for more than it draws itself.

Shapes: n tokens, d d_model, s d_sae.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from saefw.chance import seeded
from saefw.plugin import SaeConfig
from saefw.sae import Sae

SAMPLE = 1 << 16
"""Training tokens, at most, that a start may look at."""

BLEND = 0.8
"""Share of the token's direction in a decoder row that starts near one; the rest is a random direction."""

CLOSE = 1e-10
"""The geometric median is found when a step moves it by less than this share of the tokens' spread."""


@torch.no_grad()
def start(sae: Sae, config: SaeConfig, tokens: Callable[[], Tensor]) -> None:
    """Start W_enc, W_dec and b_dec as `init` and `b_dec` say; whatever the device, they are drawn on the CPU.

    Args:
        sae: as its variant built it, with the mean and the scale of the training tokens.
        config: its settings.
        tokens: gives normalised training tokens [n, d]; called only if they are needed.

    """
    if config.b_dec == "median":
        sae.b_dec.copy_(geometric_median(tokens()))
    elif config.b_dec == "zero":
        sae.b_dec.copy_(sae.normalise(torch.zeros_like(sae.b_dec)))
    with seeded(config.seed, -1):
        if config.init == "kaiming":
            sae.W_enc.copy_(nn.init.kaiming_uniform_(torch.empty(sae.d_sae, sae.d_model)).T)
            rows_sd = nn.init.kaiming_uniform_(torch.empty(sae.d_sae, sae.d_model))
            sae.W_dec.copy_(normalize(rows_sd, dim=1) if config.unit_norm else rows_sd)
        elif config.init == "data":
            rows_sd = rows_near(tokens() - sae.b_dec.cpu(), sae.d_sae)
            sae.W_dec.copy_(rows_sd)
            sae.W_enc.copy_(rows_sd.T)


def rows_near(x_nd: Tensor, d_sae: int) -> Tensor:
    """Return rows of norm 1 [s, d]: directions of tokens drawn without repetition, as far as they reach, blended."""
    order_n = torch.randperm(len(x_nd))
    chosen_s = order_n.repeat(-(-d_sae // len(x_nd)))[:d_sae]
    random_sd = normalize(torch.randn(d_sae, x_nd.shape[1]), dim=1)
    return normalize(BLEND * normalize(x_nd[chosen_s], dim=1) + (1 - BLEND) * random_sd, dim=1)


def geometric_median(x_nd: Tensor) -> Tensor:
    """Return the point [d] whose summed distance to all tokens is smallest, in float64.

    Weiszfeld's iteration as Vardi & Zhang 2000 mend it, so that it also ends where it comes upon a token.
    """
    x_nd = x_nd.double()
    median_d = x_nd.mean(dim=0)
    spread = float((x_nd - median_d).norm(dim=1).mean())
    for _ in range(1000):
        distance_n = (x_nd - median_d).norm(dim=1)
        apart_n = distance_n > CLOSE * spread
        n_here = int((~apart_n).sum())
        weight_n = torch.where(apart_n, 1 / distance_n.clamp_min(torch.finfo(torch.float64).tiny), 0)
        if not bool(weight_n.any()):
            break
        pull_d = weight_n @ (x_nd - median_d)
        # Tokens at this very place hold it with a force of up to 1 each.
        held = min(1.0, n_here / max(float(pull_d.norm()), torch.finfo(torch.float64).tiny))
        step_d = (1 - held) * pull_d / weight_n.sum()
        median_d = median_d + step_d
        if float(step_d.norm()) <= CLOSE * spread:
            break
    return median_d
