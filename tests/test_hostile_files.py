"""Files of a unit that hold what nobody wrote: each is refused in a sentence, nothing of it is run or believed."""

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from saefw import pictures, sealed
from saefw.acts import Acts, Stats
from saefw.care import MADE, checksum
from saefw.errors import UserError
from saefw.firing import grouped
from saefw.index import schema
from saefw.plugin import Example, Task, Unit
from saefw.run import LOG, Run, _mark
from saefw.shards import INDEX, STATS, Layout, Writer
from saefw.stages import drawings
from saefw.stages.probe import FILE as PROBE
from saefw.stages.probe import open_probe
from saefw.store import Store
from saefw.tally import Sizes, Tally, check
from saefw.trained import CONFIG, FILE, SAMPLE, open_sae, write_sae
from saefw.training import CHECKPOINT, Training
from saefw_linear import Linear
from saefw_topk import TopK

TOPK = TopK(k=2, expansion=2)


def said(read: Callable[[], object]) -> str:
    """Return what is said of a file that is refused."""
    with pytest.raises(UserError) as caught:
        read()
    return str(caught.value)


TRAIN = Unit("train", {}, given={"sae": TOPK})


def fresh() -> Training:
    return Training(TRAIN, 3, Stats(torch.zeros(3), torch.ones(3), 1.0, 0.0, 1), 10, "cpu")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(Store(tmp_path / "runs"), tmp_path, {}, {}, device="cpu")


def resumed(run: Run) -> int:
    """Return at which step a training goes on from what lies in its folder."""
    training = fresh()
    training.resume(run)
    training.advance(torch.ones(4, 3), 100)
    return training.step - 1


def anew(path: Path) -> list[str]:
    """What is said of a working file that is damaged."""
    return [f"{path}: damaged; it is not used, and what it held is made again"]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the weights and the folder of an SAE, and a checkpoint of its third step."""
    training = fresh()
    torch.manual_seed(0)
    for _ in range(3):
        training.advance(torch.randn(4, 3), 100)
    tensors = {f"sae.{name}": x.clone() for name, x in training.sae.state_dict().items()}
    for index, state in training.adam.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{name}": x.clone() for name, x in state.items()}
    folder = tmp_path_factory.mktemp("good")
    write_sae(training.sae.eval(), TOPK, folder, {}, torch.randn(4, 3))
    return {
        "sae": {name: x.clone().contiguous() for name, x in training.sae.state_dict().items()},
        "folder": folder,
        "checkpoint": {**tensors, "since_s": training.since_s},
    }


def torch_saved() -> bytes:
    file = io.BytesIO()
    torch.save({"W_enc": torch.ones(3, 6)}, file)
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("../../x", b"x")
    return file.getvalue()


class Bomb:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("unpickled",)


def word(path: Path) -> str:
    """Return what safetensors says of a file, in the words of its version; nothing if it opens it."""
    try:
        with safe_open(path, "pt"):
            return ""
    except SafetensorError as error:
        return str(error)


def headed(header: bytes, body: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + body


F32 = '{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, %s]}}'

BYTES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "Error while deserializing header: header too small"),
    "a few bytes": (b"\x01\x02", "Error while deserializing header: header too small"),
    "a pickle": (pickle.dumps(Bomb()), "Error while deserializing header: header too large"),
    "a file of torch": (torch_saved(), "Error while deserializing header: header too large"),
    "a zip": (zipped(), "Error while deserializing header: header too large"),
    "noise": (np.random.default_rng(0).bytes(4096), "Error while deserializing header: header too large"),
    "a header without end": (b"\xff" * 8 + b"{}", "Error while deserializing header: header too large"),
    "a header longer than the file": (
        (1000).to_bytes(8, "little") + b"{}",
        "Error while deserializing header: invalid header length",
    ),
    "a header that is no object": (
        headed(b"[1, 2]"),
        "Error while deserializing header: invalid JSON in header: invalid type: sequence",
    ),
    "more data than there is": (
        headed((F32 % (10**9, 4 * 10**9)).encode()),
        "Error while deserializing header: incomplete metadata, file not fully covered",
    ),
    "sizes whose product is too large": (
        headed((F32 % (f"{2**40}, {2**40}", 0)).encode()),
        "Error while deserializing header: overflow computing buffer size from shape and/or",
    ),
    "no metadata": (save({"a": torch.ones(1)}), "Expecting value: line 1 column 1 (char 0)"),
    "metadata that are no object": (save({"a": torch.ones(1)}, {"saefw": "[3]"}), "list instead of a JSON object"),
    "metadata without bottom": (save({"a": torch.ones(1)}, {"saefw": "[" * 100_000}), "nested too deep"),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_that_are_no_weights(
    name: str,
    good: dict[str, Any],
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    data, why = BYTES[name]
    for file in (FILE, SAMPLE):
        shutil.copytree(good["folder"], tmp_path, dirs_exist_ok=True)
        (tmp_path / file).write_bytes(data)
        message = said(lambda: open_sae(TOPK, tmp_path))
        if reason := word(tmp_path / file):
            assert reason.startswith(why)
            assert message == f"{tmp_path / file}: cannot be read ({reason}); delete {tmp_path} to train it again"
        else:  # what the metadata say is no matter here; the tensor is none of an SAE
            assert message.startswith(f"{tmp_path / file}: does not fit its SAE; delete {tmp_path} to train it again (")
    path = run.folder(TRAIN) / CHECKPOINT
    path.write_bytes(data)
    assert (resumed(run), caplog.messages) == (0, anew(path))
    assert not Path("unpickled").exists()


def test_a_pipe_is_not_waited_for(
    good: dict[str, Any], run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = run.folder(TRAIN) / CHECKPOINT
    os.mkfifo(path)
    assert (resumed(run), caplog.messages) == (0, anew(path))
    for file in (SAMPLE, FILE, CONFIG):
        shutil.copytree(good["folder"], tmp_path / file)
        (tmp_path / file / file).unlink()
        os.mkfifo(tmp_path / file / file)
        assert said(lambda folder=tmp_path / file: open_sae(TOPK, folder)) == (  # type: ignore[misc]
            f"{tmp_path / file / file}: cannot be read (not a file); delete {tmp_path / file} to train it again"
        )


Changed = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def put(name: str, tensor: Tensor) -> Changed:
    return lambda tensors: {**tensors, name: tensor}


def without(name: str) -> Changed:
    return lambda tensors: {key: x for key, x in tensors.items() if key != name}


WIDTH = (
    "cannot be read (d_model must be a whole number from 1 to 1048576, and is {}); delete {{folder}} to train it again"
)

SAES: dict[str, tuple[Changed, dict[str, Any], str]] = {
    "a tensor is missing": (
        without("b_dec"),
        {},
        "does not fit its SAE; delete {folder} to train it again ('b_dec' is missing)",
    ),
    "one too many": (
        put("extra", torch.ones(1)),
        {},
        "does not fit its SAE; delete {folder} to train it again ('extra' is one too many)",
    ),
    "other sizes": (
        put("b_enc", torch.ones(7)),
        {},
        "does not fit its SAE; delete {folder} to train it again ('b_enc' is float32 [7] instead of float32 [6])",
    ),
    "more dimensions": (
        put("scale", torch.ones(1)),
        {},
        "does not fit its SAE; delete {folder} to train it again ('scale' is float32 [1] instead of float32 [])",
    ),
    "another dtype": (
        put("W_enc", torch.ones(3, 6, dtype=torch.int64)),
        {},
        "does not fit its SAE; delete {folder} to train it again ('W_enc' is int64 [3, 6] instead of float32 [3, 6])",
    ),
    "a NaN": (
        put("W_dec", torch.full((6, 3), float("nan"))),
        {},
        "does not fit its SAE; delete {folder} to train it again ('W_dec' holds numbers that are not finite)",
    ),
    "an infinite scale": (
        put("scale", torch.tensor(float("inf"))),
        {},
        "does not fit its SAE; delete {folder} to train it again ('scale' holds numbers that are not finite)",
    ),
    "no width": (
        lambda tensors: tensors,
        {"d_model": None},
        WIDTH.format(None),
    ),
    "a width that is a word": (
        lambda tensors: tensors,
        {"d_model": "3" * 50},
        WIDTH.format(f"'{'3' * 26}..."),
    ),
    "a width below zero": (
        lambda tensors: tensors,
        {"d_model": -3},
        WIDTH.format(-3),
    ),
    "a width for which there is no memory": (
        lambda tensors: tensors,
        {"d_model": 1 << 20},
        "does not fit its SAE; delete {folder} to train it again (49 numbers are too few for a d_model of 1048576)",
    ),
    "other settings": (
        lambda tensors: tensors,
        {"settings": {"use": "topk"}},
        "is of an SAE with other settings than asked for; delete {folder} to train that one",
    ),
}


@pytest.mark.parametrize("name", SAES)
def test_an_sae_that_is_none(name: str, good: dict[str, Any], tmp_path: Path) -> None:
    change, told, message = SAES[name]
    shutil.copytree(good["folder"], tmp_path, dirs_exist_ok=True)
    (tmp_path / FILE).write_bytes(save(change(good["sae"])))
    (tmp_path / CONFIG).write_text(json.dumps(json.loads((tmp_path / CONFIG).read_text()) | told))
    path = tmp_path / (CONFIG if message.startswith(("cannot", "is of")) else FILE)
    assert said(lambda: open_sae(TOPK, tmp_path)) == f"{path}: {message.replace('{folder}', str(tmp_path))}"


SAMPLES: dict[str, tuple[Changed, str]] = {
    "no tokens": (
        without("x"),
        "does not fit its SAE; delete {folder} to train it again ('indices' is int64 [4, 2] instead of int64 [0, 2])",
    ),
    "tokens of another width": (
        put("x", torch.ones(4, 2)),
        "does not fit its SAE; delete {folder} to train it again ('x' is float32 [4, 2] instead of float32 [4, 3])",
    ),
    "very many": (
        put("x", torch.ones(65, 3)),
        "does not fit its SAE; delete {folder} to train it again "
        "(tokens must be a whole number from 0 to 64, and is 65)",
    ),
    "features that are none": (
        put("indices", torch.full((4, 2), 6)),
        "does not fit its SAE; delete {folder} to train it again ('indices' must lie in 0..5)",
    ),
    "features below zero": (
        put("indices", torch.full((4, 2), -1)),
        "does not fit its SAE; delete {folder} to train it again ('indices' must lie in 0..5)",
    ),
    "values that are none": (
        put("values", torch.full((4, 2), float("nan"))),
        "does not fit its SAE; delete {folder} to train it again ('values' holds numbers that are not finite)",
    ),
    "one too many": (
        put("extra", torch.ones(1)),
        "does not fit its SAE; delete {folder} to train it again ('extra' is one too many)",
    ),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_that_is_none(name: str, good: dict[str, Any], tmp_path: Path) -> None:
    change, message = SAMPLES[name]
    shutil.copytree(good["folder"], tmp_path, dirs_exist_ok=True)
    (tmp_path / SAMPLE).write_bytes(save(change(load_file(tmp_path / SAMPLE))))
    wanted = f"{tmp_path / SAMPLE}: {message.replace('{folder}', str(tmp_path))}"
    assert said(lambda: open_sae(TOPK, tmp_path)) == wanted


JSONS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "Expecting value: line 1 column 1 (char 0)"),
    "a list": (b"[3]", "list instead of a JSON object"),
    "no bottom": (b"[" * 100_000, "nested too deep"),
    "no text": (b"\xff\xfe\xff", "'utf-16-le' codec can't decode byte 0xff in position 2: truncated data"),
}


@pytest.mark.parametrize("name", JSONS)
def test_a_config_that_is_none(name: str, good: dict[str, Any], tmp_path: Path) -> None:
    data, why = JSONS[name]
    shutil.copytree(good["folder"], tmp_path, dirs_exist_ok=True)
    (tmp_path / CONFIG).write_bytes(data)
    wanted = f"{tmp_path / CONFIG}: cannot be read ({why}); delete {tmp_path} to train it again"
    assert said(lambda: open_sae(TOPK, tmp_path)) == wanted


def test_a_good_sae_and_a_good_checkpoint_are_read(
    good: dict[str, Any], run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Else all of the others would be refused for something else than what is wrong with them."""
    assert torch.equal(open_sae(TOPK, good["folder"]).state_dict()["W_enc"], good["sae"]["W_enc"])
    sealed.write(run.folder(TRAIN) / CHECKPOINT, good["checkpoint"], {"step": 3, "log": _mark(b"")})
    assert (resumed(run), caplog.messages) == (3, [])


WHOLE: Changed = lambda tensors: tensors  # noqa: E731
CHECKPOINTS: dict[str, tuple[Changed, dict[str, Any]]] = {
    "no step": (WHOLE, {"step": None}),
    "a step beyond the end": (WHOLE, {"step": 11}),
    "a step before the beginning": (WHOLE, {"step": -1}),
    "a step that is true": (WHOLE, {"step": True}),
    "a step that is a fraction": (WHOLE, {"step": 3.0}),
    "no log": (WHOLE, {"log": None}),
    "moments before the first step": (WHOLE, {"step": 0}),
    "no moments": (without("adam.1.exp_avg"), {}),
    "moments of other sizes": (put("adam.1.exp_avg", torch.ones(10**4)), {}),
    "moments of nobody": (put("adam.9.exp_avg", torch.ones(3)), {}),
    "a name that is none": (put("adam.x", torch.ones(3)), {}),
    "nobody has fired": (without("since_s"), {}),
    "as floats": (put("since_s", torch.ones(6)), {}),
    "a weight that is no number": (put("sae.b_enc", torch.full((6,), float("nan"))), {}),
}
"""Of the third step, and sealed, yet not what a training writes."""


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_that_is_none(name: str, good: dict[str, Any], run: Run, caplog: pytest.LogCaptureFixture) -> None:
    change, about = CHECKPOINTS[name]
    path = run.folder(TRAIN) / CHECKPOINT
    sealed.write(path, change(good["checkpoint"]), {"step": 3, "log": _mark(b""), **about})
    assert (resumed(run), caplog.messages) == (0, anew(path))


def test_a_probe_that_is_none(tmp_path: Path) -> None:
    weights = {"weight": torch.ones(3, 2), "bias": torch.ones(2), "mean": torch.ones(3), "std": torch.ones(3)}
    path, task = tmp_path / PROBE, Task(3, ("a", "b"))
    for tensors, why in (
        ({**weights, "weight": torch.ones(3, 3)}, "'weight' is float32 [3, 3] instead of float32 [3, 2]"),
        ({**weights, "std": torch.ones(3).double()}, "'std' is float64 [3] instead of float32 [3]"),
        ({**weights, "bias": torch.tensor([1.0, float("-inf")])}, "'bias' holds numbers that are not finite"),
        ({"weight": torch.ones(3, 2)}, "'bias' is missing"),
    ):
        path.write_bytes(save(tensors))
        assert said(lambda: open_probe(Linear(), tmp_path, task)) == (
            f"{path}: is not the probe it should be; delete {tmp_path} to make it again ({why})"
        )
    path.write_bytes(pickle.dumps(Bomb()))
    assert said(lambda: open_probe(Linear(), tmp_path, task)) == (
        f"{path}: is not the probe it should be; delete {tmp_path} to make it again ({word(path)})"
    )


# Recordings

LAYOUT = Layout(4, 5, ("cls",), 3, (2, 2), 0, "float32")
EXAMPLES = [Example(f"{i}.png", -1, "train" if i < 3 else "test", Image.Image) for i in range(4)]


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    folder = tmp_path / "acts"
    folder.mkdir()
    writer = Writer(folder, LAYOUT, EXAMPLES, 2 * LAYOUT.example_bytes)
    for shard in writer.missing():
        writer.write(shard, torch.arange(30.0).reshape(5, 2, 3) + shard)
    writer.finish()
    return folder


UP_TO = "must be a whole number from {} to 2147483647, and is"

INDICES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a shard elsewhere": ({}, {"file": "../../x"}, "shard 0 is ../../x from example 0"),
    "the other shard": ({}, {"file": "acts-00001.safetensors"}, "shard 0 is acts-00001.safetensors from example 0"),
    "a shard that begins later": ({}, {"first": 1}, "shard 0 is acts-00000.safetensors from example 1"),
    "fewer than none": ({}, {"n": -2}, "n of shard 0 must be a whole number from 1 to 4, and is -2"),
    "more than all": ({}, {"n": 10**30}, f"n of shard 0 must be a whole number from 1 to 4, and is 1{'0' * 26}..."),
    "not all": ({}, {"n": 1}, "shard 1 is acts-00001.safetensors from example 2"),
    "another length": ({}, {"bytes": 10**12}, "acts-00000.safetensors is not 1000000000000 bytes long"),
    "a word too many": ({}, {"x": 1}, "Shard.__new__() got an unexpected keyword argument 'x'"),
    "no examples": ({"n_examples": -1}, {}, f"n_examples {UP_TO.format(0)} -1"),
    "more examples": ({"n_examples": 5}, {}, "the shards hold 4 examples of 5"),
    "a width of half a number": ({"d_model": 0.5}, {}, f"d_model {UP_TO.format(1)} 0.5"),
    "a width that is true": ({"d_model": True}, {}, f"d_model {UP_TO.format(1)} True"),
    "more tokens": ({"n_tokens": 6}, {}, "n_tokens is 6, for 1 and 4 patches"),
    "a grid without end": (
        {"grid": [2, 10**12]},
        {},
        "grid must be a whole number from 1 to 32767, and is 1000000000000",
    ),
    "a grid of three": ({"grid": [1, 2, 2]}, {}, "too many values to unpack (expected 2)"),
    "another dtype": ({"dtype": "object"}, {}, "dtype is object"),
    "a dtype that is a list": ({"dtype": []}, {}, "unhashable type: 'list'"),
    "shards that are none": ({"shards": 3}, {}, "'int' object is not iterable"),
    "no shards": ({"shards": []}, {}, "the shards hold 0 examples of 4"),
}


@pytest.mark.parametrize("name", INDICES)
def test_a_list_of_shards_that_is_none(name: str, recording: Path) -> None:
    whole, first, why = INDICES[name]
    index = json.loads((recording / INDEX).read_text())
    index["shards"][0] |= first
    (recording / INDEX).write_text(json.dumps({**index, **whole}))
    message = said(lambda: Acts(recording))
    assert message == f"{recording}: the recording is damaged ({why}); delete the folder to make it again"


def of_json(text: str) -> str:
    """What Python says of a text that is no JSON."""
    with pytest.raises(ValueError) as caught:
        json.loads(text)
    return str(caught.value)


LONG = '{"n_examples": ' + "9" * 5000 + "}"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "Expecting value: line 1 column 1 (char 0)"),
        ("[1]", "list instead of a JSON object"),
        ("{}", "'shards'"),
        ("[" * 100_000, "nested too deep"),
        (LONG, of_json(LONG)),
    ],
)
def test_a_list_of_shards_that_is_no_json(text: str, why: str, recording: Path) -> None:
    (recording / INDEX).write_text(text)
    message = said(lambda: Acts(recording))
    assert message == f"{recording}: the recording is damaged ({why}); delete the folder to make it again"


@pytest.mark.parametrize("name", [INDEX, "acts-00001.safetensors"])
def test_a_recording_that_cannot_be_read_is_not_damaged(name: str, recording: Path) -> None:
    """Nobody is told to delete hours of recording for a disk that fails for a while."""
    path = recording / name
    path.unlink()
    path.symlink_to(path)
    assert said(lambda: Acts(recording)) == (
        f"{path}: cannot be read (Too many levels of symbolic links); nothing is deleted for that; make it readable, "
        "or delete it, and its unit is made again"
    )


def test_a_shard_that_is_none(recording: Path) -> None:
    path = recording / "acts-00000.safetensors"

    def message(data: bytes) -> str:
        index = json.loads((recording / INDEX).read_text())
        index["shards"][0]["bytes"] = len(data)
        (recording / INDEX).write_text(json.dumps(index))
        path.write_bytes(data)
        return said(lambda: list(Acts(recording).read("all")))

    end = f"delete {recording} to make it again"
    assert message(save({"acts": torch.ones(5, 2, 4)})) == (
        f"{path}: holds {{'acts': ('F32', [5, 2, 4])}}, not float32 [5, 2, 3]; {end}"
    )
    assert message(save({"acts": torch.ones(5, 2, 3, dtype=torch.float16)})) == (
        f"{path}: holds {{'acts': ('F16', [5, 2, 3])}}, not float32 [5, 2, 3]; {end}"
    )
    assert message(save({"other": torch.ones(5, 2, 3)})) == (
        f"{path}: holds {{'other': ('F32', [5, 2, 3])}}, not float32 [5, 2, 3]; {end}"
    )
    for data in (b"", b"\xff" * 200, pickle.dumps(Bomb()), (2**62).to_bytes(8, "little") + b"{}"):
        assert message(data) == f"{path}: cannot be read ({word(path)}); {end}"


def test_statistics_that_are_none(recording: Path) -> None:
    path = recording / STATS
    good = load_file(path)
    for changed, why in (
        ({"patches.mean": torch.zeros(4, dtype=torch.float64)}, "'patches.mean' is float64 [4] instead of float64 [3]"),
        ({"cls.n": torch.ones(2, dtype=torch.int64)}, "'cls.n' is int64 [2] instead of int64 []"),
        ({"patches.scale": torch.tensor(float("nan")).double()}, "'patches.scale' holds numbers that are not finite"),
        ({"more": torch.ones(1)}, "'more' is one too many"),
    ):
        path.write_bytes(save({**good, **changed}))
        assert said(lambda: Acts(recording).stats("patches")) == (
            f"{path}: cannot be read ({why}); delete {recording} to make it again"
        )


def test_a_share_of_the_statistics_that_is_none_is_made_again(recording: Path) -> None:
    path = recording / "moments-00000.safetensors"
    good = path.read_bytes()

    def missing(data: bytes) -> list[int]:
        path.write_bytes(data)
        return Writer(recording, LAYOUT, EXAMPLES, 2 * LAYOUT.example_bytes).missing()

    assert missing(good) == []
    found = sealed.read(path, lambda tensors, about: None)
    assert found
    tensors, about = found
    for data in (b"", pickle.dumps(Bomb()), save(dict(tensors)), save(dict(tensors), {"saefw": "[]"})):
        assert missing(data) == [0]
    for changed, told in (
        ({}, {}),
        ({}, {**about, "file": "../../x"}),
        ({}, {**about, "file": 3}),
        ({}, {**about, "n": "2"}),
        ({}, {**about, "more": 1}),
        ({}, {**about, "images": 1}),
        ({}, {name: value for name, value in about.items() if name != "images"}),
        ({}, {**about, "broken": 1}),
        ({}, {**about, "broken": [[0]]}),
        ({}, {**about, "broken": [["0", "why"]]}),
        ({}, {**about, "broken": [[0, None]]}),
        ({}, {**about, "broken": [[3, "of another shard"]]}),
        ({"cls.n": torch.ones(3)}, about),
        ({"more": torch.ones(3)}, about),
    ):
        sealed.write(path, {**tensors, **changed}, told)
        assert missing(path.read_bytes()) == [0], (changed, told)
    sealed.write(path, tensors, about)
    assert missing(path.read_bytes()) == []


@pytest.mark.parametrize(
    "query",
    [
        "SELECT 1 AS example, 'a' AS key, 0 AS label, 'train' AS split",  # not 0
        "SELECT 0 AS example, 'a' AS key, 0 AS label, 'train' AS split",  # not all
        "SELECT range::INT AS example, NULL AS key, 0 AS label, 'train' AS split FROM range(4)",
        "SELECT range::INT AS other FROM range(4)",
    ],
)
def test_tables_of_other_images(query: str, recording: Path) -> None:
    import duckdb

    path = recording / "example.parquet"
    with duckdb.connect() as db:
        db.execute(f"COPY ({query}) TO '{path}' (FORMAT parquet)")
    assert said(lambda: Acts(recording).keys) == f"{path}: cannot be read; delete {recording} to make it again"


# What a unit says of itself


@pytest.mark.parametrize(
    "line",
    [
        "3", "[1]", "[2, 3]", '["x", {"a": 1}]', '[true, {"a": 1}]', '[3, {"a": "x"}]', '[4, {"a": null}]',
        f'[{2**70}, {{"a": 1}}]', "[" * 100_000, "{}", '[6, {"a', f'[1, {{"a": 1{"0" * 400}}}]', '[1, {"\\ud800": 1}]',
        "\xff",
    ],
)  # fmt: skip
def test_a_log_of_anything(line: str, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """Also under a checkpoint that vouches for it."""
    path, data = run.folder(TRAIN) / LOG, b'[1, {"a": 0.5, "b": NaN}]\n'
    path.write_bytes(data)
    assert run.rewind(TRAIN, _mark(data)) and path.read_bytes() == data
    data += line.encode("latin-1") + b"\n"
    path.write_bytes(data)
    assert not run.rewind(TRAIN, _mark(data))
    assert caplog.messages == anew(path) and path.read_bytes() == b""


@pytest.mark.parametrize("mark", ["x", "-1:", "9" * 5000 + ":", "0:", "3"])
def test_a_mark_of_anything(mark: str, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    (run.folder(TRAIN) / LOG).write_text('[1, {"a": 0.5}]\n')
    assert not run.rewind(TRAIN, mark)
    assert caplog.messages == anew(run.folder(TRAIN) / LOG)


def words(provoke: Callable[[], object]) -> str:
    """The first line of what a library says, in the words of its version."""
    with pytest.raises(Exception) as caught:
        provoke()
    return str(caught.value).splitlines()[0]


def indexed(*row: object) -> None:
    """Put label, time and seconds of a unit into an index."""
    with duckdb.connect() as db:
        db.execute(schema())
        db.execute("INSERT INTO unit VALUES ('', '', ?, '{}', '{}', ?, ?)", row)


NO_LIST = "does not list the files of its unit"
DEEP = "[" * 100_000
UNHASHED: Any = [[]]


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("unit.json", "[]", words(lambda: json.loads("[]")["stage"])),
        ("unit.json", "{}", "has no 'stage'"),
        ("unit.json", '{"stage": "x", "content": {}, "needs": [[]]}', words(lambda: dict.fromkeys(UNHASHED))),
        ("unit.json", DEEP, words(lambda: json.loads(DEEP))),
        ("unit.json", "\udcff", words(b"\xff".decode)),
        ("made.json", "", NO_LIST),
        ("made.json", '{"files": {"unit.json": {"bytes": Infinity, "sha256": ""}}}', NO_LIST),
        (
            "made.json",
            '{"files": {"unit.json": {"bytes": 1, "sha256": ""}, "a\\u0000": {"bytes": 1, "sha256": ""}}}',
            NO_LIST,
        ),
        (
            "made.json",
            '{"files": {"unit.json": {"bytes": 1, "sha256": ""}, "\\ud800": {"bytes": 1, "sha256": ""}}}',
            NO_LIST,
        ),
        ("made.json", '{"label": "x"}', "has no 'made_with'"),
        (
            "made.json",
            '{"label": "x", "seconds": "long", "made_at": "2025-01-01", "made_with": {}}',
            words(lambda: indexed("x", "2025-01-01", "long")),
        ),
        (
            "made.json",
            '{"label": "\\ud800", "seconds": 1, "made_at": "2025-01-01", "made_with": {}}',
            words(lambda: indexed("\ud800", "2025-01-01", 1)),
        ),
        (
            "made.json",
            '{"label": "x", "seconds": 1, "made_at": "never", "made_with": {}}',
            words(lambda: indexed("x", "never", 1)),
        ),
    ],
)
def test_a_unit_that_says_nothing_of_itself(name: str, text: str, why: str, tmp_path: Path) -> None:
    """The others are indexed all the same."""
    store = Store(tmp_path / "runs")
    units = [Unit("fake", {"n": n}) for n in range(2)]
    for unit in units:
        store.write(unit, "metric", {"name": "a", "step": 1, "value": 1.0})
        store.keep(unit, 1.0, {})
    folder = store.folder(units[0])
    (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    try:
        made = json.loads((folder / MADE).read_bytes())
        made.setdefault("files", {"unit.json": {}})["unit.json"] |= {
            "bytes": (folder / "unit.json").stat().st_size,
            "sha256": checksum(folder / "unit.json"),
        }
    except ValueError:
        pass
    else:
        if "Infinity" not in text:
            (folder / MADE).write_text(json.dumps(made))
    store.sync()
    (damage,) = store.damage(folder)
    assert str(damage) == f"{folder / name}: damaged ({why})"
    # What made.json vouches for, it alone is no reason to delete.
    assert damage.as_made == (why != NO_LIST)
    with store.db() as db:
        assert db.execute("SELECT unit FROM unit").fetchall() == [(units[1].address,)]


def test_a_tally_that_is_none(tmp_path: Path) -> None:
    sizes = Sizes(4, 2, 2, 2)
    tally = Tally(sizes, tmp_path)
    image, patch, feature = torch.ones(1, 2, 4).nonzero().unbind(dim=1)
    tally.add(torch.tensor([0]), torch.tensor([1]), grouped(image, patch, feature, torch.ones(8), 4, 2))
    good = {name: x.clone() for name, x in tally.state().items()}
    check(good, sizes)
    Tally(sizes, tmp_path, good)
    for changed, why in (
        ({"fired_s": torch.zeros(5, dtype=torch.int64)}, "'fired_s' is int64 [5] instead of int64 [4]"),
        ({"top.slot_st": torch.zeros(4, 2, dtype=torch.int64)}, "'top.slot_st' is no order of maps"),
        ({"top.label_st": torch.full((4, 2), 2)}, "'top.label_st' is not within -1..1"),
        ({"top.token_st": torch.full((4, 2), -1)}, "'top.token_st' is not within 0..1"),
        ({"runs": torch.tensor([3])}, "'runs' do not add up"),
        ({"count_sb": good["count_sb"] - 1}, "'count_sb' is not within 0..2147483647"),
    ):
        with pytest.raises(ValueError) as caught:
            check({**good, **changed}, sizes)
        assert str(caught.value) == why
    for name, path in (("pairs", tmp_path / "pairs.bin"), ("images", tmp_path / "images.bin")):
        data = path.read_bytes()
        for n in (2**60, -1, 0):
            with pytest.raises(ValueError) as caught:
                Tally(sizes, tmp_path, {**good, name: torch.tensor(n)})
            assert [str(caught.value)] == anew(path)
            path.write_bytes(data)


# Pictures


@pytest.mark.parametrize("data", [b"", b"noise" * 50, pickle.dumps(Bomb()), save({"other": torch.ones(3, 2)})])
def test_pictures_that_are_none(data: bytes, tmp_path: Path) -> None:
    for name, opens in {
        "maps.safetensors": lambda path: pictures.maps(path, 0),
        "picture.parquet": lambda path: pictures.read(path, [0]),
    }.items():
        path = tmp_path / name
        path.write_bytes(data)
        message = said(lambda path=path, opens=opens: opens(path))  # type: ignore[misc]
        assert message == f"{path}: cannot be read; delete {tmp_path} to make it again"


def test_a_map_of_a_feature_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "maps.safetensors"
    path.write_bytes(save({"maps": torch.ones(3, 2, 4, dtype=torch.uint8)}))
    assert pictures.maps(path, 2).shape == (2, 4)
    assert said(lambda: pictures.maps(path, 3)) == f"{path}: cannot be read; delete {tmp_path} to make it again"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[1]", "list instead of a JSON object"),
        ('{"edit": -1}', "edit must be a whole number from 0 to 2147483647, and is -1"),
        ('{"edit": "1"}', "edit must be a whole number from 0 to 2147483647, and is '1'"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_a_first_example_that_is_none(text: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "first.json"
    path.write_text(text)
    message = f"{path}: cannot be read ({why}); delete {tmp_path} to make it again"
    assert said(lambda: drawings._first(path)) == message
