"""What is found by way of a product in bfloat16 is what a product in float32, and in float64, gives."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saefw import near, sae
from saefw.catalog import Catalog
from saefw.largest import ordered
from saefw.near import ROUNDING, Near, TooMany, rounded
from saefw.sae import Loss
from saefw.sparse import Entries, Scratch, chosen, where
from saefw_topk import TopKSae

VARIANTS = ["topk", "batchtopk", "matryoshka", "archetypal", "relu", "jumprelu", "gated"]


def made(seed: int, n: int, d: int, s: int, spread: float, shift: float) -> tuple[Near, Tensor]:
    """Pre-activations of tokens far from 0, by features of very different norms; and what they are in float64."""
    rng = torch.Generator().manual_seed(seed)
    z_nd = torch.randn(n, d, generator=rng) + shift
    W_enc = torch.randn(s, d, generator=rng).mul(torch.randn(s, 1, generator=rng).mul(spread).exp()).T
    b_enc = torch.randn(s, generator=rng) * spread
    pre = Near(z_nd, W_enc, b_enc, rounded(W_enc, b_enc), Scratch())
    return pre, z_nd.double() @ W_enc.double() + b_enc.double()


DRAWN = given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 9),
    d=st.integers(1, 300),
    s=st.sampled_from([7, 64, 1024, 1040, 2048]),
    spread=st.sampled_from([0.0, 0.3, 2.0]),
    shift=st.sampled_from([0.0, 1.0, 30.0]),
)


@settings(max_examples=60, deadline=None)
@DRAWN
def test_it_is_no_further_off_than_said(seed: int, n: int, d: int, s: int, spread: float, shift: float) -> None:
    pre, exact_ns = made(seed, n, d, s, spread, shift)
    near_ns = pre.product(pre.z_nd.bfloat16()).double()
    assert ((near_ns - exact_ns).abs() <= pre.off_n[:, None] + ROUNDING * near_ns.abs()).all()


@settings(max_examples=60, deadline=None)
@DRAWN
def test_what_is_found_is_exact(seed: int, n: int, d: int, s: int, spread: float, shift: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near, "MANY", 1.0)
        pre, exact_ns = made(seed, n, d, s, spread, shift)
        # What float32 may make of equal numbers.
        close = 1e-5 * (pre.z_nd.abs() @ pre.W_enc.abs() + pre.b_enc.abs()).max().double()
        k = min(3, s)
        kth_n = exact_ns.sort(dim=1, descending=True).values[:, k - 1, None]
        found = pre.largest(k)
        assert len(found.features_e) == k * n
        check(found, exact_ns, kth_n, close)
        edge_s = torch.linspace(-1, 1, s) * float(exact_ns.abs().max())
        for edge in (0.0, 0.5, -0.5, edge_s):
            check(pre.above(edge), exact_ns, torch.as_tensor(edge).double(), close)
        try:
            found = pre.largest_of_batch(k)
        except TooMany:
            return
        assert len(found.features_e) == k * n
        check(found, exact_ns, exact_ns.flatten().sort(descending=True).values[k * n - 1], close)


def check(found: Entries, exact_ns: Tensor, edge: Tensor, close: Tensor) -> None:
    """See that all above the edge are found, none below, each once, and with their values."""
    n, s = exact_ns.shape
    assert found.known_e is not None
    places_e = found.rows().long() * s + found.features_e
    assert len({*places_e.tolist()}) == len(places_e)
    torch.testing.assert_close(found.known_e.double(), exact_ns.flatten()[places_e], rtol=0, atol=float(close))
    found_ns = torch.zeros(n * s, dtype=torch.bool).index_fill(0, places_e, True).view(n, s)
    assert found_ns[exact_ns > edge + close].all()
    assert not found_ns[exact_ns < edge - close].any()


@pytest.mark.parametrize("hot", [1, 300, 5 * 1024, 1 << 30])
def test_in_however_many_pieces_the_same_is_found(hot: int, monkeypatch: pytest.MonkeyPatch) -> None:
    n, s, k = 23, 1024, 5
    monkeypatch.setattr(near, "MANY", 1.0)
    wanted, _ = made(3, n, 40, s, 0.3, 1.0)
    sizes: list[int] = []
    real = Near.product

    def product(self: Near, near_nd: Tensor) -> Tensor:
        sizes.append(len(near_nd))
        return real(self, near_nd)

    ways: dict[str, Callable[[Near], Entries]] = {
        "above": lambda pre: pre.above(3.0),
        "by feature": lambda pre: pre.above(torch.linspace(1, 4, s)),
        "largest": lambda pre: pre.largest(k),
        "of all": lambda pre: pre.largest_of_batch(k),
    }
    for name, find in ways.items():
        whole = find(wanted)
        with monkeypatch.context() as patch:
            patch.setattr(near, "HOT", hot)
            patch.setattr(near, "AT_ONCE", max(1, hot // 3))
            patch.setattr(Near, "product", product)
            sizes.clear()
            pre, _ = made(3, n, 40, s, 0.3, 1.0)
            found = find(pre)
        assert sum(sizes) == n + (n if name == "of all" else 0)
        assert max(sizes[1:] if name == "of all" else sizes) <= max(1, hot * torch.get_num_threads() // s)
        assert torch.equal(found.starts_r, whole.starts_r)
        assert set(zip(found.rows().tolist(), found.features_e.tolist(), strict=True)) == set(
            zip(whole.rows().tolist(), whole.features_e.tolist(), strict=True)
        )
    # Nor does it matter for what may be found, of which there may be too many.
    edge_1s = np.linspace(1, 4, s, dtype=np.float32)[None]
    wanted.off_n *= torch.linspace(0.1, 9, n)
    whole = wanted._candidates(lambda near_ns, off_n: edge_1s)
    with monkeypatch.context() as patch:
        patch.setattr(near, "HOT", hot)
        assert torch.equal(wanted._candidates(lambda near_ns, off_n: edge_1s).features_e, whole.features_e)
    # A W_enc that is read from memory for each is not read for a few tokens.
    monkeypatch.setattr(near, "HOT", 1)
    monkeypatch.setattr(near, "LARGE", 1)
    monkeypatch.setattr(Near, "product", product)
    sizes.clear()
    wanted.above(3.0)
    assert sizes == [n]


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_numbers_that_are_none_are_left_to_float32(broken: float) -> None:
    pre, _ = made(0, 4, 8, 64, 0.0, 0.0)
    pre.off_n[1] = broken
    with pytest.raises(TooMany):
        pre.above(0.0)
    for find in (pre.largest, pre.largest_of_batch):
        with pytest.raises(TooMany):
            find(2)


def test_other_entries_are_known_too() -> None:
    pre, exact_ns = made(0, 4, 8, 64, 0.3, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near, "MANY", 1.0)
        found = pre.largest(4)
    assert found.of(pre) is found.known_e
    others = chosen(found.features_e.long().view(4, 4)[:, ::2])
    torch.testing.assert_close(
        others.of(pre), exact_ns.gather(1, others.features_e.view(4, 2).long()).flatten().float()
    )


def test_a_select_that_says_nothing_gets_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it overrides one that can do with less."""

    class Half(TopKSae):
        def select(self, pre_ns: Tensor) -> Entries:
            assert isinstance(pre_ns, Tensor)
            return where(pre_ns > 0.5)

    monkeypatch.setattr(sae, "has_bfloat16", lambda: True)
    monkeypatch.setattr(sae, "WORTH", 0)
    x_nd, none = torch.randn(9, 8), torch.zeros(64, dtype=torch.bool)
    asked: list[int] = []

    def largest(self: Near, k: int) -> Entries:
        asked.append(k)
        raise TooMany

    monkeypatch.setattr(Near, "largest", largest)
    assert TopKSae(8, 64, 2).loss(x_nd, none).fired_s.any() and asked == [2]
    assert Half(8, 64, 2).loss(x_nd, none).fired_s.any() and asked == [2]


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1))
def test_a_number_a_step_below_at_most(values: list[float]) -> None:
    x = torch.tensor(values)
    floor = torch.from_numpy(ordered(near._floor(x.numpy()))).view(torch.bfloat16).float()
    assert (floor <= x).all()
    one_up = torch.from_numpy(ordered(near._floor(x.numpy()) + np.int16(1))).view(torch.bfloat16).float()
    assert (one_up >= x).all()


def step(config: Any, x_nd: Tensor, dead_s: Tensor) -> tuple[Loss, dict[str, Tensor]]:
    """One step of an SAE of these settings, and its gradients."""
    torch.manual_seed(0)
    made = config.fresh(x_nd.shape[1]).train()
    made.prepare(x_nd)
    with torch.no_grad():
        made.b_enc.normal_(-1.0, 0.1)
    torch.manual_seed(1)
    loss = made.loss(x_nd, dead_s)
    total: Tensor = torch.stack(list(loss.terms.values())).sum()
    total.backward()  # type: ignore[no-untyped-call]
    return loss, {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("many", [1.0, 0.0])
@pytest.mark.parametrize("use", VARIANTS)
def test_a_step_is_that_in_float32(use: str, many: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where so many may be large that float32 is taken after all."""
    variants: Any = Catalog().lookup("saes")
    config = variants[use](d_sae=256)
    x_nd = torch.randn(90, 24, generator=torch.Generator().manual_seed(3))
    dead_s = torch.arange(256) % 5 == 0
    monkeypatch.setattr(sae, "PART", 40)
    monkeypatch.setattr(sae, "DENSE", 2.0)
    monkeypatch.setattr(sae, "has_bfloat16", lambda: False)
    wanted, wanted_gradients = step(config, x_nd, dead_s)
    asked: list[str] = []
    for name in ("above", "largest", "largest_of_batch"):
        original = getattr(Near, name)

        def noted(self: Near, *args: Any, name: str = name, original: Any = original) -> Entries:
            found: Entries = original(self, *args)
            asked.append(name)
            return found

        monkeypatch.setattr(Near, name, noted)
    monkeypatch.setattr(sae, "has_bfloat16", lambda: True)
    monkeypatch.setattr(sae, "WORTH", 0)
    for place in (near, sae):
        monkeypatch.setattr(place, "MANY", many)
    found, gradients = step(config, x_nd, dead_s)
    assert bool(asked) == bool(many)
    assert torch.equal(found.fired_s, wanted.fired_s)
    for name, term in wanted.terms.items():
        torch.testing.assert_close(found.terms[name], term, msg=name)
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
