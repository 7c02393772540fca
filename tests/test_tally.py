"""One pass over features, against numpy and scikit-learn on everything at once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from saefw import tally
from saefw.tally import Percentiles, Tally

N, P, S, C, TOP = 45, 6, 40, 3, 5


def codes(seed: int = 0) -> torch.Tensor:
    """Sparse codes [image, patch, feature]: coarse, so that many values tie; the last four features never fire."""
    rng = np.random.default_rng(seed)
    found = rng.integers(1, 6, (N, P, S)) / 4 * (rng.random((N, P, S)) < rng.random(S) * 0.2)
    found[..., -4:] = 0
    found[3:, :, 0] = 0
    return torch.tensor(found, dtype=torch.float32)


def labels() -> torch.Tensor:
    """Every tenth image has no label."""
    found = torch.arange(N) % C
    found[::10] = -1
    return found


def tallied(path: Path, batch: int, x: torch.Tensor) -> Tally:
    made = Tally(S, P, C, TOP, path / "pairs")
    examples = torch.arange(N) * 2
    for first in range(0, N, batch):
        part = slice(first, first + batch)
        made.add(examples[part], labels()[part], x[part])
    return made


def everything(made: Tally) -> list[dict[str, Any]]:
    return [
        made.features(),
        made.top_examples(),
        made.top_features(),
        made.class_features(),
        {"maps": made.maps().numpy()},
    ]


def same(one: Tally, other: Tally) -> None:
    for a, b in zip(everything(one), everything(other), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_features_are_those_of_numpy(tmp_path: Path) -> None:
    x = codes()
    flat = x.numpy().reshape(-1, S).astype(np.float64)
    found = tallied(tmp_path, 7, x).features()
    assert list(found["feature"]) == list(range(S))
    for s in range(S):
        positive = flat[flat[:, s] > 0, s]
        wanted = [positive.mean(), np.percentile(positive, 99), positive.max()] if len(positive) else [0.0, 0.0, 0.0]
        np.testing.assert_allclose([found["mean"][s], found["p99"][s], found["max"][s]], wanted, rtol=1e-6)
        assert found["frequency"][s] == len(positive) / len(flat)
    assert (found["frequency"] == 0).sum() >= 4


def test_top_images_are_distinct_and_ties_go_to_the_earlier_image(tmp_path: Path) -> None:
    x = codes()
    made = tallied(tmp_path, 7, x)
    found, maps = made.top_examples(), made.maps().numpy()
    peak = x.amax(dim=1).numpy()
    for s in range(S):
        rows = found["feature"] == s
        wanted = [i for i in np.lexsort((np.arange(N), -peak[:, s])) if peak[i, s] > 0][:TOP]
        assert list(found["example"][rows]) == [2 * i for i in wanted]
        assert list(found["rank"][rows]) == list(range(len(wanted)))
        np.testing.assert_array_equal(found["value"][rows], peak[wanted, s])
        assert list(found["token"][rows]) == [int(x[i, :, s].argmax()) for i in wanted]
        for rank in range(TOP):
            lit = np.rint(x[wanted[rank], :, s].numpy() / peak[:, s].max() * 255) if rank < len(wanted) else np.zeros(P)
            np.testing.assert_array_equal(maps[s, rank], lit)


def test_top_features_of_an_image(tmp_path: Path) -> None:
    x = codes()
    found = tallied(tmp_path, 7, x).top_features()
    peak = x.amax(dim=1).numpy()
    for i in range(N):
        rows = found["example"] == 2 * i
        wanted = [s for s in np.lexsort((np.arange(S), -peak[i])) if peak[i, s] > 0][: tally.IMAGE_FEATURES]
        assert list(found["feature"][rows]) == wanted
        np.testing.assert_array_equal(found["value"][rows], peak[i, wanted])


@pytest.mark.parametrize("block", [1 << 24, 50])
def test_class_features_are_those_of_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(tally, "BLOCK", block)
    x = codes()
    found = tallied(tmp_path, 7, x).class_features()
    known = labels().numpy() >= 0
    y, x = labels().numpy()[known], x[known]
    peak, mass = x.amax(dim=1).numpy(), x.sum(dim=1).numpy().astype(np.float64)
    assert list(zip(found["label"], found["feature"], strict=True)) == [
        (c, s) for c in range(C) for s in range(S) if (peak[y == c, s] > 0).any()
    ]
    for row, (c, s) in enumerate(zip(found["label"], found["feature"], strict=True)):
        wanted = {
            "rate": (peak[y == c, s] > 0).mean(),
            "mean": peak[y == c, s].mean(),
            "share": mass[y == c, s].sum() / mass[:, s].sum(),
            "ap": average_precision_score(y == c, peak[:, s]),
        }
        for name, value in wanted.items():
            assert found[name][row] == pytest.approx(value, rel=1e-6), name


def test_the_size_of_a_batch_changes_nothing(tmp_path: Path) -> None:
    x = codes(1)
    same(tallied(tmp_path, 1, x), tallied(tmp_path, N, x))


def test_it_goes_on_from_a_state(tmp_path: Path) -> None:
    x, examples = codes(2), torch.arange(N) * 2
    first = Tally(S, P, C, TOP, tmp_path / "stopped")
    first.add(examples[:20], labels()[:20], x[:20])
    state = {name: tensor.clone() for name, tensor in first.state().items()}
    first.add(examples[20:30], labels()[20:30], x[20:30])
    again = Tally(S, P, C, TOP, tmp_path / "stopped", state)
    assert again.seen == 20
    again.add(examples[20:], labels()[20:], x[20:])
    (tmp_path / "whole").mkdir()
    same(again, tallied(tmp_path / "whole", N, x))


def test_without_labels_there_are_no_class_rows(tmp_path: Path) -> None:
    made = Tally(S, P, 0, TOP, tmp_path / "pairs")
    made.add(torch.arange(N), torch.full((N,), -1), codes())
    assert all(len(column) == 0 for column in made.class_features().values())


def test_percentiles_that_do_not_fit_are_within_a_step_of_the_histogram() -> None:
    rng = np.random.default_rng(0)
    values = np.exp(rng.normal(size=4000)).astype(np.float32)
    features = rng.integers(0, 3, 4000)
    exact, rough = Percentiles(4), Percentiles(4, exact=1000)
    for part in np.array_split(np.arange(4000), 9):
        for one in (exact, rough):
            one.add(torch.tensor(features[part]), torch.tensor(values[part]))
    again = Percentiles(4)
    again.load(rough.state())
    for s in range(3):
        wanted = np.percentile(values[features == s], 99)
        assert exact.result(99)[s] == pytest.approx(wanted, rel=1e-6)
        at_rank = np.percentile(values[features == s], 99, method="lower")
        assert rough.result(99)[s] == pytest.approx(at_rank, rel=1 / 128)
        assert again.result(99)[s] == rough.result(99)[s] != exact.result(99)[s]
    assert exact.result(99)[3] == rough.result(99)[3] == 0


def test_the_histogram_takes_in_what_lies_outside_its_range() -> None:
    rough = Percentiles(1, exact=0)
    rough.add(torch.zeros(2, dtype=torch.int64), torch.tensor([1e-30, 1e30]))
    assert rough.result(0)[0] == pytest.approx(2**-20, rel=1 / 64)
    assert rough.result(100)[0] == pytest.approx(2**12, rel=1 / 64)
