"""How long a run takes: pieces of work that are measured once, and what is said of it."""

import math

import pytest
import torch
from rich.console import Console

from saefw import printer
from saefw.pace import Pace, timed
from saefw.plugin import Task, UserError
from saefw.stages import probe, train
from saefw_linear import Linear
from saefw_relu import Relu
from saefw_topk import TopK


def test_a_piece_of_work_is_measured_once() -> None:
    measured: list[str] = []

    def sample() -> float:
        measured.append("x")
        return 2.0

    pace = Pace({"known": 5.0})
    assert [pace("known", sample), pace("new", sample), pace("new", sample)] == [5.0, 2.0, 2.0]
    assert measured == ["x"]


def test_the_first_call_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    takes = iter([100.0, 0.04, 0.05, 0.06])
    monkeypatch.setattr("saefw.pace.perf_counter", lambda: clock[0])

    def work() -> None:
        clock[0] += next(takes)

    assert timed(work) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (math.nan, ""), (0, "< 1 min"), (59, "< 1 min"), (60, "1 min"), (9 * 60, "9 min"), (42 * 60, "40 min"),
        (100 * 60, "2 h"), (26 * 3600, "25 h"), (49 * 3600, "2 days"), (123 * 86400, "120 days"),
        (12345 * 86400, "12,000 days"),
    ],
)  # fmt: skip
def test_a_guess_is_said_in_a_digit_or_two(seconds: float, said: str) -> None:
    assert printer.roughly(seconds) == said


def test_an_sae_is_tried_narrow_unless_that_does_not_fit() -> None:
    assert train.narrow(Relu(expansion=32), 768) == Relu(d_sae=train.NARROW)
    assert train.narrow(Relu(expansion=4), 64) == Relu(d_sae=256)
    wide = TopK(expansion=32, k=2000)
    assert train.narrow(wide, 768) == wide
    with pytest.raises(UserError):
        TopK(expansion=2, k=2000).build(768)


def test_a_fit_is_watched_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left is guessed from the steps after the first; a fit that ends before is measured whole."""
    clock = [0.0]
    monkeypatch.setattr("saefw.stages.probe.perf_counter", lambda: clock[0])
    real, steps = torch.Tensor.softmax, 0

    def softmax(self: torch.Tensor, dim: int) -> torch.Tensor:
        nonlocal steps
        steps += 1
        clock[0] += 5.0 if steps == 1 else 0.03
        return real(self, dim)

    monkeypatch.setattr(torch.Tensor, "softmax", softmax)
    task = Task(4, ("a", "b"))
    assert probe._fit_seconds(Linear, [Linear(steps=1000)], task, 8, "cpu") == pytest.approx(30.0)
    assert steps == 5
    steps = 0
    assert probe._fit_seconds(Linear, [Linear(steps=2)], task, 8, "cpu") == pytest.approx(5.03)
    assert math.isnan(probe._fit_seconds(Linear, [Linear()], task, 0, "cpu"))


@pytest.mark.parametrize(
    ("label", "width", "shown"),
    [
        ("linear lr=0.3 weight_decay=1.0 on vit", 40, "linear lr=0.3 weight_decay=1.0 on vit"),
        ("linear lr=0.3 weight_decay=1.0 on vit", 24, "linear lr=0.3 we\N{HORIZONTAL ELLIPSIS} on vit"),
        ("abc", 1, "\N{HORIZONTAL ELLIPSIS}"),
    ],
)
def test_a_long_label_is_cut_in_its_middle(
    label: str, width: int, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Console(width=width).print(printer.Cut(label))
    assert capsys.readouterr().out.rstrip() == shown
