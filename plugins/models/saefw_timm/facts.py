"""What is known of timm's models without importing timm, which takes seconds: models.txt beside this file.

`scripts/timm_facts.py` writes it from timm itself. It counts beside the timm that it was written from alone, and while
timm is not imported: from then on timm is asked, which a plugin may have taught other models.
"""

import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, cast

from saefw.plugin import BackboneInfo, Prefix

FILE = Path(__file__).with_name("models.txt")
"""A line a model, the first of those with one architecture being timm's choice for it; ahead of them timm's version."""


class Stack(NamedTuple):
    """What is known of a model of timm without its weights."""

    name: str
    """Its full name, with the tag of its weights where they have one."""

    size: tuple[int, int]
    """Pixels of its images: rows, columns."""

    patch: tuple[int, int]
    """Pixels of a patch: rows, columns."""

    weighted: bool
    """Whether timm has weights of that name."""

    info: BackboneInfo
    """Its shapes at the size it is made for."""

    def __str__(self) -> str:
        """Return its line in the file: name, weights, image, patch, grid, d_model, n_blocks, d_embed, prefix."""
        info, weights = self.info, "weights" if self.weighted else "random"
        sides = ["x".join(map(str, pair)) for pair in (self.size, self.patch, info.grid)]
        return " ".join(map(str, [self.name, weights, *sides, info.d_model, info.n_blocks, info.d_embed, *info.prefix]))

    @classmethod
    def read(cls, line: str) -> "Stack":
        """Return what a line of the file says."""
        name, weights, *sides, d_model, n_blocks, d_embed = (words := line.split())[:8]
        size, patch, grid = (cast(tuple[int, int], tuple(map(int, pair.split("x")))) for pair in sides)
        prefix = cast(tuple[Prefix, ...], tuple(words[8:]))
        info = BackboneInfo(int(d_model), int(n_blocks), grid, prefix, int(d_embed))
        return cls(name, size, patch, weights == "weights", info)


def known(model: str) -> Stack | None:
    """Return what is known of a model by its name, with or without a tag; None if only timm can say."""
    return None if "timm" in sys.modules else _known().get(model)


@cache
def _known() -> Mapping[str, Stack]:
    """Return what the file says, by names with and without a tag; nothing if it was written from another timm."""
    written, *lines = FILE.read_text().splitlines()
    found: dict[str, Stack] = {}
    if written == f"timm {version('timm')}":
        for stack in map(Stack.read, lines):
            found.setdefault(stack.name.partition(".")[0], stack)
            found[stack.name] = stack
    return found
