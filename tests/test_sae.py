"""The SAE and its built-in variants, against dense oracles in float64.

Shapes: n tokens, d d_model, s d_sae, k codes a token.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saefw import sae as module
from saefw.errors import UserError
from saefw.plugin import SaeConfig
from saefw.sae import Sae
from saefw_archetypal import Archetypal
from saefw_batchtopk import BatchTopK
from saefw_gated import Gated
from saefw_jumprelu import JumpRelu
from saefw_matryoshka import Matryoshka
from saefw_relu import Relu, ReluSae
from saefw_topk import TopK, TopKSae

N, D, EXPANSION = 9, 5, 3
S = D * EXPANSION

VARIANTS = [
    Relu(expansion=EXPANSION, l1=0.1),
    TopK(expansion=EXPANSION, k=4),
    BatchTopK(expansion=EXPANSION, k=4),
    JumpRelu(expansion=EXPANSION, weight=0.1),
    Gated(expansion=EXPANSION, l1=0.1),
    Matryoshka(expansion=EXPANSION, k=4, prefixes=[0.2, 0.6]),
    Archetypal(expansion=EXPANSION, k=4, candidates=6),
]


def rough(config: SaeConfig, seed: int = 0, d_model: int = D) -> Any:
    """An SAE in float64 with nothing at zero, at norm one, or tied."""
    generator = torch.Generator().manual_seed(seed)
    sae = config.fresh(d_model).double()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for name, buffer in sae.named_buffers():
            if name == "threshold.value":
                buffer.fill_(0.8)
        sae.settle()
        sae.mean.copy_(torch.randn(d_model, generator=generator) * 3)
        sae.scale.fill_(1.7)
    return sae


def tokens(seed: int = 1, n: int = N) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1


def gradients(sae: Sae, total: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*sae.named_parameters(), strict=True)
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, parameters, found, strict=True)}


def assert_same_gradients(sae: Sae, total: Tensor, expected: Tensor) -> None:
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)
    wanted = gradients(sae, expected)
    for name, gradient in gradients(sae, total).items():
        assert wanted[name].abs().max() > 1e-6, f"the oracle gives {name} no gradient: nothing is tested"
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-10, atol=1e-12, msg=name)


# The objectives


@pytest.mark.parametrize("unit_norm", [True, False])
def test_relu_loss_is_that_of_a_dense_oracle(unit_norm: bool) -> None:
    sae, x_nd = rough(Relu(expansion=EXPANSION, l1=0.3, unit_norm=unit_norm)), tokens()
    loss = sae.loss(x_nd, torch.zeros(S, dtype=torch.bool))
    expected = torch.zeros((), dtype=torch.float64)
    for x_d in x_nd:
        code_s = torch.clamp(sae.W_enc.T @ (x_d - sae.b_dec) + sae.b_enc, min=0)
        error_d = x_d - sae.W_dec.T @ code_s - sae.b_dec
        norm_s = torch.ones(S, dtype=torch.float64) if unit_norm else torch.linalg.vector_norm(sae.W_dec, dim=1)
        expected = expected + (error_d @ error_d / D + 0.3 * (code_s * norm_s).sum()) / N
    assert set(loss.terms) == {"mse", "penalty"}
    assert_same_gradients(sae, sum(loss.terms.values()), expected)


def oracle_topk(sae: TopKSae, x_nd: Tensor, dead_s: Tensor) -> Tensor:
    """The loss of TopK with AuxK, token by token, with masks instead of selections."""
    errors, codes = [], []
    for x_d in x_nd:
        pre_s = (x_d - sae.b_dec) @ sae.W_enc + sae.b_enc
        values = pre_s.tolist()

        def largest(k: int, among: list[int], values: list[float] = values) -> Tensor:
            kept = sorted(among, key=lambda i: -values[i])[:k]
            return torch.tensor([float(i in kept and values[i] > 0) for i in range(S)], dtype=torch.float64)

        errors.append(x_d - (pre_s * largest(sae.k, list(range(S)))) @ sae.W_dec - sae.b_dec)
        codes.append(pre_s * largest(sae.k_aux, dead_s.nonzero().flatten().tolist()))
    error_nd, code_ns = torch.stack(errors), torch.stack(codes)
    n_aux = math.ceil(sae.aux_share * len(x_nd))
    target_nd, code_ns = error_nd.detach()[:n_aux], code_ns[:n_aux]
    rest = ((target_nd - code_ns @ sae.W_dec) ** 2).sum()
    variance: Tensor = ((target_nd - target_nd.mean(0)) ** 2).sum()
    return (error_nd**2).sum() / (len(x_nd) * D) + sae.aux * rest / variance


@pytest.mark.parametrize("part", [2, 3, 2048])
@pytest.mark.parametrize("share", [0.25, 0.6, 1.0])
@pytest.mark.parametrize("k_aux", [2, 64])
def test_topk_loss_with_auxk_is_that_of_a_dense_oracle(
    k_aux: int, share: float, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART", part)
    sae, x_nd = rough(TopK(expansion=EXPANSION, k=4, k_aux=k_aux, aux=0.5, aux_share=share)), tokens()
    dead_s = torch.zeros(S, dtype=torch.bool)
    dead_s[[0, 3, 4, 7, 11]] = True
    loss = sae.loss(x_nd, dead_s)
    assert loss.terms["aux"].item() > 0
    assert_same_gradients(sae, sum(loss.terms.values()), oracle_topk(sae, x_nd, dead_s))


def test_auxk_teaches_the_dead_alone() -> None:
    sae, x_nd = rough(TopK(expansion=EXPANSION, k=4)), tokens()
    dead_s = torch.arange(S) % 3 == 0
    found = gradients(sae, sae.loss(x_nd, dead_s).terms["aux"])
    assert (found["W_enc"][:, dead_s] != 0).any() and (found["W_dec"][dead_s] != 0).any()
    assert not found["W_enc"][:, ~dead_s].any()
    assert not found["W_dec"][~dead_s].any()
    assert not found["b_enc"][~dead_s].any()


def test_auxk_of_silent_features_predicts_nothing() -> None:
    """The target is an error, so the decoder bias must not be added to its prediction."""
    sae, x_nd = rough(TopK(expansion=EXPANSION, k=4, aux=1.0, aux_share=1.0)), tokens()
    dead_s = torch.arange(S) < 4
    with torch.no_grad():
        sae.b_enc[dead_s] = -1e6
    error_nd = x_nd - sae.reconstruct(sae.activate(sae.pre(x_nd)))
    aux = sae.loss(x_nd, dead_s).terms["aux"]
    variance = (error_nd - error_nd.mean(dim=0)).square().mean()
    assert aux.item() == pytest.approx((error_nd.square().mean() / variance).item())
    assert not any(gradient.any() for gradient in gradients(sae, aux).values())


def test_auxk_does_not_depend_on_the_scale_of_the_activations() -> None:
    sae, x_nd = rough(TopK(expansion=EXPANSION, k=4)), tokens()
    dead_s = torch.arange(S) % 2 == 0
    with torch.no_grad():
        small = sae.loss(x_nd, dead_s).terms["aux"]
        sae.b_enc *= 10
        sae.b_dec *= 10
        large = sae.loss(10 * x_nd, dead_s).terms["aux"]
    assert large.item() == pytest.approx(small.item(), rel=1e-12)


def test_auxk_of_a_single_token_is_nothing() -> None:
    sae = rough(TopK(expansion=EXPANSION, k=4))
    aux = sae.loss(tokens(n=1), torch.ones(S, dtype=torch.bool)).terms["aux"]
    assert aux.item() == 0
    assert not any(gradient.any() for gradient in gradients(sae, aux).values())


def test_no_term_is_paid_while_none_is_dead() -> None:
    sae = rough(TopK(expansion=EXPANSION, k=4))
    assert sae.loss(tokens(), torch.zeros(S, dtype=torch.bool)).terms["aux"].item() == 0


def test_k_aux_is_a_power_of_two_up_to_half_of_d_model() -> None:
    assert [TopK(expansion=64).fresh(d).k_aux for d in (1, 2, 3, 5, 8, 63, 64, 100)] == [1, 1, 1, 2, 4, 16, 32, 32]
    assert TopK(k_aux=7).fresh(64).k_aux == 7


def test_free_rows_cannot_cheat_the_penalty() -> None:
    """Decoder rows twice as long with codes half as large are the same SAE, so they must cost the same."""
    x_nd, none = tokens(), torch.zeros(S, dtype=torch.bool)
    costs = []
    for unit_norm in (False, True):
        sae = rough(Relu(expansion=EXPANSION, l1=0.3, unit_norm=unit_norm))
        before = {name: term.item() for name, term in sae.loss(x_nd, none).terms.items()}
        with torch.no_grad():
            sae.W_dec *= 2
            sae.W_enc /= 2
            sae.b_enc /= 2
        after = {name: term.item() for name, term in sae.loss(x_nd, none).terms.items()}
        assert after["mse"] == pytest.approx(before["mse"], rel=1e-12)
        costs.append(after["penalty"] / before["penalty"])
    assert costs == pytest.approx([1, 0.5])


@pytest.mark.parametrize("config", VARIANTS, ids=lambda config: config.use)
def test_what_is_below_zero_learns_nothing(config: SaeConfig) -> None:
    sae = rough(config)
    with torch.no_grad():
        sae.b_enc -= 1e3
    loss = sae.loss(tokens(), torch.zeros(S, dtype=torch.bool))
    found = gradients(sae, sum(loss.terms.values(), torch.zeros(())))
    assert not loss.fired_s.any()
    assert found["b_dec"].any()
    assert [name for name, gradient in found.items() if gradient.any()] == ["b_dec"]


# Encoding and decoding


@pytest.mark.parametrize("config", VARIANTS, ids=lambda config: config.use)
def test_sparse_and_dense_codes_are_one(config: SaeConfig) -> None:
    sae, x_nd = rough(config), tokens()
    with torch.no_grad():
        codes, dense_ns = sae.encode(x_nd), sae.dense(x_nd)
        assert codes.indices.dtype == torch.int64 and codes.d_sae == S and dense_ns.shape == (N, S)
        scattered_ns = torch.zeros_like(dense_ns).scatter_add(1, codes.indices, codes.values)
        torch.testing.assert_close(scattered_ns, dense_ns)
        assert (codes.values >= 0).all() and (dense_ns > 0).any()
        fired = sae.loss(sae.normalise(x_nd), torch.zeros(S, dtype=torch.bool)).fired_s
        assert fired.tolist() == (dense_ns > 0).sum(dim=0).tolist()
        expected_nd = (dense_ns @ sae.W_dec + sae.b_dec) * sae.scale + sae.mean
        torch.testing.assert_close(sae.decode(codes), expected_nd)
        torch.testing.assert_close(sae(x_nd), expected_nd)


def test_topk_keeps_the_k_largest_that_are_above_zero() -> None:
    sae = rough(TopK(expansion=EXPANSION, k=3))
    pre = np.random.default_rng(0).normal(size=(50, S)) - 1
    dense = sae.activate(torch.from_numpy(pre)).numpy()
    for row, code in zip(pre, dense, strict=True):
        expected = np.where((row >= np.sort(row)[-3]) & (row > 0), row, 0)
        np.testing.assert_array_equal(code, expected)
    assert {int(n) for n in (dense > 0).sum(axis=1)} == {0, 1, 2, 3}


@pytest.mark.parametrize("config", VARIANTS, ids=lambda config: config.use)
def test_a_token_does_not_depend_on_its_neighbours(config: SaeConfig) -> None:
    sae, x_nd = rough(config).eval(), tokens()
    with torch.no_grad():
        together = sae.dense(x_nd)
        for i in range(N):
            torch.testing.assert_close(sae.dense(x_nd[i : i + 1]), together[i : i + 1])
            torch.testing.assert_close(sae(x_nd[i : i + 1]), sae(x_nd)[i : i + 1])


@pytest.mark.parametrize("config", VARIANTS, ids=lambda config: config.use)
def test_more_axes_are_flattened_by_who_has_them_and_never_wrongly(config: SaeConfig) -> None:
    """Patches of images give the codes of each patch alone; with their axes, or none, they are refused."""
    sae, x_bpd = rough(config).eval(), torch.stack([tokens(), tokens(2), tokens(3)])
    with torch.no_grad():
        dense_bps = sae.dense(x_bpd.flatten(0, 1)).view(3, N, S)
        codes = sae.encode(x_bpd.flatten(0, 1))
        scattered_ns = torch.zeros(3 * N, S, dtype=torch.float64).scatter_add(1, codes.indices, codes.values)
        torch.testing.assert_close(scattered_ns.view(3, N, S), dense_bps)
        for x_pd, dense_ps in zip(x_bpd, dense_bps, strict=True):
            torch.testing.assert_close(sae.dense(x_pd), dense_ps)
        for x in (x_bpd, x_bpd[0, 0], x_bpd.mT):
            for method in (sae.encode, sae.dense, sae):
                with pytest.raises(RuntimeError, match=r"matri|size of tensor"):
                    method(x)


@pytest.mark.parametrize("config", VARIANTS, ids=lambda config: config.use)
def test_no_tokens_are_no_codes(config: SaeConfig) -> None:
    sae = rough(config)
    with torch.no_grad():
        assert sae.encode(torch.zeros(0, D, dtype=torch.float64)).indices.shape[0] == 0
        assert sae(torch.zeros(0, D, dtype=torch.float64)).shape == (0, D)


@pytest.mark.parametrize("config", VARIANTS, ids=lambda config: config.use)
def test_using_an_sae_changes_nothing_in_it(config: SaeConfig) -> None:
    sae = rough(config).eval()
    before, rng = {key: value.clone() for key, value in sae.state_dict().items()}, torch.get_rng_state()
    with torch.no_grad():
        sae(tokens())
        sae.loss(tokens(), torch.ones(S, dtype=torch.bool))
    assert torch.equal(torch.get_rng_state(), rng)
    for key, value in sae.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("config", VARIANTS, ids=lambda config: config.use)
def test_the_units_of_the_activations_do_not_matter(config: SaeConfig) -> None:
    """Activations in other units, with mean and scale in the same, give the same codes."""
    sae, x_nd = rough(config).eval(), tokens()
    with torch.no_grad():
        dense_ns, x_hat_nd = sae.dense(x_nd), sae(x_nd)
        shift_d = torch.arange(D, dtype=torch.float64)
        sae.mean.copy_(100 * sae.mean + shift_d)
        sae.scale.mul_(100)
        torch.testing.assert_close(sae.dense(100 * x_nd + shift_d), dense_ns)
        torch.testing.assert_close(sae(100 * x_nd + shift_d), 100 * x_hat_nd + shift_d)


@pytest.mark.parametrize("config", VARIANTS, ids=lambda config: config.use)
def test_normalisation_can_be_folded_into_the_weights(config: SaeConfig) -> None:
    """What other programs, which know no mean and scale, would have to be given."""
    sae, x_nd = rough(config).eval(), tokens()
    with torch.no_grad():
        dense_ns, x_hat_nd = sae.dense(x_nd), sae(x_nd)
        sae.b_dec.mul_(sae.scale).add_(sae.mean)
        sae.W_dec.mul_(sae.scale)
        sae.W_enc.div_(sae.scale)
        sae.mean.zero_()
        sae.scale.fill_(1)
        torch.testing.assert_close(sae.dense(x_nd), dense_ns)
        torch.testing.assert_close(sae(x_nd), x_hat_nd)


@pytest.mark.parametrize("config", VARIANTS, ids=lambda config: config.use)
def test_a_fresh_sae_is_tied_and_of_norm_one(config: SaeConfig) -> None:
    torch.manual_seed(3)
    sae = config.fresh(8)
    assert set(sae.state_dict()) >= {"W_enc", "b_enc", "W_dec", "b_dec", "mean", "scale"}
    assert sae.W_enc.shape == (8, 24) and sae.W_dec.shape == (24, 8)
    # Archetypal looks for the scale of W_enc.
    scale = sae.W_enc.norm(dim=0).mean() if isinstance(config, Archetypal) else 1
    torch.testing.assert_close(sae.W_enc, scale * sae.W_dec.T)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(24))
    torch.manual_seed(3)
    assert torch.equal(config.fresh(8).W_dec, sae.W_dec)
    assert not torch.equal(config.fresh(8).W_dec, sae.W_dec)


def test_k_must_not_exceed_the_features() -> None:
    with pytest.raises(UserError) as error:
        TopK(k=33, expansion=4).build(8)
    assert str(error.value) == "topk: k is 33, but there are 32 features"
    assert isinstance(TopK(k=32, expansion=4).build(8), TopKSae)


def test_a_code_weighs_as_much_as_its_row_is_long() -> None:
    sae = ReluSae(3, 2, l1=0.5, unit_norm=False)
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]]))
        sae.W_enc.copy_(torch.eye(3, 2))
    x_nd = torch.tensor([[1.0, -1.0, 7.0], [2.0, 3.0, 7.0]])
    penalty = sae.loss(x_nd, torch.zeros(2, dtype=torch.bool)).terms["penalty"]
    assert penalty.item() == pytest.approx(0.5 * ((1 + 2) * 5 + 3 * 2) / 2)
