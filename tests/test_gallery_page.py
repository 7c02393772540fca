"""The pages of a gallery in a real browser, with 24,576 features: what search, map, list and keys show."""

import json
import shutil
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import duckdb
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from saefw.stages.gallery import PAGE, _colours
from saefw.stages.gallery_data import SCRIPTS, SHARD, Tables, features, index, script

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

N, TOP, GRID, N_IMAGES = 24_576, 4, (3, 5), 40
CLASSES = ["tabby cat", "cat", "12", "</script><b>dog", "tiger cat", "\\u2028 \"owl'"]
SHOWN = 600
"""The first features show images; of those, every fifth fires nowhere."""

Array = np.ndarray[Any, Any]


class Site(NamedTuple):
    """A gallery of made-up features, and what is true of them."""

    url: str
    frequency_s: Array
    mean_s: Array
    max_s: Array
    ap_sc: Array
    """Average precision; 0 of a class on which the feature does not fire."""

    label_s: Array
    most_s: Array
    maps_stp: Array


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("site")
    rng = np.random.default_rng(0)
    feature = np.arange(N)
    fires = (feature % 5 > 0).astype(np.float64)
    # In four digits, as the page has them.
    frequency_s, mean_s, max_s = (
        np.array([float(f"{x:.4g}") for x in 10 ** rng.uniform(low, high, N) * fires])
        for low, high in ((-6, -0.3), (-2, 1), (1, 2))
    )
    ap_sc = np.array([[float(f"{x:.4g}") for x in row] for row in rng.random((N, len(CLASSES))) ** 4 * fires[:, None]])
    ap_sc[rng.random(ap_sc.shape) < 0.3] = 0
    label_e = np.arange(N_IMAGES) % len(CLASSES)
    alive = feature[fires > 0]
    tables = {
        "feature": {
            "feature": feature, "frequency": frequency_s, "mean": mean_s, "p50": mean_s, "p90": mean_s,
            "p99": mean_s, "max": max_s, "monosemanticity": np.full(N, np.nan),
        },
        "top_example": {
            "feature": alive.repeat(TOP), "rank": np.tile(np.arange(TOP), len(alive)),
            "example": rng.integers(0, N_IMAGES, len(alive) * TOP), "token": np.zeros(len(alive) * TOP, dtype=int),
            "value": max_s[alive].repeat(TOP), "score": max_s[alive].repeat(TOP),
        },
        "class_feature": dict(
            zip(("feature", "label"), np.nonzero(ap_sc), strict=True), ap=ap_sc[ap_sc > 0], rate=ap_sc[ap_sc > 0],
            share=ap_sc[ap_sc > 0],
        ),
        "feature_histogram": {"feature": alive, "low": np.full(len(alive), 1.25), "n": np.full(len(alive), 7)},
    }  # fmt: skip
    for name, columns in tables.items():
        with duckdb.connect() as db:
            db.register("rows", columns)
            db.execute(f"COPY (FROM rows) TO '{folder / name}.parquet' (FORMAT parquet)")
    maps_stp = rng.integers(0, 256, (SHOWN, TOP, GRID[0] * GRID[1]), dtype=np.uint8)
    save_file({"maps": torch.from_numpy(maps_stp)}, folder / "maps.safetensors")
    read = Tables.read(folder, label_e)
    chosen_s = (feature < SHOWN) & (fires > 0)
    near = (feature[:, None] + np.arange(1, 3)) % N, np.full((N, 2), 0.5)
    keys = [f"<i>{example}</i>" for example in range(N_IMAGES)]
    made = folder / "site"
    shutil.copytree(PAGE, made)
    found = features(read, chosen_s, near, keys, True, made / "data/0", lambda n: None)
    script(made / "data/0/index.js", "0", index(read, read.best(), chosen_s, found))
    sae = {
        "name": "made up", "classes": CLASSES, "grid": GRID, "images": 0, "size": [50, 30],
        "rank_by": "max", "split": "train", "n_features": N,
    }  # fmt: skip
    told = {"colours": _colours(), "shard": SHARD, "scripts": SCRIPTS, "images": 1000, "saes": [sae]}
    script(made / "data/gallery.js", "gallery", told)
    (made / "images/0/0").mkdir(parents=True)
    for example in range(N_IMAGES):
        Image.new("RGB", (50, 30), (4 * example, 90, 60)).save(made / f"images/0/0/{example}.webp")
    label_s, most_s = read.commonest()
    url = f"{(made / 'index.html').as_uri()}"
    return Site(url, frequency_s, mean_s, max_s, ap_sc, label_s, most_s, maps_stp)


@pytest.fixture
def page(chromium: "Browser", site: Site) -> "Iterator[Page]":
    """The list of all features; in the end nothing was refused and nothing failed."""
    page = chromium.new_page(viewport={"width": 1440, "height": 900})
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    page.goto(f"{site.url}#/")
    ready(page, "#/")
    yield page
    assert complaints == []
    assert page.evaluate("byId('failed').hidden")
    page.close()


def until(page: "Page", text: str) -> Any:
    """Wait until an expression is true, and return it; the page's own policy lets no script wait for one."""
    end = time.monotonic() + 30
    while not (found := page.evaluate(text)):
        assert time.monotonic() < end, f"never: {text}"
        page.wait_for_timeout(20)
    return found


def drag(page: "Page", start: tuple[float, float], end: tuple[float, float]) -> None:
    """Press the mouse at a place and let it go at another; a click if that is the same."""
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move(*end)
    page.mouse.up()


def ready(page: "Page", address: str) -> None:
    until(page, f"document.body.dataset.ready === {json.dumps(address)}")


def go(page: "Page", address: str) -> None:
    page.evaluate(f"location.hash = {json.dumps(address)}")
    ready(page, address)


def listed(page: "Page") -> list[int]:
    found: list[int] = page.evaluate("list.features")
    return found


def in_order(values: Array, among: Array, up: bool = False) -> list[int]:
    """Return those of some features that fire by their values, largest first, then all others by number."""
    sign = 1 if up else -1
    return sorted(np.flatnonzero(among).tolist(), key=lambda s: (sign * values[s], sign * -s))


def test_all_features_are_listed_few_have_cards(page: "Page", site: Site) -> None:
    alive = site.frequency_s > 0
    wanted = in_order(site.ap_sc.max(axis=1), alive)
    assert listed(page) == [*wanted, *np.flatnonzero(~alive).tolist()]
    assert page.evaluate("byId('count').textContent") == f"24,576 features, {alive.sum():,} fire"
    assert page.evaluate("document.title") == "Features of made up"

    def cards() -> list[int]:
        found: list[int] = page.evaluate(
            "[...document.querySelectorAll('.card')].sort((a, b) => a.dataset.place - b.dataset.place)"
            ".map((card) => Number(card.dataset.feature))"
        )
        return found

    assert cards() == wanted[: len(cards())] and 9 <= len(cards()) < 60
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    until(page, f"list.cards.has({max(np.flatnonzero(~alive))})")
    assert len(cards()) < 60 and "never fires" in page.evaluate("byId('list').textContent")


@pytest.mark.parametrize("text", ["cat", "CAT", "b>dog", "OWL'"])
def test_a_class_finds_its_features(page: "Page", site: Site, text: str) -> None:
    """First the best detectors of the class of this name, then those of classes that contain it."""
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.insert_text(text)
    until(page, f"route().q === {json.dumps(text)} && seen.key === address(route())")
    fit = np.full(N, -1.0)
    best = np.argsort(np.argsort(-site.ap_sc, axis=1, kind="stable"), axis=1)
    for c, name in enumerate(CLASSES):
        bonus = 2 if name.lower() == text.lower() else 1 if text.lower() in name.lower() else 0
        if bonus:
            rank = np.argsort(np.argsort(-site.ap_sc[:, c], kind="stable"))
            told = (site.ap_sc[:, c] > 0) & ((best[:, c] < 3) | (rank < 16))
            fit = np.maximum(fit, np.where(told, bonus + site.ap_sc[:, c], -1))
            fit = np.maximum(fit, np.where(site.label_s == c, bonus, -1))
    assert listed(page) == in_order(fit, fit > 0)
    assert len(listed(page)) > 1000


def test_a_number_finds_a_feature_and_a_class_of_that_name(page: "Page", site: Site) -> None:
    page.keyboard.press("/")
    page.keyboard.insert_text("12")
    until(page, "route().q === '12' && seen.key === address(route())")
    assert listed(page)[0] == 12 and site.ap_sc[listed(page)[1], 2] == site.ap_sc[:, 2].max()
    page.keyboard.press("Enter")
    ready(page, "#/feature/12?q=12")
    assert page.evaluate("byId('title').textContent") == f"Feature 12{CLASSES[site.label_s[12]]}"
    page.keyboard.press("Escape")
    ready(page, "#/?q=12")
    page.evaluate("byId('search').value = ''; byId('search').dispatchEvent(new Event('input'))")
    assert len(listed(page)) == N


@pytest.mark.parametrize(
    ("sort", "column"), [("frequency", "frequency_s"), ("mean", "mean_s"), ("max", "max_s"), ("pure", "most_s")]
)
def test_sorted_within_bounds(page: "Page", site: Site, sort: str, column: str) -> None:
    bounds = "f=-3,-1.5&v=,0.25"
    with np.errstate(divide="ignore"):
        f, v = np.log10(site.frequency_s), np.log10(site.mean_s)
    among = (f >= -3) & (f <= -1.5) & (v <= 0.25)
    go(page, f"#/?sort={sort}&{bounds}")
    assert listed(page) == in_order(getattr(site, column), among) and 1000 < among.sum() < N / 2
    go(page, f"#/?sort={sort}&turned=1&{bounds}")
    assert listed(page) == in_order(getattr(site, column), among, up=True)
    go(page, f"#/?sort=number&shown=1&{bounds}")
    assert listed(page) == [s for s in range(SHOWN) if among[s]]
    fields = page.evaluate("['f0', 'f1', 'v0', 'v1'].map((id) => byId(id).value)")
    assert fields == ["0.001", "0.0316", "", "1.78"]


def test_a_box_on_the_map_chooses_and_a_click_opens(page: "Page", site: Site) -> None:
    left, top, width, height = page.evaluate(
        "(() => { const box = byId('map').getBoundingClientRect(); return [box.x, box.y, box.width, box.height]; })()"
    )
    drag(page, (left + 0.4 * width, top + 0.3 * height), (left + 0.7 * width, top + 0.6 * height))
    until(page, "route().f.every(Number.isFinite) && document.body.dataset.ready === location.hash")
    (f0, f1), (v0, v1) = page.evaluate("[route().f, route().v]")
    f, v = np.log10(np.maximum(site.frequency_s, 1e-99)), np.log10(np.maximum(site.mean_s, 1e-99))
    among = (f >= f0) & (f <= f1) & (v >= v0) & (v <= v1)
    assert sorted(listed(page)) == np.flatnonzero(among).tolist() and 500 < among.sum() < N / 2
    # What the bounds mean on the map: the ends of the box that was drawn.
    places = page.evaluate(
        f"(() => {{ const s = scales(byId('map')); return [s.x({f0}), s.x({f1}), s.y({v1}), s.y({v0})] }})()"
    )
    np.testing.assert_allclose(places, [0.4 * width, 0.7 * width, 0.3 * height, 0.6 * height], atol=1)
    page.evaluate("byId('clear').click()")
    until(page, "document.body.dataset.ready === '#/'")
    assert len(listed(page)) == N
    x0, x1, y0, y1 = page.evaluate(
        "(() => { const s = scales(byId('map')); return [s.x(0), s.x(1), s.y(0), s.y(1)]; })()"
    )
    x_s, y_s = x0 + f * (x1 - x0), y0 + v * (y1 - y0)
    drag(page, (left + x_s[7], top + y_s[7]), (left + x_s[7], top + y_s[7]))
    opened = until(page, "route().feature !== null && route().feature")
    assert np.hypot(x_s[opened] - x_s[7], y_s[opened] - y_s[7]) < 1.5


def test_the_page_of_a_feature(page: "Page", site: Site) -> None:
    go(page, "#/feature/7")
    tiles = until(
        page, "[...document.querySelectorAll('#tiles figure')].map((f) => [Number(f.dataset.example), f.textContent])"
    )
    assert len(tiles) == TOP
    for example, caption in tiles:
        assert caption == CLASSES[example % len(CLASSES)] + f"{float(f'{site.max_s[7]:.3g}'):g}"
    # Each patch has a pixel of its own in the canvas over the image, of the colour of its value.
    drawn = page.evaluate(
        "[...document.querySelectorAll('#tiles canvas')].map((c) => [c.width, c.height,"
        " [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]])"
    )
    palette = page.evaluate("gallery.colours")
    for (width, height, data), map_p in zip(drawn, site.maps_stp[7], strict=True):
        assert (height, width) == GRID
        for value, (*colour, alpha) in zip(map_p.tolist(), np.reshape(data, (-1, 4)).tolist(), strict=True):
            assert (alpha == 0) == (value == 0)
            wanted = [int(palette[value][at : at + 2], 16) for at in (1, 3, 5)]
            assert not value or np.abs(np.subtract(colour, wanted)).max() <= 3  # of colours times alpha, in 8 bits
    until(
        page,
        "[...document.querySelectorAll('#tiles img')].every((image) => image.complete && image.naturalWidth === 50)",
    )
    assert page.evaluate("byId('near').textContent").startswith("#8")
    assert page.evaluate("document.querySelectorAll('#histogram rect').length") == 1
    page.keyboard.press("ArrowRight")
    until(page, "route().feature !== 7 && document.body.dataset.ready === location.hash")
    order = listed(page) or []
    assert page.evaluate("route().feature") == page.evaluate("seen.features[seen.features.indexOf(7) + 1]"), order
    page.keyboard.press("ArrowLeft")
    ready(page, "#/feature/7")
    page.keyboard.press("p")
    assert page.evaluate("getComputedStyle(document.querySelector('#tiles canvas')).opacity") == "0"
    page.keyboard.press("p")
    assert page.evaluate("getComputedStyle(document.querySelector('#tiles canvas')).opacity") == "0.8"
    page.evaluate("document.querySelector('#tiles figure').click()")
    assert page.evaluate("byId('about').textContent").split(" · ")[1] == f"<i>{tiles[0][0]}</i>"
    page.keyboard.press("ArrowRight")
    assert page.evaluate("byId('about').textContent").endswith(f"2 of {TOP}")
    page.keyboard.press("Escape")
    assert not page.evaluate("byId('large').open")
    go(page, "#/feature/5")
    assert page.evaluate("byId('none').textContent") == "It fires on no image."
    go(page, f"#/feature/{SHOWN + 1}")
    assert page.evaluate("byId('none').textContent") == "This gallery holds no images of it."
    go(page, f"#/feature/{N}")  # there is none: the list
    assert not page.evaluate("byId('browse').hidden")


def test_keys_walk_through_the_list(page: "Page") -> None:
    def here() -> int:
        return int(page.evaluate("Number(document.activeElement.dataset.place ?? -1)"))

    columns = page.evaluate("list.columns")
    assert columns > 1
    for key, place in (
        ("ArrowDown", 0), ("ArrowRight", 1), ("ArrowDown", 1 + columns), ("ArrowLeft", columns), ("ArrowUp", 0),
    ):  # fmt: skip
        page.keyboard.press(key)
        assert here() == place
    for _ in range(30):
        page.keyboard.press("ArrowDown")
    assert here() == 30 * columns and page.evaluate("scrollY") > 1000
    box = page.evaluate(
        "(() => { const b = document.activeElement.getBoundingClientRect(); return [b.top, b.bottom]; })()"
    )
    assert 0 <= box[0] and box[1] <= 900
    feature = page.evaluate("Number(document.activeElement.dataset.feature)")
    where = page.evaluate("scrollY")
    page.keyboard.press("Enter")
    ready(page, f"#/feature/{feature}")
    page.keyboard.press("Escape")
    ready(page, "#/")
    assert page.evaluate("scrollY") == where


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (400, "dark")])
def test_nothing_sticks_out(page: "Page", width: int, scheme: str) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    for address in ("#/", "#/feature/7"):
        go(page, address)
        until(page, f"document.documentElement.scrollWidth <= {width}")
        assert page.evaluate("getComputedStyle(document.body).colorScheme") in (scheme, "normal")
