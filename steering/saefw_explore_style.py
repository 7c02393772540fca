"""How the Explore and Compare tabs look, beyond what they share with the Steer tab."""

from typing import Any

from saefw.pictures import bar
from saefw_steering_style import FIELD, FONT, TEXT

POINT, CHOSEN, AXES = "#3a8fc7", "#d55e00", "#7d838f"
"""Of points and bars, of what is chosen, and of axes and their words. A canvas has one colour for a light page and
a dark one: these can be seen on both, and told apart by all kinds of sight."""

WIDE: dict[str, Any] = {"stylesheets": [FIELD], "margin": 0, "sizing_mode": "stretch_width"}
"""Of a field that takes the room that there is."""

FIELDS = """
:host { display: grid !important; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 10px !important;
  align-items: end; }
@media (max-width: 560px) { :host { grid-template-columns: minmax(0, 1fr); } }
"""

RANGES = """
:host { display: grid !important; grid-template-columns: repeat(2, minmax(0, 1fr)) auto; gap: 24px !important;
  align-items: end; padding: 0 8px; }
"""

HALVES = """
:host { display: grid !important; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 14px !important;
  align-items: start; }
@media (max-width: 1020px) { :host { grid-template-columns: minmax(0, 1fr); } }
"""

HEAD = """
:host { display: grid !important; grid-template-columns: auto auto minmax(0, 1fr); gap: 8px !important;
  align-items: center; }
"""

GLOW = ", ".join(f"rgb{tuple(colour)}" for colour in bar().reshape(-1, 3)[::51].tolist())
"""The colours of lit patches, from the weakest to the strongest."""

PAGE = (
    TEXT
    + f"""
.tiles {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(88px, 1fr)); gap: 8px; }}
.tiles figure {{ margin: 0; min-width: 0; }}
.tiles img, .tiles .none {{ width: 100%; aspect-ratio: 1; object-fit: contain; background: #16171a; border-radius: 5px;
  display: block; }}
.tiles figcaption {{ font-size: 11.5px; color: var(--faint); overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }}
.glow {{ display: flex; align-items: center; gap: 8px; font-size: 12px; color: var(--faint); margin-top: 8px; }}
.glow i {{ flex: 0 1 180px; height: 9px; border-radius: 3px;
  background: linear-gradient(90deg, {GLOW}); }}
dl {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(70px, 1fr)); gap: 8px; margin: 0; }}
dt {{ font-size: 11.5px; color: var(--faint); }}
dd {{ margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; table-layout: fixed; }}
th {{ font-size: 11.5px; font-weight: 400; color: var(--faint); text-align: right; padding: 2px 0; }}
td {{ text-align: right; padding: 3px 0; border-top: 1px solid var(--line); overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; width: 34%; }}
.bar {{ display: inline-block; height: 8px; background: var(--found); border-radius: 2px; vertical-align: middle;
  margin-right: 6px; }}
.history p {{ margin: 3px 0; overflow-wrap: anywhere; white-space: pre-wrap; font-size: 12px; color: var(--faint); }}
.problem {{ color: var(--bad); }}
h1 {{ overflow-wrap: anywhere; }}
"""
)

TABLE = """
:host { font-size: 12.5px; color: var(--ink); border: 1px solid var(--line); border-radius: 6px; overflow: hidden; }
.bk-data-table, .slick-viewport, .slick-header { background: transparent !important; }
.slick-row { background: transparent !important; border: none !important; }
.slick-header-column { background: transparent !important; color: var(--faint); border: none !important;
  font-weight: 400; }
.slick-cell { border: none !important; border-top: 1px solid var(--line) !important; color: inherit; cursor: pointer; }
.slick-cell.selected { background: var(--found) !important; color: var(--paper) !important; }
"""

AREA = FIELD + ".bk-input { height: auto; min-height: 58px; resize: vertical; font-family: inherit; }"


def plain(plot: Any) -> None:
    """Draw axes in one grey, without a ground, so that a figure stands on a light page and on a dark one."""
    plot.background_fill_color = plot.border_fill_color = None
    plot.outline_line_color = None
    plot.grid.grid_line_color, plot.grid.grid_line_alpha = AXES, 0.22
    for axis in plot.axis:
        axis.axis_line_color = axis.major_tick_line_color = AXES
        axis.minor_tick_line_color = None
        axis.axis_label_text_font = axis.major_label_text_font = FONT
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font_size, axis.major_label_text_font_size = "12px", "11px"
        axis.axis_label_text_color = axis.major_label_text_color = AXES


def plain_legend(plot: Any) -> None:
    """Put the legend above a figure, without a ground."""
    for legend in plot.legend:
        legend.background_fill_color = legend.border_line_color = None
        legend.label_text_color, legend.label_text_font, legend.label_text_font_size = AXES, FONT, "12px"
        legend.orientation, legend.margin, legend.padding = "vertical", 0, 4
        plot.add_layout(legend, "above")
