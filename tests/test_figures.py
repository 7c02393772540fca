"""The figures, drawn from tables written by hand, and the stage that draws them."""

import json
import logging
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, Literal

import duckdb
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file
from tiny import desk

from saefw.choice import Choice
from saefw.outcome import KINDS, ROLES, WAYS, found
from saefw.pictures import png
from saefw.plugin import FigureConfig, Pick, Run, Unit, UserError
from saefw.stages.charts import Pareto, ProbeGrid
from saefw.stages.drawings import BeforeAfter, FeatureGrid
from saefw.stages.feature_charts import ActivationHistograms, ClassCoverage, FeatureDistributions
from saefw.stages.figures import Draw, sized
from saefw.stages.probe_charts import Calibration, Confusion, Faithful
from saefw.stages.steer_charts import DoseResponse, Effects, Specificity
from saefw.style import STYLE, rendered, styled

CLASSES = ("cat", "dog & <co>", "eel")
FIGURES: dict[str, FigureConfig] = {
    "pareto": Pareto(),
    "grid": FeatureGrid(rows=3, images=4),
    "probes": ProbeGrid(),
    "confused": Confusion(),
    "sure": Calibration(),
    "faithful": Faithful(),
    "doses": DoseResponse(),
    "effects": Effects(),
    "specific": Specificity(),
    "case": BeforeAfter(),
    "spread": FeatureDistributions(),
    "values": ActivationHistograms(),
    "covered": ClassCoverage(),
}


def recorded(run: Run) -> Unit:
    unit = Unit("record", {"layer": 1}, label="vit on pets, layer 1")
    run.store.begin(unit)
    run.put(unit, "acts", layer=1, grid_h=2, grid_w=3, backbone="b", dataset="d", n_examples=12)
    run.put(unit, "example", example=np.arange(12), label=np.arange(12) % 3, key=[f"k{i}" for i in range(12)])
    run.put(unit, "class", label=[0, 1, 2], name=list(CLASSES))
    run.keep(unit)
    return unit


def trained(run: Run, acts: Unit, variant: str, **settings: Any) -> Unit:
    unit = Unit("train", {"variant": variant, **settings}, (acts,), label=f"{variant} {settings}")
    run.store.begin(unit)
    run.put(unit, "sae", acts=acts.address, variant=variant, n_features=4, config=json.dumps(settings))
    size = float(settings.get("k", 20))
    run.log(unit, 9, nmse=1 / max(size, 1), l0=size, dead=0.1, n_valid_tokens=1234)
    run.keep(unit)
    return unit


def looked_at(run: Run, sae: Unit, acts: Unit, labelled: bool = True) -> Unit:
    """Four features; the first three each fire on one class, the last never."""
    unit = Unit("visuals", {"labelled": labelled}, (sae, acts), label=sae.label)
    folder = run.store.begin(unit)
    whose: dict[str, Any] = {"sae": sae.address, "acts": acts.address}
    feature, rank = (index.ravel() for index in np.indices((3, 4)))
    run.put(
        unit, "feature", **whose, feature=np.arange(4), frequency=[0.1, 0.2, 0.3, 0], mean=[0.5, 1.5, 0.75, 0],
        p50=[0.5, 1.5, 0.75, 0], p90=[0.8, 2.5, 1.5, 0], p99=[1.0, 3, 2, 0], max=[1.0, 3, 2, 0],
    )  # fmt: skip
    run.put(unit, "feature_histogram", feature=[0, 0, 1, 2], low=[0.5, 1, 2, 1], high=[0.5625, 1.125, 2.25, 1.125],
            n=[30, 10, 8, 6])  # fmt: skip
    run.put(unit, "top_example", **whose, feature=feature, rank=rank, example=rank * 3 + feature, token=0, value=1.0)
    if labelled:
        label, of = (index.ravel() for index in np.indices((3, 3)))
        ap = np.where(label == of, 0.9, 0.4)
        run.put(unit, "class_feature", **whose, label=label, feature=of, ap=ap)
        run.log(unit, 0, n_pure=3)
    run.log(unit, 0, n_live=3)
    maps = torch.randint(0, 255, (4, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_file({"maps": maps}, folder / "maps.safetensors")
    pictures = {
        "unit": np.full(12, unit.address, dtype=object),
        "example": np.arange(12),
        "png": np.array([png(Image.new("RGB", (30, 20), (20 * i, 90, 90))) for i in range(12)], dtype=object),
    }
    with duckdb.connect() as db:
        db.register("pictures", pictures)
        db.execute(f"COPY (FROM pictures) TO '{folder / 'picture.parquet'}' (FORMAT parquet)")
    run.keep(unit)
    return unit


def probed(run: Run, acts: Unit, lr: float, weight_decay: float, **more: Any) -> Unit:
    unit = Unit("probe", {"lr": lr, "weight_decay": weight_decay, **more}, (acts,), label=f"lr {lr}")
    run.store.begin(unit)
    config = json.dumps({"lr": lr, "weight_decay": weight_decay, "steps": 100, **more})
    run.put(unit, "probe", acts=acts.address, variant="linear", config=config)
    good = 0.9 - abs(lr - 0.1) - weight_decay / 10
    measured = {"valid_accuracy": good, "valid_loss": 1 - good, "test_accuracy": good - 0.01, "test_ece": 0.125}
    run.log(unit, 0, **measured, n_valid=50, n_test=60)
    # Of class 0 all are right, of class 1 half are taken for 2, of class 2 all for 0.
    predicted = [0, 1, 0, 0, 2, 0] * 2
    run.put(unit, "prediction", acts=acts.address, example=np.arange(12), predicted=predicted, confidence=0.9)
    edges = np.array([0.8, 0.9])
    run.put(
        unit,
        "calibration",
        bin=[12, 13],
        low=edges,
        high=edges + 0.1,
        n=[4, 8],
        confidence=edges + 0.05,
        accuracy=[0.5, 0.75],
    )
    run.keep(unit)
    return unit


def steered(run: Run, sae: Unit, probe: Unit, seen: Unit, acts: Unit, flips: bool = True, mode: str = "set") -> Unit:
    """Six images, both roles, all ways and kinds, two amounts; by effect features shift the target by 3 an amount."""
    unit = Unit("steer", {"flips": flips}, (sae, probe, seen), label="steered")
    run.store.begin(unit)
    shape = (6, 2, 4, 3, 2)
    example, role, way, kind, amount = (index.ravel() for index in np.indices(shape))
    edit = np.arange(len(example))
    target = (example + role) % 3
    ways = np.array(WAYS)[way]
    run.put(
        unit, "edit", sae=sae.address, acts=acts.address, edit=edit, example=example, mode=mode, place="patches",
        role=np.array(ROLES)[role], way=ways, chosen_by=np.where(kind == 0, ways, np.array(KINDS)[kind]),
        dose=amount + 1.0, target=target,
    )  # fmt: skip
    run.put(unit, "edit_feature", edit=np.repeat(edit, 2), feature=np.tile([1, 2], len(edit)), amount=1.0)
    label = np.tile(np.arange(3), len(edit))
    before = np.where(label == np.repeat(example % 3, 3), 2.0, 0.0)
    by_effect = (kind == 0) & np.isin(way, [0, 3])
    shift = np.where(by_effect, (3 if flips else 0.1) * (amount + 1) + example / 100, 0.0)
    after = before + np.where(label == np.repeat(target, 3), np.repeat(shift, 3), 0)
    run.put(unit, "edit_logit", edit=np.repeat(edit, 3), label=label, before=before, after=after)
    of_class, rank = (index.ravel() for index in np.indices((3, 2)))
    run.put(unit, "choice", way="single", label=of_class, rank=rank, feature=of_class + rank, score=1.0, predicted=1.0)
    values = np.zeros((*shape, 5))
    values[..., 0] = shift.reshape(shape)
    target_er = (np.arange(6)[:, None] + np.arange(2)) % 3
    rows = found(values, target_er, WAYS, [1.0, 2.0])
    run.put(
        unit, "outcome", **{name: list(x) for name, x in zip(rows[0]._fields, zip(*rows, strict=True), strict=True)}
    )
    run.keep(unit)
    return unit


def faithful(run: Run, sae: Unit, probe: Unit, acts: Unit, share: float) -> Unit:
    """Accuracy 0.9 of the tokens and 0.1 without them; so much is recovered of it, and half of it of the loss."""
    unit = Unit("faithfulness", {}, (sae, probe, acts), label=sae.label)
    run.store.begin(unit)
    shares, whose = np.array([share, share / 2]), {"sae": sae.address, "probe": probe.address, "acts": acts.address}
    run.put(
        unit, "faithfulness", **whose, place="patches", split="test", measure=["accuracy", "cross_entropy"], n=60,
        clean=[0.9, 0.2], ablated=[0.1, 2.2], reconstructed=[0.1 + 0.8 * share, 2.2 - share],
        recovered=shares, low=shares - 0.1, high=shares + 0.2,
    )  # fmt: skip
    run.keep(unit)
    return unit


def stocked(path: Path) -> Run:
    """A desk with units of every stage, made from tables."""
    run = desk(path, {"figures": FIGURES})
    acts = recorded(run)
    saes = [trained(run, acts, "topk", k=4), trained(run, acts, "topk", k=8), trained(run, acts, "relu", l1=0.1)]
    seen = [looked_at(run, sae, acts) for sae in saes[:2]]
    probes = [probed(run, acts, lr, decay) for lr in (0.01, 0.1, 1.0) for decay in (0.0, 1.0)]
    run.listed("sweep", saes)
    run.listed("seen", seen)
    run.listed("probes", probes)
    run.listed("faithful", [faithful(run, sae, probes[0], acts, i / 4) for i, sae in enumerate(saes, 1)])
    run.listed("steer", [steered(run, saes[0], probes[0], seen[0], acts)])
    run.publish()
    return run


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return stocked(tmp_path_factory.mktemp("figures"))


def folders(run: Run, *stages: str) -> dict[str, Sequence[Path]]:
    units = [unit for stage in stages for unit in run.made_by(stage)]
    return {stage: [run.store.folder(u) for u in units if u.stage == stage] for stage in {u.stage for u in units}}


def drawn(run: Run, figure: FigureConfig, *stages: str) -> Any:
    with run.db() as db, styled():
        return sized(figure, figure.draw(db, folders(run, *stages)))


def texts(figure: Any) -> str:
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))


def test_the_stage_draws_each_figure_as_png_svg_and_pdf(stock: Run) -> None:
    stage = Draw(figures=list(FIGURES), of=["sweep", "seen", "probes", "faithful", "steer"])
    units = list(stage.units(stock))
    assert [unit.label for unit in units] == list(FIGURES)
    assert [set(unit.needs) for unit in units] == [
        set(stock.made_by("sweep")),
        set(stock.made_by("seen")),
        *[set(stock.made_by("probes"))] * 3,
        set(stock.made_by("faithful")),
        *[set(stock.made_by("steer"))] * 3,
        {*stock.made_by("seen"), *stock.made_by("steer")},
        *[set(stock.made_by("seen"))] * 3,
    ]
    stage.make(units, stock)
    for unit, figure in zip(units, FIGURES.values(), strict=True):
        use = figure.content()["use"]
        folder = stock.store.folder(unit)
        with Image.open(folder / f"{use}.png") as image:
            assert (1100 if figure.wants != ("probe",) or use == "probe-grid" else 800) < image.width < 1300
            assert len(np.unique(np.asarray(image.convert("L")))) > 20
        svg = (folder / f"{use}.svg").read_text()
        assert "<svg" in svg and "dc:date" not in svg
        pdf = (folder / f"{use}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF") and b"CreationDate" not in pdf
        if unit.label in ("pareto", "case"):
            with stock.db() as db, styled():
                again = rendered(sized(figure, figure.draw(db, folders(stock, "sweep", "seen", "steer"))))
            assert again["png"] == (folder / f"{use}.png").read_bytes()
            assert again["svg"].decode() == svg and again["pdf"] == pdf


def test_a_figure_without_its_units_is_skipped_with_a_sentence(stock: Run, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        units = list(Draw(figures=["pareto", "doses", "case"], of=["sweep", "seen"]).units(stock))
    assert [unit.label for unit in units] == ["pareto"]
    assert caplog.messages == [
        "figure 'doses' is not drawn: `of` names no steer stage",
        "figure 'case' is not drawn: `of` names no steer stage",
    ]


def test_the_revision_of_the_figure_and_of_the_stage_count(stock: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def address() -> str:
        (unit,) = Draw(figures=["pareto"], of=["sweep"]).units(stock)
        return unit.address

    found = [address()]
    for cls in (Pareto, Draw):
        monkeypatch.setattr(cls, "revision", 7)
        found.append(address())
    assert len(set(found)) == 3


class Broken(FigureConfig):
    """Cannot be drawn."""

    use: Literal["broken"] = "broken"
    wants: ClassVar[tuple[str, ...]] = ("steer",)

    def draw(self, db: object, units: object) -> Figure:
        """Say why."""
        raise UserError("there is nothing to see")


def test_one_that_cannot_be_drawn_does_not_keep_the_others_from_it(tmp_path: Path) -> None:
    run = desk(tmp_path, {"figures": {**FIGURES, "broken": Broken()}})
    acts = recorded(run)
    sae, probe = trained(run, acts, "topk", k=4), probed(run, acts, 0.1, 0.0)
    seen = looked_at(run, sae, acts)
    run.listed("all", [seen, steered(run, sae, probe, seen, acts, flips=False)])
    stage = Draw(figures=["broken", "case", "doses"], of=["all"])
    units = list(stage.units(run))
    with pytest.raises(UserError, match="figure 'broken' cannot be drawn: there is nothing to see"):
        stage.make(units, run)
    assert [run.store.has(unit) for unit in units] == [False, True, True]
    drawn = (run.folder(units[1]) / "before-after.svg").read_text()
    assert "No edit turned an image into another class." in drawn


def test_pareto_shows_each_sae_at_its_numbers(stock: Run) -> None:
    made = drawn(stock, Pareto(), "sweep")
    (axes,) = made.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines == {"topk": [[4, 0.25], [8, 0.125]], "relu": [[20, 0.05]]}
    said = texts(made)
    assert "k 4\n10% dead" in said and "N = 1,234 valid tokens" in said and "vit on pets, layer 1" in said


def test_many_saes_are_told_apart_and_not_written_over_each_other(tmp_path: Path) -> None:
    run = desk(tmp_path)
    acts = recorded(run)
    saes = [trained(run, acts, f"variant {i}", k=4 + j) for i in range(7) for j in range(3)]
    run.listed("sweep", saes[:-1])
    assert "k 4\n10% dead" in texts(drawn(run, Pareto(), "sweep"))
    run.listed("sweep", saes)
    made = drawn(run, Pareto(), "sweep")
    assert len({(line.get_color(), line.get_marker()) for line in made.axes[0].lines}) == 7
    assert "dead" not in texts(made) and "variant 6" in texts(made)


def test_settings_of_any_kind_are_told(tmp_path: Path) -> None:
    run = desk(tmp_path)
    acts = recorded(run)
    saes = [trained(run, acts, "my", kind=kind, l1=l1) for kind, l1 in (("soft", None), ("hard", [0.1, 2]))]
    run.listed("sweep", saes)
    said = texts(drawn(run, Pareto(), "sweep"))
    assert "kind soft, l1 None\n10% dead" in said and "kind hard, l1 [0.1, 2]\n10% dead" in said
    probes = [probed(run, acts, 0.1, 0.0, widths=widths) for widths in ([64, 64], [32], None)]
    run.listed("probes", probes)
    (axes,) = drawn(run, ProbeGrid(), "probes").axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["None", "[32]", "[64, 64]"]


def test_an_sae_without_a_place_on_the_axes_is_counted(tmp_path: Path) -> None:
    run = desk(tmp_path)
    acts = recorded(run)
    run.listed("sweep", [trained(run, acts, "topk", k=4), trained(run, acts, "topk", k=0.0)])
    made = drawn(run, Pareto(), "sweep")
    assert made.axes[0].lines[0].get_xydata().tolist() == [[4, 0.25]]
    assert "vit on pets, layer 1 (1 of 2 not shown: L0 or error is 0)" in texts(made)
    run.listed("sweep", run.made_by("sweep")[1:])
    assert "(1 of 1 not shown: L0 or error is 0)" in texts(drawn(run, Pareto(), "sweep"))


def test_names_are_no_formulas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_figures.CLASSES", ("$x_{", "$\\frac$", r"\\$"))
    run = stocked(tmp_path)
    for figure, stages in (
        (FeatureGrid(), ["seen"]),
        (ActivationHistograms(), ["seen"]),
        (ClassCoverage(title="$x_{"), ["seen"]),
        (DoseResponse(), ["steer"]),
        (BeforeAfter(), ["seen", "steer"]),
    ):
        made = drawn(run, figure, *stages)
        with styled():
            assert rendered(made)["png"]
        assert "$x_{" in texts(made)


def test_amounts_of_edits_that_multiply_are_factors(tmp_path: Path) -> None:
    run = desk(tmp_path)
    acts = recorded(run)
    sae, probe = trained(run, acts, "topk", k=4), probed(run, acts, 0.1, 0.0)
    run.listed("steer", [steered(run, sae, probe, looked_at(run, sae, acts), acts, mode="scale")])
    said = texts(drawn(run, DoseResponse(), "steer"))
    assert "\nfactor\n" in said and "p99" not in said


def test_feature_grid_shows_the_best_detector_of_each_class(stock: Run) -> None:
    made = drawn(stock, FeatureGrid(rows=2, images=4, sae=Pick(lowest="nmse")), "seen")
    said = texts(made)
    assert "topk {'k': 8}" in said and "3 of 3 features that fire here are pure" in said
    assert "cat" in said and "feature 0\n4 of 4: cat" in said and "eel" not in said
    (axes,) = made.axes
    assert [image.get_array().shape for image in axes.images] == [(1, 256, 3), *[(59, 4 * 94 - 6, 3)] * 2]


def test_feature_grid_without_classes_shows_the_strongest(tmp_path: Path) -> None:
    run = desk(tmp_path)
    acts = recorded(run)
    run.listed("seen", [looked_at(run, trained(run, acts, "topk", k=4), acts, labelled=False)])
    said = texts(drawn(run, FeatureGrid(rows=2), "seen"))
    assert (
        said.index("feature 1") < said.index("feature 2")
        and "feature 0" not in said
        and "3 features that fire here" in said
    )


def test_feature_grid_shows_the_features_or_classes_asked_for(stock: Run) -> None:
    said = texts(drawn(stock, FeatureGrid(features=Choice(order="value", n=2), sae=Pick(lowest="nmse")), "seen"))
    assert said.index("feature 1\n4 of 4: dog & <co>\nup to 3") < said.index("feature 2") and "feature 0" not in said
    assert "from 0 to the feature’s largest value, in SAE units" in said
    said = texts(drawn(stock, FeatureGrid(classes=["eel"]), "seen"))
    assert "feature 2\n4 of 4: eel\nup to 2" in said and "feature 0" not in said and "feature 1" not in said


def test_any_figure_takes_a_size_and_a_title(stock: Run) -> None:
    stages = "sweep", "seen", "probes", "faithful", "steer"
    for figure in FIGURES.values():
        made = drawn(stock, figure.model_copy(update={"width": 5.0, "height": 9.0, "title": "Mine & <b>$"}), *stages)
        assert made.get_size_inches().tolist() == [5, 9]
        assert made._suptitle.get_text() == "Mine & <b>$"
        with styled():
            assert rendered(made)["pdf"]
    with styled(), pytest.raises(UserError) as caught:
        rendered(drawn(stock, Effects(width=2, height=1), "steer"))
    assert str(caught.value) == "2 by 1 inches are too few for what it shows"
    assert drawn(stock, FeatureGrid(title=""), "seen")._suptitle.get_text() == ""


def test_distributions_have_a_point_for_each_feature_that_fires(stock: Run) -> None:
    made = drawn(stock, FeatureDistributions(sae=Pick(lowest="nmse")), "seen")
    points = made.axes[0].collections[0]
    np.testing.assert_allclose(points.get_offsets(), [[0.1, 0.5], [0.2, 1.5], [0.3, 0.75]], rtol=1e-6)
    np.testing.assert_allclose(points.get_array(), 0.9, rtol=1e-6)
    for beside in made.axes[1:3]:
        assert sum(bar.get_height() if beside is made.axes[1] else bar.get_width() for bar in beside.patches) == 3
    said = texts(made)
    assert "topk {'k': 8}" in said and "3 of 4 features fire; medians: frequency 0.2, value 0.75" in said


def test_histograms_are_densities_by_octave_with_the_quantiles(stock: Run) -> None:
    made = drawn(stock, ActivationHistograms(features=Choice(include=[3], order="value")), "seen")
    panels = [axes for axes in made.axes if axes.axison]
    assert [axes.get_title("left") for axes in panels] == ["3", "1 · dog & <co>", "2 · eel", "0 · cat"]
    assert [axes.texts[0].get_text() for axes in panels] == ["never fires", "N = 8", "N = 6", "N = 40"]
    (stairs,) = panels[3].patches
    density, edges, _ = stairs.get_data()
    assert edges.tolist() == [0.5, 0.5625, 1, 1.125]
    assert density == pytest.approx([30 / np.log2(1.125), 0, 10 / np.log2(1.125)])
    assert [line.get_xdata()[0] for line in panels[3].lines] == pytest.approx([0.5, 0.8, 1.0])


def test_coverage_counts_the_classes_whose_best_feature_is_above(tmp_path: Path) -> None:
    run = desk(tmp_path)
    acts = recorded(run)
    saes = [trained(run, acts, "topk", k=k) for k in (4, 8)]
    run.listed("seen", [looked_at(run, sae, acts) for sae in saes])
    made = drawn(run, ClassCoverage(threshold=0.5), "seen")
    lines = {line.get_label(): line.get_xydata() for line in made.axes[0].lines[:2]}
    assert sorted(lines) == ["3 of 3: topk {'k': 4}", "3 of 3: topk {'k': 8}"]
    assert lines["3 of 3: topk {'k': 4}"][:, 1].tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0, 0])
    assert [bar.get_width() for bar in made.axes[1].patches] == pytest.approx([0.9] * 3)
    none = drawn(run, ClassCoverage(threshold=0.95, classes=["eel"]), "seen")
    assert {line.get_label() for line in none.axes[0].lines[:2]} == {f"0 of 1: topk {{'k': {k}}}" for k in (4, 8)}
    assert [label.get_text() for label in none.axes[1].get_yticklabels()] == ["eel"]


def test_a_class_on_which_nothing_fires_is_not_covered(tmp_path: Path) -> None:
    run = desk(tmp_path)
    acts = recorded(run)
    sae = trained(run, acts, "topk", k=4)
    unit = Unit("visuals", {}, (sae, acts), label="topk")
    run.store.begin(unit)
    whose: dict[str, Any] = {"sae": sae.address, "acts": acts.address}
    run.put(unit, "feature", **whose, feature=[0, 1], frequency=[0.1, 0.2], mean=1.0)
    run.put(unit, "class_feature", **whose, label=[0, 1, 1], feature=[1, 0, 1], ap=[0.9, 0.2, 0.25])
    run.log(unit, 0, n_live=2)
    run.keep(unit)
    run.listed("seen", [unit])
    made = drawn(run, ClassCoverage(), "seen")
    assert made.axes[0].lines[0].get_label() == "1 of 3: topk"
    assert [label.get_text() for label in made.axes[1].get_yticklabels()] == list(CLASSES)
    assert [text.get_text() for text in made.axes[1].texts] == ["1", "1"]


def test_probe_grid_frames_the_picked_one_and_says_its_test_accuracy(stock: Run) -> None:
    from matplotlib.patches import Rectangle

    made = drawn(stock, ProbeGrid(), "probes")
    (axes,) = made.axes
    assert axes.images[0].get_array().round(6).tolist() == [[81, 90, 0], [71, 80, -10]]
    (frame,) = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert frame.get_xy() == (0.5, -0.5)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.01", "0.1", "1"]
    said = texts(made)
    assert "89.0% on test (N = 60)" in said and "framed: highest valid accuracy" in said
    worst = drawn(stock, ProbeGrid(probe=Pick(highest="valid_loss")), "probes")
    assert "-11.0% on test" in texts(worst)


def test_confusion_shows_the_share_of_each_class_that_is_taken_for_each(stock: Run) -> None:
    axes, colours = drawn(stock, Confusion(), "probes").axes
    assert axes.images[0].get_array().tolist() == [[100, 0, 0], [0, 50, 50], [100, 0, 0]]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(CLASSES)
    assert sorted(text.get_text() for text in axes.texts) == ["100", "100", "50", "50"]
    assert axes.get_title("left").replace("\n", " ") == "vit on pets, layer 1: 89.0% right (N = 60)"
    assert colours.get_ylabel() == "% of the test images of the class"
    some = drawn(stock, Confusion(classes=["eel", "cat"], width=3.4, title=""), "probes")
    assert some.axes[0].images[0].get_array().tolist() == [[0, 100], [0, 100]] and some.get_figwidth() == 3.4
    assert some.axes[0].get_title("left") == ""
    with pytest.raises(UserError, match=r"^classes: there is no class 'ell'; did you mean 'eel'\?$"):
        drawn(stock, Confusion(classes=["ell"]), "probes")


def test_of_many_classes_the_most_mistaken_are_shown() -> None:
    counts = np.eye(40) * 5
    counts[7, 3], counts[30, 31], counts[31, 30] = 4, 3, 2
    names = {c: str(c) for c in range(40)}
    assert Confusion()._chosen(names, counts, 4) == [3, 7, 30, 31]
    assert Confusion()._chosen(names, counts, 3) == [3, 7]
    assert Confusion()._chosen(names, counts, 40) == list(range(40))


def test_calibration_shows_accuracy_by_confidence(stock: Run) -> None:
    (axes,) = drawn(stock, Calibration(), "probes").axes
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == pytest.approx([0.5, 0.75, -0.1, -0.2])
    (dots,) = [line for line in axes.lines if line.get_marker() == "o"]
    assert dots.get_xydata().tolist() == pytest.approx(np.array([[0.85, 0.5], [0.95, 0.75]]))
    said = axes.get_title("left").replace("\n", " ")
    assert said == "vit on pets, layer 1: expected calibration error 0.125 (N = 60)"


def test_faithfulness_shows_what_is_read_of_each_sae(stock: Run) -> None:
    figure = drawn(stock, Faithful(), "faithful")
    raw, share = figure.axes
    points = {line.get_label(): line.get_xydata().tolist() for line in raw.lines}
    assert points["topk"] == pytest.approx(np.array([[4, 30], [8, 50]])) and points["relu"] == [[20, pytest.approx(70)]]
    levels = {line.get_label(): line.get_ydata()[0] for line in raw.lines if line.get_label().startswith("the tokens")}
    assert levels == pytest.approx({"the tokens as they are": 90, "the tokens at their mean": 10})
    bars = {one.get_label(): one for one in share.containers}
    assert bars["topk: accuracy"][0].get_xydata().tolist() == pytest.approx(np.array([[4, 0.25], [8, 0.5]]))
    assert bars["topk: cross-entropy"][0].get_xydata().tolist() == pytest.approx(np.array([[4, 0.125], [8, 0.25]]))
    (lines,) = bars["topk: accuracy"][2]
    assert lines.get_segments()[0].tolist() == pytest.approx(np.array([[4, 0.15], [4, 0.45]]))
    assert "N = 60" in raw.get_ylabel() and "SAEs of layer 1, lr 0.01" in texts(figure)


def test_dose_response_shows_each_feature_on_the_logits_of_three_classes(stock: Run) -> None:
    made = drawn(stock, DoseResponse(), "steer")
    axes = made.findobj(lambda artist: hasattr(artist, "get_legend_handles_labels"))
    panels = [one for one in axes if one.get_xlabel()]
    assert [one.get_title("left") for one in panels] == [
        "feature 0, of cat\nN = 2 images",
        "feature 1, of dog & <co>\nN = 2 images",
        "feature 2, of eel\nN = 2 images",
    ]
    # Images 2 and 5 are edited towards class 0; their shifts are 3 an amount and a hundredth of their number.
    lines = {line.get_label(): line.get_xydata().tolist() for line in panels[0].lines}
    assert lines["logit of cat"] == [[1, pytest.approx(3.035, rel=1e-6)], [2, pytest.approx(6.035, rel=1e-6)]]
    assert lines["logit of eel"] == [[1, 0], [2, 0]]
    assert (
        lines["control: like features, same norm"] == lines["control: random directions, same norm"] == [[1, 0], [2, 0]]
    )


def test_effects_and_specificity_show_the_outcomes(stock: Run) -> None:
    made = drawn(stock, Effects(amount=1.0), "steer")
    lines = {line.get_label(): line.get_xydata() for line in made.subfigs[0].axes[0].lines}
    np.testing.assert_allclose(lines["features of the class"], [[1, 3.025], [2, 6.025]], rtol=1e-6)
    assert "chosen by predicted effect, amount 1, N = 2 images a class" in texts(made)
    made = drawn(stock, Specificity(classes=["eel", "cat"], title="Mine", width=3.4), "steer")
    said = texts(made)
    assert "Mine" in said and "eel" in said and "dog" not in said and "steered" not in said
    assert made.get_size_inches()[0] == 3.4 and len(made.subfigs[0].axes) == 4


@pytest.mark.parametrize(
    ("figure", "message"),
    [
        (Specificity(classes=["eal"]), "classes: no edit aims at 'eal'; did you mean 'eel'?"),
        (Effects(amount=3.0), "amount: no edit is by 3 (there are: 1, 2)"),
        (BeforeAfter(edit=999), "edit: there is no edit 999 of features"),
        (FeatureGrid(classes=["kat"]), "classes: no feature fires on 'kat'; did you mean 'cat'?"),
        (ClassCoverage(classes=["kat"]), "classes: no image is of 'kat'; did you mean 'cat'?"),
        (FeatureGrid(features=Choice(include=[4])), "include: there is no feature 4; there are 4, from 0 on"),
        (
            ActivationHistograms(features=Choice(log_value=(4, 5)), sae=Pick(lowest="nmse")),
            "no feature of topk {'k': 8} is chosen: none fires and passes the filters",
        ),
    ],
)
def test_what_a_figure_does_not_find_is_named(stock: Run, figure: FigureConfig, message: str) -> None:
    with pytest.raises(UserError) as caught:
        drawn(stock, figure, "seen", "steer")
    assert str(caught.value) == message


def test_before_after_shows_the_surest_turn_or_the_one_that_is_named(stock: Run, tmp_path: Path) -> None:
    made = drawn(stock, BeforeAfter(), "seen", "steer")
    said = texts(made)
    # The last image, 5, is an eel; role "other class" targets (5 + 1) % 3, a cat, and shifts it most at amount 2.
    assert "eel → cat: 2 features set to 2 × p99 on every patch" in said
    assert "feature 1, 4 of 4: dog & <co>" in said and "feature 2, 4 of 4: eel" in said
    bars = [bar.get_width() for bar in made.axes[-1].patches]
    powers = np.exp(np.array([[0, 0, 2], [6.05, 0, 2]]))
    np.testing.assert_allclose(bars, (powers / powers.sum(axis=1, keepdims=True)).ravel(), rtol=1e-6)
    run = stocked(tmp_path)
    (folder,) = folders(run, "steer")["steer"]
    (folder / "first.json").write_text(json.dumps({"edit": 24}))
    (folder / "first.png").write_bytes(png(Image.new("RGB", (8, 8), (250, 0, 0))))
    named = drawn(run, BeforeAfter(), "seen", "steer")
    assert "cat → dog & <co>: 2 features set to 1 × p99" in texts(named)
    np.testing.assert_array_equal(named.axes[0].images[0].get_array()[0, 0], [250, 0, 0])


def test_the_users_own_style_changes_nothing(stock: Run) -> None:
    from matplotlib import rc_context, rcParams

    with styled():
        plain = rendered(drawn(stock, Pareto(), "sweep"))
    with rc_context({"font.size": 20, "axes.facecolor": "red"}):
        with styled():
            assert rendered(drawn(stock, Pareto(), "sweep")) == plain
        assert rcParams["font.size"] == 20 != STYLE["font.size"]


def test_files_are_read_as_pictures(stock: Run) -> None:
    with styled():
        files = rendered(drawn(stock, ProbeGrid(), "probes"))
    with Image.open(BytesIO(files["png"])) as image:
        assert "Software" not in image.info
