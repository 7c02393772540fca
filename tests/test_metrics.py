"""The metrics against plain numpy in float64, on tokens whose dimensions have means far from zero."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from saefw import metrics, peers
from saefw.metrics import L0, L0P95, Cosine, Dead, Dense, Dense1, ExplainedVariance, L0Median, Nmse, coherence
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
    e, fired = x - x_hat, np.count_nonzero(codes, axis=1)
    q, mean_square = (x**2).sum(axis=1).mean(), (x**2).mean(axis=0).mean()  # as SAELens has them
    return {
        peers.EvSaev: 1 - e.var() / x.var(),
        peers.EvSaelens: 1 - (e**2).sum(axis=1).mean() / (q - mean_square**2),
        peers.EvDictionaryLearning: 1 - e.var(axis=0).sum() / x.var(axis=0).sum(),
        peers.R2Overcomplete: 1 - (e**2).mean() / ((x - x.mean()) ** 2).mean(),
        peers.BiasSaelens: (x_hat**2).sum(axis=1).mean() / (x * x_hat).sum(axis=1).mean(),
        peers.NmseOpenAi: float(np.mean([(d @ d) / (a @ a) for a, d in zip(x, e, strict=True)])),
        peers.FvuMsae: float(np.mean([d.var() / a.var() for a, d in zip(x, e, strict=True)])),
        peers.L2RatioSaelens: float(
            np.mean([np.linalg.norm(b) / np.linalg.norm(a) for a, b in zip(x, x_hat, strict=True)])
        ),
        L0Median: np.quantile(fired, 0.5, method="inverted_cdf"),
        L0P95: np.quantile(fired, 0.95, method="inverted_cdf"),
        Dense1: float((frequency > 0.01).mean()),
        Nmse: nmse,
        ExplainedVariance: 1 - nmse,
        Cosine: float(np.mean(cosine)),
        L0: np.count_nonzero(codes, axis=1).mean(),
        Dead: float((frequency == 0).mean()),
        Dense: float((frequency > 0.1).mean()),
    }


PEERS: list[Any] = [
    peers.EvSaev,
    peers.EvSaelens,
    peers.EvDictionaryLearning,
    peers.R2Overcomplete,
    peers.BiasSaelens,
    peers.NmseOpenAi,
    peers.FvuMsae,
    peers.L2RatioSaelens,
]


@pytest.mark.parametrize("kind", [Nmse, ExplainedVariance, Cosine, L0, L0Median, L0P95, Dead, Dense, Dense1, *PEERS])
@pytest.mark.parametrize("cuts", [[], [1], [7, 50, 51]])
def test_metric_is_that_of_numpy(kind: type[Any], cuts: list[int]) -> None:
    x, x_hat, codes = case()
    expected = naive(x, x_hat, codes)[kind]
    assert 0 < expected < 2 or kind in (L0, L0Median, L0P95, peers.EvSaelens)
    # Differences of large sums: a mean of 50 costs these some digits.
    assert measured(kind(), x, x_hat, codes, cuts) == pytest.approx(expected, rel=1e-7 if kind in PEERS else 1e-9)


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


def test_what_a_constant_error_costs_by_each_formula() -> None:
    """Of the peers, two forgive a wrong bias; and where channels have means of their own, three flatter an SAE."""
    x, _, codes = case()
    mean, shifted = np.broadcast_to(x.mean(axis=0), x.shape).copy(), x + np.float32(10)
    assert measured(ExplainedVariance(), x, shifted, codes, []) < -5
    for forgiving in (peers.EvSaev, peers.EvDictionaryLearning):
        assert measured(forgiving(), x, shifted, codes, []) == pytest.approx(1, abs=1e-6)
    assert measured(ExplainedVariance(), x, mean, codes, []) == pytest.approx(0, abs=1e-6)
    for flattering in (peers.EvSaev, peers.R2Overcomplete):
        assert measured(flattering(), x, mean, codes, []) > 0.9
    assert measured(peers.NmseOpenAi(), x, mean, codes, []) < 0.1


def test_tokens_of_which_a_formula_says_nothing_give_nan() -> None:
    x = np.zeros((3, D), dtype=np.float32)
    for kind in PEERS:
        assert np.isnan(measured(kind(), x, x, np.zeros((3, S)), []))
        assert np.isnan(kind().result())


def test_normalised_units_change_neither_nmse_nor_explained_variance() -> None:
    x, x_hat, codes = case()
    for kind in (Nmse, ExplainedVariance):
        normalised = measured(kind(), (x - x.mean(axis=0)) / 3, (x_hat - x.mean(axis=0)) / 3, codes, [9])
        assert normalised == pytest.approx(measured(kind(), x, x_hat, codes, [9]), rel=1e-5)


@pytest.mark.parametrize("pairs", [1, 50, 10**6])
def test_coherence_is_that_of_all_pairs(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "PAIRS", pairs)
    rows = np.random.default_rng(0).normal(size=(23, 7)) * np.arange(1, 24)[:, None]
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    pairwise = np.abs(unit @ unit.T)[np.triu_indices(23, 1)]
    found = coherence(torch.from_numpy(rows))
    assert found == pytest.approx({"decoder_cos_max": pairwise.max(), "decoder_cos_mean": pairwise.mean()}, rel=1e-5)
    alone = coherence(torch.ones(1, 7))
    assert np.isnan(alone["decoder_cos_max"]) and np.isnan(alone["decoder_cos_mean"])
