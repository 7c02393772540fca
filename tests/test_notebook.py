"""An experiment in a notebook: what its few lines return and show, and what they refuse."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from saefw import pipeline, registry
from saefw.catalog import Catalog
from saefw.errors import UserError
from saefw_notebook import Notebook, open_experiment

REGISTRY = f"""
saefw: 1
plugins: [{Path(tiny.__file__)}]
device: cpu
backbones: {{tiny: {{use: tiny-vit}}}}
datasets: {{tiny: {{use: tiny-set}}}}
saes: {{topk: {{use: topk, k: 4, expansion: 2, lr: 0.003}}}}
probes: {{linear: {{use: linear, lr: 0.01}}}}
stages:
  acts: {{use: record, backbone: tiny, datasets: [tiny], layers: [0, -1]}}
  sweep: {{use: train, acts: acts, saes: [topk], layers: [0], n_tokens: 4096, batch_size: 256}}
  looks: {{use: visuals, saes: sweep, acts: acts, top: 6}}
  probes: {{use: probe, acts: acts, probes: [linear]}}
  steer: {{use: steer, saes: sweep, probes: probes, visuals: looks, amounts: [1], max_frequency: 2, ways: [effect]}}
"""


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Notebook:
    path = tmp_path_factory.mktemp("notebook") / "registry.yaml"
    path.write_text(REGISTRY)
    catalog = Catalog()
    pipeline.run(registry.read(path, catalog), catalog)
    with pytest.raises(UserError) as caught:
        open_experiment(path, "tyni")
    assert str(caught.value) == f"{path}: 'tyni' is not steered (there are: tiny)"
    return open_experiment(path, "tiny")


def test_an_image_is_edited_and_shown(notebook: Notebook) -> None:
    image = notebook.image(notebook.examples[0])
    assert notebook.image(notebook.experiment.acts.keys[image.example]) == image
    with Image.open(BytesIO(image._repr_png_())) as shown:
        assert max(shown.size) >= 112
    feature = image.features(3).numbers[0]
    assert f"<td>{feature}</td>" in image.features(3)._repr_html_()
    before, p99 = image.probabilities, notebook.experiment.about[feature].p99
    same = image.edit({feature: 1.0}, "scale").probabilities
    np.testing.assert_allclose(list(same.values()), list(before.values()), atol=1e-6)
    edited = image.edit({feature: 3.0}, patches=[0, 5])
    raw = image.edit({feature: 3 * p99}, patches=[0, 5], raw=True)
    np.testing.assert_allclose(edited.probability_c, raw.probability_c, atol=1e-6)
    assert sum(edited.probabilities.values()) == pytest.approx(1) and edited.probabilities != before
    assert "red" in edited._repr_html_() and "data:image/png" in edited._repr_html_()
    assert len(notebook.features_of("red", 2).numbers) == 2


def test_what_is_not_there_is_named(notebook: Notebook) -> None:
    image = notebook.image(notebook.examples[0])
    for call, message in (
        (lambda: image.edit({0: 1.0}, "sett"), "mode: there is no 'sett' (there are: set, add, scale, ablate)"),
        (lambda: image.edit({999: 1.0}), "feature 999: none of this number fires on the training images"),
        (lambda: image.edit({}, patches=[16]), "patches: there is no 16 (there are: 0 to 15)"),
        (lambda: notebook.image(-1), "image: there is no -1 (there are: 0 to 59)"),
        (lambda: notebook.features_of("pink"), "class: there is no 'pink' (there are: red, green, blue)"),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert str(caught.value) == message
