"""Every error that is the user's to mend."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


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
