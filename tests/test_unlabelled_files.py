"""Images without labels, through every stage that needs none."""

from pathlib import Path

import numpy as np
import pytest
from bokeh.document import Document
from PIL import Image
from typer.testing import CliRunner

from saefw.cli import app
from saefw_steering import page

REGISTRY = """\
saefw: 1
device: cpu
backbones: {vit: {use: digits-vit}}
datasets: {ours: {use: image-folder, root: images}}
saes: {topk: {use: topk, expansion: 2, k: 4}}
probes: {linear: {use: linear}}
figures: {front: {use: pareto}, grid: {use: feature-grid}}
stages:
  acts: {use: record, backbone: vit, datasets: [ours], layers: [-1]}
  sweep: {use: train, acts: acts, saes: [topk], n_tokens: 20_000}
  visuals: {use: visuals, saes: sweep, acts: acts}
  sheets: {use: sheets, visuals: visuals}
  figures: {use: draw, figures: [front, grid], of: [sweep, visuals]}
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry beside forty digits without labels."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("unlabelled")
    (folder / "images").mkdir()
    for i, values in enumerate(load_digits().images[:40]):
        pixels = np.round(values / 16 * 255).astype(np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(folder / "images" / f"{i:02d} <b>&.png")
    registry = folder / "registry.yaml"
    registry.write_text(REGISTRY)
    made = CliRunner().invoke(app, ["run", str(registry)])
    assert made.exit_code == 0, made.output
    return registry


def sql(path: Path, query: str) -> list[str]:
    found = CliRunner().invoke(app, ["sql", query, "--csv", "--registry", str(path)])
    assert found.exit_code == 0, found.output
    return found.output.splitlines()[1:]


def test_every_stage_is_made(path: Path) -> None:
    assert sql(path, "SELECT stage, count(*) FROM unit GROUP BY ALL ORDER BY ALL") == [
        "draw,2", "record,1", "sheets,1", "train,1", "visuals,1",
    ]  # fmt: skip
    assert sql(path, "SELECT count(*), max(label) FROM example") == ["40,-1"]
    assert sql(path, "SELECT split, count(*) FROM example GROUP BY ALL ORDER BY ALL") == [
        "test,4", "train,32", "valid,4",
    ]  # fmt: skip
    assert sql(path, "SELECT count(*) FROM class") == ["0"]
    assert sql(path, "SELECT count(*) FROM class_feature") == ["0"]
    assert int(sql(path, "SELECT count(*) FROM top_example")[0]) > 0
    assert sql(path, "SELECT count(*) FROM feature WHERE frequency > 0") != ["0"]


def test_views_answer(path: Path) -> None:
    for view in sql(path, "SELECT view_name FROM duckdb_views() WHERE NOT internal ORDER BY ALL"):
        sql(path, f"FROM {view} LIMIT 1")


def test_the_page_says_that_there_is_nothing_to_steer(path: Path) -> None:
    doc = Document()
    page(doc, path)
    assert doc.get_model_by_name("nothing") is not None


@pytest.mark.parametrize("store", ["runs", "nothing-made-yet"])
def test_a_probe_says_what_it_lacks(path: Path, store: str) -> None:
    """Before anything is made, whether its recording is there by now or not."""
    other = path.with_name("probing.yaml")
    lines = [f"store: {store}", *REGISTRY.strip().splitlines()]
    lines.insert(-1, "  probes: {use: probe, acts: acts, layer: -1, probes: [linear]}")
    other.write_text("\n".join(lines) + "\n")
    for command in (["check"], ["run", "--dry"], ["run"]):
        said = CliRunner().invoke(app, [*command, str(other)])
        assert (said.exit_code, said.stdout) == (1, "")
        assert said.stderr == (
            f"{other}:14:3: stages.probes: vit on ours, layer 5: has 0 classes; a probe tells two or more apart\n"
        )
    assert not path.with_name("nothing-made-yet").exists()


def test_a_probe_whose_images_are_elsewhere_is_planned_all_the_same(path: Path) -> None:
    other = path.with_name("elsewhere.yaml")
    lines = REGISTRY.replace("root: images", "root: nowhere").strip().splitlines()
    lines.insert(-1, "  probes: {use: probe, acts: acts, layer: -1, probes: [linear]}")
    other.write_text("\n".join(lines) + "\n")
    said = CliRunner().invoke(app, ["check", str(other)])
    column = next(line for line in lines if "nowhere" in line).index("root:") + 1
    row = next(i for i, line in enumerate(lines, 1) if "nowhere" in line)
    assert (said.exit_code, said.stderr) == (
        0, f"{other}:{row}:{column}: datasets.ours.root: {path.parent / 'nowhere'} is not there; what needs it cannot "
        "be made here\n",
    )  # fmt: skip
    assert said.stdout.splitlines()[-1].startswith(f"{other}: fine; ")
