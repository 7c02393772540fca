"""YAML that remembers where each value stands."""

import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from saefw.errors import UNPRINTED, UserError, escaped

DEPTH = 40
"""How deep lists and mappings may lie in one another."""

REPEATS = 10_000
"""How many values aliases may repeat, all together: a few lines of YAML can otherwise stand for billions."""

LARGEST = 4 << 20
"""Bytes of the largest file that is read: a hundred times what ten experiments take."""

LONGEST_NUMBER = 64
"""Characters of the longest number; some ways to write one take a time that grows with the square of its length."""

_TAG = "tag:yaml.org,2002:"


@dataclass(slots=True)
class Spot:
    """A value of a YAML file and where it stands: a mapping's item at its key, a list's item at its value."""

    line: int
    column: int
    value: Any
    """The plain value: dict, list, str, int, float, bool or None; the keys of a dict are strings, as written."""

    items: dict[str | int, "Spot"] = field(default_factory=dict)
    """Of a mapping by key, of a list by index."""

    def walk(self, loc: Iterable[str | int]) -> tuple["Spot", list[str | int]]:
        """Follow a location as pydantic writes it; return the last spot on the way and the steps that led there.

        Steps that are not in the file are left out: pydantic's names for the members of a union are none of ours.
        """
        spot, taken = self, []
        for step in loc:
            if step in spot.items:
                spot = spot.items[step]
                taken.append(step)
        return spot, taken


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong in a file; faults sort in the order of the file."""

    line: int
    column: int
    text: str

    def show(self, path: Path) -> str:
        """Return `file:line:column: text`."""
        return f"{path}:{self.line}:{self.column}: {escaped(self.text)}"


def load(path: Path) -> tuple[Spot, list[Fault]]:
    """Read a YAML file; return what it holds, and the keys that are set twice (the first counts).

    Raises:
        UserError: the file cannot be read, is not UTF-8, not YAML, or holds what is not plain data.

    """
    try:
        # Looked at first: to open a pipe is to wait for whoever writes to it.
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode) and not stat.S_ISDIR(facts.st_mode):
            raise UserError(f"{path}: cannot be read: not a file")
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > LARGEST:
        raise UserError(f"{path}: larger than {LARGEST >> 20} MiB, which no registry is")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Of what was decoded: without the mark at its beginning.
        line, column = _position(error.object[: error.start].decode())
        raise UserError(f"{path}:{line}:{column}: not UTF-8 (byte 0x{error.object[error.start]:02x})") from None
    try:
        loader = _Loader(text)
        node = _node(loader)
        reader = _Reader()
        spot = reader.spot(node, None) if node else Spot(1, 1, None)
    except yaml.reader.ReaderError as error:
        line, column = _position(text[: error.position])
        code: Any = error.character
        raise UserError(f"{path}:{line}:{column}: not YAML: character #x{code:04x}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        sentence = ", ".join(part for part in (error.context, error.problem) if part)
        raise UserError(f"{path}:{line}:{column}: not YAML that saefw reads: {escaped(sentence)}") from None
    return spot, reader.doubles


def _node(loader: "_Loader") -> yaml.Node | None:
    try:
        return loader.get_single_node()
    except (ValueError, OverflowError):  # of "\\UFFFFFFFF"
        problem = "an escape of no character"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=loader.get_mark()) from None


def _position(before: str) -> tuple[int, int]:
    """Return line and column, from 1, of what comes after a text."""
    return before.count("\n") + 1, len(before) - before.rfind("\n")


class _Loader(yaml.SafeLoader):
    """PyYAML's composer, without tags and without bottomless nesting."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None):
            raise yaml.MarkedYAMLError(problem=f"a tag ({event.tag})", problem_mark=event.start_mark)
        if self._depth > DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested more than {DEPTH} deep", problem_mark=event.start_mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


class _Reader:
    """Makes spots of nodes."""

    def __init__(self) -> None:
        self.doubles: list[Fault] = []
        self._construct = yaml.constructor.SafeConstructor()
        self._seen: set[int] = set()
        self._open: set[int] = set()
        self._repeats = 0

    def spot(self, node: yaml.Node, key: yaml.Node | None) -> Spot:
        """Return the spot of a node; `key` is the node of its key, if it has one."""
        mark = (key or node).start_mark
        if id(node) in self._open:
            raise yaml.MarkedYAMLError(problem="an alias to what it lies in", problem_mark=mark)
        self._repeats += id(node) in self._seen
        if self._repeats > REPEATS:
            raise yaml.MarkedYAMLError(problem=f"aliases that repeat over {REPEATS} values", problem_mark=mark)
        self._seen.add(id(node))
        self._open.add(id(node))
        items: dict[str | int, Spot] = {}
        value: Any
        if isinstance(node, yaml.MappingNode):
            for key_node, value_node in node.value:
                name = self._key(key_node)
                if name in items:
                    at = key_node.start_mark
                    self.doubles.append(Fault(at.line + 1, at.column + 1, f"'{name}' is set twice"))
                else:
                    items[name] = self.spot(value_node, key_node)
            value = {name: spot.value for name, spot in items.items()}
        elif isinstance(node, yaml.SequenceNode):
            items = {i: self.spot(child, None) for i, child in enumerate(node.value)}
            value = [spot.value for spot in items.values()]
        else:
            value = self._scalar(node)
        self._open.discard(id(node))
        return Spot(mark.line + 1, mark.column + 1, value, items)

    def _key(self, node: yaml.Node) -> str:
        """Return a key as written, so that `on`, `no` and `8` are words like any other."""
        if not isinstance(node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key that is not a word", problem_mark=node.start_mark)
        if node.tag == _TAG + "merge":
            raise yaml.MarkedYAMLError(problem="a merge key (<<): write its settings out", problem_mark=node.start_mark)
        return self._text(node, "")

    def _text(self, node: yaml.Node, allowed: str) -> str:
        """Return the text of a node, in which only characters that print may be, and those `allowed`."""
        for found in UNPRINTED.findall(node.value):
            if found not in allowed:
                problem = f"a character that does not print (U+{ord(found):04X})"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return str(node.value)

    def _scalar(self, node: yaml.Node) -> Any:
        """Return null, a bool, an int, a float; all else, dates too, as the text it is."""
        if node.tag not in [_TAG + kind for kind in ("null", "bool", "int", "float")]:
            return self._text(node, "\n\t")
        try:
            value = self._construct.construct_object(node) if len(node.value) <= LONGEST_NUMBER else None
        except (ValueError, OverflowError):
            value = None
        if value is None and not node.tag.endswith("null"):
            raise yaml.MarkedYAMLError(problem=f"{node.value[:20]} is no number", problem_mark=node.start_mark)
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            problem = f"{node.value[:20]} is too large: a whole number has 64 bits"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return value
