"""Sums over a batch: against plain ones in float64, and the same bytes on one thread as on two.

Shapes: n tokens, d d_model, s d_sae, e entries.
"""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saefw import sae as module
from saefw.plugin import SaeConfig
from saefw.sae import at, mean_square
from saefw.sums import PIECE, total
from saefw_gated import Gated
from saefw_jumprelu import JumpRelu
from saefw_relu import Relu

PLAIN: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "total": (total, lambda x: x.sum()),
    "mean_square": (mean_square, lambda x: x.square().mean()),
}


@pytest.mark.parametrize("name", PLAIN)
@settings(deadline=None)
@given(n=st.sampled_from([1, 2, 63, PIECE // 8, 3001]), d=st.integers(1, 9), g=st.integers(1, 3))
def test_it_is_the_plain_sum_with_its_gradient(name: str, n: int, d: int, g: int) -> None:
    ours, plain = PLAIN[name]
    x = torch.randn(g, n, d, generator=torch.Generator().manual_seed(n), dtype=torch.float64, requires_grad=True)
    again = x.detach().clone().requires_grad_()
    found, wanted = ours(x), plain(again)
    assert found.shape == ()
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    (3 * found).backward()  # type: ignore[no-untyped-call]
    (3 * wanted).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-12, atol=1e-12)


def test_of_float32_it_is_as_good_as_torchs() -> None:
    x_nd = torch.randn(5000, 48, generator=torch.Generator().manual_seed(0)) + 3
    for ours, plain in PLAIN.values():
        assert ours(x_nd).item() == pytest.approx(plain(x_nd.double()).item(), rel=3e-7)


@pytest.mark.parametrize("features", [torch.tensor([2, 0, 2, 1, 2]), slice(None), torch.zeros(0, dtype=torch.int64)])
def test_at_is_an_index_with_its_gradient(features: Tensor | slice) -> None:
    x_s, again_s = (torch.tensor([1.0, 2, 4], dtype=torch.float64, requires_grad=True) for _ in range(2))
    found, wanted = at(x_s, features), again_s[features]
    assert torch.equal(found, wanted)
    weights = torch.arange(1, 1 + len(found), dtype=torch.float64)
    (weights * found).sum().backward()  # type: ignore[no-untyped-call]
    (weights * wanted).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(x_s.grad, again_s.grad)


STEP = """
import sys, torch
from saefw.sums import at, mean_square, total
torch.set_num_threads(int(sys.argv[1]))
generator = torch.Generator().manual_seed(0)
x_nd, bias_s = torch.randn(4001, 96, generator=generator), torch.zeros(50, requires_grad=True)
features_e = torch.randint(50, (200_000,), generator=generator)
(at(bias_s, features_e) * torch.randn(200_000, generator=generator)).sum().backward()
print(total(x_nd).item().hex(), mean_square(x_nd).item().hex(), sum(x_nd.mean(dim=0).tolist()).hex())
print([x.hex() for x in bias_s.grad.tolist()])
"""


def test_how_many_threads_there_are_changes_no_bit() -> None:
    """So large that torch's own would differ; in processes of their own, as the tests of a process have one thread."""
    said = {
        subprocess.run([sys.executable, "-c", STEP, n], capture_output=True, text=True, check=True).stdout
        for n in "1234"
    }
    assert len(said) == 1 and len(said.pop().split()) == 53


WHOLE = """
import hashlib, sys, torch
from saefw.acts import Stats
from saefw.catalog import Catalog
from saefw.plugin import Unit
from saefw.training import Training
n_threads, addmm = int(sys.argv[1]), torch.addmm
torch.set_num_threads(n_threads)
def alone(*args, **settings):
    torch.set_num_threads(1)
    found = addmm(*args, **settings)
    torch.set_num_threads(n_threads)
    return found
torch.addmm = alone
x_nd = torch.randn(2048, 96, generator=torch.Generator().manual_seed(0))
for use, cls in sorted(Catalog().lookup("saes").items()):
    config = cls(d_sae=1024, clip=1e-3, **({"k": 24} if "k" in cls.model_fields else {}))
    stats = Stats(torch.zeros(96), torch.ones(96), 1.0, 0.0, 1)
    training = Training(Unit("train", {}, given={"sae": config}), 96, stats, 9, "cpu")
    training.since_s[:200] = 10**9
    with torch.no_grad():
        training.sae.b_enc -= 0 if "k" in cls.model_fields else 2
    for _ in range(3):
        training.advance(x_nd, 10**9)
    told = b"".join(x.numpy().tobytes() for x in training.sae.state_dict().values())
    print(use, hashlib.sha256(told).hexdigest(), float(training.total).hex())
"""


def test_a_whole_step_is_the_same_on_one_thread_as_on_two() -> None:
    """Of every variant, clipped and with dead features, but for the products, which are the libraries'."""
    said = [
        subprocess.run([sys.executable, "-c", WHOLE, n], capture_output=True, text=True, check=True).stdout
        for n in "12"
    ]
    assert len(said[0].splitlines()) >= 7 and said[0] == said[1]


@pytest.mark.parametrize("cls", [Relu, JumpRelu, Gated])
def test_a_large_step_is_the_same_each_time(cls: type[SaeConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """With so many entries that torch sums their gradients on several threads, as each comes."""
    monkeypatch.setattr(module, "DENSE", 1.0)
    x_nd = torch.randn(1024, 24, generator=torch.Generator().manual_seed(0))
    before, found = torch.get_num_threads(), set()
    torch.set_num_threads(3)
    try:
        for _ in range(8):
            torch.manual_seed(0)
            sae = cls(d_sae=128).build(24)
            loss = sae.loss(x_nd, torch.zeros(128, dtype=torch.bool))
            torch.stack(list(loss.terms.values())).sum().backward()  # type: ignore[no-untyped-call]
            found.add(b"".join(p.grad.numpy().tobytes() for p in sae.parameters() if p.grad is not None))
            assert int(loss.fired_s.sum()) > 32768 / 2
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1
