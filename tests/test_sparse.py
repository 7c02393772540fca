"""The step on active entries, against dense autograd and naive oracles in float64.

Shapes: n tokens, d d_model, s d_sae, e entries.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saefw import largest as of_rows
from saefw import sae as module
from saefw import sparse
from saefw.largest import BLOCK
from saefw.plugin import SaeConfig
from saefw.sae import Batch, Entries, Loss, Sae, largest, largest_of_batch, where
from saefw.sparse import (
    Scratch,
    above,
    chosen,
    decode,
    encode,
    largest_above_zero,
    left_over,
    split,
    stacked,
    turned,
)
from saefw_relu import Relu
from saefw_topk import TopK

N, D, EXPANSION = 11, 5, 4
S = D * EXPANSION


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Entries


@given(st.integers(0, 6), st.integers(1, 9), st.integers(0, 2**30), st.floats(0, 1))
def test_entries_are_those_of_a_mask(n: int, s: int, seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((n, s)) < share
    x = rng.normal(size=(n, s))
    entries = where(torch.from_numpy(mask))
    rows, features = np.nonzero(mask)
    assert entries.starts_r.tolist() == [0, *np.cumsum(mask.sum(axis=1))]
    assert entries.rows().tolist() == rows.tolist() and entries.features_e.tolist() == features.tolist()
    assert entries.of(torch.from_numpy(x)).tolist() == x[mask].tolist()
    np.testing.assert_array_equal(entries.dense(entries.of(torch.from_numpy(x)), s).numpy(), np.where(mask, x, 0))
    by_feature = turned(entries, s)
    features, rows = np.nonzero(mask.T)
    assert by_feature.rows_e.tolist() == by_feature.tokens_e.tolist() == rows.tolist()
    assert entries.features_e[by_feature.order_e].tolist() == features.tolist()
    assert by_feature.starts_s.tolist() == [0, *np.cumsum(mask.sum(axis=0))]


def test_chosen_features_are_entries() -> None:
    indices_nk = torch.tensor([[3, 0], [1, 2], [2, 0]])
    assert chosen(indices_nk).dense(torch.ones(6), 4).tolist() == [[1, 0, 0, 1], [0, 1, 1, 0], [1, 0, 1, 0]]
    kept = chosen(indices_nk, torch.tensor([[True, False], [False, False], [True, True]]))
    assert kept.dense(torch.ones(3), 4).tolist() == [[0, 0, 0, 1], [0] * 4, [1, 0, 1, 0]]
    assert chosen(indices_nk).k == 2 and kept.k is None


def test_rows_are_put_below_each_other_and_split_by_feature() -> None:
    one, two = (
        where(torch.tensor([[1, 0, 1, 1], [0, 1, 0, 1]]) > 0),
        where(torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0]]) > 0),
    )
    both = stacked([split(one, [1, 3, 4]), two], 2)
    assert both.dense(torch.ones(7), 4).tolist() == [
        [1, 0, 0, 0], [0, 0, 0, 0],
        [0, 0, 1, 0], [0, 1, 0, 0],
        [0, 0, 0, 1], [0, 0, 0, 1],
        [0, 0, 1, 0], [1, 0, 0, 0],
    ]  # fmt: skip
    assert split(one, [4]) is one
    # Whatever its row, an entry is of one of the two tokens.
    assert both.of(torch.tensor([[0, 1, 2, 3], [10, 11, 12, 13]])).tolist() == [0, 2, 11, 3, 13, 2, 10]


@pytest.mark.parametrize("s", [7, 2 * BLOCK, 5 * BLOCK, 12 * BLOCK])
@pytest.mark.parametrize("tied", [False, True])
def test_the_largest_are_those_of_a_sort(s: int, tied: bool) -> None:
    for k in (1, 2, 6):
        pre_ns = normal(N, s, seed=k)
        if tied:
            pre_ns = pre_ns.round()
        of_token, of_batch = largest(pre_ns, k), largest_of_batch(pre_ns, k)
        for found in (of_token, of_batch):
            places = zip(found.rows().tolist(), found.features_e.tolist(), strict=True)
            assert len(found.features_e) == len({*places}) == k * N
            assert found.rows().tolist() == sorted(found.rows().tolist())
        assert sorted(of_batch.of(pre_ns).tolist()) == sorted(pre_ns.flatten().tolist())[-k * N :]
        for row, values in zip(pre_ns.tolist(), of_token.of(pre_ns).view(N, k).tolist(), strict=True):
            assert sorted(values) == sorted(row)[-k:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("held", [1, 100, 10**6])
@pytest.mark.parametrize("s", [8 * BLOCK, 8 * BLOCK + 3])
def test_the_largest_are_found_whatever_is_looked_at_at_once(
    s: int, held: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where few are tied, many, or all; a row without numbers still has k."""
    monkeypatch.setattr(of_rows, "HELD", held)
    monkeypatch.setattr(of_rows, "PIECE", held)
    dead, k = torch.tensor([1, 5, 6, 30, 41, 90]), 3
    for scale, shift in ((1e3, 0.0), (1.0, 0.0), (0.0, 0.0), (10.0, -1e3)):
        pre_ns = ((normal(N, s, seed=2) * scale).round() + shift).to(dtype)
        for values, row in zip(largest(pre_ns, k).of(pre_ns).view(N, k).tolist(), pre_ns.tolist(), strict=True):
            assert sorted(values) == sorted(row)[-k:]
        of_batch = largest_of_batch(pre_ns, k)
        assert sorted(of_batch.of(pre_ns).tolist()) == sorted(pre_ns.flatten().tolist())[-k * N :]
        assert len({*zip(of_batch.rows().tolist(), of_batch.features_e.tolist(), strict=True)}) == k * N
        for among in (dead, dead[:k]):
            found, allowed = largest_above_zero(pre_ns[:, among], among, k), set(among.tolist())
            assert found.known_e is not None
            kept_ns = found.dense(torch.ones(len(found.features_e)), pre_ns.shape[1])
            for row, kept, dense in zip(pre_ns, kept_ns, found.dense(found.known_e, s), strict=True):
                assert {*kept.nonzero().flatten().tolist()} <= allowed
                wanted = sorted(x for x in row[among].tolist() if x > 0)[-k:]
                assert sorted(dense[kept > 0].tolist()) == wanted
        for edge in (0.5, torch.linspace(-1, 1, s).to(dtype)):
            over, wanted_at = above(pre_ns, edge), where(pre_ns > edge)
            assert torch.equal(over.starts_r, wanted_at.starts_r)
            assert torch.equal(over.features_e, wanted_at.features_e)
            assert torch.equal(over.of(pre_ns), wanted_at.of(pre_ns))
            # Of another matrix it gives that one's values.
            assert torch.equal(over.of(2 * pre_ns), wanted_at.of(2 * pre_ns))
    pre_ns[3, 7] = torch.nan
    assert len(largest(pre_ns, k).features_e) == N * k
    pre_ns[3] = torch.nan
    assert len(largest(pre_ns, k).features_e) == N * k


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_their_order_does_not_hang_on_what_is_looked_at_at_once(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor so on the number of threads: a sum over them would."""
    pre_ns = normal(64, 12_288, seed=3).to(dtype)
    once, _ = of_rows.largest_of_rows(pre_ns, 256)
    monkeypatch.setattr(of_rows, "PIECE", 10_000)
    assert torch.equal(of_rows.largest_of_rows(pre_ns, 256)[0], once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_zeros_with_few_others(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them reach what is looked from, and are not laid side by side."""
    few_ns = torch.rand(N, 70 * BLOCK, generator=torch.Generator().manual_seed(1)) < 0.01
    pre_ns = normal(N, 70 * BLOCK, seed=4).where(few_ns, 0).relu().to(dtype)

    def refuse(*_: object) -> None:
        raise AssertionError("they are")

    monkeypatch.setattr(of_rows, "side_by_side", refuse)
    values = largest(pre_ns, 32).of(pre_ns).view(N, 32)
    assert torch.equal(values.sort(descending=True).values, pre_ns.topk(32).values)


# Gradients


def ragged() -> Entries:
    """Of many tokens some, of one none."""
    mask_ns = normal(N, S, seed=3) > 0.7
    mask_ns[4] = False
    return where(mask_ns)


def test_gradients_by_entries_are_the_numerical_ones() -> None:
    entries, W_sd = ragged(), normal(S, D).requires_grad_()
    by_feature, codes_e = turned(entries, S), normal(len(entries.features_e), seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda codes, W: decode(codes, W, entries, by_feature), (codes_e, W_sd))
    torch.testing.assert_close(decode(codes_e, W_sd, entries, by_feature), entries.dense(codes_e, S) @ W_sd)

    rows_gnd, x_nd, b_dec = normal(3, N, D).requires_grad_(), normal(N, D, seed=1), normal(D, seed=2).requires_grad_()
    # The tokens come without b_dec: that they hang on it is known to the gradient alone.
    left_gnd = left_over((x_nd - b_dec).detach(), b_dec, rows_gnd)
    plain_gnd = x_nd - b_dec - rows_gnd.cumsum(dim=0)
    torch.testing.assert_close(left_gnd, plain_gnd)
    weights_gnd = normal(3, N, D, seed=3)
    ours = torch.autograd.grad((left_gnd * weights_gnd).sum(), (b_dec, rows_gnd))
    torch.testing.assert_close(ours, torch.autograd.grad((plain_gnd * weights_gnd).sum(), (b_dec, rows_gnd)))

    x_nd, b_dec = normal(N, D, seed=2), normal(D, seed=4).requires_grad_()
    W_enc, b_enc = normal(D, S, seed=5).requires_grad_(), normal(S, seed=6).requires_grad_()

    def pre(W: Tensor, b: Tensor, c: Tensor, at: Entries | None) -> Tensor:
        with torch.no_grad():
            pre_ns = (x_nd - c) @ W + b
        known = pre_ns if at is None else at.of(pre_ns)
        return encode(known, x_nd - c.detach(), W, b, c, None if at is None else by_feature)

    for at in (entries, None):
        assert torch.autograd.gradcheck(lambda W, b, c, at=at: pre(W, b, c, at), (W_enc, b_enc, b_dec))


@pytest.mark.parametrize("at_once", [7, 10**6])
def test_a_device_without_compressed_matrices_gathers(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "GATHERED", at_once)
    entries, x_nd, W_sd = ragged(), normal(N, D), normal(S, D, seed=1)
    given = x_nd, W_sd, entries.starts_r, entries.features_e
    torch.testing.assert_close(sparse._gathered(*given), sparse.dots(*given))
    torch.testing.assert_close(sparse.dots(*given), entries.of(x_nd @ W_sd.T))


class Nested(SaeConfig):
    """TopK that must also rebuild from its first features."""

    use: Literal["nested"] = "nested"

    k: int = 3
    """Features that fire."""

    def build(self, d_model: int) -> "NestedSae":
        return NestedSae(d_model, self.width(d_model), self.k)


class NestedSae(Sae):
    """Each token's k largest; three prefixes."""

    def __init__(self, d_model: int, d_sae: int, k: int) -> None:
        super().__init__(d_model, d_sae)
        self.k = k

    def select(self, pre_ns: Tensor) -> Entries:
        return largest(pre_ns, self.k)

    def prefixes(self) -> Sequence[int]:
        return (self.d_sae // 4, self.d_sae // 2, self.d_sae)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        other = batch.x_nd - batch.rebuild(2 * batch.codes)
        own = batch.per_token(batch.codes * self.b_enc[batch.features])
        return {**super().terms(batch), "other": other.square().mean(), "own": own}


CONFIGS: dict[str, SaeConfig] = {
    "relu": Relu(expansion=EXPANSION, l1=0.1, aux=0.3, unit_norm=False),
    "topk": TopK(expansion=EXPANSION, k=3, aux=0.3),
    "nested": Nested(expansion=EXPANSION, k=7, aux=0.3),
}  # fmt: skip


def rough(config: SaeConfig) -> Any:
    """An SAE in float64 with nothing at zero, at norm one, or tied."""
    sae = config.fresh(D).double()
    with torch.no_grad():
        for i, parameter in enumerate(sae.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=10 + i))
    return sae


def tokens(sae: Sae, kind: str) -> Tensor:
    """Tokens of which some, or all, have tied or negative pre-activations."""
    x_nd = normal(N, D, seed=7)
    with torch.no_grad():
        if kind == "tied":
            for parameter in sae.parameters():
                parameter.round_()
            x_nd = x_nd.round()
        if kind == "negative":
            sae.b_enc.sub_(1e3)
        if kind == "some negative":
            sae.b_enc.sub_(3)
    return x_nd


def gradients(sae: Sae, loss: Loss) -> dict[str, Tensor]:
    sae.zero_grad()
    torch.stack(list(loss.terms.values())).sum().backward()  # type: ignore[no-untyped-call]
    return {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in sae.named_parameters()}


def both_ways(sae: Sae, x_nd: Tensor, dead_s: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Loss, Loss]:
    """The loss by entries, and by plain dense autograd."""
    monkeypatch.setattr(module, "DENSE", 2.0)
    monkeypatch.setattr(module, "PART", 3)
    by_entries = sae.loss(x_nd, dead_s)
    monkeypatch.setattr(Sae, "_found", lambda self, z_nd, dead, n_aux: None)
    dense = sae.loss(x_nd, dead_s)
    monkeypatch.undo()
    return by_entries, dense


@pytest.mark.parametrize("kind", ["plain", "tied", "negative", "some negative"])
@pytest.mark.parametrize("n_dead", [0, 1, 9, S])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_by_entries_is_the_dense_one(name: str, n_dead: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = rough(CONFIGS[name])
    x_nd, dead_s = tokens(sae, kind), torch.arange(S) * 7 % S < n_dead
    by_entries, dense = both_ways(sae, x_nd, dead_s, monkeypatch)
    assert by_entries.terms.keys() == dense.terms.keys() and "aux" in by_entries.terms
    for term in dense.terms:
        torch.testing.assert_close(by_entries.terms[term], dense.terms[term], rtol=1e-12, atol=0, msg=term)
    assert by_entries.fired_s.tolist() == dense.fired_s.tolist()
    assert bool(by_entries.fired_s.any()) == (kind != "negative")
    found, wanted = gradients(sae, by_entries), gradients(sae, dense)
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-11, atol=1e-13, msg=parameter)
        assert bool(gradient.any()) or kind == "negative", f"dense autograd gives {parameter} no gradient"
        # As the parameter lies in memory: torch would copy it otherwise.
        assert found[parameter].stride() == sae.get_parameter(parameter).stride()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_whole_loss_has_its_numerical_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the sum of the terms; AuxK's target, which is fixed, is left out by having no dead feature."""
    sae, x_nd = rough(CONFIGS[name]), normal(N, D, seed=7)
    monkeypatch.setattr(module, "DENSE", 2.0)
    names = ["W_enc", "b_enc", "W_dec", "b_dec"]

    def total(*parameters: Tensor) -> Tensor:
        def loss(x_nd: Tensor) -> Tensor:
            return torch.stack(list(Sae.loss(sae, x_nd, torch.zeros(S, dtype=torch.bool)).terms.values())).sum()

        sae.forward = loss
        found: Tensor = torch.func.functional_call(sae, dict(zip(names, parameters, strict=True)), (x_nd,))
        return found

    # What is rebuilt by other values than the codes teaches the decoder nothing, on purpose.
    if name == "nested":
        monkeypatch.setattr(NestedSae, "terms", Sae.terms)
    given = tuple(sae.get_parameter(name).detach().clone().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(total, given)


def test_very_many_active_features_are_done_densely(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the batch alone, not by what came before."""
    ways: list[str] = []
    for way in ("_sparse", "_dense"):
        original = getattr(Sae, way)

        def noted(self: Sae, *args: Any, way: str = way, original: Any = original) -> Any:
            ways.append(way)
            return original(self, *args)

        monkeypatch.setattr(Sae, way, noted)
    sae, x_nd, none = rough(Relu(expansion=EXPANSION)), normal(200, D), torch.zeros(S, dtype=torch.bool)
    for bias in (0.0, -100.0, 0.0, -9.0):
        with torch.no_grad():
            sae.b_enc.fill_(bias)
            share = (sae.pre(x_nd[: module.PROBED]) > 0).double().mean()
        sae.loss(x_nd, none)
        assert ways[-1] == ("_dense" if share > module.DENSE else "_sparse")
    assert set(ways) == {"_sparse", "_dense"}


@given(st.lists(st.booleans()), st.sampled_from([0.0, 0.01, 0.5, 1.0]), st.integers(0, 400))
def test_where_a_mask_holds(begin: list[bool], share: float, n: int) -> None:
    mask = np.array(begin + (np.random.default_rng(n).random(n) < share).tolist(), dtype=bool)
    found = of_rows.places_of(mask)
    assert found.dtype == np.int64 and found.tolist() == np.flatnonzero(mask).tolist()
    square = mask[: len(mask) // 3 * 3].reshape(3, -1)
    assert of_rows.places_of(square).tolist() == np.flatnonzero(square).tolist()


# Memory and precision


def test_scratch_memory_is_used_again() -> None:
    scratch = Scratch()
    kind: Any = (torch.float32, torch.device("cpu"))
    first = scratch.empty(4, 6, *kind)
    assert first.shape == (4, 6) and scratch.empty(3, 8, *kind).data_ptr() == first.data_ptr()
    assert scratch.empty(4, 7, *kind).shape == (4, 7)
    again = scratch.empty(3, 8, *kind)
    assert scratch.empty(3, 8, *kind) is again
    assert scratch.empty(2, 2, torch.bfloat16, kind[1]).dtype == torch.bfloat16


def test_of_another_product_in_the_same_memory_nothing_is_taken_for_known() -> None:
    sae, z_nd = TopK(k=2, expansion=EXPANSION).fresh(D).double(), normal(N, D, seed=7)
    with torch.no_grad():
        first = sae._product(z_nd, sae.W_enc, sae.b_enc)
        entries = largest(first, 2)
        again = sae._product(-z_nd, sae.W_enc, sae.b_enc)
        assert again.data_ptr() == first.data_ptr()
        assert torch.equal(entries.of(again), entries._replace(source=None).of(again))


@pytest.mark.parametrize("name", CONFIGS)
def test_members_may_share_their_scratch(name: str) -> None:
    x_nd, dead_s = normal(N, D, seed=7).float(), torch.arange(S) < 3
    alone = []
    for i in range(2):
        torch.manual_seed(i)
        sae = CONFIGS[name].fresh(D)
        alone.append(gradients(sae, sae.loss(x_nd, dead_s)))
    shared = Scratch()
    for i in range(2):
        torch.manual_seed(i)
        sae = CONFIGS[name].fresh(D)
        sae.scratch = shared
        found = gradients(sae, sae.loss(x_nd, dead_s))
        assert all(torch.equal(found[key], alone[i][key]) for key in found)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_in_bfloat16_is_nearly_the_same(name: str) -> None:
    x_nd, dead_s = normal(200, 32, seed=7).float(), torch.arange(128) < 5
    found = []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        sae = CONFIGS[name].model_copy(update={"precision": precision}).fresh(32)
        loss = sae.loss(x_nd, dead_s)
        found.append(gradients(sae, loss))
        assert all(term.dtype == torch.float32 for term in loss.terms.values())
    for key, exact in found[0].items():
        near = found[1][key]
        assert near.dtype == torch.float32 and not torch.equal(near, exact)
        assert torch.nn.functional.cosine_similarity(near.flatten(), exact.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_no_tokens_nothing_is_active(dtype: torch.dtype) -> None:
    indices_nk, known_nk = of_rows.largest_of_rows(torch.zeros(0, 64 * BLOCK, dtype=dtype), 3)
    assert indices_nk.shape == known_nk.shape == (0, 3)
    sae = TopK(d_sae=64 * BLOCK, k=4).build(8).eval()
    assert sae(torch.zeros(0, 8)).shape == (0, 8)
