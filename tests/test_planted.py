"""Every variant finds a dictionary that is known.

Tokens are sums of a few of 48 directions in 32 dimensions, some of them far more frequent than others, and each now
and then alone. A trained SAE of 64 features has a row near each direction.

Shapes: n tokens, d d_model, a planted directions (atoms).
"""

import pytest
import torch

from saefw.plugin import SaeConfig
from saefw.testing import check_planted
from saefw.testing.planted import ATOMS, found, planted, trained
from saefw_archetypal import Archetypal
from saefw_batchtopk import BatchTopK
from saefw_gated import Gated
from saefw_jumprelu import JumpRelu
from saefw_matryoshka import Matryoshka
from saefw_relu import Relu
from saefw_topk import TopK

K = 3
"""About how many atoms a token has."""

SHARED = {"expansion": 2, "lr": 0.01, "warmup": 10}


@pytest.mark.parametrize(
    ("config", "low", "high"),
    [
        (Relu(l1=0.04, **SHARED), 2, 6),
        (TopK(k=K, **SHARED), 2.7, K),
        (BatchTopK(k=K, **SHARED), 2.7, 3.3),
        (JumpRelu(weight=0.02, **SHARED), 2, 4),
        (JumpRelu(weight=0.02, penalty="tanh", pre_act=1e-4, **SHARED), 2, 4),
        (Gated(l1=0.08, **SHARED), 2, 5),
        (Matryoshka(k=K, prefixes=[0.5, 0.75], **SHARED), 2.7, 3.3),
        (Matryoshka(k=K, prefixes=[0.5], sampled=True, **SHARED), 2.7, 3.3),
        (Matryoshka(k=K, prefixes=[0.5, 0.75], keep="topk", **SHARED), 2.7, K),
        (Archetypal(k=K, candidates=512, **SHARED), 2.7, K),
        (Archetypal(k=K, candidates=512, delta=0, **SHARED), 2.7, K),
    ],
    ids=lambda value: value.content()["use"] if isinstance(value, SaeConfig) else "",
)
def test_every_variant_finds_the_planted_dictionary(config: SaeConfig, low: float, high: float) -> None:
    sae = check_planted(config)
    l0 = float((sae.encode(planted().x_nd[:2000]).values > 0).sum(dim=1).double().mean())
    assert low <= l0 <= high
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(sae.d_sae))


def test_it_has_to_be_found() -> None:
    """Neither a fresh SAE, nor tokens themselves as its rows, are near the atoms."""
    assert found(trained([TopK(k=K, **SHARED)], n_steps=0)[0]) < 0.6
    assert found(trained([Archetypal(k=K, candidates=512, delta=0, **SHARED)], n_steps=0)[0]) < 0.9


def test_the_first_features_of_a_matryoshka_are_the_frequent_ones() -> None:
    (sae,) = trained([Matryoshka(k=K, prefixes=[0.5, 0.75], **SHARED)])
    nearest_a = (planted().atoms_ad @ sae.W_dec.T).argmax(dim=1)
    inside_a = (nearest_a < sae.d_sae // 2).double()
    assert inside_a[: ATOMS // 2].mean() > 0.8 > 0.4 > inside_a[-ATOMS // 4 :].mean()
