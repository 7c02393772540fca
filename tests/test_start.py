"""How weights start, against plain oracles; and the settings that say so."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.optimize import minimize
from torch import Tensor

from saefw.plugin import SaeConfig
from saefw.sae import Codes, Sae
from saefw.start import BLEND, geometric_median, rows_near, start
from saefw_relu import Relu
from saefw_topk import TopK


def tokens(n: int = 200, d: int = 5) -> Tensor:
    """Skewed tokens, whose mean is far from their median."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0)).exp() + 3


def never() -> Tensor:
    raise AssertionError("no tokens are needed")


def started(config: SaeConfig, given: Callable[[], Tensor], d_model: int = 5) -> Sae:
    sae = config.build(d_model)
    start(sae, config, given)
    return sae


def test_the_geometric_median_is_that_of_a_general_minimiser() -> None:
    x = tokens().double().numpy()
    found = geometric_median(tokens()).numpy()
    wanted = minimize(lambda at: np.linalg.norm(x - at, axis=1).sum(), x.mean(axis=0), tol=1e-12).x
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.linalg.norm(found - x.mean(axis=0)) > 0.1


@pytest.mark.parametrize(
    ("points", "median"),
    [
        ([[0.0], [0.0], [0.0], [9.0], [-1.0]], [0.0]),  # on a token that stands for many
        ([[1.0], [2.0], [7.0]], [2.0]),  # in one dimension it is the median
        ([[4.0, 4.0]], [4.0, 4.0]),
        ([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]], [1.0, 1.0]),
        ([[-3.0], [0.0], [3.0]], [0.0]),  # the mean, where it begins, is a token
    ],
)
def test_the_geometric_median_may_be_a_token(points: list[list[float]], median: list[float]) -> None:
    np.testing.assert_allclose(geometric_median(torch.tensor(points)).numpy(), median, atol=1e-6)


def test_by_default_weights_stay_as_the_variant_drew_them() -> None:
    torch.manual_seed(1)
    sae = TopK(k=4).build(5)
    before = {name: x.clone() for name, x in sae.state_dict().items()}
    start(sae, TopK(k=4), never)
    assert all(torch.equal(before[name], x) for name, x in sae.state_dict().items())
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(80))
    assert torch.equal(sae.W_enc, sae.W_dec.T) and not sae.b_dec.any()


def test_kaiming_draws_apart() -> None:
    sae = started(Relu(init="kaiming", unit_norm=False, d_sae=400), never)
    bound = (6 / 5) ** 0.5
    for weight in (sae.W_enc, sae.W_dec):
        assert bound * 0.98 < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert abs(np.corrcoef(sae.W_enc.T.detach().flatten(), sae.W_dec.detach().flatten())[0, 1]) < 0.1
    normed = started(Relu(init="kaiming", d_sae=400), never)
    torch.testing.assert_close(normed.W_dec.norm(dim=1), torch.ones(400))


def test_rows_from_data_lie_near_tokens_that_are_each_taken_once() -> None:
    x_nd = tokens(300, 40) - 4
    sae = started(TopK(init="data", d_sae=150, k=4), lambda: x_nd, 40)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(150))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    cos_sn = sae.W_dec.detach() @ torch.nn.functional.normalize(x_nd, dim=1).T
    nearest_s = cos_sn.argmax(dim=1)
    assert len(set(nearest_s.tolist())) == 150
    # cos of b u + (1 - b) v with u, for orthogonal unit vectors, up to chance
    expected = BLEND / (BLEND**2 + (1 - BLEND) ** 2) ** 0.5
    assert cos_sn.amax(dim=1).mean().item() == pytest.approx(expected, abs=0.02)


def test_more_rows_than_tokens_repeat_them() -> None:
    rows_sd = rows_near(tokens(7) - 4, 20)
    assert rows_sd.shape == (20, 5) and len(set(map(tuple, rows_sd.tolist()))) == 20


def test_b_dec_may_start_at_the_median() -> None:
    config = TopK(b_dec="median", init="data", k=4)
    sae = started(config, tokens)
    torch.testing.assert_close(sae.b_dec.detach(), geometric_median(tokens()).float())


def test_b_dec_may_start_at_the_zero_of_the_recorded_activations() -> None:
    config = TopK(b_dec="zero", k=4)
    sae = config.build(5)
    sae.mean.copy_(tokens().mean(dim=0))
    sae.scale.fill_(1.7)
    start(sae, config, never)
    silent = sae.decode(Codes(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1), sae.d_sae))
    torch.testing.assert_close(silent, torch.zeros(1, 5), atol=1e-6, rtol=0)
    assert sae.b_dec.abs().min() > 0.1


@pytest.mark.parametrize("init", ["kaiming", "data"])
def test_each_seed_draws_its_own_and_the_same_again(init: Any) -> None:
    drawn = [started(TopK(init=init, k=4, seed=seed), tokens).W_dec.detach() for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


# Settings


def test_the_size_is_said_by_one_setting() -> None:
    assert Relu().width(8) == 128 and Relu(expansion=2).width(8) == 16 and Relu(d_sae=100).width(8) == 100
    assert Relu(d_sae=100).content()["expansion"] is None and Relu(expansion=2).content()["d_sae"] is None
    assert Relu.model_validate(Relu(d_sae=100).model_dump()) == Relu(d_sae=100)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"expansion": 4, "d_sae": 64}, "set expansion or d_sae, not both (got 4 and 64)"),
        ({"expansion": None}, "set expansion or d_sae (both are null)"),
    ],
)
def test_two_sizes_or_none_are_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as error:
        Relu(**given)
    assert [detail["msg"] for detail in error.value.errors()] == [f"Value error, {told}"]
