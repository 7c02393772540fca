"""What holds of any registry: it is read or refused in lines with a place, and order and names change no address."""

import re
import time
from pathlib import Path
from typing import Any

import kinds
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saefw.catalog import Catalog
from saefw.entry import KINDS
from saefw.errors import UNPRINTED, Faults, UserError
from saefw.plugin import Unit
from saefw.registry import Registry, read

CATALOG = Catalog([kinds], entry_points=False)

NAMES = st.text("abcXYZ019_-", min_size=1, max_size=6)
WORDS = st.sampled_from(
    ["saefw", *KINDS, "store", "device", "plugins", "use", "vary", "topk", "relu", "k", "l1", "record", "acts", "cpu"]
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)
QUICK = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "registry.yaml"


def told(path: Path, data: bytes) -> Registry | None:
    """Read bytes; every line of a refusal has its place in the file, prints, and comes within seconds."""
    path.write_bytes(data)
    begun = time.monotonic()
    try:
        return read(path, CATALOG)
    except UserError as error:
        # YAML also ends lines by other characters than a newline.
        lines = 1 + len(re.findall("[\n\r\x85\u2028\u2029]", data.decode("utf-8", "replace")))
        for line in str(error).split("\n"):
            found = re.match(rf"{re.escape(str(path))}:(\d+):(\d+): .", line)
            assert found, line
            assert 1 <= int(found[1]) <= lines
            assert not UNPRINTED.search(line), line
        return None
    finally:
        assert time.monotonic() - begun < 20  # a guard against hanging, no measure


@QUICK
@given(data=st.binary(max_size=60))
def test_any_bytes(path: Path, data: bytes) -> None:
    told(path, data)
    told(path, b"saefw: 1\nsaes:\n  a: " + data)


@QUICK
@given(text=st.text(max_size=60))
def test_any_text(path: Path, text: str) -> None:
    told(path, b"saefw: 1\nstore: " + text.encode("utf-8", "surrogatepass"))


@QUICK
@given(tree=PLAIN, block=st.sampled_from(["", *KINDS, "store", "device", "plugins"]))
def test_any_tree(path: Path, tree: Any, block: str) -> None:
    whole = {"saefw": 1, block: tree} if block else tree
    told(path, yaml.safe_dump(whole, allow_unicode=True).encode("utf-8", "surrogatepass"))
    if block in KINDS:
        told(path, yaml.safe_dump({"saefw": 1, block: {"a": tree, "b": {"use": "topk", "vary": tree}}}).encode())


K, L1 = st.integers(1, 64), st.floats(1e-6, 1e6, allow_nan=False)


@st.composite
def registries(draw: st.DrawFn) -> dict[str, Any]:
    """Return a registry that is right, as data."""
    saes: dict[str, Any] = {}
    for name in draw(st.lists(NAMES, min_size=1, max_size=4, unique=True)):
        entry: dict[str, Any] = {"use": draw(st.sampled_from(["topk", "relu"]))}
        key, values = ("k", K) if entry["use"] == "topk" else ("l1", L1)
        if draw(st.booleans()):
            entry["vary"] = {key: draw(st.lists(values, min_size=1, max_size=3, unique=True))}
        else:
            entry[key] = draw(values)
        saes[name] = entry
    tried = draw(st.lists(st.sampled_from(sorted(saes)), min_size=1, max_size=3))
    return {
        "saefw": 1,
        "store": draw(st.sampled_from(["runs", "../runs", "/a/b"])),
        "device": draw(st.sampled_from(["auto", "cpu", "cuda:3"])),
        "backbones": {"b": {"use": "open-clip", "pretrained": draw(st.text("abc:#-' é特\n", min_size=1))}},
        "datasets": {"d": {"use": "folder", "root": draw(st.text("abc/.~", min_size=1))}},
        "saes": saes,
        "probes": {"p": {"use": "linear", "note": draw(st.none() | st.text("ab: \n\t'\"é🙂", max_size=9))}},
        "stages": {
            "acts": {"use": "record", "backbone": "b", "datasets": ["d"], "layers": draw(st.lists(st.integers(-9, 9)))},
            "sweep": {"use": "train", "acts": "acts", "saes": tried},
        },
    }


def good(path: Path, data: dict[str, Any], **how: Any) -> Registry:
    path.write_text(yaml.safe_dump(data, **{"sort_keys": False, "allow_unicode": True, **how}), encoding="utf-8")
    return read(path, CATALOG)


def contents(registry: Registry) -> dict[str, dict[str, list[Any]]]:
    return {
        kind: {name: [member.entry for member in members] for name, members in block.items()}
        for kind, block in registry.families.items()
    }


def addresses(registry: Registry, kind: str = "saes") -> dict[str, list[str]]:
    """Return by name the addresses of what entries alone would decide."""
    return {
        name: [Unit("x", member.entry.content()).address for member in members]
        for name, members in registry.families[kind].items()
    }


@QUICK
@given(data=registries(), flow=st.booleans(), width=st.sampled_from([20, 1000]))
def test_what_is_written_is_read(path: Path, data: dict[str, Any], flow: bool, width: int) -> None:
    """However it is laid out: what comes is the data given, once more."""
    one = good(path, data)
    other = good(path, data, default_flow_style=flow, width=width, allow_unicode=False, indent=4)
    assert contents(one) == contents(other)
    for name, entry in data["saes"].items():
        key = "k" if entry["use"] == "topk" else "l1"
        values = entry["vary"][key] if "vary" in entry else [entry[key]]
        assert [getattr(member.entry, key) for member in one.families["saes"][name]] == values
    (probe,) = one.families["probes"]["p"]
    assert getattr(probe.entry, "note") == data["probes"]["p"]["note"]  # noqa: B009 - a field of the test's own plugin
    assert one.device == data["device"]


@QUICK
@given(data=registries(), random=st.randoms(use_true_random=False))
def test_order_and_names_change_no_address(path: Path, data: dict[str, Any], random: Any) -> None:
    before = addresses(good(path, data))
    names = list(data["saes"])
    random.shuffle(names)
    renamed = {name: f"new-{i}" for i, name in enumerate(names)}
    tried = [renamed[name] for name in data["stages"]["sweep"]["saes"]]
    mixed = {
        **data,
        "saes": {renamed[name]: dict(reversed(data["saes"][name].items())) for name in names},
        "stages": {**data["stages"], "sweep": {**data["stages"]["sweep"], "saes": tried}},
    }
    after = addresses(good(path, dict(reversed(mixed.items()))))
    assert {renamed[name]: found for name, found in before.items()} == after


@QUICK
@given(data=registries(), more=st.lists(K, min_size=1, max_size=3, unique=True))
def test_more_values_leave_the_members_that_were(path: Path, data: dict[str, Any], more: list[int]) -> None:
    data["saes"]["a"] = {"use": "topk", "vary": {"k": more[:1]}}
    before = addresses(good(path, data))["a"]
    data["saes"]["a"]["vary"] = {"k": more, "lr": [0.001]}
    after = addresses(good(path, data))["a"]
    assert after[0] == before[0] and len(set(after)) == len(more)  # lr is at its default there


@QUICK
@given(data=registries(), batch=st.integers(1, 10**6))
def test_knobs_do_not_count(path: Path, data: dict[str, Any], batch: int) -> None:
    before = addresses(good(path, data), "stages")["acts"]
    data["stages"]["acts"]["batch_size"] = batch
    data["device"] = "cpu"
    assert addresses(good(path, data), "stages")["acts"] == before


@QUICK
@given(data=registries(), pick=st.randoms(use_true_random=False), indent=st.integers(2, 6))
def test_a_place_is_that_of_the_word_that_is_wrong(path: Path, data: dict[str, Any], pick: Any, indent: int) -> None:
    wrong = "zzz-wrong"
    name = pick.choice(list(data["saes"]))
    data["saes"][name] = {"use": "topk", "vary": {"k": [1, 2, wrong]}}
    path.write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, indent=indent), encoding="utf-8")
    with pytest.raises(Faults) as caught:
        read(path, CATALOG)
    (line,) = caught.value.lines
    found = re.match(rf"{re.escape(str(path))}:(\d+):(\d+): saes\.{name}\.vary\.k\.2: ", line)
    assert found, line
    here = path.read_text(encoding="utf-8").split("\n")[int(found[1]) - 1]
    assert here[int(found[2]) - 1 :].startswith(wrong)
