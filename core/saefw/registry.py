"""registry.yaml, read and checked."""

import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema

from saefw.catalog import Catalog
from saefw.entry import KINDS, Entry, Member, Place, expand
from saefw.errors import Faults, UserError, escaped
from saefw.places import Fault, Spot, load
from saefw.unit import WORD
from saefw.wording import got, listed, near, or_listed, sentence

log = logging.getLogger("saefw")

VERSION = 1
"""The version of the format, which a file states as `saefw: 1`."""

HEADER = ("saefw", "plugins", "store", "device")
"""What a registry may say besides its six blocks."""

DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")

MEMBERS = 100_000
"""How many members one entry may stand for; more is a slip of the pen."""

HINTED = 100
"""So many faults are told with the words that would be right; to find them takes long where there are many."""

Loc = tuple[str | int, ...]


@dataclass(frozen=True)
class Registry:
    """What registry.yaml says, checked."""

    path: Path
    """The file, as it was given."""

    base: Path
    """Its folder, from which relative paths count."""

    store: Path
    """Where units are kept."""

    device: str
    """`auto`, `cpu`, `cuda`, `cuda:1` or `mps`."""

    families: Mapping[str, Mapping[str, tuple[Member, ...]]]
    """By kind and name, the members that each entry stands for; stages too, in the order of the file."""

    root: Spot = field(repr=False, compare=False)
    """The whole file, for places."""

    def place(self, kind: str, name: str, field: str = "") -> str:
        """Return `file:line:column` of an entry, or of a setting in it (`saes.0`), wherever in the entry it stands."""
        entry, _ = self.root.walk((kind, name))
        steps = [int(step) if step.isdigit() else step for step in field.split(".")] if field else []
        spot, taken = entry.walk(steps)
        if not taken:
            spot, _ = entry.walk(("vary", *steps)) if steps and steps[0] in _vary(entry.value) else (entry, [])
        return f"{self.path}:{spot.line}:{spot.column}"

    def absent(self) -> list[str]:
        """Return a line for each path that an entry names, and where there is nothing: it may lie elsewhere."""
        lines: dict[str, None] = {}
        for kind, name, member in (
            (kind, name, member)
            for kind, block in self.families.items()
            for name, members in block.items()
            for member in members
        ):
            for setting, place in member.entry.places():
                try:
                    path = place.open(self.base)
                    why = "" if path.exists() else f"{path} is not there"
                except UserError as error:
                    why = str(error)
                if why:
                    where = f"{self.place(kind, name, setting)}: {kind}.{name}.{setting}"
                    lines[f"{where}: {why}; what needs it cannot be made here"] = None
        return list(lines)


def read(path: Path, catalog: Catalog) -> Registry:
    """Read and check a registry; its drop-in plugins are added to the catalog.

    Raises:
        Faults: everything that is wrong with it, in the order of the file.
        UserError: it cannot be read at all.

    """
    root, doubles = load(path)
    reader = _Reader(path, root, catalog)
    reader.faults += doubles
    registry = reader.registry()
    if not reader.faults:
        for text in catalog.broken:
            log.warning("%s; nothing in %s needs it", escaped(text), path)
    if reader.faults:
        raise Faults(
            [fault.show(path) for fault in sorted(reader.faults, key=lambda fault: (fault.line, fault.column))]
        )
    return registry


def _vary(settings: Any) -> Mapping[str, Any]:
    """Return the `vary` of an entry, as far as it is one."""
    vary = settings.get("vary") if isinstance(settings, dict) else None
    return vary if isinstance(vary, dict) else {}


class _Reader:
    """Checks one file and collects its faults."""

    def __init__(self, path: Path, root: Spot, catalog: Catalog) -> None:
        self.path, self.base, self.root, self.catalog = path, path.parent, root, catalog
        self.faults: list[Fault] = []
        self.names: dict[str, set[str]] = {}
        self.above: set[str] = set()
        self.plugins_failed = False

    def fault(self, loc: Iterable[str | int], text: str, at: Iterable[str | int] | None = None) -> None:
        """Note a fault of the setting at `loc`; its place is that of `at`, where given."""
        spot, _ = self.root.walk(loc if at is None else at)
        key = ".".join(map(str, loc))
        self.faults.append(Fault(spot.line, spot.column, f"{key}: {text}" if key else text))

    # The header

    def registry(self) -> Registry:
        """Check everything; what is returned is good only if no fault was found."""
        data = self.root.value
        if not isinstance(data, dict):
            what = " (it is empty)" if data is None else got(data)
            raise UserError(f"{self.path}:1:1: a registry is a mapping that begins with `saefw: {VERSION}`{what}")
        if "saefw" not in data:
            self.fault((), f"saefw: is required: write `saefw: {VERSION}`, the version of the format")
        elif data["saefw"] != VERSION or isinstance(data["saefw"], bool):
            # Another version may mean anything by its other keys: no word about them.
            spot = self.root.items["saefw"]
            text = f"saefw: must be {VERSION}, the version that this saefw reads{got(data['saefw'])}"
            raise Faults([Fault(spot.line, spot.column, text).show(self.path)])
        for key in data:
            if key not in (*HEADER, *KINDS):
                self.fault((key,), f"unknown key{or_listed(key, (*HEADER, *KINDS))}")
        self._plugins(data.get("plugins"))
        blocks = {kind: self._block(kind, data.get(kind)) for kind in KINDS}
        self.names = {kind: set(block) for kind, block in blocks.items()}
        families = {
            kind: {name: self._family(kind, name, settings) for name, settings in block.items()}
            for kind, block in blocks.items()
        }
        return Registry(
            path=self.path,
            base=self.base,
            store=self._store(data.get("store", "runs")),
            device=self._device(data.get("device", "auto")),
            families=families,
            root=self.root,
        )

    def _plugins(self, files: Any) -> None:
        """Add the drop-ins to the catalog."""
        if files is None:
            return
        if not isinstance(files, list):
            self.fault(("plugins",), f"must be a list of plugin files{got(files)}")
            return
        for i, file in enumerate(files):
            try:
                if not isinstance(file, str) or not file:
                    raise UserError(f"must be the path of a plugin file{got(file)}")
                self.catalog.add_files([Place(file).open(self.base)])
            except UserError as error:
                self.plugins_failed = True
                for line in str(error).splitlines():
                    self.fault(("plugins", i), line)

    def _store(self, text: Any) -> Path:
        if not isinstance(text, str) or not text:
            self.fault(("store",), f"must be the path of a folder{got(text)}")
            return self.base
        try:
            store = Place(text).open(self.base)
            if store.exists() and not store.is_dir():
                raise UserError(f"'{text}' is a file; it must be a folder, or yet to be made")
        except UserError as error:
            self.fault(("store",), str(error))
            return self.base
        return store

    def _device(self, text: Any) -> str:
        if not isinstance(text, str) or not DEVICE.fullmatch(text):
            self.fault(("device",), f"must be auto, cpu, cuda, cuda:N or mps{got(text)}")
        return str(text)

    # The blocks

    def _block(self, kind: str, block: Any) -> dict[str, Any]:
        """Return the entries of a block by name; a block whose entries are all commented out is empty."""
        if block is None:
            return {}
        if not isinstance(block, dict):
            self.fault((kind,), f"must be a mapping of names to entries{got(block)}")
            return {}
        for name in block:
            if not WORD.fullmatch(name):
                self.fault((kind, name), "a name is made of letters, digits, - and _")
        return block

    def _family(self, kind: str, name: str, settings: Any) -> tuple[Member, ...]:
        """Return the members of an entry."""
        here = (kind, name)
        try:
            if not isinstance(settings, dict):
                self.fault(here, f"must be a mapping with `use` and settings{got(settings)}")
                return ()
            cls = self._class(kind, name, settings)
            if cls is None:
                return ()
            vary = self._checked_vary(here, settings)
            rest = {key: value for key, value in settings.items() if key != "vary"}
            self._check_names(here, cls, rest, vary)
            return self._members(here, cls, rest, vary)
        finally:
            if kind == "stages":
                self.above.add(name)

    def _class(self, kind: str, name: str, settings: dict[str, Any]) -> type[Entry] | None:
        """Return the config class that `use` names."""
        loc = (kind, name, "use")
        brought = self.catalog.lookup(kind)
        use = settings.get("use")
        if "use" not in settings:
            self.fault(loc, f"is required{listed(brought)}")
        elif not isinstance(use, str):
            self.fault(loc, f"must be the name that a plugin brings{listed(brought)}{got(use)}")
        elif (kind, use) in self.catalog.clashes:
            self.fault(loc, self.catalog.clashes[kind, use])
        elif use in brought:
            return brought[use]
        elif not self.plugins_failed:
            # A plugin that failed may have brought it; that fault is the one to mend.
            hint = f"{near(use, brought)}{listed(brought)}" if len(self.faults) < HINTED else ""
            lame = f"; perhaps it would come from one that is broken: {'; '.join(self.catalog.broken)}"
            self.fault(loc, f"no plugin brings '{use}'{hint}{lame if self.catalog.broken else ''}")
        return None

    def _checked_vary(self, here: Loc, settings: dict[str, Any]) -> dict[str, list[Any]]:
        """Return `vary` without what is wrong in it."""
        vary = settings.get("vary", {})
        if not isinstance(vary, dict):
            self.fault((*here, "vary"), f"must be a mapping of settings to lists of values{got(vary)}")
            return {}
        good: dict[str, list[Any]] = {}
        for key, values in vary.items():
            loc = (*here, "vary", key)
            if key in ("use", "vary"):
                self.fault(loc, f"'{key}' cannot vary")
            elif not isinstance(values, list) or not values:
                self.fault(loc, f"must be a list of values, at least one{got(values)}")
            else:
                good[key] = values
                if key in settings:
                    self.fault(loc, "is set outside vary too")
        count = math.prod(len(values) for values in good.values())
        if count > MEMBERS:
            self.fault((*here, "vary"), f"stands for {count} members; at most {MEMBERS} may be")
            return {key: values[:1] for key, values in good.items()}
        return good

    def _members(
        self, here: Loc, cls: type[Entry], rest: dict[str, Any], vary: dict[str, list[Any]]
    ) -> tuple[Member, ...]:
        """Validate every combination; report each fault once, at its place."""
        faults: dict[Loc, str] = {}
        entries: list[tuple[dict[str, int], Entry]] = []
        for choice in expand(vary):
            settings = rest | {key: vary[key][i] for key, i in choice.items()}
            try:
                entries.append((choice, cls.model_validate(settings, context=self.base)))
            except ValidationError as error:
                faults = self._sentences(here, cls, error, choice) | faults
            except UserError as error:  # from a validator of the plugin
                faults.setdefault(here, str(error))
        for loc, text in faults.items():
            self.fault(loc, text)
        doubled = self._doubles(here, vary, entries)
        if faults or doubled:
            return ()
        return tuple(_labelled(str(here[1]), entries))

    def _sentences(
        self, here: Loc, cls: type[Entry], error: ValidationError, choice: Mapping[str, int]
    ) -> dict[Loc, str]:
        """Return what pydantic found, one sentence a place."""
        texts: dict[Loc, dict[str, None]] = {}
        inputs: dict[Loc, str] = {}
        branches: set[Loc] = set()
        for detail in error.errors(include_url=False):
            kind, loc = detail["type"], detail["loc"]
            if loc and loc[0] in choice:
                unknown = len(loc) == 1 and kind == "extra_forbidden"
                loc = ("vary", loc[0], *(() if unknown else (choice[str(loc[0])],)), *loc[1:])
            _, taken = self.root.walk((*here, *loc))
            place = (*taken, *loc[-1:]) if kind == "missing" else tuple(taken)
            texts.setdefault(place, {})[sentence(cls, detail)] = None
            of_value = kind not in ("missing", "extra_forbidden") and len(place) > len(here)
            inputs[place] = got(detail["input"]) if of_value else ""
            if len(taken) < len(here) + len(loc):
                branches.add(place)
        # Of a union, the member that the value was meant to be is the one with faults further inside.
        for place in branches:
            if any(other[: len(place)] == place and len(other) > len(place) for other in texts):
                texts.pop(place)
        return {place: " or ".join(texts[place]) + inputs[place] for place in texts}

    def _doubles(self, here: Loc, vary: dict[str, list[Any]], entries: list[tuple[dict[str, int], Entry]]) -> bool:
        """Report values that stand in a list of `vary` twice, also if written differently (4e-4, 0.0004)."""
        found = False
        for key, values in vary.items():
            texts = dict(enumerate(map(repr, values)))
            for choice, entry in entries:
                if all(choice[other] == 0 for other in vary if other != key):
                    texts[choice[key]] = repr(getattr(entry, key, values[choice[key]]))
            seen: set[str] = set()
            for i, text in texts.items():
                if text in seen:
                    found = True
                    self.fault((*here, "vary", key, i), f"is in the list already{got(values[i])}")
                seen.add(text)
        return found

    def _check_names(self, here: Loc, cls: type[Entry], rest: dict[str, Any], vary: dict[str, list[Any]]) -> None:
        """Check that the entries which settings name are there."""
        for name, kind in cls.names():
            if name in vary:
                for i, value in enumerate(vary[name]):
                    self._check_named((*here, "vary", name, i), kind, value)
            elif name in rest:
                self._check_named((*here, name), kind, rest[name])
            elif not cls.model_fields[name].is_required():
                self._check_named((*here, name), kind, cls.model_fields[name].get_default(call_default_factory=True))

    def _check_named(self, loc: Loc, kind: str, value: Any) -> None:
        if isinstance(value, list | tuple):
            for i, word in enumerate(value):
                self._check_named((*loc, i), kind, word)
        elif isinstance(value, str):
            above = kind == "stages" and loc[0] == "stages"
            allowed = self.above if above else self.names[kind]
            if value not in allowed:
                below = above and value in self.names[kind]
                hint = "" if below or len(self.faults) >= HINTED else or_listed(value, allowed)
                self.fault(loc, f"'{value}' is not one of the {kind}{' above it' if above else ''}{hint}")


# Labels


def _labelled(name: str, entries: list[tuple[dict[str, int], Entry]]) -> Iterator[Member]:
    """Name the members: `relu l1=0.0004`; numbers are short unless two members would share a label."""

    def label(choice: Mapping[str, int], entry: Entry, number: str) -> str:
        return " ".join([name, *(f"{key}={_short(getattr(entry, key), number)}" for key in choice)])

    labels = [label(choice, entry, "%g") for choice, entry in entries]
    if len(set(labels)) < len(labels):
        labels = [label(choice, entry, "%r") for choice, entry in entries]
    for text, (_, entry) in zip(labels, entries, strict=True):
        yield Member(text, entry)


def _short(value: Any, number: str) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, float):
        return number % value
    if isinstance(value, list | tuple):
        return f"[{','.join(_short(item, number) for item in value)}]"
    if isinstance(value, BaseModel):
        return json.dumps(value.model_dump(mode="json"), separators=(",", ":"))
    return escaped(str(value))


# The JSON Schema


def json_schema(catalog: Catalog) -> dict[str, Any]:
    """Return the JSON Schema of a registry with these plugins, for editors that complete and check while typing."""
    classes = [cls for kind in KINDS for cls in catalog.lookup(kind).values()]
    refs, defs = models_json_schema([(cls, "validation") for cls in classes], ref_template="#/$defs/{model}")
    definitions: dict[str, Any] = defs.get("$defs", {})
    name = {"type": "string", "pattern": f"^{WORD.pattern}$"}
    blocks: dict[str, Any] = {}
    for kind in KINDS:
        union = {}
        for use, cls in catalog.lookup(kind).items():
            ref = refs[cls, "validation"]["$ref"]
            union[use] = ref
            definitions[ref.removeprefix("#/$defs/")] = _with_vary(definitions[ref.removeprefix("#/$defs/")])
        # Not one of all: a validator could say no more than that none fits.
        entry: Any = {
            "type": "object",
            "required": ["use"],
            "properties": {"use": {"enum": list(union)}},
            "allOf": [
                {"if": {"required": ["use"], "properties": {"use": {"const": use}}}, "then": {"$ref": ref}}
                for use, ref in union.items()
            ],
        }
        blocks[kind] = {
            "type": ["object", "null"],
            "propertyNames": name,
            "additionalProperties": entry if union else False,
        }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "registry.yaml",
        "type": "object",
        "properties": {
            "saefw": {"const": VERSION, "description": "The version of the format."},
            "plugins": {"type": "array", "items": {"type": "string"}, "description": "Plugin files."},
            "store": {"type": "string", "default": "runs", "description": "The folder where everything made is kept."},
            "device": {
                "type": "string",
                "pattern": f"^({DEVICE.pattern})$",
                "default": "auto",
                "description": "Where models run: auto (a GPU where there is one), cpu, cuda, cuda:1 or mps.",
            },
            **blocks,
        },
        "required": ["saefw"],
        "additionalProperties": False,
        "$defs": definitions,
    }


def _with_vary(schema: dict[str, Any]) -> dict[str, Any]:
    """Add `vary` to the schema of an entry; a required setting may stand there instead."""
    properties = dict(schema["properties"])
    lists = {
        key: {"type": "array", "items": value, "minItems": 1, "uniqueItems": True}
        for key, value in properties.items()
        if key != "use"
    }
    vary = {"type": "object", "properties": lists, "additionalProperties": False, "description": "Every combination."}
    either = [
        {"anyOf": [{"required": [key]}, {"required": ["vary"], "properties": {"vary": {"required": [key]}}}]}
        for key in schema.get("required", [])
        if key != "use"
    ]
    return schema | {
        "properties": properties | {"vary": vary},
        "required": ["use"],
        **({"allOf": either} if either else {}),
    }
