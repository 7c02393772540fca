"""The metrics against plain numpy in float64, on tokens whose dimensions have means far from zero."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from saefw.metrics import L0, Cosine, Dead, Dense, ExplainedVariance, Nmse
from saefw.plugin import Codes, Metric

N, D, S, K = 101, 6, 20, 4


def case(seed: int = 0) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Tokens, reconstructions and dense codes; features 0 to 3 never fire, 4 nearly always."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N, D)) * rng.uniform(0.1, 3, D) + rng.normal(size=D) * 50
    codes = np.zeros((N, S))
    for row in codes:
        row[rng.choice(np.arange(5, S), rng.integers(0, K), replace=False)] = rng.uniform(0.1, 2)
    codes[10:, 4] = 1
    return x.astype(np.float32), (x + rng.normal(size=(N, D)) * 0.5 + 0.2).astype(np.float32), codes


def measured(metric: Metric, x: NDArray[Any], x_hat: NDArray[Any], codes: NDArray[Any], cuts: list[int]) -> float:
    """Feed a metric batch by batch."""
    for part in np.split(np.arange(len(x)), cuts):
        top = torch.from_numpy(codes[part]).topk(K, dim=1)
        sparse = Codes(top.indices, top.values, S)
        metric.add(torch.from_numpy(x[part]), torch.from_numpy(x_hat[part]), sparse)
    return metric.result()


def naive(x: NDArray[Any], x_hat: NDArray[Any], codes: NDArray[Any]) -> dict[type[Any], float]:
    x, x_hat = x.astype(np.float64), x_hat.astype(np.float64)
    nmse = ((x - x_hat) ** 2).sum() / ((x - x.mean(axis=0)) ** 2).sum()
    frequency = (codes > 0).mean(axis=0)
    cosine = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(x, x_hat, strict=True)]
    return {
        Nmse: nmse,
        ExplainedVariance: 1 - nmse,
        Cosine: float(np.mean(cosine)),
        L0: np.count_nonzero(codes, axis=1).mean(),
        Dead: float((frequency == 0).mean()),
        Dense: float((frequency > 0.1).mean()),
    }


@pytest.mark.parametrize("kind", [Nmse, ExplainedVariance, Cosine, L0, Dead, Dense])
@pytest.mark.parametrize("cuts", [[], [1], [7, 50, 51]])
def test_metric_is_that_of_numpy(kind: type[Any], cuts: list[int]) -> None:
    x, x_hat, codes = case()
    expected = naive(x, x_hat, codes)[kind]
    assert 0 < expected and (expected < 1 or kind is L0)
    assert measured(kind(), x, x_hat, codes, cuts) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", [Nmse, Cosine, L0, Dead, Dense])
def test_metric_does_not_depend_on_the_scale(kind: type[Any]) -> None:
    x, x_hat, codes = case()
    assert measured(kind(), x * 64, x_hat * 64, codes, [13]) == pytest.approx(
        measured(kind(), x, x_hat, codes, [13]), rel=1e-9
    )


def test_the_mean_alone_has_nmse_one_and_perfection_zero() -> None:
    x, _, codes = case()
    mean = np.broadcast_to(x.astype(np.float64).mean(axis=0), x.shape).copy()
    assert measured(Nmse(), x, mean, codes, [5]) == pytest.approx(1, rel=1e-9)
    assert measured(Nmse(), x, x, codes, [5]) == 0
    assert measured(ExplainedVariance(), x, x, codes, [5]) == 1


def test_a_constant_error_is_an_error() -> None:
    """Formulae that take the variance of the error forgive a wrong bias; this one must not."""
    x, _, codes = case()
    shifted = x + np.float32(10)
    assert measured(Nmse(), x, shifted, codes, []) > 5


def test_a_feature_is_dense_above_a_tenth_not_at_it() -> None:
    codes = np.zeros((100, S))
    codes[:10, 0] = 1
    codes[:11, 1] = 1
    x = np.zeros((100, D), dtype=np.float32)
    assert measured(Dense(), x, x, codes, [30]) == 1 / S
    assert measured(Dead(), x, x, codes, [30]) == (S - 2) / S


def test_equal_tokens_have_no_nmse() -> None:
    x = np.full((5, D), 3.0, dtype=np.float32)
    assert np.isnan(measured(Nmse(), x, x, np.zeros((5, S)), []))
