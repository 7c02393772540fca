"""The engine of steering against naive float64, and what edits are compared with."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tiny import TinyVit
from torch import Tensor

from saefw.blocks import outputs, tokens_after
from saefw.controls import Drawn, balanced, others, strongest
from saefw.errors import UserError
from saefw.inputs import Token, check_reach, taken
from saefw.outcome import KINDS, MEASURES, WAYS, Readout, agreement, bootstrap, first, found, summary
from saefw.plugin import Backbone, Task
from saefw.sae import Sae
from saefw.stages.steer_edits import kept
from saefw.stages.steer_plan import spoken_for
from saefw.steering import MODES, Edit, Steering, Together, along, like_norm
from saefw_linear import Linear
from saefw_topk import TopK

LAYER, CLASSES = 0, ("a", "b", "c")


def parts(seed: int = 0) -> tuple[Backbone, Sae, Tensor]:
    """The tiny ViT, a random SAE with a mean and a scale, and two images."""
    torch.manual_seed(seed)
    sae = TopK(k=3, expansion=2).build(16)
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1)
        sae.b_dec.normal_(std=0.1)
    sae.mean.normal_()
    sae.scale.fill_(1.7)
    return TinyVit().build("cpu"), sae.eval().requires_grad_(False), torch.randn(2, 3, 16, 16)


def steering(
    place: str = "patches", probe_layer: int = 2, dtype: torch.dtype = torch.float32, keep_error: bool = True
) -> Steering:
    backbone, sae, _ = parts()
    probe = Linear().build(Task(16, CLASSES))
    with torch.no_grad():
        probe.weight.normal_()
        probe.bias.normal_()
        probe.mean.normal_()
    probe = probe.requires_grad_(False)
    return Steering(backbone.to(dtype), sae.to(dtype), probe.to(dtype), LAYER, probe_layer, place, keep_error)


class Watched(Steering):
    """Keeps the tokens from which the logits were read."""

    seen: Tensor

    def logits(self, tokens_btd: Tensor) -> Tensor:
        self.seen = tokens_btd
        return super().logits(tokens_btd)


def watched() -> Watched:
    plain = steering()
    return Watched(plain.backbone, plain.sae, plain.probe, plain.layer, plain.probe_layer, plain.place)


def beside(of: Steering, layer: int, seed: int, place: str = "patches", keep_error: bool = True) -> Steering:
    """Another SAE on the same backbone, read by the same probe."""
    return Steering(of.backbone, parts(seed)[1].to(torch.float64), of.probe, layer, of.probe_layer, place, keep_error)


def naively(sites: Sequence[Steering], images: Tensor, edits: Sequence[dict[int, float]]) -> Tensor:
    """Block by block, SAE by SAE, with dense codes; each edit sets codes."""
    backbone = sites[0].backbone
    x = backbone.embed(images)
    for layer in range(sites[0].probe_layer + 1):
        x = backbone.tail(x, layer, layer)
        here = [i for i, site in enumerate(sites) if site.layer == layer]
        z, added = {}, torch.zeros_like(x)
        for i in sorted(here, key=lambda i: sites[i].keep_error):  # stand-ins first, whose codes are those of before
            site = sites[i]
            token_nd = x[:, site.edited].flatten(0, 1)
            z[i] = site.sae.dense(token_nd).view(len(x), -1, site.sae.d_sae)
            if not site.keep_error:
                x = x.clone()
                x[:, site.edited] = site.sae(token_nd).view_as(x[:, site.edited])
        for i in here:
            for feature, amount in edits[i].items():
                change = (amount - z[i][..., feature, None]) * sites[i].sae.W_dec[feature]
                added[:, sites[i].edited] += sites[i].sae.scale * change
        x = x + added
    logits: Tensor = sites[0].probe(x[:, 0])
    return logits


@pytest.mark.parametrize(
    "edits",
    [
        [{0: 2.0}, {}, {}, {}],
        [{}, {3: 1.5}, {}, {}],
        [{5: 1.0, 7: 0.0}, {3: 1.5}, {1: 2.0}, {9: 1.0}],
        [{}, {}, {2: 3.0}, {4: 2.0}],
    ],
)
def test_several_saes_are_edited_together(edits: list[dict[int, float]]) -> None:
    """After block 0 two SAEs, one of patches and one of [CLS]; after block 1 two of patches."""
    first, images = steering(dtype=torch.float64), parts()[2].double()
    sites = [beside(first, 1, 5), first, beside(first, 0, 6, "cls"), beside(first, 1, 7)]
    of = Together(sites)
    readings = of.read(images)
    kept_before = [reading.tokens_btd.clone() for reading in readings]
    asked = [[Edit(feature, "set", amount) for feature, amount in some.items()] for some in edits]
    after = of.edit(readings, asked)
    torch.testing.assert_close(after, naively(sites, images, edits))
    assert not torch.allclose(after, readings[0].logits_bc, atol=1e-4)
    assert all(torch.equal(reading.tokens_btd, x) for reading, x in zip(readings, kept_before, strict=True))
    # An edit of one SAE alone is that of its own engine.
    alone = [Edit(3, "set", 1.5, [2, 4])]
    torch.testing.assert_close(of.edit(readings, [[], alone, [], []]), first.edit(first.read(images), alone))


def test_several_saes_may_stand_in_for_tokens_and_nothing_changes_nothing() -> None:
    first, images = steering(dtype=torch.float64, keep_error=False), parts()[2].double()
    sites = [beside(first, 1, 5, keep_error=False), beside(first, 0, 6), first]
    of = Together(sites)
    readings = of.read(images)
    torch.testing.assert_close(readings[0].logits_bc, naively(sites, images, [{}, {}, {}]))
    edits = [{}, {8: 1.0}, {3: 2.0}]
    asked = [[Edit(feature, "set", amount) for feature, amount in some.items()] for some in edits]
    torch.testing.assert_close(of.edit(readings, asked), naively(sites, images, edits))
    nothing = [Edit(3, "add", 0.0)]
    assert torch.equal(of.edit(readings, [nothing] * 3), readings[0].logits_bc)
    assert torch.equal(of.edit(readings, [[], [], []]), readings[0].logits_bc)
    with pytest.raises(UserError, match="two SAEs would replace the patches after block 0 by their reconstructions"):
        Together([first, first])
    with pytest.raises(UserError, match="on one backbone, and read by one probe"):
        Together([first, steering(probe_layer=1)])


def dense(of: Steering, tokens_btd: Tensor) -> Tensor:
    """The codes [b, p, s] of the patches, by the SAE's dense path."""
    return of.sae.dense(tokens_btd[:, 1:].flatten(0, 1)).view(len(tokens_btd), 16, -1)


def test_a_reading_is_what_the_parts_say() -> None:
    of, (_, _, images) = steering(probe_layer=1), parts()
    reading = of.read(images)
    torch.testing.assert_close(reading.tokens_btd, tokens_after(of.backbone, images, 0))
    torch.testing.assert_close(reading.logits_bc, of.probe(tokens_after(of.backbone, images, 1)[:, 0]))
    z_bps = dense(of, reading.tokens_btd)
    features_bf = torch.tensor([[0, 5, 7], [31, 2, 9]])
    wanted = torch.stack([z_bps[i][:, features_bf[i]] for i in range(2)])
    assert torch.equal(of.observed(reading, features_bf), wanted)
    assert (wanted > 0).any()


@pytest.mark.parametrize("place", ["patches", "cls"])
def test_an_edit_that_changes_no_code_changes_no_bit(place: str) -> None:
    of, (_, _, images) = steering(place), parts()
    reading = of.read(images[:1])
    features = sorted(set(reading.codes.indices.flatten().tolist()))[:5]
    z_pf = of.observed(reading, torch.tensor([features]))[0]
    for edits in (
        [Edit(feature, "set", z_pf[:, i]) for i, feature in enumerate(features)],
        [Edit(feature, "add", 0.0) for feature in features],
        [Edit(feature, "scale", 1.0) for feature in features],
        [Edit(feature, "ablate", 0.0) for feature in features],
        [Edit(features[0], "set", 9.0, [])],
        [],
    ):
        assert torch.equal(of.edit(reading, edits), reading.logits_bc), edits
    assert not torch.equal(of.edit(reading, [Edit(features[0], "add", 1.0)]), reading.logits_bc)


def naive_edit(of: Steering, x_td: Tensor, edits: dict[int, tuple[str, float]], patches: Sequence[int]) -> Tensor:
    """One token and one feature at a time, in float64."""
    sae = of.sae
    W_dec, scale = sae.W_dec.double(), float(sae.scale)
    after = x_td.double().clone()
    for patch in patches:
        codes = sae.dense(x_td[1 + patch][None])[0].double()
        for feature, (mode, amount) in edits.items():
            z = float(codes[feature])
            changed = {"set": amount, "add": z + amount, "scale": z * amount, "ablate": z * (1 - amount)}[mode]
            after[1 + patch] += scale * (changed - z) * W_dec[feature]
    return after


@pytest.mark.parametrize("patches", [None, [3], [0, 15, 7]])
def test_the_delta_is_exact_and_on_patches_alone(patches: list[int] | None) -> None:
    of, (_, _, images) = watched(), parts()
    reading = of.read(images)
    before = reading.tokens_btd.clone()
    firing = reading.codes.indices[0].tolist()
    edits = {
        firing[0]: ("set", 2.5),
        firing[1]: ("add", -0.5),
        firing[2]: ("scale", 3.0),
        30: ("set", 1.0),
        29: ("ablate", 0.5),
    }
    logits_bc = of.edit(reading, [Edit(feature, *how, patches) for feature, how in edits.items()])
    for i in range(2):
        wanted = naive_edit(of, before[i], edits, range(16) if patches is None else patches)
        torch.testing.assert_close(of.seen[i].double(), wanted, rtol=1e-6, atol=1e-5)
    untouched = [0, *(1 + p for p in range(16) if patches is not None and p not in patches)]
    assert torch.equal(of.seen[:, untouched], before[:, untouched])
    assert torch.equal(reading.tokens_btd, before), "a reading is left as it is"
    # The rest of the model runs on the edited tokens, and on nothing else.
    alone = of.probe(of.backbone.tail(of.seen, 1)[:, 0])
    assert torch.equal(logits_bc, alone)


@pytest.mark.parametrize("mode", list(MODES))
def test_a_batch_of_edits_is_edit_by_edit(mode: str) -> None:
    of, (_, _, images) = steering(), parts()
    reading = of.read(images)
    features_bf, amounts_bf = reading.codes.indices[[3, 20]], torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]])
    together = of.after(reading, of.delta(reading, features_bf, amounts_bf, mode))
    for i in range(2):
        edits = [Edit(int(f), mode, float(a)) for f, a in zip(features_bf[i], amounts_bf[i], strict=True)]
        alone = of.edit(of.read(images[i : i + 1]), edits)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_cls_is_edited_alone() -> None:
    of, (_, _, images) = steering("cls", probe_layer=0), parts()
    reading = of.read(images)
    feature = int(reading.codes.indices[0, 0])
    z = of.observed(reading, torch.tensor([[feature], [feature]]))
    assert z.shape == (2, 1, 1)
    moved = reading.tokens_btd[:, 0] + of.sae.scale * (4.0 - z[:, 0]) * of.sae.W_dec[feature]
    torch.testing.assert_close(of.edit(reading, [Edit(feature, "set", 4.0)]), of.probe(moved))


@pytest.mark.parametrize(("place", "token"), [("cls", "cls"), ("patches", "mean"), ("patches", 3)])
def test_straight_into_the_probe_is_by_the_residual_stream_alone(place: str, token: Token) -> None:
    plain, (_, _, images) = steering("cls", dtype=torch.float64), parts()
    of = Steering(plain.backbone, plain.sae, plain.probe, LAYER, 2, place, token=token)
    reading = of.read(images.double())
    z_bps = of.sae.dense(reading.tokens_btd.flatten(0, 1)).view(2, 17, -1)
    change_bps = torch.zeros_like(z_bps)
    where = [0] if place == "cls" else range(1, 17)
    for t in where:
        change_bps[:, t, 4], change_bps[:, t, 9] = 2.0 - z_bps[:, t, 4], 0.5
    # What the last block puts out for the unedited image, and the delta on top of it, as if no block had read it.
    moved_btd = tokens_after(of.backbone, images.double(), 2) + float(of.sae.scale) * change_bps @ of.sae.W_dec
    wanted_bd = {"cls": moved_btd[:, 0], "mean": moved_btd[:, 1:].mean(dim=1), 3: moved_btd[:, 4]}[token]
    edits = [Edit(4, "set", 2.0), Edit(9, "add", 0.5)]
    after_bc = of.directly(reading, of.change(reading, edits))
    torch.testing.assert_close(after_bc, of.probe(wanted_bd))
    assert (after_bc - of.edit(reading, edits)).abs().max() > 1e-3


def test_what_the_probe_does_not_read_does_not_go_straight_into_it() -> None:
    of = steering()
    with pytest.raises(UserError) as caught:
        of.directly(of.read(parts()[2]), torch.zeros(2, 16, 16))
    assert str(caught.value) == ("steer: an edit of patches goes through blocks alone, since the probe reads [CLS]")


@pytest.mark.parametrize("place", ["patches", "cls"])
def test_the_predicted_effect_is_the_finite_difference(place: str) -> None:
    of, (_, _, images) = steering(place, dtype=torch.float64), parts()
    reading = of.read(images.double())
    p99_s = torch.linspace(0.5, 2, 32, dtype=torch.float64)
    classes_bm = torch.tensor([[2, 0, 1], [0, 1, 2]])
    gradient_cd = torch.zeros(3, 16, dtype=torch.float64)
    gradient_cd.index_add_(0, classes_bm.flatten(), of.gradients(reading.tokens_btd, classes_bm).flatten(0, 1))
    effect_sc = of.effects(gradient_cd / 2, p99_s)
    step = 1e-4
    for feature in range(32):
        up, down = (of.edit(reading, [Edit(feature, "add", float(s * step * p99_s[feature]))]) for s in (1, -1))
        slope_c = ((up - down) / (2 * step)).mean(dim=0)
        torch.testing.assert_close(effect_sc[feature], slope_c, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("layer", "probe_layer", "place", "token", "message"),
    [
        (
            0,
            0,
            "patches",
            "cls",
            "[CLS] after block 0, which patches edited after block 0 cannot reach; choose a probe of layer 1 "
            "or higher, or a probe with token: mean of layer 0",
        ),
        (
            2,
            2,
            "patches",
            "cls",
            "[CLS] after block 2, which patches edited after block 2 cannot reach; choose an SAE of layer 1 "
            "or lower, or a probe with token: mean of layer 2",
        ),
        (
            1,
            0,
            "patches",
            "mean",
            "the mean of the patches after block 0, which patches edited after block 1 cannot reach; choose "
            "an SAE of layer 0, or a probe of layer 1 or higher",
        ),
        (
            2,
            1,
            "cls",
            "cls",
            "[CLS] after block 1, which [CLS] edited after block 2 cannot reach; choose an SAE of layer 1 or "
            "lower, or a probe of layer 2",
        ),
        (
            1,
            1,
            "cls",
            3,
            "patch 3 after block 1, which [CLS] edited after block 1 cannot reach; choose an SAE of layer 0, "
            "a probe of layer 2, or a probe with token: cls of layer 1",
        ),
        (
            2,
            2,
            "patches",
            "embedding",
            "the image embedding after block 2, which patches edited after block 2 may not reach; choose an "
            "SAE of layer 1 or lower, or a probe with token: mean of layer 2",
        ),
    ],
)
def test_an_edit_that_cannot_reach_the_probe_is_refused(
    layer: int, probe_layer: int, place: str, token: Token, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_reach("steer", TinyVit().describe(), layer, probe_layer, place, token)
    assert str(caught.value) == f"steer: the probe reads {message}"


@pytest.mark.parametrize("place", ["patches", "cls"])
@pytest.mark.parametrize("token", ["cls", "mean", 0, 15])
@pytest.mark.parametrize("probe_layer", [0, 1, 2])
def test_what_is_said_to_reach_does_and_nothing_else(place: str, token: Token, probe_layer: int) -> None:
    """Against the blocks themselves: all tokens of the place are moved after block 1, and what is read is compared."""
    backbone, _, images = parts()
    before = outputs(backbone, images, range(3))
    moved = before[1].clone()
    moved[:, slice(0, 1) if place == "cls" else slice(1, None)] += torch.randn(16)
    after = {0: before[0], 1: moved, 2: backbone.tail(moved, 2, 2)}
    reached = not torch.equal(*(taken(x[probe_layer], token, 1) for x in (before, after)))
    try:
        check_reach("steer", backbone.info, 1, probe_layer, place, token)
    except UserError:
        assert not reached
    else:
        assert reached


@pytest.mark.parametrize("token", ["mean", 5])
def test_a_probe_of_patches_reads_an_edit_of_its_own_block(token: Token) -> None:
    """By hand: the tokens are moved by scale times the change of the code times the row, and read as they are."""
    plain, (_, _, images) = steering(), parts()
    of = Steering(plain.backbone, plain.sae, plain.probe, 0, 0, "patches", True, token)
    reading = of.read(images)
    feature = int(reading.codes.indices[5, 0])
    z_bp = of.observed(reading, torch.full((2, 1), feature))[..., 0]
    moved_bpd = reading.tokens_btd[:, 1:] + of.sae.scale * (3.0 - z_bp)[..., None] * of.sae.W_dec[feature]
    wanted_bd = moved_bpd.mean(dim=1) if token == "mean" else moved_bpd[:, 5]
    torch.testing.assert_close(of.edit(reading, [Edit(feature, "set", 3.0)]), of.probe(wanted_bd), rtol=1e-4, atol=1e-5)
    step, p99_s = 1e-3, torch.ones(32)
    gradient_cd = of.gradients(reading.tokens_btd, torch.arange(3).expand(2, 3)).mean(dim=0)
    up, down = (of.edit(reading, [Edit(feature, "add", sign * step)]) for sign in (1, -1))
    slope_c = ((up - down) / (2 * step)).mean(dim=0)
    torch.testing.assert_close(of.effects(gradient_cd, p99_s)[feature].float(), slope_c, rtol=1e-2, atol=1e-2)


def test_controls_are_as_long_as_the_edit() -> None:
    torch.manual_seed(0)
    edit, other = torch.randn(3, 16, 8), torch.randn(3, 16, 8) * 5
    other[2] = 0
    same = like_norm(other, edit)
    norms = [np.linalg.norm(x.double().numpy().reshape(3, -1), axis=1) for x in (same, edit, other)]
    np.testing.assert_allclose(norms[0][:2], norms[1][:2], rtol=1e-6)
    assert norms[0][2] == 0
    np.testing.assert_allclose((same[0] / other[0]).std(), 0, atol=1e-6)
    direction_bd = torch.nn.functional.normalize(torch.randn(3, 8), dim=1)
    spread = along(direction_bd, edit)
    torch.testing.assert_close(spread.norm(dim=2), edit.norm(dim=2))
    torch.testing.assert_close(torch.nn.functional.normalize(spread[1], dim=1), direction_bd[1].expand(16, -1))


# Choices


def test_balanced_draws_evenly() -> None:
    labels = np.array([0] * 30 + [1] * 10 + [2] * 3)
    chosen = balanced(labels, 15, seed=0)
    assert np.bincount(labels[chosen]).tolist() == [6, 6, 3]
    assert (np.diff(chosen) > 0).all()
    assert not np.array_equal(chosen, balanced(labels, 15, seed=1))
    assert np.array_equal(balanced(labels, 99, seed=0), np.arange(43))


def test_other_classes_are_other_and_balanced() -> None:
    labels = np.repeat(np.arange(5), [40, 10, 10, 10, 10])
    target = others(labels, np.arange(5), seed=3)
    assert (target != labels).all()
    # Images of class 0 may go to four classes only, so the four get what the fifth cannot.
    assert np.bincount(target).tolist() == [16, 16, 16, 16, 16]
    assert np.array_equal(target, others(labels, np.arange(5), seed=3))
    assert not np.array_equal(target, others(labels, np.arange(5), seed=4))


def test_strongest_features_are_usable() -> None:
    score_sc = np.array([[3.0, 0], [9, 1], [2, 5], [3, 4]])
    chosen = strongest(score_sc, np.array([True, False, True, True]), 2)
    assert chosen.tolist() == [[0, 3], [2, 3]]


def test_like_features_are_near_in_frequency_and_not_the_class_s_own() -> None:
    frequency_s = 10.0 ** np.linspace(-4, -0.5, 200)
    usable_s = np.ones(200, dtype=bool)
    usable_s[50] = False
    chosen_cf = np.array([[48, 49, 150], [0, 1, 2]])
    drawn = Drawn(chosen_cf, frequency_s, usable_s, 8, seed=0)
    seen: set[int] = set()
    for example in range(300):
        features, direction = drawn(example, 0)
        assert len(set(features)) == 3
        assert not set(features) & {48, 49, 150, 50}
        assert np.abs(features - [48, 49, 150]).max() <= 13
        assert np.linalg.norm(direction) == pytest.approx(1)
        seen.update(features.tolist())
    assert len(seen) > 35
    again = Drawn(chosen_cf, frequency_s, usable_s, 8, seed=0)
    assert again(7, 1)[0].tolist() == drawn(7, 1)[0].tolist()
    assert not np.array_equal(again(7, 1)[1], drawn(8, 1)[1])


def test_features_that_must_fire_are_drawn_from_those_that_do() -> None:
    frequency_s = 10.0 ** np.linspace(-4, -0.5, 200)
    usable_s = np.ones(200, dtype=bool)
    usable_s[60] = False
    drawn = Drawn(np.array([[48, 49, 150]]), frequency_s, usable_s, 8, seed=0)
    fires_s = np.zeros(200, dtype=bool)
    fires_s[[10, 48, 60, 100, 101, 180]] = True
    seen = {tuple(drawn.firing(example, 0, fires_s).tolist()) for example in range(100)}
    assert all(len(set(features)) == 3 and set(features) <= {10, 100, 101, 180} for features in seen) and len(seen) > 6
    assert drawn.firing(3, 0, fires_s).tolist() == drawn.firing(3, 0, fires_s).tolist()
    fires_s[[10, 100, 101]] = False
    for example in range(20):
        first, *rest = drawn.firing(example, 0, fires_s)
        assert first == 180 and len({first, *rest}) == 3 and not {first, *rest} & {48, 49, 150, 60}
    fires_s[180] = False
    assert len(set(drawn.firing(0, 0, fires_s))) == 3


def test_fires_are_those_of_the_dense_codes() -> None:
    engine = steering()
    reading = engine.read(parts()[2])
    wanted = engine.sae.dense(reading.tokens_btd[:, engine.edited].flatten(0, 1)).view(2, 16, -1).amax(dim=1) > 0
    assert torch.equal(engine.fires(reading), wanted) and 0 < wanted.sum() < wanted.numel()


# What came of it


def test_the_bootstrap_is_that_of_scipy_and_passes_over_what_is_not_there() -> None:
    from scipy.stats import bootstrap as theirs

    values = np.random.default_rng(0).normal(1, 2, (80, 2))
    low, high = bootstrap(values, 0)
    for i in range(2):
        wanted = theirs((values[:, i],), np.mean, method="percentile", n_resamples=20_000).confidence_interval
        assert (low[i], high[i]) == pytest.approx(tuple(wanted), abs=0.05)
    assert np.array_equal(bootstrap(values, 0)[0], low)
    holes = np.concatenate([values, np.full((40, 2), np.nan)])
    assert bootstrap(holes, 0)[0] == pytest.approx(low, abs=0.1)
    none, one = np.full((5, 1), np.nan), np.array([[1.0], [np.nan]])
    for few in (none, one):
        assert bootstrap(few, 0) == (np.array([-np.inf]), np.array([np.inf]))


def test_agreement_is_spearman_s() -> None:
    from scipy.stats import spearmanr

    x, y = np.random.default_rng(0).integers(0, 5, (2, 30)).astype(float)
    assert agreement(x, x + y) == pytest.approx(spearmanr(x, x + y).statistic)
    assert np.isnan(agreement(x, np.ones(30))) and np.isnan(agreement(x[:2], y[:2]))


@pytest.mark.parametrize(("n", "c"), [(20, 3), (40, 100), (3, 1000)])
def test_every_class_is_spoken_for(n: int, c: int) -> None:
    whole = spoken_for(range(n), n, c)
    counts = whole.flatten().bincount(minlength=c)
    assert counts.min() >= 1 and counts.max() - counts.min() <= 1
    assert all(len(set(row)) == len(row) for row in whole.tolist())
    assert torch.equal(spoken_for(range(1, 3), n, c), whole[1:3])


def test_without_the_error_the_reconstruction_is_edited() -> None:
    of, (_, _, images) = steering(keep_error=False), parts()
    tokens = tokens_after(of.backbone, images, 0)
    kept_before = tokens.clone()
    reading = of.reading(tokens)
    assert torch.equal(tokens, kept_before)
    wanted = tokens.clone()
    wanted[:, 1:] = of.sae(tokens[:, 1:].flatten(0, 1)).view(2, 16, 16)
    torch.testing.assert_close(reading.tokens_btd, wanted)
    torch.testing.assert_close(reading.logits_bc, of.logits(wanted))
    feature = int(reading.codes.indices[0, 0])
    assert torch.equal(of.edit(reading, [Edit(feature, "scale", 1.0)]), reading.logits_bc)


def outcome(n: int = 60) -> tuple[Readout, np.ndarray, np.ndarray, np.ndarray]:
    """Three classes, two ways, two amounts: by the first the target's logit rises a lot, by the second that of 1."""
    rng = np.random.default_rng(0)
    own = np.arange(n) % 3
    target = np.stack([own, (own + 1 + np.arange(n) // 3 % 2) % 3], axis=1)
    shape = (n, 2, 2, 3, 2, 3)
    before = rng.normal(0, 0.1, (n, 1, 1, 1, 1, 3)) + 2 * np.eye(3)[own][:, None, None, None, None]
    before = np.broadcast_to(before, shape).astype(np.float32)
    hit = np.eye(3)[target][:, :, None, None, None] * np.ones(shape)
    after = before + rng.normal(0, 0.1, shape)
    after[:, :, 0, 0] += 4 * hit[:, :, 0, 0] * np.array([1, 2])[:, None]
    after[:, :, 1, 0] += hit[:, :, 1, 0] * (target == 1)[:, :, None, None]
    label = np.broadcast_to(np.arange(3), shape)
    return Readout(label, before, after.astype(np.float32), target), before, after, target


def measured(read: Readout) -> np.ndarray:
    """The logit and the flips; the other measures are 0."""
    values = np.zeros((*read.shift_erwka.shape, len(MEASURES)))
    values[..., 0], values[..., 2] = read.shift_erwka, read.flips()
    return values


def test_the_summary_counts_as_one_would_by_hand() -> None:
    read, before, after, target = outcome()
    rows = found(measured(read), target, WAYS[:2], [1.0, 2.0])
    told, images = summary(rows, 2.0), np.arange(60)
    shift = (after - before)[images, 1, :, :, 1, target[:, 1]]
    for k, name in enumerate(("", "_like_features", "_random_directions")):
        assert told[f"shift_effect{name}"] == pytest.approx(shift[:, 0, k].mean(), abs=1e-6)
    flips = (after[images, 1, 0, 0, 1].argmax(axis=1) == target[:, 1]).mean()
    assert told["flip_rate_effect"] == pytest.approx(flips) and flips > 0.9
    assert told["flip_rate_effect_random_directions"] == 0
    assert told["classes_above_controls_effect"] == 3 and told["classes_above_controls_mass"] == 1
    of_class = [shift[target[:, 1] == t, 0, 0].mean() for t in range(3)]
    assert told["tpp_effect"] == pytest.approx(np.mean(of_class), abs=1e-6)
    (paired,) = [
        row
        for row in rows
        if row[1:7] == ("effect", "effect", "like features", 2.0, 1, "logit") and row.role == "other class"
    ]
    ours = (shift[:, 0, 0] - shift[:, 0, 1])[target[:, 1] == 1]
    assert paired.n == len(ours) and paired.mean == pytest.approx(ours.mean(), abs=1e-6)
    assert paired.low < paired.mean < paired.high


def test_controls_left_out_are_left_out_of_the_summary() -> None:
    read, before, after, target = outcome()
    whole = summary(found(measured(read), target, WAYS[:2], [1.0, 2.0]), 2.0)
    values = measured(read)
    values[::7, 1, 0, 1, 1] = np.nan
    told = summary(found(values, target, WAYS[:2], [1.0, 2.0]), 2.0)
    assert {name for name in told if told[name] != whole[name]} == {"shift_effect_like_features"}
    images = np.flatnonzero(np.arange(60) % 7)
    shift = (after - before)[images, 1, 0, 1, 1, target[images, 1]]
    assert told["shift_effect_like_features"] == pytest.approx(shift.mean(), abs=1e-6)
    values[:, 1, 0, 1, 1] = np.nan
    told = summary(found(values, target, WAYS[:2], [1.0, 2.0]), 2.0)
    assert np.isnan(told["shift_effect_like_features"]) and told["classes_above_controls_effect"] == 0


def test_the_first_example_is_clear_then_easily_named_then_small() -> None:
    read, _, after, target = outcome()
    place = first(read, np.array([0.1, 0.9, 0.5]), np.array([1.0, 1.0]))
    assert place is not None
    powers = np.exp(after[:, 1, 0, 0])
    sure = powers / powers.sum(axis=-1, keepdims=True)
    best = max(
        (float(sure[e, a, 1]), e, a)
        for e in range(60)
        for a in range(2)
        if target[e, 1] == 1 and after[e, 1, 0, 0, a].argmax() == 1
    )
    assert place == (best[1], 1, 0, 0, best[2])
    assert read.probabilities(place)[1][1] == pytest.approx(best[0], rel=1e-5)
    unmoved = Readout(read.label, read.before, read.before, read.target_er)
    assert first(unmoved, np.ones(3), np.ones(2)) is None


def test_of_many_classes_the_telling_logits_are_kept() -> None:
    torch.manual_seed(0)
    grid = (3, 2, 2, len(KINDS), 2)
    before_ec, after_c = torch.randn(3, 50), torch.randn(*grid, 50)
    target_er = torch.tensor([[1, 2], [3, 3], [40, 41]])
    label = kept(before_ec, after_c, target_er)
    for place in np.ndindex(*grid):
        found_here = label[place][label[place] >= 0].tolist()
        wanted = set(before_ec[place[0]].argsort(descending=True)[:5].tolist())
        wanted |= set(after_c[place].argsort(descending=True)[:5].tolist())
        wanted |= {int(target_er[place[0], 0]), int(target_er[place[:2]])}
        assert found_here == sorted(wanted)
    few = kept(before_ec[:, :20], after_c[..., :20], target_er)
    assert few.shape == (*grid, 20) and few[0, 0, 0, 0, 0].tolist() == list(range(20))
