"""The stage that makes a gallery: what its scripts and images hold, beside the tables that they were made from."""

import base64
import json
import re
import zlib
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from saefw import pipeline, registry
from saefw.acts import Acts
from saefw.catalog import Catalog
from saefw.errors import NotYet, UserError, escaped
from saefw.pace import Pace
from saefw.plugin import Pick, Run, Unit
from saefw.printer import Printer
from saefw.stages import gallery_data
from saefw.stages.gallery import PAGE, Gallery
from saefw.stages.gallery_data import CLASSES, DETECTORS, FOUND, NEAR, SHARD, neighbours, searched
from saefw.trained import open_sae

NAMES = ("</script><script>x=1</script>", "a\u2028b\"'\\ <!--", "<img src=x onerror=x=1>")
"""Names of classes that would end a script or a line of it, or become a part of a page."""

SETS = f'''
"""The tiny images under names that mean harm, and without classes."""

from typing import Literal

from saefw.plugin import DatasetConfig, hookimpl
from tiny import TinyImages, TinySet


class NamedSet(TinySet):
    """The tiny images."""

    use: Literal["named-set"] = "named-set"

    labels: bool = True
    """Whether they have classes."""

    def build(self, base):
        return NamedImages(self.n, self.seed, self.labels)


class NamedImages(TinyImages):
    """With such names."""

    def __init__(self, n, seed, labels):
        super().__init__(n, seed, frozenset())
        self.classes, self.labels = {NAMES!r} if labels else (), labels

    def __getitem__(self, index):
        example = super().__getitem__(index)
        key = f"<b>\\u2028{{example.key}}</script>"
        return example._replace(key=key, label=example.label if self.labels else -1)


@hookimpl
def saefw_datasets():
    """One: named-set."""
    return [NamedSet]
'''

REGISTRY = f"""
saefw: 1
plugins: [{Path(tiny.__file__)}, sets.py]
device: cpu
backbones: {{tiny: {{use: tiny-vit}}}}
datasets: {{named: {{use: named-set, n: 90}}, bare: {{use: named-set, labels: false}}}}
saes:
  topk: {{use: topk, expansion: 4, lr: 0.003, k: 4}}
stages:
  acts: {{use: record, backbone: tiny, datasets: [named], layers: [0, 1]}}
  bare: {{use: record, backbone: tiny, datasets: [bare], layers: [0]}}
  sweep: {{use: train, acts: acts, saes: [topk], n_tokens: 2048, batch_size: 256}}
  cls: {{use: train, acts: acts, layers: [0], tokens: cls, saes: [topk], n_tokens: 1024, batch_size: 256}}
  other: {{use: train, acts: bare, saes: [topk], n_tokens: 1024, batch_size: 256}}
  looks: {{use: visuals, saes: sweep, acts: acts, top: 6}}
  of_cls: {{use: visuals, saes: cls, acts: acts, top: 6}}
  of_bare: {{use: visuals, saes: other, acts: bare, top: 6}}
  gallery: {{use: gallery, visuals: looks, sae: []}}
  cls_gallery: {{use: gallery, visuals: of_cls, n_features: 5}}
  bare_gallery: {{use: gallery, visuals: of_bare}}
"""

GALLERIES = "gallery", "cls_gallery", "bare_gallery"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The desk of a registry with everything made."""
    folder = tmp_path_factory.mktemp("gallery")
    (folder / "sets.py").write_text(SETS, encoding="utf-8")
    (folder / "registry.yaml").write_text(REGISTRY)
    catalog = Catalog()
    read = registry.read(folder / "registry.yaml", catalog)
    pipeline.run(read, catalog)
    desk = pipeline.desk(read, catalog)
    pipeline.plan(read, catalog, run=desk)
    return desk


def taken(path: Path) -> Any:
    """Return what a script hands to the page."""
    found = re.fullmatch(r'take\("([\w/]+)",(.*)\);\n', path.read_text(encoding="ascii"))
    assert found
    return json.loads(found[2])


def table(folder: Path, name: str) -> dict[str, np.ndarray[Any, Any]]:
    with duckdb.connect() as db:
        return db.execute(f"FROM '{folder / name}.parquet'").fetchnumpy()


def page_of(site: Path, sae: int, feature: int) -> dict[str, Any]:
    number = feature // SHARD
    found: dict[str, Any] = taken(site / f"data/{sae}/{number // 100}/{number}.js")[feature % SHARD]
    return found


def seen(run: Run, stage: str) -> tuple[Path, tuple[Unit, ...]]:
    (unit,) = run.made_by(stage)
    return run.folder(unit) / "site", unit.needs


def test_scripts_say_what_the_tables_say(run: Run) -> None:
    site, units = seen(run, "gallery")
    told = taken(site / "data/gallery.js")
    assert [sae["name"] for sae in told["saes"]] == [unit.label for unit in units] and len(units) == 2
    assert len(told["colours"]) == 256
    for number, unit in enumerate(units):
        folder, acts = run.folder(unit), Acts(run.folder(unit.needs[1]))
        sae, index = told["saes"][number], taken(site / f"data/{number}/index.js")
        features, top, of_class, bins = (
            table(folder, name) for name in ("feature", "top_example", "class_feature", "feature_histogram")
        )
        assert sae["classes"] == [escaped(name) for name in NAMES] and sae["grid"] == [4, 4] and sae["size"] == [16, 16]
        for name in ("frequency", "mean", "p50", "p90", "p99", "max"):
            np.testing.assert_allclose(index["numbers"][name], features[name], rtol=1e-3)
        assert "monosemanticity" not in index["numbers"]
        maps = load_file(folder / "maps.safetensors")["maps"].numpy()
        for s in range(sae["n_features"]):
            page, rows, classes = page_of(site, number, s), top["feature"] == s, of_class["feature"] == s
            images = page.get("images", [])
            assert [image[0] for image in images] == top["example"][rows].tolist()
            assert [image[2] for image in images] == [escaped(acts.keys[e]) for e in top["example"][rows]]
            assert [image[5] for image in images] == top["token"][rows].tolist()
            np.testing.assert_allclose([image[3] for image in images], top["value"][rows], rtol=1e-3)
            labels = acts.labels[top["example"][rows]].tolist()
            assert [image[1] for image in images] == labels
            if images:
                assert zlib.decompress(base64.b64decode(page["maps"])) == maps[s, : len(images)].tobytes()
            commonest = max(dict.fromkeys(labels), key=labels.count, default=-1)  # of equal ones the strongest image's
            assert (index["label"][s], index["most"][s]) == (commonest, labels.count(commonest))
            assert index["shown"][s] == index["n_images"][s] == rows.sum()
            best = sorted(zip(-of_class["ap"][classes], of_class["label"][classes], strict=True))[:CLASSES]
            assert [row[0] for row in page["classes"]] == [label for _, label in best]
            np.testing.assert_allclose([row[1] for row in page["classes"]], [-ap for ap, _ in best], rtol=1e-3)
            assert index["ap"][s] == pytest.approx(-best[0][0] if best else 0, rel=1e-3)
            first, counts = page["histogram"]
            lows = [2.0 ** (code // 8) * (1 + code % 8 / 8) for code in range(first, first + len(counts))]
            told_of = {low: n for low, n in zip(lows, counts, strict=True) if n}
            mine = bins["feature"] == s
            assert told_of == dict(zip(bins["low"][mine].tolist(), bins["n"][mine].tolist(), strict=True))


def test_every_image_is_there_once_and_as_the_model_saw_it(run: Run) -> None:
    site, units = seen(run, "gallery")
    wanted: set[int] = set()
    for unit in units:
        wanted |= set(table(run.folder(unit), "top_example")["example"].tolist())
    assert {unit.needs[1].content["layer"] for unit in units} == {0, 1}
    assert {path.relative_to(site).as_posix() for path in site.rglob("*.webp")} == {
        f"images/0/0/{example}.webp" for example in wanted
    }
    images = tiny.TinyImages(90, 0, frozenset())
    for example in wanted:  # so small an image is kept without loss
        with Image.open(site / f"images/0/0/{example}.webp") as image:
            np.testing.assert_array_equal(np.asarray(image.convert("RGB")), np.asarray(images.image(example)))


def test_neighbours_are_those_of_largest_cosine(run: Run) -> None:
    site, units = seen(run, "gallery")
    for number, unit in enumerate(units):
        sae = open_sae(unit.needs[0].given["sae"], run.folder(unit.needs[0]))
        w_sd = sae.W_dec.detach().double().numpy()
        w_sd /= np.linalg.norm(w_sd, axis=1, keepdims=True)
        fires = table(run.folder(unit), "feature")["frequency"] > 0
        cosine_ss = w_sd @ w_sd.T
        for s in range(len(w_sd)):
            others = [t for t in range(len(w_sd)) if t != s and fires[t] and fires[s]]
            best = sorted(others, key=lambda t: -cosine_ss[s, t])[:NEAR]
            near = page_of(site, number, s)["near"]
            np.testing.assert_allclose([c for _, c in near], cosine_ss[s, best], atol=6e-4)
            np.testing.assert_allclose(cosine_ss[s, [t for t, _ in near]], cosine_ss[s, best], atol=1e-5)


def test_neighbours_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    w_sd, alive_s = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), np.arange(50) % 7 > 0
    whole = neighbours(w_sd, alive_s, lambda n: None)
    monkeypatch.setattr(gallery_data, "ROWS", 9)
    heard: list[int] = []
    near_sk, cosine_sk = neighbours(w_sd, alive_s, heard.append)
    assert heard == [9, 18, 27, 36, 42]
    np.testing.assert_array_equal(near_sk, whole[0])
    np.testing.assert_allclose(cosine_sk, whole[1], rtol=1e-5)
    assert (near_sk[~alive_s] == -1).all() and alive_s[near_sk[alive_s]].all()
    one, _ = neighbours(w_sd, np.arange(50) == 3, lambda n: None)
    assert one.shape == (50, 0)


def test_features_are_found_by_what_they_detect(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    feature, label = (x.ravel() for x in np.meshgrid(np.arange(80), np.arange(9), indexing="ij"))
    ap = rng.permutation(len(feature)) / len(feature)
    by_feature = np.concatenate([(-row).argsort().argsort() + 1 for row in ap.reshape(80, 9)])
    found = searched({"feature": feature, "label": label, "ap": ap, "by_feature": by_feature})
    wanted = set()
    for s, c, p in zip(feature, label, ap, strict=True):
        if (ap[feature == s] > p).sum() < FOUND or (ap[label == c] > p).sum() < DETECTORS:
            wanted.add((s, c))
    assert set(zip(found["feature"], found["label"], strict=True)) == wanted
    assert len(found["ap"]) == len(wanted)


def test_classes_read_in_pieces_are_the_same(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    site, units = seen(run, "gallery")
    acts = Acts(run.folder(units[0].needs[1]))
    tables = gallery_data.Tables.read(run.folder(units[0]), acts.labels)
    none = np.full((tables.d_sae, 0), -1), np.zeros((tables.d_sae, 0))
    monkeypatch.setattr(gallery_data, "AT_ONCE", SHARD)
    nothing = np.zeros(tables.d_sae, dtype=bool)
    found = gallery_data.features(tables, nothing, none, acts.keys, True, tmp_path / "0", lambda n: None)
    assert found == taken(site / "data/0/index.js")["found"]
    assert len(list(tmp_path.rglob("*.js"))) == 2
    for s in range(tables.d_sae):
        whole = page_of(site, 0, s)
        page = taken(tmp_path / f"0/0/{s // SHARD}.js")[s % SHARD]
        assert page == {"histogram": whole["histogram"], "classes": whole["classes"], "near": []}


def test_no_name_can_end_a_script_or_a_line(run: Run) -> None:
    for stage in GALLERIES:
        site, _ = seen(run, stage)
        scripts = list((site / "data").rglob("*.js"))
        assert len(scripts) >= 4
        for path in scripts:
            data = path.read_bytes()
            assert b"<" not in data and data.count(b"\n") == 1 and data.isascii()
        assert any(b"\\u003cb>" in path.read_bytes() for path in scripts)


def test_the_page_loads_nothing_from_elsewhere_and_makes_no_html_of_text() -> None:
    texts = {path.name: path.read_text() for path in PAGE.iterdir()}
    assert "index.html" in texts and "style.css" in texts
    html = texts["index.html"]
    assert "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';" in html
    assert set(re.findall(r'(?:src|href)="([^"#]+)"', html)) == set(texts) - {"index.html"}
    assert " style=" not in html and not re.search(r"\son\w+=", html)
    for name, text in texts.items():
        assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", ""), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(", text), name


def test_features_of_cls_light_no_patch_and_few_show_images(run: Run) -> None:
    site, (unit,) = seen(run, "cls_gallery")
    told, index = taken(site / "data/gallery.js")["saes"][0], taken(site / "data/0/index.js")
    assert told["grid"] is None
    features, of_class = table(run.folder(unit), "feature"), table(run.folder(unit), "class_feature")
    best = [max(of_class["ap"][of_class["feature"] == s], default=0) for s in range(64)]
    alive = [s for s in range(64) if features["frequency"][s] > 0]
    wanted = sorted(alive, key=lambda s: (-best[s], -features["frequency"][s], s))[:5]
    assert len(alive) > 5
    assert [s for s in range(64) if index["shown"][s]] == sorted(wanted)
    pages = [page_of(site, 0, s) for s in range(64)]
    assert all("maps" not in page and ("images" in page) == (s in wanted) for s, page in enumerate(pages))
    assert {image[5] for s in wanted for image in pages[s]["images"]} == {-1}
    examples = {image[0] for s in wanted for image in pages[s]["images"]}
    assert {int(path.stem) for path in site.rglob("*.webp")} == examples


def test_images_without_classes(run: Run) -> None:
    site, _ = seen(run, "bare_gallery")
    told, index = taken(site / "data/gallery.js")["saes"][0], taken(site / "data/0/index.js")
    assert told["classes"] == [] and set(index["label"]) == {-1} and set(index["ap"]) == {0}
    assert index["found"] == {"feature": [], "label": [], "ap": []}
    assert {image[1] for image in page_of(site, 0, int(np.argmax(index["shown"])))["images"]} == {-1}


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "made.json"
    }


def test_a_stopped_run_keeps_its_images(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was cut short, as by a power cut, is made again; the gallery is that of a run at one go."""
    monkeypatch.setattr(run, "_mend", True)
    run.enter("again")
    looks = run.made_by("looks")[:1]
    run.listed("first", looks)
    stage = Gallery(visuals="first", sae=[])
    (unit,) = stage.units(run)

    def stopping(self: Run, *units: Unit, without: Any = ()) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "keep", stopping)
        stage.make([unit], run)
    stopped = files(run.folder(unit))
    images = sorted((run.folder(unit) / "site" / "images").rglob("*.webp"))
    images[0].write_bytes(images[0].read_bytes()[:-20])
    images[1].unlink()
    times = {path.relative_to(run.folder(unit)): path.stat().st_mtime_ns for path in images[2:]}
    stage.make([unit], run)
    folder = run.folder(unit)
    assert {name: (folder / name).stat().st_mtime_ns for name in times} == times
    assert {name: data for name, data in files(folder).items() if name.startswith("site/")} == {
        name: data for name, data in stopped.items() if name.startswith("site/")
    }


def test_images_are_made_smaller_never_larger() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (100, 200, 3), dtype=np.uint8)
    view = Image.fromarray(pixels)
    sizes = {
        (side, quality): Gallery(visuals="looks", side=side, quality=quality)._webp(view)
        for side, quality in ((300, 80), (120, 80), (120, 10))
    }
    shapes = {key: Image.open(BytesIO(data), formats=["WEBP"]).size for key, data in sizes.items()}
    assert shapes == {(300, 80): (200, 100), (120, 80): (120, 60), (120, 10): (120, 60)}
    assert len(sizes[120, 10]) < len(sizes[120, 80])


def test_which_saes_are_shown(run: Run) -> None:
    run.listed("looks too", run.made_by("looks"))
    label = run.made_by("looks")

    def chosen(sae: Any) -> list[str]:
        (unit,) = Gallery(visuals="looks too", sae=sae).units(run)
        return [need.label for need in unit.needs]

    with run.db() as db:
        nmse = dict(db.execute("SELECT unit, value FROM final WHERE name = 'nmse'").fetchall())
    best, worst = (pick(label, key=lambda unit: nmse[unit.needs[0].address]).label for pick in (min, max))
    assert chosen(Pick(lowest="nmse")) == [best]
    assert chosen([Pick(highest="nmse"), Pick(lowest="nmse"), Pick(highest="nmse")]) == [worst, best]
    assert chosen([]) == [unit.label for unit in label]
    with pytest.raises(UserError) as caught:
        chosen(Pick(lowest="nmsee"))
    assert str(caught.value) == "gallery: nothing measured 'nmsee'; did you mean 'nmse'?"
    unmade = Unit("visuals", {}, label[0].needs, "unmade")
    run.listed("not yet", [unmade])
    with pytest.raises(NotYet) as late:
        list(Gallery(visuals="not yet").units(run))
    assert str(late.value) == "decided once not yet is made"
    run.listed("nothing", [])
    assert list(Gallery(visuals="nothing", sae=[]).units(run)) == []


def test_what_it_costs_is_guessed(run: Run) -> None:
    (unit,) = run.made_by("gallery")
    stage = Gallery(visuals="looks", sae=[])
    assert 1e5 < stage.disk(unit, run) < 1e7
    assert 0 < stage.duration([unit], run, Pace()) < 60


def test_a_run_says_where_its_galleries_are(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.base)
    catalog = Catalog()
    done = pipeline.plan(registry.read(run.base / "registry.yaml", catalog), catalog)
    pages = [f"runs/gallery/{run.made_by(name)[0].address}/site/index.html" for name in GALLERIES]
    assert all(Path(page).is_file() for page in pages)
    file = StringIO()
    shown = Printer(Console(file=file, width=80, markup=False, highlight=False))
    shown.summary(done, run.store, Path("registry.yaml"))
    last = file.getvalue().splitlines()[-1]
    assert last.startswith(f"Gallery: {pages[0]}. Tables: ")
    shown.made = 1
    file.truncate(file.seek(0))
    shown.summary(done, run.store, Path("registry.yaml"))
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    assert lines[2:5] == [f"gallery  {pages[0]}", f"         {pages[1]}", f"         {pages[2]}"]


def test_the_embedded_experiment_has_one() -> None:
    read = registry.read(Path(__file__).parents[1] / "registry.yaml", Catalog())
    (member,) = read.families["stages"]["gallery"]
    assert member.entry == Gallery(visuals="visuals", sae=Pick(lowest="nmse", below={"l0": 16, "dead": 0.1}))
