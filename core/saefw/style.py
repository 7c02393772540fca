"""How figures look: colours, sizes, and how they become files.

Importing it draws in nothing of matplotlib.
"""

import warnings
from io import BytesIO
from textwrap import fill
from typing import TYPE_CHECKING, Any

from saefw.errors import UserError, escaped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, told apart by all kinds of sight (jfly.uni-koeln.de/color)."""

INK, FAINT, RULE, ZERO = "#1d1f24", "#707580", "#e3e5ea", "#a9adb6"

WIDTH = 7.2
"""Of a figure, in inches, unless its entry says another: as wide as a README shows without scaling much."""

STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": ZERO,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.titlesize": 9.5,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "figure.titlesize": 11,
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "pdf.fonttype": 42,
    "savefig.dpi": 170,
    "svg.hashsalt": "saefw",
    "text.color": INK,
    "text.parse_math": False,
    "text.usetex": False,
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "xtick.major.width": 0.8,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
    "ytick.major.width": 0.8,
}
"""Settings of matplotlib under which every figure is drawn; a figure may go beyond them."""


def styled() -> Any:
    """Return a context in which matplotlib draws in the style of all figures, whatever the user's own settings are."""
    from cycler import cycler
    from matplotlib import rc_context, rcParamsDefault

    kept = ("backend", "interactive")
    plain: dict[str, Any] = {key: value for key, value in rcParamsDefault.items() if not key.startswith(kept)}
    settings: dict[Any, Any] = {**plain, **STYLE, "axes.prop_cycle": cycler(color=PALETTE)}
    return rc_context(settings)


def rendered(figure: "Figure") -> dict[str, bytes]:
    """Return a figure as bytes of `png`, `svg` and `pdf` files, without the time or matplotlib's version in them.

    Raises:
        UserError: it is too small for what it shows.

    """
    metadata: dict[str, dict[str, Any]] = {
        "png": {"Software": None},
        "svg": {"Date": None, "Creator": None},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    }
    files = {}
    with warnings.catch_warnings():
        # A name in a writing that the font does not have is drawn as boxes; the tables have it as it is.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        warnings.filterwarnings("error", "constrained_layout not applied", UserWarning)
        for kind, told in metadata.items():
            file = BytesIO()
            try:
                figure.savefig(file, format=kind, metadata=told)
            except UserWarning as warning:
                width, height = figure.get_size_inches()
                raise UserError(f"{width:g} by {height:g} inches are too few for what it shows") from warning
            files[kind] = file.getvalue()
            figure.set_layout_engine("none")  # laid out once, alike in all of them
    return files


def shown(name: str, most: int = 30) -> str:
    """Return a name as figures write it: in one line, nothing in it obeyed, cut so that the axes keep their room."""
    text = escaped(name)
    return text if len(text) <= most else text[: most - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"


def wrapped(text: str, width: float) -> str:
    """Return a title with its lines broken so that they fit into a figure of a width in inches."""
    return "\n".join(fill(line, int(12.5 * width)) for line in text.split("\n"))


def panels(n: int, height: float, width: float) -> "tuple[Figure, list[Axes]]":
    """Return a figure with n panels, two in a row where it is wide; a single one takes the whole width."""
    from matplotlib.figure import Figure

    columns = min(n, 2 if width > 5 else 1)
    rows = -(-n // columns)
    figure = Figure(figsize=(width, height * rows))
    grid = figure.add_gridspec(rows, columns)
    return figure, [figure.add_subplot(grid[divmod(i, columns)]) for i in range(n)]


def plain_ticks(*axes: "Axis", most: int | None = None) -> None:
    """Label logarithmic axes with plain numbers: the powers of ten and, where they are few, 2 and 5 times these.

    At most so many as `most`, where there is little room; None: as many as matplotlib thinks fit.
    """
    from math import log10

    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in axes:
        low, high = axis.get_view_interval()
        few = 3 * log10(high / low) < (most or 7)
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=most))
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}".replace("e-0", "e-")))
        axis.set_minor_formatter(NullFormatter())
