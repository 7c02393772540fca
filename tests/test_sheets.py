"""Contact sheets, and the pictures on them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_visuals import TOP, digests, made, table, trained

from saefw import pictures
from saefw.plugin import NotYet, Pick, Run, Unit, UserError
from saefw.stages import sheets
from saefw.stages.sheets import Sheets, percent
from saefw.stages.visuals import Visuals


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[Unit]]:
    """A desk with an SAE, seen on two recordings."""
    run = trained(tmp_path_factory.mktemp("sheets"))
    units = made(run)
    run.listed("looks", units)
    return run, units


def drawn(run: Run, **settings: Any) -> list[Unit]:
    stage = Sheets(visuals="looks", **settings)
    run.enter("sheets")
    units = list(stage.units(run))
    stage.make([unit for unit in units if not run.store.has(unit)], run)
    return units


def sheet_files(run: Run, unit: Unit) -> dict[int, Path]:
    with run.db() as db:
        rows = db.execute("SELECT feature, file FROM sheet WHERE unit = ?", [unit.address]).fetchall()
    return {feature: run.folder(unit) / file for feature, file in rows}


def test_each_sae_has_sheets_of_the_features_chosen(looked: tuple[Run, list[Unit]]) -> None:
    run, tables = looked
    units = drawn(run, features={"n": 4, "include": [31]})
    assert [unit.needs for unit in units] == [(one,) for one in tables]
    for unit in units:
        assert {path.name for path in run.folder(unit).iterdir()} == {
            "features", "sheet.parquet", "unit.json", "made.json",
        }  # fmt: skip
        files = sheet_files(run, unit)
        assert 31 in files and 4 <= len(files) <= 5
        assert sorted(files.values()) == sorted((run.folder(unit) / "features").iterdir())
        for path in files.values():
            with Image.open(path) as sheet:
                assert sheet.format == "WEBP" and sheet.height == 58 + 148 + 10
                assert sheet.width in [10 + n * 138 for n in (4, 5, TOP)]


def test_all_other_features_are_listed_with_their_statistics(looked: tuple[Run, list[Unit]]) -> None:
    run, _ = looked
    unit = drawn(run, features={"n": 4, "include": [31]})[0]
    with run.db() as db:
        rows = db.execute(
            "SELECT f.feature, f.frequency, s.file FROM feature f LEFT JOIN sheet s ON s.visuals = f.unit AND "
            "s.feature = f.feature AND s.unit = $1 WHERE f.unit = $2 ORDER BY 1",
            [unit.address, unit.needs[0].address],
        ).fetchall()
    assert [row[0] for row in rows] == list(range(32))
    assert {row[0] for row in rows if row[2] is not None} == set(sheet_files(run, unit))


def test_how_it_is_drawn_leaves_the_tables_where_they_are(looked: tuple[Run, list[Unit]]) -> None:
    run, tables = looked
    with pytest.raises(ValueError, match="n_features"):
        Visuals(saes="sweep", acts="acts", top=TOP, n_features=4)  # type: ignore[call-arg]
    settings: list[Mapping[str, Any]] = [{}, {"side": 64}, {"images": 2}, {"features": {"seed": 1}}]
    units = [next(iter(Sheets(visuals="looks", **some).units(run))) for some in settings]
    assert len({unit.address for unit in units}) == 4 and {unit.needs for unit in units} == {(tables[0],)}


def test_a_sheet_shows_the_images_that_are_lit_and_the_scale(looked: tuple[Run, list[Unit]]) -> None:
    """Tiles are those of `lit`, up to what WebP loses; the bar runs through the colours of a patch."""
    run, tables = looked
    top = table(run, tables[0], "top_example")
    feature = int(top["feature"][0])
    unit = drawn(run, features={"n": 0, "include": [feature]}, images=3, side=64)[0]
    with Image.open(sheet_files(run, unit)[feature]) as sheet:
        assert sheet.size == (10 + 4 * 74, 58 + 84 + 10)
        shown = np.asarray(sheet.convert("RGB"), dtype=int)
    examples = top["example"][top["feature"] == feature][:3].tolist()
    views = pictures.read(run.folder(tables[0]) / "picture.parquet", examples)
    maps = pictures.maps(run.folder(tables[0]) / "maps.safetensors", feature)
    for i, example in enumerate(examples):
        wanted = np.asarray(pictures.lit(views[example], maps[i].reshape(4, 4), 64), dtype=int)
        found = shown[58:122, 10 + 74 * i : 74 + 74 * i]
        assert abs(found - wanted).mean() < 8
        assert abs(found - wanted).mean() < abs(found - wanted[:, ::-1]).mean() / 2
    strip = shown[17:27].mean(axis=0)
    ramp = np.asarray(Image.fromarray(pictures.bar()[None]).resize((120, 1)), dtype=int)[0]
    assert min(abs(strip[x : x + 120] - ramp).mean() for x in range(shown.shape[1] - 120)) < 8


def test_one_of_the_saes_can_be_picked(looked: tuple[Run, list[Unit]], tmp_path: Path) -> None:
    run, tables = looked
    (unit,) = drawn(run, sae=Pick(highest="n_images"), features={"n": 1})
    assert unit.needs == (tables[0],)
    with pytest.raises(UserError) as caught:
        drawn(run, sae=Pick(highest="n_imagse"))
    assert str(caught.value) == "looks: nothing measured 'n_imagse'; did you mean 'n_images'?"
    fresh = trained(tmp_path)
    fresh.listed("looks", list(Visuals(saes="sweep", acts="acts", top=TOP).units(fresh)))
    with pytest.raises(NotYet, match="decided once looks is made"):
        drawn(fresh, sae=Pick(highest="n_live"))
    assert len(list(Sheets(visuals="looks").units(fresh))) == 2


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"features": {"include": [32]}}, "sheets: include: feature 32 is not among the 32 of topk"),
        (
            {"features": {"of_class": "gren"}},
            "sheets: features: of_class: no such class (got 'gren'); did you mean 'green'?",
        ),
        ({"visuals": "sweep"}, "'sweep' is a stage of train, not of visuals"),
    ],
)
def test_what_does_not_fit_is_said(looked: tuple[Run, list[Unit]], settings: dict[str, Any], why: str) -> None:
    run, _ = looked
    stage = Sheets(**{"visuals": "looks", **settings})
    with pytest.raises(UserError) as caught:
        stage.make(list(stage.units(run)), run)
    assert str(caught.value).partition(", tiny")[0] == why


def test_each_image_is_decoded_once(looked: tuple[Run, list[Unit]], monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = looked
    decoded = []
    opened = pictures.opened

    def counting(data: bytes) -> Image.Image:
        decoded.append(data)
        return opened(data)

    monkeypatch.setattr(pictures, "opened", counting)
    units = drawn(run, features={"n": 20, "seed": 5})
    n_tiles = n_images = 0
    for unit in units:
        top = table(run, unit.needs[0], "top_example")
        examples = top["example"][np.isin(top["feature"], list(sheet_files(run, unit)))]
        n_tiles, n_images = n_tiles + len(examples), n_images + len(set(examples))
    assert len(decoded) == n_images < n_tiles


def test_stopped_and_started_again_it_draws_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looked: tuple[Run, list[Unit]]
) -> None:
    run = trained(tmp_path)
    run.listed("looks", made(run)[:1])
    webp, sizes, stop = pictures.webp, list[int](), [4]

    def counting(image: Image.Image) -> bytes:
        if len(sizes) == stop[0]:
            raise KeyboardInterrupt
        sizes.append(len(data := webp(image)))
        return data

    monkeypatch.setattr(sheets, "CHECKPOINT", 0.0)
    monkeypatch.setattr(pictures, "webp", counting)
    with pytest.raises(KeyboardInterrupt):
        drawn(run, features={"n": 9})
    folder = run.store.partial(next(iter(Sheets(visuals="looks", features={"n": 9}).units(run))))
    first, *_ = sorted((folder / "features").iterdir())
    first.write_bytes(first.read_bytes()[:-1])  # a sheet that is cut short is drawn again
    stop[0] = -1
    (unit,) = drawn(run, features={"n": 9})
    assert len(sizes) == 4 + (9 - 4) + 1
    whole = looked[0]
    (wanted, _) = drawn(whole, features={"n": 9})
    assert digests(run.folder(unit)) == digests(whole.folder(wanted))


def test_an_sae_of_cls_has_no_bar(looked: tuple[Run, list[Unit]]) -> None:
    run, _ = looked
    run.listed("looks at cls", made(run, tokens="cls")[:1])
    run.enter("sheets")
    stage = Sheets(visuals="looks at cls", features={"n": 1})
    units = list(stage.units(run))
    stage.make(units, run)
    (path,) = sheet_files(run, units[0]).values()
    with Image.open(path) as sheet:
        x_hwc = np.asarray(sheet.convert("RGB"), dtype=int)
    assert (x_hwc[15:30, -150:] > 240).all()


def test_the_colours_are_uniform() -> None:
    """By CIELAB: on grey of any shade, equal steps of a value are nearly equal steps to the eye."""
    linear = np.vectorize(lambda c: c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    for grey in (50, 128, 200):
        rgb = pictures.shades()[::15, grey] / 255
        xyz = linear(rgb) @ to_xyz.T / np.array([0.9505, 1, 1.089])
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)
        steps = np.linalg.norm(np.diff(lab, axis=0), axis=1)
        assert steps.min() > 0.4 * steps.max()


def test_patches_glow_where_they_lie() -> None:
    view = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8))
    patches = np.zeros((2, 3), dtype=np.uint8)
    patches[1, 2], patches[0, 1] = 255, 90
    found = np.asarray(pictures.lit(view, patches, 36))
    grey = np.asarray(view.convert("L"))
    for y in range(24):
        for x in range(36):
            value = patches[y * 2 // 24, x * 3 // 36]
            assert found[y, x].tolist() == pictures.shades()[value, grey[y, x]].tolist()
    off = found[patches[np.arange(24) // 12][:, np.arange(36) // 12] == 0]
    assert (off.max(axis=1) == off.min(axis=1)).all() and off.max() < 140


@pytest.mark.parametrize(("share", "text"), [(0, "0 %"), (0.034, "3.4 %"), (1, "100 %"), (0.000123, "0.012 %")])
def test_percent_has_two_digits(share: float, text: str) -> None:
    assert percent(share) == text
