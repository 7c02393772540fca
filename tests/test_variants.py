"""The built-in SAE variants against oracles in float64, written from the formulas of their papers.

What each variant has to keep, and where it is tested:
- gradients of the whole loss, ties and tokens on which nothing fires included: here, relu and topk in test_sae.py;
- eval mode: no token depends on its batch, nothing changes the state, units of the activations do not matter,
  mean and scale can be folded into the weights: test_sae.py, for every variant;
- rows of norm 1 can be had from any: `test_rows_of_any_length_are_the_same_sae`;
- a threshold learnt in training serves later, after short runs too: `test_a_short_run_ends_with_the_right_l0`;
- who has not fired for long is counted exactly: test_train.py; what fired in a batch: test_sae.py;
- rows keep norm 1, and every variant finds a dictionary that is known: test_planted.py.

Shapes: n tokens, d d_model, s d_sae.
"""

from typing import Any

import pytest
import torch
from test_sae import D, S, assert_same_gradients, gradients, rough, tokens
from torch import Tensor

from saefw.errors import UserError
from saefw.plugin import SaeConfig
from saefw.sae import Threshold
from saefw_archetypal import Archetypal
from saefw_batchtopk import BatchTopK
from saefw_gated import Gated
from saefw_jumprelu import JumpRelu
from saefw_matryoshka import Matryoshka
from saefw_relu import Relu
from saefw_topk import TopK

NONE = torch.zeros(S, dtype=torch.bool)
SOME = torch.arange(S) % 3 == 0


def total(sae: Any, x_nd: Tensor, dead_s: Tensor = NONE) -> Tensor:
    return torch.stack(list(sae.loss(x_nd, dead_s).terms.values())).sum()


def kept_of_batch(pre_ns: Tensor, n_kept: int) -> Tensor:
    """The codes of BatchTopK, by sorting numbers in a list."""
    values = [(value, i, j) for i, row in enumerate(pre_ns.tolist()) for j, value in enumerate(row)]
    mask_ns = torch.zeros_like(pre_ns)
    for value, i, j in sorted(values, reverse=True)[:n_kept]:
        mask_ns[i, j] = float(value > 0)
    return pre_ns * mask_ns


# JumpReLU


def oracle_jumprelu(sae: Any, config: JumpRelu, x_nd: Tensor) -> Tensor:
    """Token by token; what the step would teach a threshold is written as a line through where it stands."""
    loss = torch.zeros((), dtype=torch.float64)
    for x_d in x_nd:
        pre_s, theta_s = (x_d - sae.b_dec) @ sae.W_enc + sae.b_enc, sae.log_threshold.exp()
        above_s = (pre_s > theta_s).double()
        window_s = (((pre_s - theta_s) / config.bandwidth).abs() < 0.5).double()
        moved_s = theta_s - theta_s.detach()
        code_s = pre_s * above_s - (theta_s.detach() / config.bandwidth * window_s) * moved_s
        count_s = above_s - window_s / config.bandwidth * moved_s
        norm_s = torch.linalg.vector_norm(sae.W_dec, dim=1)
        error_d = x_d - sae.W_dec.T @ code_s - sae.b_dec
        penalty_s = count_s if config.penalty == "l0" else torch.tanh(4 * code_s * norm_s)
        below_s = torch.clamp(theta_s - pre_s, min=0) * norm_s
        loss = loss + error_d @ error_d / D + config.weight * penalty_s.sum() + config.pre_act * below_s.sum()
    return loss / len(x_nd)


@pytest.mark.parametrize("pre_act", [0, 0.2])
@pytest.mark.parametrize("penalty", ["l0", "tanh"])
@pytest.mark.parametrize("shift", [0, -12])
def test_jumprelu_loss_is_that_of_a_dense_oracle(penalty: Any, pre_act: float, shift: float) -> None:
    """With many features active, and with so few that the step is a sparse one."""
    config = JumpRelu(expansion=3, penalty=penalty, weight=0.3, bandwidth=1.3, pre_act=pre_act)
    sae, x_nd = rough(config), tokens(n=40)
    with torch.no_grad():
        sae.b_enc += shift
        dense = sae._found(x_nd - sae.b_dec, NONE, 0) is None
    assert dense == (shift == 0 or bool(pre_act))
    assert_same_gradients(sae, total(sae, x_nd), oracle_jumprelu(sae, config, x_nd))


def test_a_threshold_learns_from_what_is_near_it_alone() -> None:
    """Far below, in the lower half of the window, at the threshold, in its upper half, far above; in closed form."""
    sae: Any = JumpRelu(expansion=1, threshold=2.0, bandwidth=0.5).fresh(1).double()
    for pre, fires, near in ((0.1, 0, 0), (1.9, 0, 1), (2.0, 0, 1), (2.1, 1, 1), (5.0, 1, 0)):
        pre_ns = torch.tensor([[pre]], dtype=torch.float64, requires_grad=True)
        code = sae.activate(pre_ns)
        to_pre, to_log = torch.autograd.grad(3 * code.sum(), (pre_ns, sae.log_threshold))
        assert code.item() == pre * fires
        assert to_pre.item() == 3 * fires
        # d threshold / d log_threshold is the threshold.
        assert to_log.item() == pytest.approx(-3 * 2.0 / 0.5 * near * 2.0)


def test_thresholds_follow_the_smoothed_count() -> None:
    """The count's gradient is the derivative of the count averaged over the window, and no token's alone."""
    config = JumpRelu(expansion=1, threshold=1.0, bandwidth=0.8, weight=1.0)
    sae: Any = config.fresh(1).double()
    x_nd = torch.linspace(-3.03, 3, 41, dtype=torch.float64)[:, None] * sae.W_enc.detach().sign()

    def smoothed(log_threshold: float) -> float:
        threshold = torch.tensor(log_threshold, dtype=torch.float64).exp()
        pre_n = (x_nd @ sae.W_enc.detach()).flatten()
        return float(((pre_n - threshold) / config.bandwidth + 0.5).clamp(0, 1).mean())

    (found,) = torch.autograd.grad(sae.loss(x_nd, NONE[:1]).terms["penalty"], sae.log_threshold)
    expected = (smoothed(1e-6) - smoothed(-1e-6)) / 2e-6
    assert found.item() == pytest.approx(expected, rel=1e-6) and found.item() < -0.1


def test_features_are_pulled_up_to_their_thresholds() -> None:
    sae = rough(JumpRelu(expansion=3, pre_act=1.0))
    with torch.no_grad():
        sae.b_enc[SOME] = -1e3
        sae.b_enc[~SOME] = 1e3
    found = gradients(sae, sae.loss(tokens(), NONE).terms["pre_act"])
    norm_s = sae.W_dec.norm(dim=1)
    torch.testing.assert_close(found["b_enc"], torch.where(SOME, -norm_s, 0))
    torch.testing.assert_close(found["log_threshold"], torch.where(SOME, norm_s * sae.log_threshold.exp(), 0))


# Gated


def oracle_gated(sae: Any, l1: float, unit_norm: bool, x_nd: Tensor) -> Tensor:
    """Token by token, with both encoders written out."""
    loss = torch.zeros((), dtype=torch.float64)
    W_gate_sd = sae.W_enc.T
    W_mag_sd = torch.exp(sae.r_mag)[:, None] * W_gate_sd
    norm_s = torch.ones(S, dtype=torch.float64) if unit_norm else torch.linalg.vector_norm(sae.W_dec, dim=1)
    for x_d in x_nd:
        gate_s = W_gate_sd @ (x_d - sae.b_dec) + sae.b_enc
        magnitude_s = torch.clamp(W_mag_sd @ (x_d - sae.b_dec) + sae.b_mag, min=0)
        open_s = torch.clamp(gate_s, min=0)
        error_d = x_d - sae.W_dec.T @ (magnitude_s * (gate_s > 0)) - sae.b_dec
        gate_error_d = x_d - sae.W_dec.detach().T @ open_s - sae.b_dec.detach()
        loss = loss + (error_d @ error_d + gate_error_d @ gate_error_d) / D + l1 * (open_s * norm_s).sum()
    return loss / len(x_nd)


@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("shift", [0, -12])
def test_gated_loss_is_that_of_a_dense_oracle(unit_norm: bool, shift: float) -> None:
    sae, x_nd = rough(Gated(expansion=3, l1=0.3, unit_norm=unit_norm)), tokens(n=40)
    with torch.no_grad():
        sae.b_enc += shift
        sae.b_mag -= 2 * shift
    with torch.no_grad():
        assert (sae._found(x_nd - sae.b_dec, NONE, 0) is None) == (not shift)
    assert_same_gradients(sae, total(sae, x_nd), oracle_gated(sae, 0.3, unit_norm, x_nd))


def test_the_gates_teach_the_decoder_nothing_and_codes_teach_the_gates_nothing() -> None:
    sae, x_nd = rough(Gated(expansion=3)), tokens()
    loss = sae.loss(x_nd, NONE)
    assert not gradients(sae, loss.terms["gate"])["W_dec"].any()
    # The bias of the gates moves no magnitude, so what the codes lack says nothing of it.
    torch.testing.assert_close(
        gradients(sae, sae.loss(x_nd, NONE).terms["mse"])["b_enc"], torch.zeros(S, dtype=torch.float64)
    )


# BatchTopK


def test_batchtopk_loss_is_that_of_a_dense_oracle() -> None:
    sae, x_nd = rough(BatchTopK(expansion=3, k=4)), tokens()
    codes_ns = kept_of_batch((x_nd - sae.b_dec) @ sae.W_enc + sae.b_enc, 4 * len(x_nd))
    counts = {int(n) for n in (codes_ns > 0).sum(dim=1)}
    assert len(counts) > 1, "every token has as many: that would be TopK"
    expected = (x_nd - codes_ns @ sae.W_dec - sae.b_dec).square().mean()
    assert_same_gradients(sae, total(sae, x_nd), expected)


def test_of_equal_ones_no_more_than_asked_for_fire() -> None:
    sae = BatchTopK(expansion=1, k=3).fresh(5)
    codes_ns = sae.activate(torch.tensor([[2.0, 1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0, -1.0]]))
    assert (codes_ns > 0).sum() == 6 and codes_ns.sum() == 7
    assert (sae.activate(torch.ones(4, 5)) > 0).sum() == 12


def test_the_threshold_is_the_average_of_the_smallest_kept() -> None:
    threshold = Threshold(1)
    expected = 0.0
    for n, value in enumerate((3.0, 1.0, 2.0)):
        threshold(torch.tensor([[value, -1.0], [value + 1, 0.5]]))
        expected += 10 / (10 + n) * (value - expected)
        assert threshold.value.item() == pytest.approx(expected)
    assert threshold.n_batches == 3


def test_a_batch_in_which_nothing_fires_teaches_no_threshold() -> None:
    sae = BatchTopK(expansion=1, k=2).fresh(3)
    sae.activate(torch.tensor([[0.5, 1.5, 2.5]]))
    threshold: Any = sae.threshold
    for silent_ns in (torch.full((4, 3), -1.0), torch.zeros(4, 3), torch.zeros(0, 3)):
        codes_ns = sae.activate(silent_ns)
        assert codes_ns.shape == silent_ns.shape and not codes_ns.any()
    assert (threshold.value.item(), threshold.n_batches.item()) == (1.5, 1)
    # Fewer above zero than asked for: all of them fire, and the smallest counts.
    assert sae.activate(torch.tensor([[-1.0, 0.5, -2.0]])).tolist() == [[0, 0.5, 0]]
    assert threshold.value.item() == pytest.approx(1.5 + 10 / 11 * (0.5 - 1.5))


@pytest.mark.parametrize("n_batches", [20, 200])
def test_a_short_run_ends_with_the_right_l0(n_batches: int) -> None:
    """Codes that grow sevenfold while it trains: what counts is their size at the end."""
    sae = BatchTopK(expansion=1, k=4).fresh(32)
    threshold: Any = sae.threshold
    generator = torch.Generator().manual_seed(0)
    for step in range(n_batches):
        size = 1 + 6 * min(1, step / (0.8 * n_batches))
        sae.activate(size * torch.randn(64, 32, generator=generator))
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    sae.eval()
    pre_ns = 7 * torch.randn(500, 32, generator=generator)
    codes_ns = sae.activate(pre_ns)
    assert (codes_ns > 0).sum(dim=1).double().mean().item() == pytest.approx(4, rel=0.1)
    torch.testing.assert_close(codes_ns, torch.cat([sae.activate(row_s[None]) for row_s in pre_ns]))
    torch.testing.assert_close(codes_ns, torch.where(pre_ns > threshold.value, pre_ns, 0))
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


# Matryoshka


def oracle_matryoshka(sae: Any, x_nd: Tensor, codes_ns: Tensor, ends: list[int]) -> Tensor:
    """Every prefix on its own, from the start."""
    losses = [(x_nd - codes_ns[:, :end] @ sae.W_dec[:end] - sae.b_dec).square().mean() for end in ends]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("keep", ["topk", "batchtopk"])
def test_matryoshka_loss_is_that_of_a_dense_oracle(keep: Any) -> None:
    sae, x_nd = rough(Matryoshka(expansion=3, k=4, keep=keep, prefixes=[0.2, 0.6])), tokens()
    pre_ns = (x_nd - sae.b_dec) @ sae.W_enc + sae.b_enc
    if keep == "batchtopk":
        codes_ns = kept_of_batch(pre_ns, 4 * len(x_nd))
    else:
        codes_ns = torch.cat([kept_of_batch(row_s[None], 4) for row_s in pre_ns])
    assert_same_gradients(sae, total(sae, x_nd), oracle_matryoshka(sae, x_nd, codes_ns, [3, 9, 15]))


@pytest.mark.parametrize(("keep", "plain"), [("topk", TopK), ("batchtopk", BatchTopK)])
def test_the_whole_alone_is_the_plain_variant(keep: Any, plain: Any) -> None:
    one, other = rough(Matryoshka(expansion=3, k=4, keep=keep, prefixes=[])), rough(plain(expansion=3, k=4))
    found, wanted = gradients(one, total(one, tokens(), SOME)), gradients(other, total(other, tokens(), SOME))
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-10, atol=1e-12)
    assert total(one, tokens(), SOME).item() == pytest.approx(total(other, tokens(), SOME).item(), rel=1e-12)


def test_prefixes_are_drawn_anew_from_the_seeded_generator() -> None:
    sae, x_nd = rough(Matryoshka(expansion=3, k=4, keep="topk", prefixes=[0.2, 0.6], sampled=True)), tokens()
    codes_ns = sae.activate(sae.pre(x_nd))
    losses, seen = [], set()
    for seed in range(20):
        torch.manual_seed(seed)
        losses.append(total(sae, x_nd).item())
        torch.manual_seed(seed)
        assert total(sae, x_nd).item() == losses[-1]
        torch.manual_seed(seed)
        ends = sorted((torch.randperm(S - 1)[:2] + 1).tolist())
        seen.add(tuple(ends))
        assert losses[-1] == pytest.approx(oracle_matryoshka(sae, x_nd, codes_ns, [*ends, S]).item(), rel=1e-12)
    assert len(seen) > 15 and all(0 < first < second < S for first, second in seen)


@pytest.mark.parametrize(
    ("prefixes", "ends"), [([0.5, 0.25], [8, 4]), ([0.5, 0.51], [8, 8]), ([0.01, 0.5], [0, 8]), ([0.5, 0.999], [8, 16])]
)
def test_prefixes_have_to_grow(prefixes: list[float], ends: list[int]) -> None:
    with pytest.raises(UserError) as error:
        Matryoshka(prefixes=prefixes, expansion=2, k=1).fresh(8)
    assert str(error.value) == (
        f"matryoshka: prefixes {prefixes} of 16 features end at {ends}; each must be larger than the one before, "
        f"hold a feature and leave one"
    )


# Archetypal


def test_archetypal_loss_is_that_of_a_dense_oracle() -> None:
    sae, x_nd = rough(Archetypal(expansion=3, k=4, candidates=6, delta=0.5)), tokens()
    rows_sd = torch.stack(
        [sum((sae.mix[i, j] * sae.points[j] for j in range(6)), torch.zeros(D)) + sae.relax[i] for i in range(S)]
    )
    rows_sd = torch.stack([row_d / torch.sqrt(row_d @ row_d) for row_d in rows_sd])
    pre_ns = (x_nd - sae.b_dec) @ sae.W_enc + sae.b_enc
    codes_ns = torch.cat([kept_of_batch(row_s[None], 4) for row_s in pre_ns])
    expected = (x_nd - codes_ns @ rows_sd - sae.b_dec).square().mean()
    assert_same_gradients(sae, total(sae, x_nd), expected)


@pytest.mark.parametrize("unit_norm", [True, False])
def test_rows_stay_near_mixtures_of_tokens(unit_norm: bool) -> None:
    """After steps much too large, W_dec is what convex weights and a bounded rest make of real tokens."""
    torch.manual_seed(0)
    sae: Any = Archetypal(expansion=3, k=4, candidates=20, delta=0.5, unit_norm=unit_norm).fresh(D)
    x_nd = tokens(n=50).float()
    sae.prepare(x_nd)
    assert torch.equal(sae.points, x_nd[:20])
    # Tied, on the scale that rebuilds the tokens best.
    scale_s = (sae.W_enc.T * sae.W_dec).sum(dim=1)
    torch.testing.assert_close(scale_s, scale_s[:1].expand(S))
    rebuilt_nd = sae(x_nd).detach()
    errors = [float((x_nd - scale * rebuilt_nd).square().sum()) for scale in (0.99, 1, 1.01)]
    assert errors[1] == min(errors)
    optimiser = torch.optim.Adam(sae.parameters(), lr=0.3)
    for _ in range(20):
        optimiser.zero_grad()
        total(sae, x_nd).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        sae.settle()
        assert (sae.mix >= 0).all()
        torch.testing.assert_close(sae.mix.sum(dim=1), torch.ones(S))
        assert (sae.relax.norm(dim=1) <= 0.5 + 1e-6).all() and (sae.relax.norm(dim=1) > 0.4).any()
    rows_sd = sae.mix @ x_nd[:20] + sae.relax
    if unit_norm:
        rows_sd = rows_sd / rows_sd.norm(dim=1, keepdim=True)
    torch.testing.assert_close(sae.W_dec, rows_sd.detach())


def test_a_short_sample_is_taken_again_from_its_start() -> None:
    sae: Any = Archetypal(expansion=3, k=4, candidates=5).fresh(D)
    x_nd = tokens(n=2).float()
    sae.prepare(x_nd)
    assert torch.equal(sae.points, x_nd[[0, 1, 0, 1, 0]])


def test_a_mixture_of_nothing_becomes_one_of_everything() -> None:
    sae: Any = Archetypal(expansion=3, k=4, candidates=5).fresh(D)
    with torch.no_grad():
        sae.mix[2] = -1
    sae.settle()
    torch.testing.assert_close(sae.mix[2], torch.full((5,), 0.2))


# All


@pytest.mark.parametrize("cls", [BatchTopK, Matryoshka, Archetypal], ids=lambda cls: cls.__name__)
def test_k_must_not_exceed_the_features(cls: Any) -> None:
    config = cls(k=33, expansion=4)
    with pytest.raises(UserError) as error:
        config.fresh(8)
    assert str(error.value) == f"{config.use}: k is 33, but there are 32 features"


@pytest.mark.parametrize(
    "config",
    [
        Relu(expansion=3, l1=0.3, unit_norm=False),
        JumpRelu(expansion=3, weight=0.3, unit_norm=False),
        JumpRelu(expansion=3, weight=0.3, penalty="tanh", pre_act=0.1, unit_norm=False),
        Gated(expansion=3, l1=0.3, unit_norm=False),
    ],
    ids=["relu", "jumprelu-l0", "jumprelu-tanh", "gated"],
)
def test_rows_of_any_length_are_the_same_sae(config: SaeConfig) -> None:
    """Rows brought to norm 1, with codes, biases and thresholds longer by it: same reconstruction, same loss."""
    sae, x_nd = rough(config), tokens()
    before = {name: term.item() for name, term in sae.loss(x_nd, SOME).terms.items()}
    x_hat_nd = sae(x_nd)
    with torch.no_grad():
        norm_s = sae.W_dec.norm(dim=1)
        sae.W_dec /= norm_s[:, None]
        for name in ("W_enc", "b_enc", "b_mag"):
            if hasattr(sae, name):
                getattr(sae, name).mul_(norm_s)
        if hasattr(sae, "log_threshold"):
            sae.log_threshold += norm_s.log()
    torch.testing.assert_close(sae(x_nd), x_hat_nd)
    assert {name: term.item() for name, term in sae.loss(x_nd, SOME).terms.items()} == pytest.approx(before)
