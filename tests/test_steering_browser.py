"""The Steer tab in a real browser: patches, sliders, saving, links, uploads, odd names, two visitors, all sizes."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import odd_names
import pytest
import tiny
from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a page that is served by a process of its own."""
    path = odd_names.made(tmp_path_factory.mktemp("page"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(Path(tiny.__file__).parent)}
    command = [sys.executable, "-m", "saefw", "serve", str(path), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as served:
        assert served.stdout is not None and b"The steering page is at" in served.stdout.readline()
        yield f"http://127.0.0.1:{port}/steering"
        served.kill()


@pytest.fixture
def visit(chromium: "Browser", address: str) -> Iterator[Any]:
    """Opens the page, for a visitor each time; in the end none of them saw a fault."""
    faults: list[str] = []
    contexts = []

    def opened(url: str = address, **how: Any) -> "Page":
        contexts.append(chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **how}))
        made = contexts[-1].new_page()
        made.on("pageerror", lambda error: faults.append(str(error)))
        made.goto(url)
        made.wait_for_selector(".bars .track")
        return made

    yield opened
    for context in contexts:
        context.close()
    assert faults == []


def linked(page: "Page", *words: str) -> None:
    """Wait until the address of the page holds words."""
    page.wait_for_function("(words) => words.every((w) => decodeURIComponent(location.search).includes(w))", arg=words)


def test_an_edit_is_made_and_its_link_shows_it_to_another(visit: Any) -> None:
    one, two = visit(), visit()
    one.locator(".noUi-handle").first.press("ArrowRight")
    one.wait_for_selector("text=1 feature edited on all patches")
    number = "[name=number-own-0]:not(:placeholder-shown)"
    amount = one.locator(number).input_value()
    assert one.locator("pre").inner_text().count(f": {float(amount):g}}}, mode='set'") == 1
    linked(one, "edits")
    assert two.locator("text=1 feature edited").count() == 0
    two.goto(one.url)
    two.wait_for_selector("text=1 feature edited on all patches")
    assert two.locator(number).input_value() == amount
    # What is edited stands out, and its reset can be pressed.
    assert two.locator(".edited .reset button").is_visible() and two.locator(".reset button:visible").count() == 1
    two.get_by_text("Compare", exact=True).click()
    assert two.locator(".reset button:visible").count() == 0
    two.get_by_text("Steer", exact=True).click()
    two.locator(".edited .reset button").wait_for()
    two.keyboard.press("0")
    two.wait_for_selector("text=1 feature edited", state="detached")
    assert two.locator(".reset button:visible").count() == 0
    assert one.locator("text=1 feature edited").count() == 1
    two.wait_for_function("!decodeURIComponent(location.search).includes('edits')")
    two.reload()
    two.wait_for_selector(".bars .track")
    assert two.locator("text=1 feature edited").count() == 0


def test_patches_are_tapped_dragged_over_and_let_go(visit: Any) -> None:
    page = visit()
    said = page.locator("p", has_text="Edits are made on")
    picture = page.locator(".image .bk-Figure canvas").first
    picture.hover(force=True)
    box = picture.bounding_box()
    side = box["width"] / 4

    def at(column: float, row: float) -> tuple[float, float]:
        return box["x"] + column * side, box["y"] + row * side

    page.mouse.click(*at(0.5, 0.5))
    said.filter(has_text="1 of 16 patches").wait_for()
    page.mouse.move(*at(1.3, 1.3))
    page.mouse.down()
    page.mouse.move(*at(2.7, 3.7), steps=6)
    page.mouse.up()
    said.filter(has_text="7 of 16 patches").wait_for()  # the box holds 2 by 3 of them
    page.locator(".noUi-handle").first.press("ArrowRight")
    page.wait_for_selector("text=1 feature edited on 7 of 16 patches")
    linked(page, '"patches":[0,5,6,9,10,13,14]')
    page.mouse.click(*at(0.5, 0.5))
    said.filter(has_text="6 of 16 patches").wait_for()
    page.get_by_text("All patches", exact=True).click()
    page.wait_for_selector("text=1 feature edited on all patches")


def test_a_feature_that_is_pointed_at_lights_its_patches(visit: Any) -> None:
    page = visit()
    alphas = "() => Array.from(Bokeh.documents[0].get_model_by_name('over').get_column('alpha'))"
    page.locator(".feature.found .name").first.hover()
    page.wait_for_function(f"({alphas})().some((alpha) => alpha > 0)")
    page.locator("h1").first.hover()
    page.wait_for_function(f"({alphas})().every((alpha) => alpha == 0)")
    pick = page.locator(".feature.found .pick").first
    number = pick.inner_text()
    pick.click()
    page.get_by_text(f"Light where {number} fires").wait_for()
    page.wait_for_function("Bokeh.documents[0].get_model_by_name('light').active")
    page.wait_for_selector(f".feature.lit.f-{number}")


def test_edits_of_cls_are_made_and_keys_go_through_the_images(visit: Any) -> None:
    page = visit()
    page.get_by_text("[CLS]", exact=True).click()
    page.locator("p", has_text="Edits are made on [CLS]").wait_for()
    page.locator(".noUi-handle").nth(1).press("ArrowRight")
    page.wait_for_selector("text=1 feature edited on [CLS]")
    linked(page, '"place":"cls"')
    image = "Bokeh.documents[0].get_model_by_name('image').value"
    first = page.evaluate(image)
    page.keyboard.press("n")
    page.wait_for_function(f"{image} != {first}")
    linked(page, f'"example":{page.evaluate(image)},')
    page.keyboard.press("p")
    linked(page, f'"example":{first},')


def test_an_edit_is_saved_and_comes_back_after_a_reload(visit: Any) -> None:
    page = visit()
    page.locator(".noUi-handle").first.press("End")
    page.wait_for_selector("text=1 feature edited")
    page.get_by_placeholder("a name for this edit").fill("<b>turned</b>")
    page.keyboard.press("Tab")
    page.get_by_text("Save", exact=True).click()
    page.locator("[name=saved] option", has_text="<b>turned</b>").wait_for(state="attached")
    with page.expect_download() as given:
        page.get_by_text("PNG", exact=True).click()
    with Image.open(given.value.path()) as figure:
        assert figure.format == "PNG" and figure.width > 300
    again = visit()
    assert again.locator("text=1 feature edited").count() == 0
    again.locator("[name=saved]").select_option(label="<b>turned</b>")
    again.wait_for_selector("text=1 feature edited on all patches")
    assert again.locator("b:text-is('turned')").count() == 0


def test_an_image_of_ones_own_is_shown_and_what_is_none_is_refused(visit: Any) -> None:
    page = visit()
    file = BytesIO()
    Image.new("RGB", (40, 30), "blue").save(file, "PNG")
    upload = page.locator("input[type=file]")
    upload.set_input_files({"name": "mine.png", "mimeType": "image/png", "buffer": b"GIF89a no image"})
    page.get_by_text("that is no image that can be read").wait_for()
    upload.set_input_files({"name": "mine.png", "mimeType": "image/png", "buffer": file.getvalue()})
    page.get_by_text("your image").first.wait_for()
    assert page.get_by_text("that is no image that can be read").count() == 0
    page.locator(".noUi-handle").first.press("ArrowRight")
    page.wait_for_selector("text=1 feature edited on all patches")


def test_names_with_markup_are_text(visit: Any) -> None:
    page = visit()
    page.locator(".bars .class", has_text="<b>red</b>").wait_for()
    assert page.locator("b:text-is('red')").count() == 0
    for tab in ("Explore", "Compare"):
        page.get_by_text(tab, exact=True).first.click()
        page.locator(".bk-Figure:visible").first.wait_for()
        assert page.locator("b:text-is('red')").count() == 0


@pytest.mark.parametrize(
    ("width", "height", "scheme"), [(820, 1180, "light"), (1180, 820, "dark"), (1920, 1080, "light")]
)
def test_nothing_sticks_out_at_any_size(visit: Any, width: int, height: int, scheme: str) -> None:
    page = visit(viewport={"width": width, "height": height}, color_scheme=scheme)
    for tab in ("Steer", "Explore", "Compare"):
        page.get_by_text(tab, exact=True).first.click()
        page.locator(".bk-Figure:visible").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(20, 22, 26)" if scheme == "dark" else "rgb(245, 246, 248)")
