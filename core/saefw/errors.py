"""Every error that is the user's to mend."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

UNPRINTED = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
"""Characters that do something instead of being shown: control characters and line ends, those that turn the direction
of writing, byte order marks, halves of characters (a file name that is not UTF-8 has them)."""


class UserError(Exception):
    """Something the user can mend; its text is all that is printed of it, without a traceback."""


class Faults(UserError):
    """Several faults found at once, one line each, in the order of the file."""

    def __init__(self, lines: Sequence[str]) -> None:
        """Keep `lines` apart, so that a caller may count or compare them."""
        super().__init__("\n".join(lines))
        self.lines = list(lines)


class NotYet(UserError):
    """A stage cannot list its units before an earlier stage is made; the text says which."""


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest allowed word, or nothing if none is near."""
    near = get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def escaped(text: str) -> str:
    """Return text in one line with every character that does not print written out as in Python's source.

    Names come from files and folders of anybody's; a terminal, a figure or a page shows them and obeys none of them.
    """
    return UNPRINTED.sub(lambda found: found.group().encode("unicode_escape").decode(), text)
