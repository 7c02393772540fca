"""One named block of registry.yaml: its settings, their markers, and what `vary` makes of it."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, final

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from saefw.errors import UserError

KINDS = ("backbones", "datasets", "saes", "probes", "figures", "stages")
"""The six blocks of registry.yaml, in the order in which they are written."""


@final
class Knob:
    """Marks a setting that changes speed, never the result: it is not part of the address."""


@final
class Late:
    """Marks a setting added after release: it counts in the address only when it is not at its default."""


@dataclass(frozen=True)
class Names:
    """Marks a setting that names entries of a kind; names are checked, followed and never hashed."""

    kind: str
    """`backbones`, `datasets`, `saes`, `probes`, `figures` or `stages`."""


class Place(str):
    """A path that is hashed as written (`$IMAGES/train`) and expanded only when opened."""

    base: Path = Path()
    """The folder of the registry that it was read from, from which a relative path counts."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Validate as a string, keep as a Place; the context of the validation is the base."""

        def place(text: str, info: core_schema.ValidationInfo) -> Place:
            made = cls(text)
            made.base = info.context or Path()
            return made

        return core_schema.with_info_after_validator_function(
            place, core_schema.str_schema(min_length=1), serialization=core_schema.to_string_ser_schema()
        )

    def open(self, base: Path | None = None) -> Path:
        """Return the path with variables and `~` expanded, relative to `base` or else to where it was read.

        Raises:
            UserError: a variable in it is not set, or no path can be called so.

        """
        text = os.path.expandvars(os.path.expanduser(self))
        unset = re.search(r"\$(\w+|\{[^}]*\})", text)
        if unset:
            raise UserError(f"'{self}': the variable {unset.group(0)} is not set")
        path = (self.base if base is None else base) / text
        try:
            path.stat()
        except FileNotFoundError:
            pass  # That it is missing is for the one to say who needs it.
        except (OSError, ValueError) as error:  # ValueError: a NUL, from a variable
            raise UserError(f"'{self[:60]}': cannot be a path: {getattr(error, 'strerror', '') or error}") from None
        return path


class Entry(BaseModel):
    """A block of settings that a plugin validates; frozen, without unknown keys.

    A subclass declares `use: Literal["name"] = "name"` and documents each field by the string below it.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        # What is hashed must be JSON, which knows neither.
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    revision: ClassVar[int] = 1
    """Raise it when the code behind the entry changes its results: everything made from it is made anew."""

    def content(self) -> dict[str, Any]:
        """Return the settings that decide the result, as JSON: no knobs, no names, no late ones at their default."""
        kept: dict[str, Any] = {"revision": self.revision}
        for name, value in self.model_dump(mode="json").items():
            info = type(self).model_fields[name]
            marks = info.metadata
            if any(mark is Knob or isinstance(mark, Names) for mark in marks):
                continue
            if any(mark is Late for mark in marks) and getattr(self, name) == info.get_default(
                call_default_factory=True, validated_data={}
            ):
                continue
            kept[name] = value
        return kept

    def places(self) -> Iterator[tuple[str, Place]]:
        """Yield (field, path) for each setting that is the path of something that is to be there."""
        for name in type(self).model_fields:
            if isinstance(place := getattr(self, name), Place):
                yield name, place

    @classmethod
    def names(cls) -> Iterator[tuple[str, str]]:
        """Yield (field, kind) for each setting that names entries."""
        for name, info in cls.model_fields.items():
            for mark in info.metadata:
                if isinstance(mark, Names):
                    yield name, mark.kind


@dataclass(frozen=True)
class Member:
    """One of the entries that a block stands for."""

    label: str
    """The block's name, and what `vary` chose: `relu l1=0.0004`."""

    entry: Entry


def expand(vary: Mapping[str, list[Any]]) -> Iterator[dict[str, int]]:
    """Yield every combination of `vary` as {key: index into its list}, the last key running fastest."""
    for indices in product(*(range(len(values)) for values in vary.values())):
        yield dict(zip(vary, indices, strict=True))
