"""Zero-shot probes: against open_clip itself, and from class embeddings in a file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_open_clip import SMALL, shrunken
from tiny import made
from torch.nn.functional import cross_entropy, normalize

from saefw.acts import Acts
from saefw.errors import UserError
from saefw.metrics import Nmse
from saefw.plugin import Entry, Place, Run, Task, Unit
from saefw.stages.faithfulness import Faithfulness
from saefw.stages.probe import ProbeStage
from saefw.stages.readers import opened
from saefw.stages.record import Record
from saefw.stages.train import Train
from saefw.testing import check_entry
from saefw_linear import Linear
from saefw_topk import TopK
from saefw_zero_shot import ZeroShot

TEMPLATES = ["a photo of a {}.", "{} things"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A shrunken CLIP of open_clip, its last two blocks recorded."""
    path = tmp_path_factory.mktemp("zero-shot")
    probes: dict[str, Entry] = {
        "zero": ZeroShot(),
        "two": ZeroShot(templates=TEMPLATES, logit_scale=5.0),
        "linear": Linear(steps=40),
    }
    families: dict[str, Any] = {
        "backbones": {"clip": shrunken(path, "ViT-B-32", SMALL)},
        "probes": probes,
        "saes": {"topk": TopK(k=6, expansion=2)},
    }
    run = tiny.desk(path, families, {"nmse": Nmse})
    made(run, "acts", Record(backbone="clip", datasets=["tiny"], layers=[-2, -1], dtype="float32"))
    made(run, "zero", ProbeStage(acts="acts", probes=["zero", "two"], token="embedding"))
    return run


@torch.inference_mode()
def test_it_says_what_open_clip_says(run: Run) -> None:
    import open_clip

    for unit, templates, scale in zip(run.made_by("zero"), (["a photo of a {}."], TEMPLATES), (None, 5.0), strict=True):
        (recording,) = unit.needs
        backbone = recording.given["backbone"].build("cpu")
        model, tokenizer = backbone._model, open_clip.get_tokenizer("ViT-B-32")
        texts = [
            normalize(
                normalize(model.encode_text(tokenizer([t.format(name) for t in templates])), dim=1).mean(0), dim=0
            )
            for name in ("red", "green", "blue")
        ]
        dataset = run.dataset(recording.given["dataset"])
        test = [i for i in range(len(dataset)) if dataset[i].split == "test"]
        images = torch.stack([backbone.prepare(dataset[i].load()) for i in test])
        cosines = normalize(model.encode_image(images), dim=1) @ torch.stack(texts).T
        logits = cosines * (scale or model.logit_scale.exp())
        labels = torch.tensor([dataset[i].label for i in test])
        with run.db() as db:
            told = dict(db.execute("SELECT name, value FROM final WHERE unit = ?", [unit.address]).fetchall())
            rows = db.execute(
                "SELECT example, predicted, confidence FROM prediction WHERE unit = ? ORDER BY 1", [unit.address]
            ).fetchnumpy()
        assert rows["example"].tolist() == test
        assert rows["predicted"].tolist() == logits.argmax(dim=1).tolist()
        np.testing.assert_allclose(rows["confidence"], logits.softmax(dim=1).amax(dim=1), rtol=1e-3)
        assert told["test_accuracy"] == float((logits.argmax(dim=1) == labels).double().mean())
        assert told["test_loss"] == pytest.approx(float(cross_entropy(logits.double(), labels)), rel=1e-3)


def test_a_linear_probe_reads_the_embedding_too(run: Run) -> None:
    (unit,) = made(run, "on embedding", ProbeStage(acts="acts", probes=["linear"], token="embedding"))
    assert opened(unit, run).weight.shape == (64, 3)


def test_patches_are_read_zero_shot_without_them(run: Run) -> None:
    """An SAE of the block before the last, read by the text probe: the whole chain through open_clip."""
    made(run, "sweep", Train(acts="acts", saes=["topk"], layers=[-2], n_tokens=2048, batch_size=256))
    (unit,) = made(run, "faithful", Faithfulness(saes="sweep", probes="zero", acts="acts"))
    with run.db() as db:
        ((clean, wanted),) = db.execute(
            "SELECT clean, value FROM faithfulness f JOIN final v ON v.unit = f.probe AND v.name = 'test_loss' "
            "WHERE f.unit = ? AND measure = 'cross_entropy'", [unit.address]
        ).fetchall()  # fmt: skip
    assert clean == pytest.approx(wanted, rel=1e-4)


def test_its_settings_keep_the_contract() -> None:
    check_entry(ZeroShot(templates=TEMPLATES, logit_scale=5.0))


# Class embeddings in a file


def written(path: Path, **tensors: torch.Tensor) -> Place:
    save_file(tensors, path / "classes.safetensors")
    return Place(path / "classes.safetensors")


def test_a_file_counts_by_what_it_holds(tmp_path: Path) -> None:
    first, again, other = (tmp_path / name for name in ("a", "b", "c"))
    configs = []
    for folder, value in ((first, 1.0), (again, 1.0), (other, 2.0)):
        folder.mkdir()
        configs.append(ZeroShot(embeddings=written(folder, embeddings=torch.full((3, 8), value))))
    one, same, different = (config.content() for config in configs)
    assert one == same != different and str(tmp_path) not in json.dumps(one)
    written(first, embeddings=torch.full((4, 8), 1.0))
    assert configs[0].content() != one
    (first / "classes.safetensors").unlink()
    assert configs[0].content()["embeddings"] == str(first / "classes.safetensors"), "its check says what is missing"


def test_class_embeddings_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classes_cd, x_nd = torch.randn(3, 8).half(), torch.randn(20, 8)
    config, task = (
        ZeroShot(embeddings=written(tmp_path, embeddings=classes_cd), logit_scale=30.0),
        Task(8, ("a", "b", "c")),
    )
    probe = config.fit(task, x_nd, torch.zeros(20, dtype=torch.int64))
    x, w = x_nd.double().numpy(), classes_cd.double().numpy()
    wanted = 30 * (x @ w.T) / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(w, axis=1)
    np.testing.assert_allclose(probe(x_nd), wanted, rtol=1e-4, atol=1e-4)
    again = config.build(task)
    again.load_state_dict(probe.state_dict())
    assert torch.equal(again(x_nd), probe(x_nd))


BAD: list[tuple[dict[str, torch.Tensor], str]] = [
    ({"text": torch.ones(3, 16)}, "holds one tensor, called embeddings (got text)"),
    (
        {"embeddings": torch.ones(4, 16)},
        "embeddings are numbers [class, width], [3, 16] here (got float32 [4, 16])",
    ),
    ({"embeddings": torch.zeros(3, 16)}, "embeddings holds rows that are zero or not finite"),
    ({"embeddings": torch.full((3, 16), torch.nan)}, "embeddings holds rows that are zero or not finite"),
]


@pytest.mark.parametrize(("tensors", "message"), BAD)
def test_a_file_that_does_not_fit_is_refused_when_it_is_planned(
    tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    place = written(tmp_path, **tensors)
    with pytest.raises(UserError) as caught:
        planned(tmp_path, ZeroShot(embeddings=place))
    assert str(caught.value) == f"{place}: {message}"


def planned(path: Path, probe: ZeroShot, **settings: Any) -> list[Unit]:
    run = tiny.desk(path, {"probes": {"p": probe}})
    run.listed("acts", list(Record(backbone="tiny", datasets=["tiny"], layers=[1, 2]).units(run)))
    return list(ProbeStage(acts="acts", probes=["p"], **settings).units(run))


def test_what_cannot_be_read_is_refused_when_it_is_planned(run: Run, tmp_path: Path) -> None:
    (tmp_path / "classes.safetensors").write_bytes(b"nothing")
    there, none = tmp_path / "classes.safetensors", tmp_path / "none"
    for probe, message in (
        (ZeroShot(), "zero-shot: a backbone of 'tiny-vit' has no text tower; name a file of class embeddings"),
        (ZeroShot(embeddings=Place(none)), f"{none}: no such file of class embeddings"),
        (
            ZeroShot(embeddings=Place(there)),
            f"{there}: cannot be read (Error while deserializing header: header too small)",
        ),
    ):
        with pytest.raises(UserError) as caught:
            planned(tmp_path, probe)
        assert str(caught.value) == message
    with pytest.raises(UserError) as caught:
        list(ProbeStage(acts="acts", probes=["zero"]).units(run))
    assert str(caught.value) == ("zero-shot: texts are compared with image embeddings; say token: embedding (got cls)")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token": "embedding"}, "probe: token: the backbone of tiny on tiny, layer 2 gives no image embedding"),
        ({"token": 16}, "probe: token: the backbone of tiny on tiny, layer 2 has 16 patches, 0 to 15 (got 16)"),
    ],
)
def test_a_token_that_is_not_there(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        planned(tmp_path, ZeroShot(), **settings)
    assert str(caught.value) == message


def test_an_embedding_of_another_block_is_refused(run: Run) -> None:
    with pytest.raises(UserError) as caught:
        list(ProbeStage(acts="acts", probes=["zero"], layer=-2, token="embedding").units(run))
    assert str(caught.value) == (
        "probe: token: the image embedding is made of the last block's output, layer 2 (got layer 1)"
    )


@pytest.mark.parametrize("template", ["a photo", "{} and {}"])
def test_a_template_without_one_place(template: str) -> None:
    with pytest.raises(ValueError, match=r"a template has one \{\}, for the name of the class"):
        ZeroShot(templates=[template])


def test_the_recording_is_that_of_the_probe(run: Run) -> None:
    """What reading the probe needs is said in its file."""
    unit = run.made_by("zero")[0]
    with safe_open(run.folder(unit) / "probe.safetensors", "pt") as file:
        told = json.loads(file.metadata()["saefw"])
    (recording,) = unit.needs
    assert told == {
        "config": unit.given["probe"].content(),
        "backbone": recording.given["backbone"].content(),
        "acts": recording.address,
        "layer": Acts(run.folder(recording)).layer,
        "token": "embedding",
    }
