"""An experiment in a notebook: what its few lines return and show, and what they refuse."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from saefw import pipeline, registry
from saefw.catalog import Catalog
from saefw.errors import UserError
from saefw.experiment.notebook import Notebook, open_experiment
from saefw.experiment.opened import probabilities

REGISTRY = f"""
saefw: 1
plugins: [{Path(tiny.__file__)}]
device: cpu
backbones: {{tiny: {{use: tiny-vit}}}}
datasets: {{tiny: {{use: tiny-set}}}}
saes: {{topk: {{use: topk, k: 4, expansion: 2, lr: 0.003}}}}
probes: {{linear: {{use: linear, lr: 0.01}}}}
stages:
  acts: {{use: record, backbone: tiny, datasets: [tiny], layers: [0, 1, -1]}}
  sweep: {{use: train, acts: acts, saes: [topk], layers: [0, 1], n_tokens: 4096, batch_size: 256}}
  looks: {{use: visuals, saes: sweep, acts: acts, top: 6}}
  probes: {{use: probe, acts: acts, layer: -1, probes: [linear]}}
  steer:
    {{use: steer, saes: sweep, sae: {{layer: 0}}, probes: probes, visuals: looks, amounts: [1], max_frequency: 2,
      ways: [effect]}}
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


def test_two_saes_are_edited_in_one_pass(notebook: Notebook) -> None:
    choice = notebook.experiment.choice
    (address,) = [unit.address for unit in choice.saes() if unit != choice.sae]
    later = open_experiment(choice.registry, sae=address)
    image, features = notebook.image(notebook.examples[0]), later.image(notebook.examples[0]).features(2).numbers
    edited = image.edit({image.features(1).numbers[0]: 3.0})
    both = edited.also(later, dict.fromkeys(features, 2.0), patches=[0, 5])
    assert np.abs(np.log(both.probability_c / edited.probability_c)).max() > 0.1
    assert "<td>red</td>" in both._repr_html_()
    # By hand: the second SAE reads what the first edit left.
    of, before = notebook.experiment.steerings["patches"], notebook.experiment.seen(image.example).readings["patches"]
    tokens_btd = before.tokens_btd.clone()
    tokens_btd[:, of.edited] += of.change(before, edited.steps[0].edits)
    after = later.experiment.steerings["patches"]
    reading = after.reading(of.backbone.tail(tokens_btd, 1, 1))
    wanted = probabilities(after.edit(reading, both.steps[1].edits)[0])
    np.testing.assert_allclose(np.log(both.probability_c), np.log(wanted), atol=1e-4)
    same = edited.also(later, {features[0]: 1.0}, "scale")
    np.testing.assert_allclose(np.log(same.probability_c), np.log(edited.probability_c), atol=1e-4)
    with pytest.raises(UserError, match="also: an edit straight into the probe stands alone"):
        replace(edited, steps=[]).also(later, {})


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
