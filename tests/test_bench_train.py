"""`saefw bench train` on numbers so small that it takes no time; no time is asserted."""

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest
import torch

from saefw.abreast import Abreast
from saefw.bench import train as module
from saefw.bench.frame import Bench, memory
from saefw_relu import Relu
from saefw_topk import TopK


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "BATCH", 64)
    monkeypatch.setattr(module, "WIDTHS", {16: 4.0, 8: 3.5})
    monkeypatch.setattr(module, "K", 4)
    yield


def test_every_step_has_a_row_beside_the_product(small: None, tmp_path: Path) -> None:
    bench = Bench(None, 1, tmp_path)
    module.bench(bench)
    titles = [title for title, _ in bench.parts]
    assert titles[0] == "A step: d_model 16, d_sae 512, 64 tokens, k 4; of relus 1% active" and len(titles) == 4
    for (_, times), (_, rates), of_members in zip(bench.parts[::2], bench.parts[1::2], (4.0, 3.5), strict=True):
        named = {row.name: row for row in times}
        assert {module.PRODUCT, module.PLAIN, "topk", "topk, 10% dead", "relu", "topk, 4 members"} <= named.keys()
        assert all(row.value > 0 and row.unit == "ms" for row in times)
        members = named["topk, 4 members"]
        assert members.reference == named["topk"].value and members.bound is not None
        assert members.bound.limit == of_members
        assert named["relu"].reference == named[module.PRODUCT].value
        assert rates[0].value == pytest.approx(64_000 / named[module.PRODUCT].value)
        assert rates[-1].unit == ("MB" if memory() is not None else "vectors/s")


@pytest.mark.parametrize("cls", [Relu, TopK])
def test_a_step_that_is_measured_changes_no_weight(cls: type, small: None) -> None:
    x_nd = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    training = module._training(cls, {"k": 4} if cls is TopK else {"aux": 0.1}, x_nd)
    before = {name: x.clone() for name, x in training.sae.state_dict().items()}
    with Abreast((), 64) as abreast:
        for dead in (0.0, 0.1):
            module._step(abreast, cycle([training]), x_nd.half(), dead)()
            assert training.values["train_dead"].item() == pytest.approx(dead, abs=0.002)
            assert training.values["train_l0"].item() == pytest.approx(4 if cls is TopK else 5.1, rel=0.05)
            assert (training.values["train_aux"].item() > 0) == (dead > 0)
    for name, x in training.sae.state_dict().items():
        torch.testing.assert_close(x, before[name], rtol=0, atol=1e-6)
