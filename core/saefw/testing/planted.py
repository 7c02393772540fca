"""What is checked of the training of an SAE variant, by the steps that the train stage takes.

Shapes: n tokens, d d_model, a planted directions (atoms).
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from saefw.abreast import Abreast
from saefw.acts import Stats
from saefw.plugin import SaeConfig, Unit
from saefw.sae import Sae
from saefw.testing.contract import equal, expect
from saefw.training import Training

D, ATOMS, N = 32, 48, 20_000
"""Dimensions, planted directions, tokens."""

BATCH, N_STEPS = 512, 500
"""Tokens a step, steps."""

NEAR = 0.95
"""The cosine, as a mean over atoms, from which on they count as found; neither a fresh SAE reaches it nor tokens do."""


class Planted(NamedTuple):
    """Tokens, and what they are made of."""

    atoms_ad: Tensor
    """Of norm 1."""

    x_nd: Tensor
    """Sums of about three atoms, some of them far more frequent than others, each now and then alone."""


@cache
def planted() -> Planted:
    """Make up tokens from atoms that are known, always the same."""
    generator = torch.Generator().manual_seed(7)
    atoms_ad = torch.randn(ATOMS, D, generator=generator)
    atoms_ad /= atoms_ad.norm(dim=1, keepdim=True)
    rate_a = 0.15 * 0.97 ** torch.arange(ATOMS)
    on_na = torch.rand(N, ATOMS, generator=generator) < rate_a
    alone_n = torch.multinomial(rate_a, N // 3, replacement=True, generator=generator)
    on_na[: N // 3] = torch.nn.functional.one_hot(alone_n, ATOMS).bool()
    codes_na = on_na * (1 + torch.rand(N, ATOMS, generator=generator))
    return Planted(atoms_ad, (codes_na @ atoms_ad)[torch.randperm(N, generator=generator)])


def check_planted(config: SaeConfig) -> Sae:
    """Check that a variant finds a dictionary that is known; return what was trained, in eval mode.

    48 directions are planted in tokens of 32 dimensions, about three a token. It trains for 500 steps with 64
    features, `lr: 0.01` and `warmup: 10`; `config` is to set what makes about three features fire on a token.
    """
    (sae,) = trained([config.model_copy(update={"expansion": 2, "d_sae": None, "lr": 0.01, "warmup": 10})])
    cosine = found(sae)
    l0 = float((sae.dense(planted().x_nd[:1000]) > 0).sum(dim=1).float().mean())
    got = f"{cosine:.3f}, with {l0:.1f} features on a token"
    expect("sae.planted", cosine > NEAR, f"a mean cosine above {NEAR}", got)
    return sae


def check_stacked(config: SaeConfig, n_steps: int = 5) -> None:
    """Check that an SAE trained beside one of another seed, with whom it shares memory, is the one trained alone."""
    (alone,) = trained([config], n_steps)
    beside, _ = trained([config, config.model_copy(update={"seed": config.seed + 1})], n_steps)
    for name, x in alone.state_dict().items():
        equal("sae.stacked", beside.state_dict()[name], x, f"{name} after {n_steps} steps")


def trained(configs: list[SaeConfig], n_steps: int = N_STEPS) -> list[Sae]:
    """Return SAEs trained beside each other on the planted tokens, in eval mode."""
    x_nd = planted().x_nd
    mean_d, var_d = x_nd.double().mean(dim=0), x_nd.double().var(dim=0, correction=0)
    stats = Stats(mean_d, var_d, float(var_d.mean().sqrt()), float(mean_d.norm() / var_d.sum().sqrt()), N)
    trainings = [Training(Unit("train", {}, given={"sae": config}), D, stats, n_steps, "cpu") for config in configs]
    z_nd = trainings[0].sae.normalise(x_nd)
    for training in trainings:
        training.sae.prepare(z_nd)
    generator = torch.Generator().manual_seed(1)
    with Abreast(trainings, BATCH) as abreast:
        for _ in range(n_steps):
            abreast.step(trainings, x_nd[torch.randint(N, (BATCH,), generator=generator)], N)
    return [training.sae.eval().requires_grad_(False) for training in trainings]


def found(sae: Sae) -> float:
    """Return the mean over atoms of the largest cosine between the atom and a row of the dictionary."""
    rows_sd = sae.dictionary().detach()
    rows_sd = rows_sd / rows_sd.norm(dim=1, keepdim=True)
    return float((planted().atoms_ad @ rows_sd.T).amax(dim=1).mean())
