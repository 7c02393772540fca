"""Steps of several SAEs at once: each is what it would be alone, and a stop leaves none in the middle of one."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import test_train as of_train
import torch
from torch import Tensor

from saefw import abreast as module
from saefw.abreast import Abreast
from saefw.errors import UserError
from saefw.plugin import SaeConfig
from saefw.sae import Sae
from saefw.sparse import Scratch
from saefw.training import Training
from saefw_batchtopk import BatchTopK
from saefw_gated import Gated
from saefw_jumprelu import JumpRelu
from saefw_matryoshka import Matryoshka, MatryoshkaSae
from saefw_relu import Relu
from saefw_topk import TopK

store = of_train.store
CONFIGS: dict[str, SaeConfig] = {
    "topk": TopK(expansion=3, k=3, warmup=3), "other": TopK(expansion=3, k=3, warmup=3, seed=1),
    "batchtopk": BatchTopK(expansion=2, k=3), "relu": Relu(expansion=2, l1=0.02), "gated": Gated(expansion=2),
    "jumprelu": JumpRelu(expansion=2), "noisy": of_train.Noisy(expansion=2),
    "sampled": Matryoshka(expansion=2, k=3, prefixes=[0.5], sampled=True),
}  # fmt: skip


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take even the smallest two at a time, as on a machine of two cores."""
    monkeypatch.setattr(module, "MANY", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def trainings(*configs: SaeConfig) -> list[Training]:
    return [of_train.training(config) for config in configs]


def x_nd(seed: int = 0) -> Tensor:
    return torch.randn(50, 6, generator=torch.Generator().manual_seed(seed)).half()


def test_each_is_what_it_would_be_alone(at_once: None, store: Path, tmp_path: Path) -> None:
    """To the byte, whoever trains beside it, also beside those whose steps draw and so wait their turn."""
    together = of_train.fresh(tmp_path / "together", store, saes=CONFIGS)
    units = of_train.trained(together, of_train.STAGE.model_copy(update={"saes": list(CONFIGS)}))
    assert len(units) == len(CONFIGS)
    for name, unit in zip(CONFIGS, units, strict=True):
        alone = of_train.fresh(tmp_path / name, store, saes=CONFIGS)
        wanted = of_train.trained(alone, of_train.STAGE.model_copy(update={"saes": [name]}))
        assert of_train.results(together, [unit]) == of_train.results(alone, wanted), name


def test_two_are_in_a_step_at_the_same_time(at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits in its step for another; memory for pre-activations is that of two."""
    both, used, advance = threading.Barrier(2, timeout=30), set(), Training.advance

    def waiting(self: Training, x_nd: Tensor, dead_after: int) -> None:
        both.wait()
        used.add(id(self.sae.scratch))
        assert torch.get_num_threads() == 1
        advance(self, x_nd, dead_after)

    monkeypatch.setattr(Training, "advance", waiting)
    made = trainings(*(TopK(expansion=3, k=3, seed=seed) for seed in range(4)))
    with Abreast(made, 50) as abreast:
        for _ in range(3):
            abreast.step(made, x_nd(), 10**9)
    assert [training.step for training in made] == [3] * 4 and len(used) == 2 == torch.get_num_threads()


@pytest.mark.parametrize("configs", [[TopK(expansion=3, k=3)], [TopK(expansion=3, k=3), of_train.Noisy(expansion=2)]])
def test_one_alone_is_not_sent_to_another_thread(
    at_once: None, configs: list[SaeConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, advance = set(), Training.advance

    def noted(self: Training, x_nd: Tensor, dead_after: int) -> None:
        threads.add(threading.current_thread())
        advance(self, x_nd, dead_after)

    monkeypatch.setattr(Training, "advance", noted)
    made = trainings(*configs)
    with Abreast(made, 50) as abreast:
        abreast.step(made, x_nd(), 10**9)
        abreast.step([], x_nd(), 10**9)
    assert threads == {threading.main_thread()} and [training.step for training in made] == [1] * len(made)


def test_a_stop_comes_back_when_no_step_is_half_done(at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One stops at once, the other has begun; who has not yet begun does not begin any more."""
    begun, stopped, advance = threading.Event(), threading.Event(), Training.advance

    def slow(self: Training, x_nd: Tensor, dead_after: int) -> None:
        if self is made[0]:
            assert begun.wait(30)
            stopped.set()
            raise of_train.Stop
        self.whole = False
        begun.set()
        assert stopped.wait(30)
        advance(self, x_nd, dead_after)

    monkeypatch.setattr(Training, "advance", slow)
    made = trainings(*(TopK(expansion=3, k=3, seed=seed) for seed in range(2)))
    with Abreast(made, 50) as abreast:
        with pytest.raises(of_train.Stop):
            abreast.step(made, x_nd(), 10**9)
        assert made[1].whole and made[1].step == 1
    assert len(abreast._spare) == 2


def test_a_stop_does_not_wait_for_a_step_that_takes_long(at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is in the middle of one is not whole; what goes on does so unseen."""
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    begun, end = threading.Event(), threading.Event()

    def slow(self: Training, x_nd: Tensor, dead_after: int) -> None:
        if self is made[0]:
            assert begun.wait(30)
            raise of_train.Stop
        self.whole = False
        begun.set()
        end.wait(30)

    monkeypatch.setattr(Training, "advance", slow)
    made = trainings(*(TopK(expansion=3, k=3, seed=seed) for seed in range(2)))
    with pytest.raises(of_train.Stop), Abreast(made, 50) as abreast:
        abreast.step(made, x_nd(), 10**9)
    assert not end.is_set() and not made[1].whole
    end.set()


@pytest.mark.parametrize("after", [1, 4, 7])
def test_stopped_it_goes_on_to_the_same_bytes(
    at_once: None, after: int, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = of_train.STAGE.model_copy(update={"saes": list(CONFIGS)})
    whole = of_train.fresh(tmp_path / "whole", store, saes=CONFIGS)
    left, advance = after, Training.advance

    def stopping(self: Training, x_nd: Tensor, dead_after: int) -> None:
        nonlocal left
        if self.unit.given["sae"] == CONFIGS["other"]:
            left -= 1
            if not left:
                raise of_train.Stop
        advance(self, x_nd, dead_after)

    with monkeypatch.context() as patch, pytest.raises(of_train.Stop):
        patch.setattr(Training, "advance", stopping)
        of_train.trained(of_train.fresh(tmp_path / "stopped", store, saes=CONFIGS), stage)
    again = of_train.fresh(tmp_path / "stopped", store, saes=CONFIGS)
    assert of_train.results(again, of_train.trained(again, stage)) == of_train.results(
        whole, of_train.trained(whole, stage)
    )


class Hasty(SaeConfig):
    """Says that it draws nothing, and does."""

    use: Literal["hasty"] = "hasty"

    def build(self, d_model: int) -> "HastySae":
        return HastySae(d_model, self.width(d_model))


class HastySae(Sae):
    """While it trains, each feature is silent half of the time."""

    draws = False

    def activate(self, pre_ns: Tensor) -> Tensor:
        return pre_ns.relu() * (torch.rand_like(pre_ns) < 0.5)


def test_who_draws_though_it_says_it_does_not_is_told() -> None:
    (made,) = trainings(Hasty(expansion=2))
    with pytest.raises(
        UserError, match=r"plugin 'test_abreast' of .*: torch's generator was drawn from during a training step"
    ):
        made.advance(x_nd().float(), 10**9)


def test_a_step_asks_for_nobodys_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """To find it is to read what is told of all installed packages: longer than the rest of a small step."""
    made = trainings(TopK(expansion=3, k=3), Matryoshka(expansion=3, k=3, prefixes=[0.5]))

    def asked(cls: type) -> str:
        raise AssertionError(cls)

    for named in [named for name, named in sys.modules.items() if name.startswith("saefw") and hasattr(named, "whose")]:
        monkeypatch.setattr(named, "whose", asked)
    with Abreast(made, 50) as abreast:
        abreast.step(made, x_nd(), 10**9)
    assert [training.step for training in made] == [1, 1]


def test_a_derived_class_says_for_itself_whether_it_draws() -> None:
    class Derived(HastySae):
        pass

    assert Sae(4, 8).may_draw() and Derived(4, 8).may_draw() and not HastySae(4, 8).may_draw()
    assert not of_train.training(Matryoshka(expansion=2, k=3, prefixes=[0.5])).sae.may_draw()
    assert of_train.training(CONFIGS["sampled"].model_copy()).sae.may_draw()

    class Further(MatryoshkaSae):
        pass

    config = Matryoshka(expansion=2, k=3, prefixes=[0.5])
    assert Further(6, 12, config, [6, 12]).may_draw() and not MatryoshkaSae(6, 12, config, [6, 12]).may_draw()


def test_gradients_and_memory_are_not_held_between_steps() -> None:
    made = trainings(TopK(expansion=3, k=3), TopK(expansion=3, k=3, seed=1))
    with Abreast(made, 50) as abreast:
        abreast.step(made, x_nd(), 10**9)
    assert all(p.grad is None for training in made for p in training.sae.parameters())
    assert isinstance(made[0].sae.scratch, Scratch) and made[0].sae.scratch is made[1].sae.scratch
