"""Input that means harm, or was made by nobody: a sentence each, the whole of it compared, and nothing is obeyed."""

import os
from collections.abc import Callable
from pathlib import Path

import kinds
import pytest

from saefw.catalog import Catalog
from saefw.entry import Place
from saefw.errors import UserError, escaped
from saefw.places import LARGEST
from saefw.registry import read
from saefw.unit import Unit

HEAD = "saefw: 1\n"
SAE = HEAD + "saes:\n  a: "
NOT = "not YAML that saefw reads: "
NINES = "9" * 20


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog([kinds], entry_points=False)


@pytest.fixture
def refused(tmp_path: Path, catalog: Catalog) -> Callable[[str | bytes], list[str]]:
    """Return what is said of a registry, without the folder."""

    def said(text: str | bytes) -> list[str]:
        path = tmp_path / "registry.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        with pytest.raises(UserError) as caught:
            read(path, catalog)
        return str(caught.value).replace(f"{tmp_path}/", "").split("\n")

    return said


YAML: dict[str, tuple[str, str]] = {
    # what YAML can stand for
    "a list in itself": (HEAD + "saes: &a [*a]\n", f"2:7: {NOT}an alias to what it lies in"),
    "a mapping in itself": (HEAD + "saes: &a {b: *a}\n", f"2:11: {NOT}an alias to what it lies in"),
    "an alias for a key": (HEAD + "saes: &a {*a : b}\n", f"2:7: {NOT}a key that is not a word"),
    "an alias to nothing": (HEAD + "saes: *b\n", f"2:7: {NOT}found undefined alias 'b'"),
    "an anchor twice": (
        HEAD + "store: &a x\ndevice: &a cpu\n",
        f"3:9: {NOT}found duplicate anchor 'a'; first occurrence, second occurrence",
    ),
    "a merge key": (
        SAE + "&x {use: relu}\n  b: {<<: *x}\n",
        f"4:7: {NOT}a merge key (<<): write its settings out",
    ),
    "a tag that runs code": (
        HEAD + "store: !!python/object/apply:os.system [x]\n",
        f"2:8: {NOT}a tag (tag:yaml.org,2002:python/object/apply:os.system)",
    ),
    "a tag of one's own": (HEAD + "store: !x y\n", f"2:8: {NOT}a tag (!x)"),
    "a tag on a key": (HEAD + "!!str store: x\n", f"2:1: {NOT}a tag (tag:yaml.org,2002:str)"),
    "bytes": (HEAD + "store: !!binary aGk=\n", f"2:8: {NOT}a tag (tag:yaml.org,2002:binary)"),
    "deep lists": (HEAD + "store:\n  " + "- " * 3000 + "a\n", f"3:83: {NOT}nested more than 40 deep"),
    "deep mappings": (HEAD + "store: " + "{a: " * 3000 + "\n", f"2:165: {NOT}nested more than 40 deep"),
    "deep keys": (HEAD + "? " * 3000 + "\n", f"2:83: {NOT}nested more than 40 deep"),
    "two documents": (
        HEAD + "---\nsaefw: 1\n",
        f"2:1: {NOT}expected a single document in the stream, but found another document",
    ),
    "another YAML": (
        "%YAML 9.9\n---\nsaefw: 1\n",
        f"1:1: {NOT}found incompatible YAML document (version 1.* is required)",
    ),
    "a long key": (
        HEAD + "x" * 5000 + ": 1\n",
        f"2:5001: {NOT}while scanning a simple key, could not find expected ':'",
    ),
    "a long value": (
        HEAD + f"device: {'x' * 100_000}\n",
        f"2:1: device: must be auto, cpu, cuda, cuda:N or mps (got '{'x' * 56}...)",
    ),
    # numbers
    "a whole number without end": (SAE + f"{{use: topk, k: {'9' * 5000}}}\n", f"3:21: {NOT}{NINES} is no number"),
    "one in hex": (HEAD + f"store: 0x{'f' * 100_000}\n", f"2:8: {NOT}0x{'f' * 18} is no number"),
    "one in sixties": (SAE + f"{{use: topk, k: 1{':59' * 100_000}}}\n", f"3:21: {NOT}1{':59' * 6}: is no number"),
    "a fraction in sixties": (
        SAE + f"{{use: relu, l1: 1{':59' * 400}.0}}\n",
        f"3:22: {NOT}1{':59' * 6}: is no number",
    ),
    "more than 64 bits": (
        SAE + f"{{use: topk, k: {'9' * 40}}}\n",
        f"3:21: {NOT}{NINES} is too large: a whole number has 64 bits",
    ),
    "less than 64 bits": (
        SAE + "{use: topk, k: -9223372036854775809}\n",
        f"3:21: {NOT}-9223372036854775809 is too large: a whole number has 64 bits",
    ),
    "too large for a fraction": (
        SAE + "{use: relu, l1: 1e999999}\n",
        "3:18: saes.a.l1: Input should be a finite number (got '1e999999')",
    ),
    "the same with its sign": (
        SAE + "{use: relu, l1: 1.0e+999999}\n",
        "3:18: saes.a.l1: Input should be a finite number (got inf)",
    ),
    "no number": (SAE + "{use: relu, l1: .nan}\n", "3:18: saes.a.l1: Input should be a finite number (got nan)"),
    "a fraction for a whole number": (
        SAE + "{use: topk, k: 1.0e+300}\n",
        "3:18: saes.a.k: Unable to parse input string as an integer, exceeded maximum size (got 1e+300)",
    ),
    "digits alone are no number": (SAE + "{use: topk, k: 0x_}\n", f"3:21: {NOT}0x_ is no number"),
    "far too many members": (
        SAE + "{use: topk, vary: {k: &k [" + ", ".join(map(str, range(1, 100))) + "], lr: *k, seed: *k, most: *k}}\n",
        "3:18: saes.a.vary: stands for 96059601 members; at most 100000 may be",
    ),
    # characters
    "NUL": (HEAD + "store: a\0b\n", "2:9: not YAML: character #x0000"),
    "NUL, written out": (HEAD + 'store: "a\\0b"\n', f"2:8: {NOT}a character that does not print (U+0000)"),
    "an escape": (HEAD + '"\\e[31mred": 1\n', f"2:1: {NOT}a character that does not print (U+001B)"),
    "in a name": (HEAD + 'saes: {"\\e[2J": {use: topk}}\n', f"2:8: {NOT}a character that does not print (U+001B)"),
    "in a use": (SAE + '{use: "\\x9b2J"}\n', f"3:12: {NOT}a character that does not print (U+009B)"),
    "another direction": (HEAD + '"\\u202eabc": 1\n', f"2:1: {NOT}a character that does not print (U+202E)"),
    "half a character": (HEAD + 'store: "\\ud800"\n', f"2:8: {NOT}a character that does not print (U+D800)"),
    "two halves": (HEAD + 'store: "\\ud83d\\ude00"\n', f"2:8: {NOT}a character that does not print (U+D83D)"),
    "no character": (HEAD + 'store: "\\UFFFFFFFF"\n', f"2:11: {NOT}an escape of no character"),
    "one beyond Unicode": (HEAD + 'store: "\\U00110000"\n', f"2:11: {NOT}an escape of no character"),
    "a mark in the middle": ("saefw: 1\n\ufeffstore: x\n", f"2:1: {NOT}a character that does not print (U+FEFF)"),
    "a line end in a key": (HEAD + '"a\\nb": 1\n', f"2:1: {NOT}a character that does not print (U+000A)"),
    "a line that looks like ours": (
        SAE + '{use: "a\\nregistry.yaml:1:1: fine"}\n',
        "3:7: saes.a.use: no plugin brings 'a\\nregistry.yaml:1:1: fine' (there are: relu, topk)",
    ),
    "markup": (
        SAE + "{use: '[red]<script>'}\n",
        "3:7: saes.a.use: no plugin brings '[red]<script>' (there are: relu, topk)",
    ),
    "another writing": (
        HEAD + "saes: {\u7279\u5fb4: {use: topk}}\n",
        "2:8: saes.\u7279\u5fb4: a name is made of letters, digits, - and _",
    ),
    # paths
    "a store in a file": (
        HEAD + "store: registry.yaml\n",
        "2:1: store: 'registry.yaml' is a file; it must be a folder, or yet to be made",
    ),
    "a store below a file": (
        HEAD + "store: registry.yaml/runs\n",
        "2:1: store: 'registry.yaml/runs': cannot be a path: Not a directory",
    ),
    "a store with a long name": (
        HEAD + f"store: {'a' * 5000}\n",
        f"2:1: store: '{'a' * 60}': cannot be a path: File name too long",
    ),
    "a plugin with a long name": (
        HEAD + f"plugins: [{'a' * 300}.py]\n",
        f"2:11: plugins.0: '{'a' * 60}': cannot be a path: File name too long",
    ),
    "a plugin that is a folder": (HEAD + "plugins: [.]\n", "2:11: plugins.0: no such file: {here}"),
    "a plugin elsewhere": (
        HEAD + "plugins: [../no/plugin.py]\n",
        "2:11: plugins.0: no such file: {above}/no/plugin.py",
    ),
    "a plugin that is none": (
        HEAD + "plugins: [registry.yaml]\n",
        "2:11: plugins.0: a plugin file is called like a module: my_plugin.py (got 'registry.yaml')",
    ),
    "a plugin of nobody": (
        HEAD + "plugins: [~nobody-here/x.py]\n",
        "2:11: plugins.0: no such file: {here}/~nobody-here/x.py",
    ),
    "a variable that is not there": (
        HEAD + "store: ${NOT_SET_ANYWHERE}\n",
        "2:1: store: '${NOT_SET_ANYWHERE}': the variable ${NOT_SET_ANYWHERE} is not set",
    ),
}


@pytest.mark.parametrize("name", YAML)
def test_a_registry_that_means_harm(name: str, refused: Callable[[str], list[str]], tmp_path: Path) -> None:
    text, message = YAML[name]
    message = message.replace("{here}/", "").replace("{here}", str(tmp_path)).replace("{above}", str(tmp_path.parent))
    assert refused(text) == [f"registry.yaml:{message}"]


def test_the_place_of_a_byte_that_is_not_utf_8(refused: Callable[[bytes], list[str]]) -> None:
    assert refused(b"\xef\xbb\xbfsaefw: 1\n# \xe9\n") == ["registry.yaml:2:3: not UTF-8 (byte 0xe9)"]
    assert refused(b"\xef\xbb") == ["registry.yaml:1:1: not UTF-8 (byte 0xef)"]


def test_files_that_are_no_registry(tmp_path: Path, catalog: Catalog) -> None:
    """To open a pipe would be to wait, and what is larger than any registry is not read."""

    def said(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            read(path, catalog)
        return str(caught.value)

    path = tmp_path / "r.yaml"
    os.mkfifo(path)
    assert said(path) == f"{path}: cannot be read: not a file"
    assert said(Path("/dev/zero")) == "/dev/zero: cannot be read: not a file"
    path = tmp_path / "large.yaml"
    with path.open("wb") as file:
        file.truncate(2 << 30)
    assert said(path) == f"{path}: larger than 4 MiB, which no registry is"
    path = tmp_path / "loop.yaml"
    path.symlink_to(path)
    assert said(path) == f"{path}: cannot be read: Too many levels of symbolic links"
    path = tmp_path / "long.yaml"
    path.write_text(HEAD + "# " + "x" * (LARGEST // 2) + "\n")
    assert read(path, catalog).store == tmp_path / "runs"


def test_paths_that_are_allowed(tmp_path: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry is its writer's own: its store may lie anywhere; addresses and stages stay inside of it."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    path = tmp_path / "registry.yaml"
    for text, store in {
        "../runs": tmp_path / "../runs",
        "/elsewhere/runs": Path("/elsewhere/runs"),
        "~/runs": Path("/home/me/runs"),
        "$DATA/runs": Path("/data/runs"),
        "md:runs": tmp_path / "md:runs",
        "\u5b9f\u9a13": tmp_path / "\u5b9f\u9a13",
    }.items():
        path.write_text(f"{HEAD}store: {text}\n")
        assert read(path, catalog).store == store


def test_a_variable_with_a_nul_is_no_path(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        Place("a\0b").open(tmp_path)
    assert str(caught.value) == "'a\0b': cannot be a path: embedded null byte"


@pytest.mark.parametrize("stage", ["", "..", "../x", "/x", "a/b", "a.partial", "a\0b", "locks", "notes"])
def test_no_stage_lies_outside_of_the_store(stage: str) -> None:
    with pytest.raises(ValueError) as caught:
        Unit(stage, {})
    assert str(caught.value) == f"a stage is called by letters, digits, - and _, not locks or notes (got {stage!r})"


def test_text_is_shown_and_never_obeyed() -> None:
    assert escaped("a\x1b[31m\n\t\x00\x9b\u202e\u2066\u2028\ufeff\ud800") == (
        "a\\x1b[31m\\n\\t\\x00\\x9b\\u202e\\u2066\\u2028\\ufeff\\ud800"
    )
    plain = "[red] $x_{ <b> \u7279\u5fb4 \U0001f468\u200d\U0001f469 \u05e9\u05dc\u05d5\u05dd e\u0301"
    assert escaped(plain) == plain
