"""One pass over features, against numpy and scikit-learn on everything at once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch.nn.functional import normalize

from saefw import detection, histogram, monosemantic, ranking, tally
from saefw.firing import Firing, codes, firing, grouped, most_images
from saefw.sae import Sae
from saefw.tally import Sizes, Tally, feed
from saefw_relu import Relu
from saefw_topk import TopK

N, P, S, C, TOP, EMBED = 45, 6, 40, 3, 5, 7
SCORES = "max", "sum", "cls"
PATCHES = P, 1
"""1: as of [CLS], where each code is a pair of its own."""

Array = np.ndarray[Any, Any]


class AsGiven(Sae):
    """Tokens are their own codes."""

    def __init__(self, d_sae: int = S) -> None:
        super().__init__(d_sae, d_sae)
        with torch.no_grad():
            self.W_enc.copy_(torch.eye(d_sae))

    def activate(self, pre_ns: torch.Tensor) -> torch.Tensor:
        return pre_ns.relu()


def sparse(seed: int = 0) -> torch.Tensor:
    """Codes [image, patch, feature]: coarse, so that many values tie; the last four features never fire."""
    rng = np.random.default_rng(seed)
    found = rng.integers(1, 6, (N, P, S)) / 4 * (rng.random((N, P, S)) < rng.random(S) * 0.2)
    found[..., -4:] = 0
    found[3:, :, 0] = 0
    return torch.tensor(found, dtype=torch.float32)


def of_cls(seed: int = 9) -> torch.Tensor:
    """Codes of [CLS], [image, feature]; feature 38 fires there alone."""
    rng = np.random.default_rng(seed)
    found = rng.integers(1, 6, (N, S)) / 4 * (rng.random((N, S)) < 0.3)
    found[:, -1] = 0
    return torch.tensor(found, dtype=torch.float32)


def embeddings() -> torch.Tensor:
    return torch.tensor(np.random.default_rng(5).normal(size=(N, EMBED)), dtype=torch.float32)


def labels() -> torch.Tensor:
    """Every tenth image has no label."""
    found = torch.arange(N) % C
    found[::10] = -1
    return found


def scored(x: torch.Tensor, score: str) -> Array:
    """What each image counts for with each feature, [image, feature]."""
    found = {"max": x.amax(dim=1), "sum": x.double().sum(dim=1).float(), "cls": of_cls()}[score]
    return found.numpy()


def fed(made: Tally, some: slice, x: torch.Tensor, score: str = "max") -> None:
    examples, embedded = torch.arange(N) * 2, embeddings()[some] if made.sizes.d_embed else None
    feed(made, AsGiven(), examples[some], labels()[some], x[some], score, of_cls()[some], embedded)


def tallied(path: Path, batch: int, x: torch.Tensor, score: str = "max", d_embed: int = 0) -> Tally:
    path.mkdir(exist_ok=True)
    made = Tally(Sizes(S, x.shape[1], C, TOP, d_embed), path)
    for first in range(0, N, batch):
        fed(made, slice(first, first + batch), x, score)
    return made


def everything(made: Tally) -> list[dict[str, Any]]:
    return [
        made.features(),
        made.histogram(),
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


# What fires


@pytest.mark.parametrize("config", [TopK(k=3, expansion=4), Relu(expansion=4)])
def test_codes_are_those_that_are_above_zero_densely(config: Any) -> None:
    torch.manual_seed(0)
    sae, x_nd = config.build(8).eval(), torch.randn(50, 8)
    with torch.no_grad():
        token_n, feature_n, value_n = codes(sae, x_nd)
        dense_ns = sae.dense(x_nd)
    found_ns = torch.zeros_like(dense_ns)
    found_ns[token_n, feature_n] = value_n
    assert len(token_n) == (dense_ns > 0).sum() and torch.equal(found_ns, dense_ns)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("patches", PATCHES)
def test_pairs_are_those_of_numpy(score: str, patches: int) -> None:
    x, cls = sparse()[:, :patches], of_cls()
    with torch.no_grad():
        found = firing(AsGiven(), x, score, cls)
    fires = (x > 0).any(dim=1) | ((cls > 0) if score == "cls" else False)
    wanted = fires.nonzero()
    assert torch.equal(torch.stack([found.image_g, found.feature_g], dim=1), wanted)
    i, s = wanted[:, 0], wanted[:, 1]
    assert torch.equal(found.peak_g, x.amax(dim=1)[i, s])
    assert torch.equal(found.mass_g, x.double().sum(dim=1)[i, s])
    assert torch.equal(found.fires_g, (x > 0).sum(dim=1)[i, s])
    assert torch.equal(found.score_g, torch.from_numpy(scored(x, score))[i, s])
    lit = found.peak_g > 0
    first = torch.from_numpy(x.numpy().argmax(axis=1))  # of equal ones the first, which torch does not promise
    assert torch.equal(found.token_g[lit], first[i, s][lit])
    back = torch.zeros_like(x)
    pair_n = torch.arange(len(i)).repeat_interleave(found.length_g)
    at_n = torch.arange(len(pair_n)) - found.first_g[pair_n]
    assert (at_n >= 0).all() and (at_n < found.length_g[pair_n]).all()
    back.index_put_((i[pair_n], found.token_n, s[pair_n]), found.value_n, accumulate=True)
    assert torch.equal(back, x)


@pytest.mark.parametrize("score", ["max", "sum"])
def test_codes_of_cls_that_are_not_grouped_give_the_same(tmp_path: Path, score: str) -> None:
    """TopK tells the codes of a token in any order."""
    torch.manual_seed(0)
    sae, x, examples = TopK(k=6, expansion=5).build(S // 5).eval(), torch.randn(N, 1, S // 5), torch.arange(N) * 2
    (tmp_path / "wanted").mkdir()
    found, wanted = (Tally(Sizes(S, 1, C, TOP), folder) for folder in (tmp_path, tmp_path / "wanted"))
    for first in range(0, N, 7):
        part = slice(first, first + 7)
        feed(found, sae, examples[part], labels()[part], x[part], score)
        with torch.no_grad():
            image_n, feature_n, value_n = codes(sae, x[part, 0])
        pairs = grouped(image_n, torch.zeros_like(image_n), feature_n, value_n, S, 1, score)
        wanted.add(examples[part], labels()[part], pairs)
    same(found, wanted)


def test_nothing_fires() -> None:
    none = torch.empty(0, dtype=torch.int64)
    found = grouped(none, none, none, torch.empty(0), S, P)
    assert all(len(x) == 0 for x in found) and isinstance(found, Firing)


@pytest.mark.parametrize(("d_sae", "n_patches"), [(6144, 196), (24_576, 256), (5, 1), (1 << 20, 1024)])
def test_the_last_of_as_many_images_as_fit_is_found(d_sae: int, n_patches: int) -> None:
    image = most_images(d_sae, n_patches) - 1
    image_n, patch_n, feature_n = (torch.tensor([number]) for number in (image, n_patches - 1, d_sae - 1))
    found = grouped(image_n, patch_n, feature_n, torch.tensor([3.5]), d_sae, n_patches)
    assert (int(found.image_g), int(found.token_g), int(found.feature_g)) == (image, n_patches - 1, d_sae - 1)
    assert float(found.peak_g) == 3.5


# What is counted of it


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("patches", PATCHES)
def test_features_are_those_of_numpy(tmp_path: Path, score: str, patches: int) -> None:
    x = sparse()[:, :patches]
    flat = x.numpy().reshape(-1, S).astype(np.float64)
    found = tallied(tmp_path, 7, x, score).features()
    assert list(found) == ["feature", "frequency", "mean", "p50", "p90", "p99", "max"]
    assert list(found["feature"]) == list(range(S))
    for s in range(S):
        positive = flat[flat[:, s] > 0, s]
        for name, share in tally.QUANTILES.items():
            wanted = np.quantile(positive, share, method="lower") if len(positive) else 0
            assert found[name][s] == pytest.approx(wanted, rel=histogram.ERROR)
        wanted = [positive.mean(), positive.max()] if len(positive) else [0.0, 0.0]
        np.testing.assert_allclose([found["mean"][s], found["max"][s]], wanted, rtol=1e-6)
        assert found["frequency"][s] == len(positive) / len(flat)
    assert (found["frequency"] == 0).sum() >= 4


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("patches", PATCHES)
def test_top_images_are_distinct_and_ties_go_to_the_earlier_image(tmp_path: Path, score: str, patches: int) -> None:
    x = sparse()[:, :patches]
    made = tallied(tmp_path, 7, x, score)
    found, maps = made.top_examples(), made.maps().numpy()
    rank_by, peak = scored(x, score), x.amax(dim=1).numpy()
    for s in range(S):
        rows = found["feature"] == s
        wanted = [i for i in np.lexsort((np.arange(N), -rank_by[:, s])) if rank_by[i, s] > 0][:TOP]
        assert list(found["example"][rows]) == [2 * i for i in wanted]
        assert list(found["rank"][rows]) == list(range(len(wanted)))
        np.testing.assert_array_equal(found["score"][rows], rank_by[wanted, s])
        np.testing.assert_array_equal(found["value"][rows], peak[wanted, s])
        assert list(found["token"][rows]) == [int(x[i, :, s].argmax()) for i in wanted]
        for rank in range(TOP):
            largest = max(peak[:, s].max(), 1e-9)
            lit = np.rint(x[wanted[rank], :, s].numpy() / largest * 255) if rank < len(wanted) else np.zeros(patches)
            np.testing.assert_array_equal(maps[s, rank], lit)
    if score == "cls":
        assert (found["value"][found["feature"] == 38] == 0).all() and (found["feature"] == 38).sum() == TOP


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("patches", PATCHES)
def test_top_features_of_an_image(tmp_path: Path, score: str, patches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "IMAGE_FEATURES", 3)
    x = sparse()[:, :patches]
    found = tallied(tmp_path, 7, x, score).top_features()
    rank_by = scored(x, score)
    for i in range(N):
        rows = found["example"] == 2 * i
        wanted = [s for s in np.lexsort((np.arange(S), -rank_by[i])) if rank_by[i, s] > 0][:3]
        assert list(found["feature"][rows]) == wanted
        assert list(found["rank"][rows]) == list(range(len(wanted)))
        np.testing.assert_array_equal(found["score"][rows], rank_by[i, wanted])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("patches", PATCHES)
@pytest.mark.parametrize(("block", "run"), [(1 << 22, 1 << 22), (50, 30)])
def test_class_features_are_those_of_scikit_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, run: int, score: str, patches: int
) -> None:
    monkeypatch.setattr(detection, "BLOCK", block)
    monkeypatch.setattr(detection, "RUN", run)
    x = sparse()[:, :patches]
    made = tallied(tmp_path, 7, x, score)
    found, top = made.class_features(), made.top_examples()
    known = labels().numpy() >= 0
    y, rank_by, mass = labels().numpy()[known], scored(x, score)[known], x.double().sum(dim=1).numpy()[known]
    assert list(zip(found["label"], found["feature"], strict=True)) == [
        (c, s) for c in range(C) for s in range(S) if (rank_by[y == c, s] > 0).any()
    ]
    assert (len(made._pairs.runs) > 3) == (run == 30)
    for row, (c, s) in enumerate(zip(found["label"], found["feature"], strict=True)):
        wanted = {
            "rate": (rank_by[y == c, s] > 0).mean(),
            "mean": rank_by[y == c, s].mean(),
            "share": mass[y == c, s].sum() / max(mass[:, s].sum(), 1e-9),
            "ap": average_precision_score(y == c, rank_by[:, s]),
            "purity": (labels().numpy()[top["example"][top["feature"] == s] // 2] == c).sum() / TOP,
        }
        for name, value in wanted.items():
            assert found[name][row] == pytest.approx(value, rel=1e-6), name


def test_pairs_of_class_and_feature_lie_in_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tally.tile(1000, 24_576) == (72, 1756) and tally.tile(0, S) == (1, S)
    monkeypatch.setattr(tally, "ROW_GROUP", 20)
    assert tally.tile(C, S) == (2, 20)
    found = tallied(tmp_path / "tiles", 7, sparse()).class_features()
    pairs = list(zip(found["label"].tolist(), found["feature"].tolist(), strict=True))
    assert pairs == sorted(pairs, key=lambda pair: (pair[0] // 2, pair[1] // 20, *pair))
    monkeypatch.setattr(tally, "ROW_GROUP", 10**9)
    whole = tallied(tmp_path / "whole", 7, sparse()).class_features()
    order = np.lexsort((found["feature"], found["label"]))
    for name, column in found.items():
        np.testing.assert_array_equal(column[order], whole[name])


def alike(score_e: Array, embedding_ed: torch.Tensor) -> float:
    """The score as it is defined, over all pairs of images."""
    a_e = (score_e - score_e.min()) / (score_e.max() - score_e.min()).clip(1e-12)
    unit_ed = normalize(embedding_ed.double(), dim=1).numpy()
    pairs = [(i, j) for i in range(len(a_e)) for j in range(i)]
    weight = sum(a_e[i] * a_e[j] for i, j in pairs)
    cosine = sum(a_e[i] * a_e[j] * (unit_ed[i] @ unit_ed[j]) for i, j in pairs)
    return float(cosine / weight) if weight else np.nan


@pytest.mark.parametrize("score", SCORES)
def test_monosemanticity_is_that_of_all_pairs(tmp_path: Path, score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "EMBEDDED", 4)
    x = sparse()
    x[:, 0, 5] += 2  # one that fires on every image: the least of its scores is not 0
    x[:, :, 6] = 0
    x[11, 2, 6] = 1  # and one that fires on a single image, which is like no other
    found = tallied(tmp_path, 7, x, score, EMBED).features()["monosemanticity"]
    rank_by = scored(x, score).astype(np.float64)
    wanted = np.array([alike(rank_by[:, s], embeddings()) for s in range(S)])
    assert np.isnan(wanted).sum() >= 1
    np.testing.assert_allclose(np.ma.filled(found, np.nan), wanted, rtol=1e-9, atol=1e-12)


def test_monosemanticity_loses_nothing_to_rounding() -> None:
    """A feature that fires faintly on a hundred images among many on which it fires always."""
    rng = np.random.default_rng(0)
    embedding_ed = torch.tensor(rng.normal(size=(300, EMBED)), dtype=torch.float32)
    score_e = 1000 + (rng.random(300) < 0.3) * rng.random(300)
    sums = monosemantic.sums(1, EMBED)
    for first in range(0, 300, 64):
        part = torch.tensor(score_e[first : first + 64], dtype=torch.float32)
        at = torch.arange(len(part))
        monosemantic.add(sums, at, torch.zeros_like(at), part, embedding_ed[first : first + 64])
    wanted = alike(score_e.astype(np.float32).astype(np.float64), embedding_ed)
    assert monosemantic.scores(sums)[0] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("score", SCORES)
def test_the_size_of_a_batch_changes_nothing(tmp_path: Path, score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = sparse(1)
    whole = tallied(tmp_path / "whole", N, x, score)
    same(tallied(tmp_path / "one", 1, x, score), whole)
    monkeypatch.setattr(tally, "DENSE", 4 * P * S)
    same(tallied(tmp_path / "few", N, x, score), whole)


@pytest.mark.parametrize("score", SCORES)
def test_it_goes_on_from_a_state(tmp_path: Path, score: str) -> None:
    x, sizes = sparse(2), Sizes(S, P, C, TOP, EMBED)
    first = Tally(sizes, tmp_path)
    fed(first, slice(0, 20), x, score)
    state = {name: tensor.clone() for name, tensor in first.state().items()}
    tally.check(state, sizes)
    fed(first, slice(20, 30), x, score)
    first.state()  # what it writes after that is cut off again
    again = Tally(sizes, tmp_path, state)
    assert again.seen == 20
    fed(again, slice(20, N), x, score)
    (tmp_path / "whole").mkdir()
    whole = Tally(sizes, tmp_path / "whole")
    fed(whole, slice(0, 20), x, score)
    fed(whole, slice(20, N), x, score)
    same(again, whole)


def test_without_labels_there_are_no_class_rows(tmp_path: Path) -> None:
    made = Tally(Sizes(S, P, 0, TOP), tmp_path)
    feed(made, AsGiven(), torch.arange(N), torch.full((N,), -1), sparse())
    assert all(len(column) == 0 for column in made.class_features().values())
    assert len(made.top_examples()["feature"]) > 0 and made.purity().shape == (0, S)


def test_memory_is_as_stated(tmp_path: Path) -> None:
    sizes = Sizes(S, P, C, TOP, EMBED)
    made = Tally(sizes, tmp_path)
    held = sum(x.nbytes for x in made._sums.values())
    assert sizes.bytes == held + 4 * detection.RUN * 12
    for _ in range(2):
        fed(made, slice(0, N), sparse())
        assert sum(x.nbytes for x in made._sums.values()) == held


def test_ranks_among_many_images(tmp_path: Path) -> None:
    """Maps lie where there was room: of thousands of images, some features change often, others never again."""
    rng = np.random.default_rng(3)
    kept = ranking.kept(6, 4, 3)
    x = torch.tensor(rng.random((4000, 4, 6)) * (rng.random((4000, 4, 6)) < 0.3), dtype=torch.float32)
    for first in range(0, 4000, 100):
        image, patch, feature = (x[first : first + 100] > 0).nonzero(as_tuple=True)
        found = grouped(image, patch, feature, x[first + image, patch, feature], 6, 4)
        ranking.add(kept, torch.arange(first, first + 100), torch.zeros(100, dtype=torch.int64), found)
    peak = x.amax(dim=1)
    value, example = peak.sort(dim=0, descending=True, stable=True)
    assert torch.equal(kept["score_st"], value[:3].T) and torch.equal(kept["example_st"], example[:3].T)
    lit = ranking.maps(kept, peak.amax(dim=0), block=4)
    for s in range(6):
        wanted = (x[example[:3, s], :, s] / peak[:, s].max() * 255).round().to(torch.uint8)
        assert torch.equal(lit[s], wanted)


# The histogram


def test_quantiles_are_within_half_a_step_of_those_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(histogram, "AT_ONCE", 2)
    rng = np.random.default_rng(0)
    values, features = np.exp(1.5 * rng.normal(size=4000)).astype(np.float32), rng.integers(0, 3, 4000)
    counts = histogram.counts(4)
    for part in np.array_split(np.arange(4000), 9):
        histogram.add(counts, torch.tensor(features[part]), torch.tensor(values[part]))
    shares = [0.0, 0.5, 0.9, 0.99, 1.0]
    found = histogram.quantiles(counts, shares)
    for s in range(3):
        for share, value in zip(shares, found[:, s], strict=True):
            wanted = np.quantile(values[features == s], share, method="lower")
            assert value == pytest.approx(wanted, rel=histogram.ERROR)
    assert (found[:, 3] == 0).all()
    rows = histogram.rows(counts)
    assert set(rows["feature"]) == {0, 1, 2} and (rows["n"] > 0).all()
    for feature, low, high, n in zip(*(rows[name] for name in ("feature", "low", "high", "n")), strict=True):
        assert ((values[features == feature] >= low) & (values[features == feature] < high)).sum() == n
        octave = 2.0 ** np.floor(np.log2(low))
        assert (high - low) * histogram.COARSE == octave and low % (high - low) == 0
    assert rows["n"].sum() == 4000


def test_the_histogram_takes_in_what_lies_outside_its_range() -> None:
    counts = histogram.counts(1)
    histogram.add(counts, torch.zeros(2, dtype=torch.int64), torch.tensor([1e-30, 1e30]))
    assert counts.sum() == 2
    low, high = histogram.quantiles(counts, [0.0, 1.0])[:, 0]
    assert low == pytest.approx(2**-20, rel=1 / 64) and high == pytest.approx(2**12, rel=1 / 64)
