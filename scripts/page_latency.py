"""Measures the steering page in Chromium: how soon it is there, and how soon a slider changes the bars.

Two experiments are opened: the embedded one, of which `--digits` names the registry, after `saefw run`; and one that
is made here, a ViT-B/16 of random weights (12 blocks, d_model 768) with an SAE of 24,576 features on the output of its
last block but one. `--large` opens a third, of 100,000 small images and 24,576 features, whose making takes a quarter
of an hour.

`start` counts from the command to the line that says where the page is: libraries and models are loaded. Then the
first visitor and the second one, each with an empty cache, count from the address to the bars, and a tap on Explore to
its last part. A step of a slider counts from the key that is pressed to the first frame that has the new bars.

    python scripts/page_latency.py --digits study/registry.yaml [--steps 100] [--vit folder] [--large folder]
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Page, sync_playwright

VIT = """
saefw: 1
backbones: {vit: {use: timm, model: vit_base_patch16_224, pretrained: false}}
datasets: {noise: {use: image-folder, root: noise, valid: 0.2, test: 0.2}}
saes: {topk: {use: topk, k: 32, expansion: 32}}
probes: {linear: {use: linear, lr: 0.01}}
stages:
  acts: {use: record, backbone: vit, datasets: [noise], layers: [-2, -1]}
  sweep: {use: train, acts: acts, saes: [topk], layers: [-2], n_tokens: 8192, batch_size: 2048}
  looks: {use: visuals, saes: sweep, acts: acts}
  probes: {use: probe, acts: acts, probes: [linear]}
  steer: {use: steer, saes: sweep, probes: probes, visuals: looks, amounts: [1, 4], max_frequency: 2}
"""

LARGE = f"""
saefw: 1
plugins: [{Path(__file__).resolve().parents[1] / "tests" / "tiny.py"}]
backbones: {{tiny: {{use: tiny-vit}}}}
datasets: {{squares: {{use: tiny-set, n: 100000}}}}
saes: {{topk: {{use: topk, k: 16, expansion: 1536}}}}
probes: {{linear: {{use: linear, lr: 0.01}}}}
stages:
  acts: {{use: record, backbone: tiny, datasets: [squares], layers: [0, -1]}}
  sweep: {{use: train, acts: acts, saes: [topk], layers: [0], n_tokens: 65536, batch_size: 4096}}
  looks: {{use: visuals, saes: sweep, acts: acts}}
  probes: {{use: probe, acts: acts, probes: [linear]}}
  steer: {{use: steer, saes: sweep, probes: probes, visuals: looks, amounts: [1, 4], max_frequency: 2}}
"""

BOUNDS = {"digits": 60, "vit": 150}
"""Milliseconds that the 95th percentile may take, on two cores; the first view may take 3 s."""

STEPS = """
async (steps) => {
  const all = (root) => [...root.querySelectorAll("*")].flatMap((e) => e.shadowRoot ? [e, ...all(e.shadowRoot)] : [e])
  const handle = all(document).find((e) => e.classList.contains("noUi-handle") && e.offsetParent != null)
  const press = (key) => handle.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, composed: true}))
  const wait = (ms) => new Promise((done) => setTimeout(done, ms))
  press("ArrowRight")
  await wait(1000)
  // The norm changes with each step, also where no share of a class does; both come in one message.
  const norm = all(document).find((e) => e.tagName == "P" && e.textContent.startsWith("Norm of the edit")).getRootNode()
  const took = []
  for (let i = 0; i < steps; i++) {
    const there = new Promise((done) => {
      const seen = new MutationObserver(() => { seen.disconnect(); requestAnimationFrame(() => setTimeout(done)) })
      seen.observe(norm, {childList: true, subtree: true, characterData: true})
    })
    const began = performance.now()
    press(Math.floor(i / 20) % 2 == 0 ? "ArrowRight" : "ArrowLeft")
    await Promise.race([there, wait(5000)])
    took.push(performance.now() - began)
    await wait(40)
  }
  return took
}
"""


def main() -> None:
    """Open each experiment, step, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=Path, required=True, help="the registry of the embedded experiment, run")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--vit", type=Path, help="keep the experiment that is made here in this folder, or take it")
    parser.add_argument("--large", type=Path, help="open also a large store, made in this folder if it is not yet")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        made = {"digits": given.digits, "vit": _made(given.vit or Path(scratch), VIT)}
        if given.large:
            made["large"] = _made(given.large, LARGE)
        print("experiment    start  first view  second  Explore  median  95th percentile  bound")
        for name, registry in made.items():
            seconds, took = _measured(registry, given.steps)
            median, late = np.percentile(took, [50, 95])
            told = "  ".join(f"{second:{n}.1f} s" for second, n in zip(seconds, (6, 8, 4, 5), strict=True))
            bound = f"{BOUNDS[name]} ms" if name in BOUNDS else ""
            print(f"{name:10} {told}  {median:3.0f} ms  {late:12.0f} ms  {bound:>6}")


def _made(folder: Path, text: str) -> Path:
    registry = folder / "registry.yaml"
    if not registry.exists():
        rng = np.random.default_rng(0)
        for i in range(40):
            place = folder / "noise" / f"class-{i % 2}" / f"{i}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)).save(place)
        registry.write_text(text)
        subprocess.run([sys.executable, "-m", "saefw", "run", str(registry)], check=True)
    return registry


def _measured(registry: Path, steps: int) -> tuple[list[float], list[float]]:
    """Return seconds (start, what two visitors wait for the bars, Explore) and the milliseconds of each step."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("there is no chromium on this machine")
    with _served(registry) as (address, start), sync_playwright() as driver:
        seconds = [start]
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        pages = [browser.new_page(viewport={"width": 1600, "height": 1000}) for _ in range(2)]
        for page in pages:
            began = time.perf_counter()
            _open(page, address)
            seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        pages[0].get_by_text("Explore", exact=True).first.click()
        pages[0].locator("h1", has_text="Feature").wait_for(timeout=120_000)
        seconds.append(time.perf_counter() - began)
        pages[0].close()
        pages[1].evaluate(STEPS, 5)  # the first of all warms up
        took: list[float] = pages[1].evaluate(STEPS, steps)
        browser.close()
    return seconds, took


def _open(page: Page, address: str) -> None:
    page.goto(address)
    page.wait_for_selector(".bars .track", timeout=120_000)


@contextmanager
def _served(registry: Path) -> Iterator[tuple[str, float]]:
    """Serve a page by a process of its own; yield its address, and the seconds until it is there."""
    began = time.perf_counter()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "saefw", "serve", str(registry), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ) as server:
        assert server.stdout is not None
        server.stdout.readline()  # where it is
        try:
            yield f"http://127.0.0.1:{port}/steering", time.perf_counter() - began
        finally:
            server.kill()


if __name__ == "__main__":
    main()
