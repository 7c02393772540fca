"""One bad file a fault, the whole message compared; and what a good file stands for."""

import itertools
import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kinds
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saefw.catalog import Catalog
from saefw.entry import KINDS
from saefw.errors import Faults, UserError
from saefw.registry import Registry, json_schema, read

GOOD = """\
# a comment
saefw: 1
store: runs/here
device: cuda:1

backbones:
  clip: {use: open-clip, pretrained: openai}

datasets:
  one: {use: folder, root: $NOWHERE/one}
  two: {use: folder, root: two}

saes:
  relu:
    use: relu
    vary: {l1: [4e-4, 0.001], lr: [1.0e-3, 3e-3]}
  topk: {use: topk, k: 8}

probes:
figures:

stages:
  acts: {use: record, backbone: clip, datasets: [one, two], layers: [-2, -1]}
  sweep: {use: train, acts: acts, saes: [relu, topk]}
  steer: {use: steer, sae: {layer: -2, lowest: nmse, below: {l0: 64}}}
"""


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog([kinds], entry_points=False)


@dataclass
class File:
    """A registry.yaml to fill and read."""

    path: Path
    catalog: Catalog

    def __call__(self, text: str) -> Registry:
        """Read a text."""
        self.path.write_text(text)
        return read(self.path, self.catalog)

    def faults(self, text: str) -> list[str]:
        """Return what is wrong with a text, the folder cut off."""
        with pytest.raises(UserError) as caught:
            self(text)
        return str(caught.value).replace(f"{self.path.parent}/", "").splitlines()


@pytest.fixture
def load(tmp_path: Path, catalog: Catalog) -> File:
    return File(tmp_path / "registry.yaml", catalog)


def test_a_good_file(load: File, tmp_path: Path) -> None:
    registry = load(GOOD)
    assert registry.store == tmp_path / "runs/here"
    assert registry.base == tmp_path
    assert registry.device == "cuda:1"
    assert tuple(registry.families) == KINDS
    assert registry.families["probes"] == registry.families["figures"] == {}
    assert [member.label for member in registry.families["saes"]["relu"]] == [
        "relu l1=0.0004 lr=0.001",
        "relu l1=0.0004 lr=0.003",
        "relu l1=0.001 lr=0.001",
        "relu l1=0.001 lr=0.003",
    ]
    assert [member.entry for member in registry.families["saes"]["relu"]] == [
        kinds.Relu.model_validate({"l1": l1, "lr": lr}) for l1, lr in itertools.product([4e-4, 1e-3], [1e-3, 3e-3])
    ]
    (topk,) = registry.families["saes"]["topk"]
    assert topk.label == "topk" and topk.entry == kinds.TopK.model_validate({"k": 8})
    assert list(registry.families["stages"]) == ["acts", "sweep", "steer"]


def test_the_smallest_file(load: File, tmp_path: Path) -> None:
    registry = load("saefw: 1")
    assert (registry.store, registry.device) == (tmp_path / "runs", "auto")


def test_places_of_a_good_file(load: File, tmp_path: Path) -> None:
    """A later fault of a stage is told with the place of its entry or setting."""
    registry = load(GOOD)
    path = tmp_path / "registry.yaml"
    assert registry.place("stages", "sweep") == f"{path}:24:3"
    assert registry.place("stages", "sweep", "saes") == f"{path}:24:35"
    assert registry.place("stages", "sweep", "saes.1") == f"{path}:24:48"
    assert registry.place("stages", "steer", "sae.below.l0") == f"{path}:25:62"
    assert registry.place("stages", "sweep", "tokens") == f"{path}:24:3"  # not in the file: at its default
    assert registry.place("saes", "relu", "lr") == f"{path}:16:31"
    assert registry.place("saes", "relu", "lr.1") == f"{path}:16:44"


def test_every_fault_of_the_plan_at_once(load: File) -> None:
    assert load.faults(
        """\
saefw: 1
plugin: [mine.py]
backbones:
  # two plugins
  clip: {use: open-clp, pretrained: openai}
  clip2:
    use: open-clip
    # a slip
    pretraind: openai

datasets:
  one: {use: folder}

saes:
  relu:
    use: relu
    vary:
      l1: [4e-4, -3]
      lr: [1,    fast]

stages:
  acts: {use: record, backbone: clip, datasets: [one]}
  # names
  sweep: {use: train, acts: later, saes: [rellu]}
  later: {use: record, backbone: clip, datasets: [one]}
"""
    ) == [
        "registry.yaml:2:1: plugin: unknown key; did you mean 'plugins'?",
        "registry.yaml:5:10: backbones.clip.use: no plugin brings 'open-clp'; did you mean 'open-clip'?"
        " (there are: open-clip, tiny-vit)",
        "registry.yaml:6:3: backbones.clip2.pretrained: is required",
        "registry.yaml:9:5: backbones.clip2.pretraind: no such setting; did you mean 'pretrained'?",
        "registry.yaml:18:18: saes.relu.vary.l1.1: Input should be greater than or equal to 0 (got -3)",
        "registry.yaml:19:18: saes.relu.vary.lr.1: Input should be a valid number, unable to parse string as a number"
        " (got 'fast')",
        "registry.yaml:24:23: stages.sweep.acts: 'later' is not one of the stages above it",
        "registry.yaml:24:43: stages.sweep.saes.0: 'rellu' is not one of the saes; did you mean 'relu'?",
    ]


HEAD = "saefw: 1\n"
SAE = HEAD + "saes:\n  a: "
STAGES = """\
saefw: 1
backbones: {tiny: {use: tiny-vit}}
datasets: {one: {use: folder}}
saes: {topk: {use: topk}}
stages:
  acts: {use: record, backbone: tiny, datasets: [one]}
"""

BAD = {
    # the file
    "empty": ("", "1:1: a registry is a mapping that begins with `saefw: 1` (it is empty)"),
    "only a comment": ("# hello\n", "1:1: a registry is a mapping that begins with `saefw: 1` (it is empty)"),
    "a list": ("- 1\n", "1:1: a registry is a mapping that begins with `saefw: 1` (got [1])"),
    "syntax": (
        HEAD + "saes: {a: {use: topk}\n",
        "3:1: not YAML that saefw reads: while parsing a flow mapping, expected ',' or '}', but got '<stream end>'",
    ),
    "tab": (
        HEAD + "saes:\n\ta: 1\n",
        "3:1: not YAML that saefw reads: while scanning for the next token, found character '\\t' that cannot start"
        " any token",
    ),
    "two documents": (
        HEAD + "---\nsaefw: 1\n",
        "2:1: not YAML that saefw reads: expected a single document in the stream, but found another document",
    ),
    "no such anchor": (
        HEAD + "store: *a\n",
        "2:8: not YAML that saefw reads: found undefined alias 'a'",
    ),
    "control character": (HEAD + "store: a\x07\n", "2:9: not YAML: character #x0007"),
    "python tag": (
        HEAD + "store: !!python/object/apply:os.getcwd []\n",
        "2:8: not YAML that saefw reads: a tag (tag:yaml.org,2002:python/object/apply:os.getcwd)",
    ),
    "merge key": (
        HEAD + "saes: {a: &a {use: topk}, b: {<<: *a}}\n",
        "2:31: not YAML that saefw reads: a merge key (<<): write its settings out",
    ),
    "a key that is a list": (HEAD + "? [a]\n: 1\n", "2:3: not YAML that saefw reads: a key that is not a word"),
    "an alias in itself": (
        HEAD + "saes: &a {b: *a}\n",
        "2:11: not YAML that saefw reads: an alias to what it lies in",
    ),
    "an endless number": (
        HEAD + f"store: {'9' * 5000}\n",
        "2:8: not YAML that saefw reads: 99999999999999999999 is no number",
    ),
    # the header
    "no version": ("store: runs\n", "1:1: saefw: is required: write `saefw: 1`, the version of the format"),
    "another version": (
        "saefw: 2\nmodels: {}\n",
        "1:1: saefw: must be 1, the version that this saefw reads (got 2)",
    ),
    "true is no version": ("saefw: true\n", "1:1: saefw: must be 1, the version that this saefw reads (got True)"),
    "unknown key": (
        HEAD + "zebra: 1\n",
        "2:1: zebra: unknown key (there are: backbones, datasets, device, figures, plugins, probes, saefw, saes,"
        " stages, store)",
    ),
    "misspelt kind": (HEAD + "sae: {}\n", "2:1: sae: unknown key; did you mean 'saes'?"),
    "store": (HEAD + "store: 3\n", "2:1: store: must be the path of a folder (got 3)"),
    "store unset": (
        HEAD + "store: $NOT_SET_ANYWHERE/runs\n",
        "2:1: store: '$NOT_SET_ANYWHERE/runs': the variable $NOT_SET_ANYWHERE is not set",
    ),
    "device": (HEAD + "device: gpu\n", "2:1: device: must be auto, cpu, cuda, cuda:N or mps (got 'gpu')"),
    "plugins": (HEAD + "plugins: mine.py\n", "2:1: plugins: must be a list of plugin files (got 'mine.py')"),
    "plugin": (HEAD + "plugins: [3]\n", "2:11: plugins.0: must be the path of a plugin file (got 3)"),
    # blocks and entries
    "a block that is a list": (HEAD + "saes: [a]\n", "2:1: saes: must be a mapping of names to entries (got ['a'])"),
    "a name": (
        HEAD + "saes:\n  a/b: {use: topk}\n",
        "3:3: saes.a/b: a name is made of letters, digits, - and _",
    ),
    "an entry that is a word": (SAE + "topk\n", "3:3: saes.a: must be a mapping with `use` and settings (got 'topk')"),
    "an entry that is nothing": (SAE + "\n", "3:3: saes.a: must be a mapping with `use` and settings (got nothing)"),
    "no use": (SAE + "{k: 3}\n", "3:3: saes.a.use: is required (there are: relu, topk)"),
    "a number for use": (
        SAE + "{use: 3}\n",
        "3:7: saes.a.use: must be the name that a plugin brings (there are: relu, topk) (got 3)",
    ),
    "an unknown use": (SAE + "{use: gated}\n", "3:7: saes.a.use: no plugin brings 'gated' (there are: relu, topk)"),
    "set twice": (SAE + "{use: topk, k: 1, k: 2}\n", "3:24: 'k' is set twice"),
    "an entry twice": (SAE + "{use: topk}\n  a: {use: topk}\n", "4:3: 'a' is set twice"),
    "an unknown setting": (
        HEAD + "datasets:\n  a: {use: folder, zebra: 1}\n",
        "3:20: datasets.a.zebra: no such setting (there are: limit, root)",
    ),
    "not finite": (SAE + "{use: relu, l1: .inf}\n", "3:18: saes.a.l1: Input should be a finite number (got inf)"),
    "settings that do not fit together": (SAE + "{use: topk, k: 65}\n", "3:3: saes.a: k 65 is over 64"),
    "a validator that speaks as the rest does": (SAE + "{use: topk, k: 1013}\n", "3:3: saes.a: k is not 1013"),
    "a long value": (
        SAE + f"{{use: topk, k: {'x' * 99}}}\n",
        f"3:18: saes.a.k: Input should be a valid integer, unable to parse string as an integer (got '{'x' * 56}...)",
    ),
    # vary
    "vary is a list": (
        SAE + "{use: topk, vary: [k]}\n",
        "3:18: saes.a.vary: must be a mapping of settings to lists of values (got ['k'])",
    ),
    "vary a value": (
        SAE + "{use: topk, vary: {k: 3}}\n",
        "3:25: saes.a.vary.k: must be a list of values, at least one (got 3)",
    ),
    "vary nothing": (
        SAE + "{use: topk, vary: {k: []}}\n",
        "3:25: saes.a.vary.k: must be a list of values, at least one (got [])",
    ),
    "vary use": (SAE + "{use: topk, vary: {use: [topk, relu]}}\n", "3:25: saes.a.vary.use: 'use' cannot vary"),
    "vary what is set": (
        SAE + "{use: topk, k: 3, vary: {k: [4, 5]}}\n",
        "3:31: saes.a.vary.k: is set outside vary too",
    ),
    "vary an unknown setting": (
        SAE + "{use: topk, vary: {warm_up: [4, 5]}}\n",
        "3:25: saes.a.vary.warm_up: no such setting; did you mean 'warmup'?",
    ),
    "the same twice": (
        SAE + "{use: relu, vary: {l1: [4e-4, 1, 0.0004]}}\n",
        "3:39: saes.a.vary.l1.2: is in the list already (got 0.0004)",
    ),
    "vary what does not fit together": (
        SAE + "{use: topk, vary: {k: [1, 65, 66], lr: [1, 2]}}\n",
        "3:3: saes.a: k 65 is over 64",
    ),
    "far too many": (
        SAE + f"{{use: topk, vary: {{k: {list(range(1, 60))}, lr: {list(range(1, 61))}, seed: {list(range(60))}}}}}\n",
        "3:18: saes.a.vary: stands for 212400 members; at most 100000 may be",
    ),
    # names
    "a name among none": (
        HEAD + "stages:\n  acts: {use: record, backbone: tiny, datasets: []}\n",
        "3:23: stages.acts.backbone: 'tiny' is not one of the backbones (there are none)",
    ),
    "a stage that names itself": (
        STAGES + "  sweep: {use: train, acts: sweep, saes: [topk]}\n",
        "7:23: stages.sweep.acts: 'sweep' is not one of the stages above it",
    ),
    "a misspelt stage": (
        STAGES + "  sweep: {use: train, acts: act, saes: [topk]}\n",
        "7:23: stages.sweep.acts: 'act' is not one of the stages above it; did you mean 'acts'?",
    ),
    "a default that is not there": (
        STAGES + "  steer: {use: steer}\n",
        "7:3: stages.steer.saes: 'sweep' is not one of the stages above it (there are: acts)",
    ),
    "a name in vary": (
        STAGES + "  sweep: {use: train, saes: [topk], vary: {acts: [acts, other]}}\n",
        "7:57: stages.sweep.vary.acts.1: 'other' is not one of the stages above it (there are: acts)",
    ),
    "names in vary": (
        STAGES + "  sweep: {use: train, acts: acts, vary: {saes: [[topk], [topk, relu]]}}\n",
        "7:64: stages.sweep.vary.saes.1.1: 'relu' is not one of the saes (there are: topk)",
    ),
    # inside a setting
    "one of several words": (
        STAGES + "  sweep: {use: train, acts: acts, saes: [topk], tokens: patch}\n",
        "7:49: stages.sweep.tokens: Input should be 'patches' or 'cls'; did you mean 'patches'? (got 'patch')",
    ),
    "in a nested model": (
        STAGES + "  steer: {use: steer, saes: acts, sae: {lowst: nmse}}\n",
        "7:41: stages.steer.sae.lowst: no such setting; did you mean 'lowest'?",
    ),
    "a union": (
        STAGES + "  steer: {use: steer, saes: acts, amounts: much}\n",
        "7:35: stages.steer.amounts: Input should be a valid integer, unable to parse string as an integer or Input"
        " should be a valid list (got 'much')",
    ),
    "inside a union": (
        STAGES + "  steer: {use: steer, saes: acts, amounts: [1, much]}\n",
        "7:48: stages.steer.amounts.1: Input should be a valid number, unable to parse string as a number (got 'much')",
    ),
    "inside a list of vary": (
        HEAD + "probes:\n  a: {use: linear, vary: {widths: [[1], [2, x]]}}\n",
        "3:45: probes.a.vary.widths.1.1: Input should be a valid integer, unable to parse string as an integer"
        " (got 'x')",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_one_fault(name: str, load: File) -> None:
    text, message = BAD[name]
    assert load.faults(text) == [f"registry.yaml:{message}"]


def test_files_that_cannot_be_read(tmp_path: Path, catalog: Catalog) -> None:
    def message(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            read(path, catalog)
        return str(caught.value)

    path = tmp_path / "registry.yaml"
    assert message(path) == f"{path}: no such file"
    assert message(tmp_path) == f"{tmp_path}: cannot be read: Is a directory"
    path.write_bytes("saefw: 1\n# caf\u00e9 \u00fc".encode("latin-1"))
    assert message(path) == f"{path}:2:6: not UTF-8 (byte 0xe9)"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text("ab:-[]{}&*!<|>'\"#%@, \n\t01$\x00\u00e9", max_size=40),
    block=st.sampled_from(["saes", "stages", "datasets", "plugins", "store", "device"]),
)
def test_no_text_ends_in_a_traceback(load: File, text: str, block: str) -> None:
    for whole in (text, f"saefw: 1\n{block}: {text}", f"saefw: 1\nsaes:\n  a: {{use: topk, vary: {text}}}"):
        with suppress(UserError):
            load(whole)


def test_a_byte_order_mark_is_no_character(load: File) -> None:
    assert load.faults("\ufeffsaefw: 1\nzoo: 1\n")[0].startswith("registry.yaml:2:1: ")
    assert load.faults("\ufeffsaefw: 3\n")[0].startswith("registry.yaml:1:1: ")


def test_faults_keep_the_order_of_the_file(load: File) -> None:
    found = load.faults("saefw: 1\nstages: {a: {use: x, use: y}}\nsaes: {b: 3}\ndevice: 4\nstore: []\nzoo: 1\n")
    assert [line.split(":")[1] for line in found] == ["2", "2", "3", "4", "5", "6"]


def test_deep_nesting_is_refused(load: File) -> None:
    assert load.faults("saefw: 1\nstore: " + "[" * 5000) == [
        "registry.yaml:2:48: not YAML that saefw reads: nested more than 40 deep"
    ]


def test_an_alias_bomb_is_refused_at_once(load: File) -> None:
    lines = ["saefw: 1", "a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    start = time.monotonic()
    (line,) = load.faults("\n".join(lines))
    assert line.endswith("not YAML that saefw reads: aliases that repeat over 10000 values")
    assert time.monotonic() - start < 30  # a guard against hanging, no measure


def test_an_alias_is_the_value_it_stands_for(load: File) -> None:
    registry = load("saefw: 1\nsaes:\n  a: &a {use: topk, k: 3}\n  b: *a\n  c: {use: topk, vary: {k: &k [1, 2]}}\n")
    families = registry.families["saes"]
    assert families["a"][0].entry == families["b"][0].entry == kinds.TopK.model_validate({"k": 3})
    assert families["b"][0].label == "b"


def test_keys_and_dates_are_words(load: File) -> None:
    """YAML 1.1 makes `on`, `no`, `8` and `2024-01-01` something else than what stands there."""
    registry = load(
        "saefw: 1\nsaes: {on: {use: topk}, 8: {use: topk}}\ndatasets: {d: {use: folder, root: 2024-01-01}}\n"
    )
    assert list(registry.families["saes"]) == ["on", "8"]
    assert registry.families["datasets"]["d"][0].entry == kinds.Folder(root="2024-01-01")


def test_labels_are_short_and_tell_members_apart(load: File) -> None:
    text = "saefw: 1\nprobes: {p: {use: linear, vary: {widths: [[], [1, 2]], bias: [yes, no], note: [null, hm]}}}\n"
    labels = [member.label for member in load(text).families["probes"]["p"]]
    assert labels[0] == "p widths=[] bias=true note=null"
    assert labels[-1] == "p widths=[1,2] bias=false note=hm"
    assert len(set(labels)) == 8
    text = "saefw: 1\nsaes: {a: {use: relu, vary: {l1: [0.12345678, 0.12345679]}}}\n"
    assert [m.label for m in load(text).families["saes"]["a"]] == ["a l1=0.12345678", "a l1=0.12345679"]


def test_ten_thousand_members_and_entries_are_read_in_seconds(load: File) -> None:
    k, seeds = list(range(1, 101)), list(range(100))
    text = f"saefw: 1\nsaes:\n  a: {{use: topk, most: 999, vary: {{k: {k}, seed: {seeds}}}}}\n"
    start = time.monotonic()
    assert len(load(text).families["saes"]["a"]) == 10_000
    assert time.monotonic() - start < 30
    long = "saefw: 1\nsaes:\n" + "".join(f"  a{i}: {{use: topk}}\n" for i in range(1000))
    start = time.monotonic()
    load(long)
    assert time.monotonic() - start < 30


def test_a_drop_in_is_added_and_its_faults_have_a_place(tmp_path: Path, catalog: Catalog) -> None:
    (tmp_path / "drop_in_good_one.py").write_text(
        '"""One."""\nfrom typing import Literal\nfrom saefw.plugin import SaeConfig, hookimpl\n'
        'class Mine(SaeConfig):\n    """Mine."""\n    use: Literal["mine"] = "mine"\n'
        "@hookimpl\ndef saefw_saes():\n    return [Mine]\n"
    )
    (tmp_path / "drop_in_bad_one.py").write_text('"""Bad."""\n\nnot_there\n')
    path = tmp_path / "registry.yaml"
    path.write_text("saefw: 1\nplugins: [drop_in_good_one.py]\nsaes: {a: {use: mine}}\n")
    fresh = Catalog([kinds], entry_points=False)
    assert type(read(path, fresh).families["saes"]["a"][0].entry).__name__ == "Mine"
    assert read(path, fresh).families["saes"]["a"]  # a second time with the same catalog

    path.write_text(
        "saefw: 1\nplugins: [drop_in_bad_one.py, absent.py]\nsaes: {a: {use: theirs}, b: {use: topk, kk: 1}}\n"
    )
    with pytest.raises(Faults) as caught:
        read(path, catalog)
    bad = tmp_path / "drop_in_bad_one.py"
    assert caught.value.lines == [
        f"{path}:2:11: plugins.0: plugin 'drop_in_bad_one' of {bad} cannot be imported:"
        " NameError: name 'not_there' is not defined at drop_in_bad_one.py:3"
        " (SAEFW_BLOCK=drop_in_bad_one leaves it out)",
        f"{path}:2:31: plugins.1: no such file: {tmp_path / 'absent.py'}",
        # Nothing of `theirs`: the plugin that failed may bring it.
        f"{path}:3:41: saes.b.kk: no such setting; did you mean 'k'?",
    ]


# The JSON Schema


def test_the_json_schema_is_closed_and_has_vary(catalog: Catalog) -> None:
    schema = json.loads(json.dumps(json_schema(catalog)))
    _resolve_all(schema, schema["$defs"])
    assert set(schema["properties"]) == {"saefw", "plugins", "store", "device", *KINDS}
    saes = schema["properties"]["saes"]["additionalProperties"]
    assert saes["properties"]["use"]["enum"] == ["relu", "topk"]
    assert [case["then"] for case in saes["allOf"]] == [{"$ref": "#/$defs/Relu"}, {"$ref": "#/$defs/TopK"}]
    relu = schema["$defs"]["Relu"]
    assert relu["required"] == ["use"]
    assert relu["additionalProperties"] is False
    l1 = relu["properties"]["l1"]
    assert (l1["minimum"], l1["description"]) == (0, "How much of the L1 norm.")
    vary = relu["properties"]["vary"]
    assert "use" not in vary["properties"]
    assert vary["properties"]["l1"] == {"type": "array", "items": l1, "minItems": 1, "uniqueItems": True}
    # A required setting may stand in the entry or in its vary.
    assert schema["$defs"]["Clip"]["allOf"] == [
        {
            "anyOf": [
                {"required": ["pretrained"]},
                {"required": ["vary"], "properties": {"vary": {"required": ["pretrained"]}}},
            ]
        }
    ]
    # A model inside a setting is no entry.
    assert "vary" not in schema["$defs"]["LayerPick"]["properties"]


def test_the_json_schema_without_plugins_allows_no_entry() -> None:
    schema = json_schema(Catalog(entry_points=False))
    assert all(schema["properties"][kind]["additionalProperties"] is False for kind in KINDS)


def _resolve_all(value: Any, defs: dict[str, Any]) -> None:
    if isinstance(value, dict):
        if "$ref" in value:
            assert value["$ref"].removeprefix("#/$defs/") in defs
        for child in value.values():
            _resolve_all(child, defs)
    elif isinstance(value, list):
        for child in value:
            _resolve_all(child, defs)
