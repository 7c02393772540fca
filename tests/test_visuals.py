"""The stage that looks at features, on a tiny recording and a tiny SAE."""

import hashlib
import shutil
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import TinyImages, TinySet, TinyVit, desk
from torch.nn.functional import normalize

from saefw import pictures
from saefw.acts import Acts
from saefw.facts import names
from saefw.plugin import BackboneInfo, Pick, Run, SaeConfig, Unit, UserError
from saefw.stages import visuals
from saefw.stages.drawings import FeatureGrid
from saefw.stages.record import Record
from saefw.stages.train import Train
from saefw.stages.visuals import Visuals
from saefw.style import styled
from saefw.tally import IMAGES, PAIRS, Sizes, Tally
from saefw.trained import open_sae
from saefw_digits_vit import DigitsVit
from saefw_topk import TopK

TOP = 6
FEATURE_TABLES = "feature", "feature_histogram", "top_example", "top_feature", "class_feature"


def trained(path: Path) -> Run:
    """A desk with two recordings, and an SAE trained on the first."""
    saes: dict[str, Any] = {"topk": TopK(k=3, expansion=2, lr=0.003)}
    run = desk(path, {"saes": saes, "datasets": {"other": TinySet(n=30, seed=5)}})
    stages = {
        "acts": Record(backbone="tiny", datasets=["tiny", "other"], layers=[0]),
        "sweep": Train(acts="acts", saes=["topk"], n_tokens=8192, batch_size=256),
    }
    for name, stage in stages.items():
        run.enter(name)
        units = list(stage.units(run))
        if name == "sweep":
            units = units[:1]
        run.listed(name, units)
        stage.make(units, run)
    return run


def made(run: Run, **settings: Any) -> list[Unit]:
    stage = Visuals(saes="sweep", acts="acts", top=TOP, **settings)
    run.enter("visuals")
    units = list(stage.units(run))
    stage.make([unit for unit in units if not run.store.has(unit)], run)
    return units


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[Unit]]:
    run = trained(tmp_path_factory.mktemp("visuals"))
    return run, made(run)


@pytest.fixture(scope="module")
def of_cls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[Unit]]:
    """The same, and an SAE of [CLS] beside it, seen together."""
    run = trained(tmp_path_factory.mktemp("cls"))
    (patches,) = run.made_by("sweep")
    run.enter("cls")
    stage = Train(acts="acts", saes=["topk"], tokens="cls", n_tokens=8192, batch_size=256)
    units = list(stage.units(run))[:1]
    stage.make(units, run)
    run.listed("sweep", [patches, *units])
    return run, made(run)


def test_an_sae_of_cls_is_ranked_by_its_value_there(
    of_cls: tuple[Run, list[Unit]], seen: tuple[Run, list[Unit]]
) -> None:
    run, units = of_cls
    assert units[:2] == seen[1] and len(units) == 4
    for unit in units[2:]:
        acts = Acts(run.folder(unit.needs[1]))
        examples = acts.of_split("train")
        ((_, x_e1d),) = acts.read("cls", examples, batch=1000)
        x = open_sae(unit.needs[0].given["sae"], run.folder(unit.needs[0])).dense(x_e1d[:, 0]).numpy()
        found, top = table(run, unit, "feature"), table(run, unit, "top_example")
        maps = load_file(run.folder(unit) / "maps.safetensors")["maps"]
        np.testing.assert_allclose(found["frequency"], (x > 0).mean(axis=0), rtol=1e-6)
        assert np.ma.getmaskarray(found["monosemanticity"]).all()
        assert np.ma.getmaskarray(top["token"]).all() and maps.shape == (32, TOP, 1)
        for s in range(32):
            wanted = [i for i in np.argsort(-x[:, s], kind="stable") if x[i, s] > 0][:TOP]
            assert top["example"][top["feature"] == s].tolist() == examples[wanted].tolist()
            np.testing.assert_allclose(top["value"][top["feature"] == s], x[wanted, s], rtol=1e-5)
            lit = np.rint(x[wanted, s] / max(x[:, s].max(), 1e-9) * 255)
            assert abs(maps[s, : len(wanted), 0].numpy() - lit).max(initial=0) <= 1
        with run.db() as db:
            told = names(db, unit.address, TOP, acts.grid)
        assert {name.place for name in told.values()} == {0.0} and max(name.purity for name in told.values()) > 0.3


def test_the_pictures_of_an_sae_of_cls_are_as_they_are(of_cls: tuple[Run, list[Unit]]) -> None:
    run, units = of_cls
    views = pictures.read(run.folder(units[2]) / "picture.parquet", range(60))
    view = next(iter(views.values()))
    assert pictures.on_grid(np.zeros(1, dtype=np.uint8), (4, 4)) is None
    np.testing.assert_array_equal(np.asarray(pictures.lit(view, None, 64)), np.asarray(pictures.enlarged(view, 64)))
    with run.db() as db, styled():
        figure: Any = FeatureGrid(rows=2, images=3, sae=Pick()).draw(db, {"visuals": [run.folder(units[2])]})
    assert len(figure.axes[0].images) == 2


def test_the_disk_it_needs_is_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps, pictures, and the pairs and records that wait until all images are counted."""
    run, held = trained(tmp_path), dict[str, int]()

    def keep(unit: Unit, without: Sequence[str]) -> None:
        files = {path.name: path.stat().st_size for path in run.folder(unit).iterdir()}
        held[unit.address] = sum(files[name] for name in ("maps.safetensors", "picture.parquet", PAIRS, IMAGES))
        assert files[PAIRS] > 0

    monkeypatch.setattr(run, "keep", keep)
    stage = Visuals(saes="sweep", acts="acts", top=TOP)
    for unit in made(run):
        # A patch is guessed to have 16 by 16 pixels: here they are 4 by 4.
        assert held[unit.address] / 2 < stage.disk(unit, run) < 8 * held[unit.address]


def test_what_does_not_fit_in_memory_is_seen_in_another_pass(
    tmp_path: Path, of_cls: tuple[Run, list[Unit]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(tmp_path)
    (sae,) = run.made_by("sweep")
    twin = Unit(sae.stage, {**sae.content, "seed": 1}, sae.needs, "twin", sae.given)
    shutil.copytree(run.folder(sae), run.store.partial(twin))
    (run.store.partial(twin) / "unit.json").write_text(twin.text)
    run.store.keep(twin, 1, {})
    run.listed("sweep", [sae, twin])
    held: list[int] = []
    fitting = visuals._fitting

    def counted(jobs: Any, memory: float) -> Any:
        for some in fitting(jobs, memory):
            held.append(len(some))
            yield some

    monkeypatch.setattr(visuals, "_fitting", counted)
    one = visuals.Job(unit := of_cls[1][0], Path(), sizes := Sizes(32, 16, 3, TOP)).bytes
    assert one > sizes.bytes
    units = made(run, memory_mb=1.5 * one / 2**20)
    assert held == [1, 1, 1, 1]
    assert digests(run.folder(units[0])) == digests(of_cls[0].folder(unit))
    for made_of in units:
        shutil.rmtree(run.folder(made_of))
    held.clear()
    again = made(run)
    assert held == [2, 2] and digests(run.folder(again[0])) == digests(of_cls[0].folder(unit))


def codes(run: Run, unit: Unit, tokens: str = "patches") -> tuple[np.ndarray[Any, Any], Any]:
    """All codes of the unit's train images [e, p, s], in one go, and their indices."""
    acts = Acts(run.folder(unit.needs[1]))
    config: SaeConfig = unit.needs[0].given["sae"]
    sae = open_sae(config, run.folder(unit.needs[0]))
    examples = acts.of_split("train")
    ((_, x_epd),) = acts.read(tokens, examples, batch=1000)
    return sae.dense(x_epd.reshape(-1, acts.d_model)).view(*x_epd.shape[:2], -1).numpy(), examples


def table(run: Run, unit: Unit, name: str) -> dict[str, Any]:
    with duckdb.connect() as db:
        return db.execute(f"FROM '{run.folder(unit) / name}.parquet'").fetchnumpy()


def test_a_unit_for_each_recording_of_the_layer(seen: tuple[Run, list[Unit]]) -> None:
    run, units = seen
    assert [unit.needs[0] for unit in units] == run.made_by("sweep") * 2
    assert [unit.needs[1] for unit in units] == run.made_by("acts")
    assert all(run.store.has(unit) for unit in units)
    assert units[1].label.endswith("seen on tiny on other, layer 0")


def test_tables_are_those_of_all_codes_at_once(seen: tuple[Run, list[Unit]]) -> None:
    run, units = seen
    for unit in units:
        x, examples = codes(run, unit)
        found = table(run, unit, "feature")
        assert found["feature"].tolist() == list(range(32))
        assert set(found["sae"]) == {unit.needs[0].address} and set(found["acts"]) == {unit.needs[1].address}
        np.testing.assert_allclose(found["frequency"], (x > 0).mean(axis=(0, 1)), rtol=1e-6)
        np.testing.assert_allclose(found["max"], x.max(axis=(0, 1)), rtol=1e-5)
        for s in range(32):
            positive = x[..., s][x[..., s] > 0]
            for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
                wanted = np.quantile(positive, share, method="lower") if len(positive) else 0
                assert found[name][s] == pytest.approx(wanted, rel=1 / 128)
        peak = x.max(axis=1)
        top = table(run, unit, "top_example")
        for s in range(32):
            wanted = [examples[i] for i in np.argsort(-peak[:, s], kind="stable") if peak[i, s] > 0][:TOP]
            assert top["example"][top["feature"] == s].tolist() == wanted


def test_maps_pictures_and_metrics_belong_to_the_top_images(seen: tuple[Run, list[Unit]]) -> None:
    run, units = seen
    for unit, config in zip(units, (TinySet(), TinySet(n=30, seed=5)), strict=True):
        x, examples = codes(run, unit)
        top, maps = table(run, unit, "top_example"), load_file(run.folder(unit) / "maps.safetensors")["maps"]
        assert maps.shape == (32, TOP, 16) and maps.dtype == torch.uint8
        place = {example: i for i, example in enumerate(examples)}
        for feature, rank, example, token in zip(
            *(top[name] for name in ("feature", "rank", "example", "token")), strict=True
        ):
            wanted = x[place[example], :, feature] / x[..., feature].max() * 255
            assert abs(maps[feature, rank].numpy() - wanted).max() <= 0.51
            assert token == wanted.argmax()
        occurring = sorted(set(top["example"].tolist()))
        views = pictures.read(run.folder(unit) / "picture.parquet", occurring)
        assert sorted(views) == occurring
        dataset, backbone = config.build(Path()), TinyVit().build("cpu")
        for example, view in views.items():
            np.testing.assert_array_equal(np.asarray(view), np.asarray(backbone.view(dataset[example].load())))
        with run.db() as db:
            final = dict(db.execute("SELECT name, value FROM final WHERE unit = ?", [unit.address]).fetchall())
        labels = np.arange(60) % 3
        pure = sum(
            np.bincount(labels[top["example"][top["feature"] == s]], minlength=3).max() >= 0.8 * TOP for s in range(32)
        )
        assert final == {"n_live": (x > 0).any(axis=(0, 1)).sum(), "n_images": len(examples), "n_pure": pure}


def test_the_view_counts_the_images_of_each_unit_apart(seen: tuple[Run, list[Unit]]) -> None:
    run, units = seen
    more = made(run, rank_by="sum")
    with run.db() as db:
        rows = db.execute("SELECT unit, feature, class, n FROM feature_class").fetchall()
    for unit in [*units, *more]:
        top = table(run, unit, "top_example")
        wanted = {
            (unit.address, s, name): n
            for s in range(32)
            for label, name in enumerate(("red", "green", "blue"))
            if (n := (top["example"][top["feature"] == s] % 3 == label).sum())
        }
        assert {row[:3]: row[3] for row in rows if row[0] == unit.address} == wanted


def test_the_folder_holds_tables_maps_and_pictures(seen: tuple[Run, list[Unit]]) -> None:
    run, units = seen
    left = {path.name for path in run.folder(units[0]).iterdir()}
    assert left == {
        *(f"{name}.parquet" for name in FEATURE_TABLES),
        "metric.parquet", "picture.parquet", "maps.safetensors", "unit.json", "made.json",
    }  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "made.json"
    }


def test_stopped_and_started_again_it_makes_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: tuple[Run, list[Unit]]
) -> None:
    run = trained(tmp_path)
    monkeypatch.setattr(visuals, "READ", 8 * 16)
    add, images = Tally.add, []

    def stopping(self: Tally, example_e: torch.Tensor, *rest: Any) -> None:
        images.append(len(example_e))
        if len(images) == 4:
            raise KeyboardInterrupt
        add(self, example_e, *rest)

    settings: dict[str, Any] = {"checkpoint_every": 0.0}
    monkeypatch.setattr(visuals, "SELDOM", 0)
    monkeypatch.setattr(Tally, "add", stopping)
    with pytest.raises(KeyboardInterrupt):
        made(run, **settings)
    units = made(run, **settings)
    assert sum(images[:3]) + sum(images[4:]) == 42 + 21  # each train image of both recordings is looked at once
    assert units == seen[1]
    for unit in units:
        assert digests(run.folder(unit)) == digests(seen[0].folder(unit))


@pytest.mark.parametrize("file", [visuals.CHECKPOINT, PAIRS, IMAGES])
def test_a_damaged_checkpoint_is_not_used(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    seen: tuple[Run, list[Unit]],
    file: str,
) -> None:
    run = trained(tmp_path)
    monkeypatch.setattr(visuals, "SELDOM", 0)
    monkeypatch.setattr(visuals, "READ", 8 * 16)
    settings: dict[str, Any] = {"checkpoint_every": 0.0}

    def stopping(self: Run, *units: Unit, without: Sequence[str] = ()) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "keep", stopping)
        made(run, **settings)
    path = run.store.partial(seen[1][0]) / file
    data = path.read_bytes()
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    for unit in made(run, **settings):
        assert digests(run.folder(unit)) == digests(seen[0].folder(unit))
    assert caplog.messages == [f"{path}: damaged; it is not used, and what it held is made again"]


def test_what_does_not_fit_is_said(tmp_path: Path, seen: tuple[Run, list[Unit]]) -> None:
    run, _ = seen
    (sae,) = run.made_by("sweep")
    run.listed("elsewhere", list(Record(backbone="tiny", datasets=["tiny"], layers=[1]).units(run)))
    with pytest.raises(UserError, match="'elsewhere' has no recording of the backbone and layer of topk"):
        list(Visuals(saes="sweep", acts="elsewhere").units(run))
    without = desk(tmp_path, {"datasets": {"tiny": TinySet(n=3)}})
    stage = Record(backbone="tiny", datasets=["tiny"], layers=[0])
    units = list(stage.units(without))
    stage.make(units, without)
    unit = Unit("visuals", {"tokens": None}, (sae, units[0]), "topk")
    with pytest.raises(UserError, match="no image is in the test split"):
        Visuals(saes="sweep", acts="acts", split="test").make([unit], without)


@pytest.mark.parametrize("rank_by", ["sum", "cls"])
def test_images_are_ranked_as_asked(seen: tuple[Run, list[Unit]], rank_by: Any) -> None:
    run, _ = seen
    unit = made(run, rank_by=rank_by)[0]
    x, examples = codes(run, unit)
    score = x.astype(np.float64).sum(axis=1) if rank_by == "sum" else codes(run, unit, "cls")[0][:, 0]
    top = table(run, unit, "top_example")
    for s in range(32):
        rows, ranked = top["feature"] == s, np.argsort(-score[:, s], kind="stable")
        wanted = [i for i in ranked if score[i, s] > 0][:TOP]
        np.testing.assert_allclose(top["score"][rows], score[wanted, s], rtol=1e-5)
        assert set(top["example"][rows].tolist()) == set(examples[wanted].tolist())
        place = {example: i for i, example in enumerate(examples)}
        at = [place[example] for example in top["example"][rows].tolist()]
        np.testing.assert_allclose(top["value"][rows], x[at, :, s].max(axis=1), rtol=1e-5)


def test_an_sae_of_patches_can_be_seen_on_cls(seen: tuple[Run, list[Unit]]) -> None:
    run, _ = seen
    unit = made(run, tokens="cls")[0]
    x, _ = codes(run, unit, "cls")
    np.testing.assert_allclose(table(run, unit, "feature")["frequency"], (x[:, 0] > 0).mean(axis=0), rtol=1e-6)
    assert np.ma.getmaskarray(table(run, unit, "top_example")["token"]).all()


@pytest.mark.parametrize("tokens", ["patches", "cls"])
def test_monosemanticity_is_by_the_embeddings_of_the_backbone(tmp_path: Path, tokens: Any) -> None:
    run = desk(
        tmp_path,
        {
            "backbones": {"tiny": DigitsVit()},
            "datasets": {"tiny": TinySet(n=40)},
            "saes": {"topk": TopK(k=3, expansion=1)},
        },
    )
    for name, stage in {
        "acts": Record(backbone="tiny", datasets=["tiny"], layers=[3]),
        "sweep": Train(acts="acts", saes=["topk"], n_tokens=4096, batch_size=256),
    }.items():
        run.enter(name)
        units = list(stage.units(run))
        run.listed(name, units)
        stage.make(units, run)
    (unit,) = made(run, tokens=tokens, monosemanticity=True)
    acts = Acts(run.folder(unit.needs[1]))
    examples = acts.of_split("train")
    ((_, x_etd),) = acts.read("all", examples, batch=1000)
    sae = open_sae(unit.needs[0].given["sae"], run.folder(unit.needs[0]))
    kept = slice(1, None) if tokens == "patches" else slice(0, 1)
    score = sae.dense(x_etd[:, kept].reshape(-1, 64)).view(len(examples), -1, 64).amax(dim=1).double().numpy()
    backbone = DigitsVit().build("cpu")
    with torch.no_grad():
        embedding = normalize(backbone.embedding(backbone.tail(x_etd, 4)), dim=1).double().numpy()
    low, high = score.min(axis=0), score.max(axis=0)
    found = table(run, unit, "feature")["monosemanticity"]
    with run.db() as db:
        asked = "SELECT value FROM final WHERE unit = ? AND name = 'monosemanticity'"
        assert db.execute(asked, [unit.address]).fetchall() == [(pytest.approx(found.mean()),)]
    cosine = np.triu(embedding @ embedding.T, 1)
    for s in range(64):
        if high[s] == low[s]:
            assert np.ma.getmaskarray(found)[s]
            continue
        a = (score[:, s] - low[s]) / (high[s] - low[s])
        weight = np.triu(np.outer(a, a), 1)
        if weight.sum() > 0:
            assert found[s] == pytest.approx((weight * cosine).sum() / weight.sum(), rel=1e-4)
    assert np.ma.count(found) > 8


@pytest.mark.parametrize(
    ("held", "settings", "why"),
    [
        ("cls", {}, "holds [CLS] alone; record it with tokens: all or patches"),
        (9, {}, "holds 9 patches of each image; record it with tokens: all or patches"),
        ("patches", {"tokens": "cls"}, "holds patches alone; record it with tokens: all or cls"),
        ("patches", {"rank_by": "cls"}, "holds patches alone; record it with tokens: all"),
    ],
)
def test_a_recording_that_does_not_hold_what_is_looked_at(
    seen: tuple[Run, list[Unit]], held: Any, settings: dict[str, Any], why: str
) -> None:
    run, _ = seen
    unit, _ = run.made_by("acts")
    part = Unit("record", {**unit.content, "tokens": held}, label=unit.label, given=unit.given)
    run.listed("part", [part])
    with pytest.raises(UserError) as caught:
        list(Visuals(saes="sweep", acts="part", **settings).units(run))
    assert str(caught.value) == f"visuals: acts: {unit.label} {why}"
    with pytest.raises(UserError) as caught:
        list(Visuals(saes="sweep", acts="acts", monosemanticity=True).units(run))
    assert str(caught.value) == f"visuals: monosemanticity: the backbone of {unit.label} gives no image embedding"


def test_a_backbone_without_cls(seen: tuple[Run, list[Unit]], monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = seen
    bare = BackboneInfo(d_model=16, n_blocks=3, grid=(4, 4), prefix=())
    monkeypatch.setattr(TinyVit, "describe", lambda self: bare)
    label = run.made_by("acts")[0].label
    for settings, place in (({"tokens": "cls"}, "tokens"), ({"rank_by": "cls"}, "rank_by")):
        with pytest.raises(UserError) as caught:
            list(Visuals(saes="sweep", acts="acts", **settings).units(run))
        assert str(caught.value) == f"visuals: {place}: the backbone of {label} has no [CLS]; it has patches"


def test_an_image_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(tmp_path)

    def gone(self: TinyImages, index: int) -> Image.Image:
        raise FileNotFoundError("no such file")

    monkeypatch.setattr(TinyImages, "image", gone)
    with pytest.raises(UserError, match=r"^image 'tiny-\d\d\d' cannot be read \(it is missing\)$"):
        made(run)


def test_equal_pictures_are_equal_bytes(tmp_path: Path) -> None:
    for written in (pictures.png, pictures.webp):
        one, other = (written(Image.new("RGB", (4, 4), (0, 0, 0))) for _ in range(2))
        assert one == other
        assert Image.open(BytesIO(one)).convert("RGB").getpixel((0, 0)) == (0, 0, 0)
    with pytest.raises(UserError, match="cannot be read"):
        pictures.read(tmp_path / "picture.parquet", [1])
