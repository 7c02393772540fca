"""How the steering page looks: colours and style sheets, all of them in the page itself.

Colours are named once, for light and for dark; every sheet speaks of them by name.
"""

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Noto Sans', 'Liberation Sans', sans-serif"

COLOURS = {
    "ground": ("#f5f6f8", "#14161a"),
    "paper": ("#ffffff", "#1d2026"),
    "field": ("#ffffff", "#262a31"),
    "soft": ("#eef0f3", "#2b3038"),
    "ink": ("#1d1f24", "#e8eaee"),
    "faint": ("#5f6672", "#a3abb8"),
    "line": ("#e3e6eb", "#343a44"),
    "edge": ("#cfd4dc", "#4a515d"),
    "before": ("#aab1be", "#767f8e"),
    "after": ("#007a5a", "#2fbf95"),
    "own": ("#7d3f98", "#c79ae0"),
    "other": ("#b35900", "#f0a04b"),
    "found": ("#2f6f9f", "#74b3e0"),
    "strong": ("#00664b", "#23996f"),
    "bad": ("#b3261e", "#ff9a91"),
}
"""In light and in dark. Purple, orange, blue and green are told apart by all kinds of sight, and each group is also
named; before and after differ in lightness as well."""


def _named(which: int) -> str:
    return "".join(f" --{name}: {pair[which]};" for name, pair in COLOURS.items())


WHOLE = f"""
:root {{ color-scheme: light dark;{_named(0)} }}
@media (prefers-color-scheme: dark) {{ :root {{{_named(1)} }} }}
html {{ scrollbar-gutter: stable; }}
#loading {{ margin: 0; padding: 14px 28px; font: 14px {FONT}; color: var(--faint); }}
body {{ margin: 0; background: var(--ground); --bokeh-base-font: {FONT}; }}
"""

PAGE = """
:host {
  box-sizing: border-box; max-width: 1880px; margin: 0 auto; padding: 10px 16px 24px;
  color: var(--ink); font-size: 13px;
}
"""

TABS = """
:host { color: var(--ink); font-size: 13px; }
.bk-header { border-bottom: 1px solid var(--line) !important; margin-bottom: 12px; }
.bk-tab { color: var(--faint); padding: 6px 14px; font-size: 14px; border: none !important; background: none !important;
  outline: none !important; }
.bk-tab:focus-visible { color: var(--ink); text-decoration: underline; }
.bk-tab:hover { color: var(--ink); }
.bk-tab.bk-active { color: var(--ink) !important; font-weight: 650; box-shadow: inset 0 -2px var(--after); }
"""

COLUMNS = """
:host { display: grid !important; grid-template-columns: 270px minmax(0, 1fr) 290px; gap: 12px !important;
  grid-template-areas: "image features bars"; align-items: start; }
.image { grid-area: image; } .features { grid-area: features; } .bars { grid-area: bars; }
@media (min-width: 1181px) { .image, .bars { position: sticky; top: 10px; } }
@media (min-width: 1600px) { :host { grid-template-columns: 330px minmax(0, 1fr) 360px; } }
@media (max-width: 1180px) {
  :host { grid-template-columns: minmax(0, 300px) minmax(0, 1fr);
    grid-template-areas: "image bars" "features features"; }
}
"""

GROUPS = """
:host { display: grid !important; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 14px !important;
  align-items: start; }
"""

CARD = """
:host { box-sizing: border-box; background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px; min-width: 0; }
"""

BUTTONS = ":host { gap: 6px !important; flex-wrap: wrap; align-items: center; }"

FOLD = """
:host { color: var(--ink); font-size: 13px; }
"""

TEXT = """
:host { color: var(--ink); font-size: 13px; line-height: 1.4; }
.bk-clearfix { width: 100%; vertical-align: top; }
h1 { font-size: 18px; font-weight: 650; margin: 0 0 2px; letter-spacing: -0.01em; }
h2 { font-size: 13px; font-weight: 650; margin: 0; }
h2 small, .faint { font-size: 12px; font-weight: 400; color: var(--faint); }
h2.own { color: var(--own); } h2.other { color: var(--other); } h2.found { color: var(--found); }
h2.own, h2.other, h2.found { min-height: 2.8em; }
p { margin: 0; }
.room { height: 28px; }
code { font: 12px/1.5 ui-monospace, Menlo, Consolas, 'Liberation Mono', monospace; }
code { background: var(--soft); border-radius: 4px; padding: 1px 4px; }
.name { font-weight: 600; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.head { display: grid; grid-template-columns: 54px minmax(0, 1fr); gap: 0 6px; align-items: center;
  padding: 0 26px 4px 0; }
.pick { font: inherit; font-weight: 600; font-variant-numeric: tabular-nums; padding: 4px 2px; border-radius: 6px;
  border: 1px solid var(--edge); background: var(--pick, var(--field)); color: var(--pick-ink, var(--ink));
  cursor: pointer; }
.pick:focus-visible { outline: 2px solid var(--after); outline-offset: 1px; }
.strip { display: grid; grid-template-columns: repeat(5, minmax(0, 48px)); gap: 3px; }
.strip img { width: 100%; aspect-ratio: 1; border-radius: 4px; object-fit: contain; background: #16171a; }
.facts { font-size: 11.5px; line-height: 1.3; color: var(--faint); }
.state { font-size: 12px; color: var(--faint); white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.state.edited { color: var(--after); font-weight: 600; }
.brand { float: right; font-size: 12px; color: var(--faint); padding-top: 6px; }
.said { min-height: 4.2em; text-wrap: pretty; overflow-wrap: anywhere; }
.notice { border-left: 3px solid var(--bad); padding: 4px 10px; color: var(--bad); overflow-wrap: anywhere; }
.busy { border-left: 3px solid var(--found); padding: 4px 10px; }
.key i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin: 0 5px 0 0; }
.key span { margin-left: 10px; } .key { float: right; font-size: 12px; font-weight: 400; color: var(--faint); }
i.before { background: var(--before); } i.after { background: var(--after); }
.verdict { display: flex; align-items: center; gap: 12px; height: 52px; font-weight: 650; overflow: hidden; }
.verdict.large { font-size: 42px; } .verdict.medium { font-size: 22px; } .verdict.small { font-size: 15px; gap: 8px; }
.word { color: var(--faint); min-width: 0; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.arrow { color: var(--before); font-size: 24px; font-weight: 400; }
.word.changed { color: var(--after); }
.bar { display: grid; grid-template-columns: minmax(16px, auto) minmax(0, 1fr) 44px 52px; gap: 0 8px;
  align-items: center; padding: 2px 0; font-variant-numeric: tabular-nums; }
.bars { display: grid; grid-template-columns: fit-content(38%) minmax(0, 1fr) max-content max-content; gap: 5px 8px;
  align-items: center; font-variant-numeric: tabular-nums; }
.bars .class { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.bars .track { display: block; position: relative; height: 15px; background: var(--soft); border-radius: 3px; }
.bars .track i { position: absolute; left: 0; border-radius: 2px; min-width: 1px; }
.bars .track i.before { top: 0; height: 6px; } .bars .track i.after { top: 7px; height: 8px; }
.bars .share { text-align: right; } .bars .change { text-align: right; font-size: 11.5px; color: var(--faint); }
.bars .change.up { color: var(--after); } .bars .change.down { color: var(--bad); }
.bars .most { font-weight: 650; }
pre { font: 11.5px/1.45 ui-monospace, Menlo, Consolas, 'Liberation Mono', monospace; background: var(--soft);
  border-radius: 6px; padding: 8px; margin: 0; overflow-x: auto; user-select: all; }
a { color: var(--found); overflow-wrap: anywhere; }
kbd { font: 11px ui-monospace, monospace; border: 1px solid var(--edge); border-radius: 4px; padding: 0 4px; }
"""

FEATURE = """
:host { display: none !important; box-sizing: border-box; min-width: 0; gap: 4px 6px !important;
  padding: 8px 0 8px 8px; border-top: 1px solid var(--line); border-left: 3px solid transparent;
  grid-template-columns: minmax(0, 1fr) 74px; position: relative; align-items: center;
  grid-template-areas: "about about" "state state" "slider slider" "mode number"; }
:host(.feature) { display: grid !important; }
:host(.edited) { --changed: var(--after); --knob: var(--after); --reset: inline-block; }
:host(.lit) { --pick: var(--ink); --pick-ink: var(--paper); }
:host(.own) { border-left-color: var(--own); } :host(.other) { border-left-color: var(--other); }
:host(.found) { border-left-color: var(--found); }
:host(:hover) { background: var(--soft); }
.about { grid-area: about; min-width: 0; } .state { grid-area: state; min-width: 0; } .slider { grid-area: slider; }
.mode { grid-area: mode; } .number { grid-area: number; }
.reset { position: absolute !important; top: 8px; right: 2px; }
"""
"""Of a card. What its state changes is said to the sheets of its parts in custom properties, which they inherit."""

BUTTON = """
.bk-btn, .bk-btn-default { border: 1px solid var(--edge) !important; background: var(--field) !important;
  color: var(--ink) !important; border-radius: 6px; font-size: 13px; padding: 5px 9px; line-height: 1.3; }
.bk-btn:hover { background: var(--soft) !important; }
.bk-btn.bk-active { background: var(--ink) !important; color: var(--paper) !important; }
.bk-btn:focus { outline: none; }
.bk-btn:focus-visible { outline: 2px solid var(--after); outline-offset: 1px; }
.bk-btn[disabled] { opacity: 0.4; }
"""

STRONG = (
    BUTTON
    + """
.bk-btn, .bk-btn:hover { background: var(--strong) !important; border-color: var(--strong) !important;
  color: #fff !important; font-weight: 600; }
"""
)

ROUND = (
    BUTTON
    + """
.bk-btn { border-color: transparent !important; background: none !important; font-size: 17px; line-height: 1;
  padding: 3px 0; color: var(--faint) !important; display: var(--reset, none); }
"""
)

FIELD = """
.bk-input { border: 1px solid var(--edge); border-radius: 6px; font-size: 13px; color: var(--ink);
  background-color: var(--field); padding: 3px 7px; height: 28px; min-height: 28px; }
.bk-input option { background: var(--field); color: var(--ink); }
.bk-spin-btn { display: none !important; }
.bk-spin-wrapper .bk-input { padding-right: 6px !important; }
.bk-input::placeholder { color: var(--faint); }
.bk-input:focus { outline: 2px solid var(--after); outline-offset: -1px; box-shadow: none; }
.bk-input-group label { font-size: 12px; color: var(--faint); padding: 0 0 2px; }
select.bk-input { appearance: auto; background-image: none; padding-right: 2px; }
input[type=file] { height: auto; padding: 3px; font-size: 12px; }
input[type=file]::file-selector-button { border: 1px solid var(--edge); border-radius: 4px; background: var(--soft);
  color: var(--ink); padding: 3px 8px; }
"""

SLIDER = """
.noUi-target { height: 6px; border: none; box-shadow: none; background: var(--line); border-radius: 3px;
  margin: 7px 8px 7px; }
.noUi-connect { border-radius: 3px; background: var(--changed, var(--before)) !important; }
.noUi-handle.noUi-touch-area, .noUi-handle { width: 18px !important; height: 18px !important; border-radius: 50%;
  top: -6px !important; right: -9px !important; border: 2px solid var(--knob, var(--faint));
  box-shadow: none; background: var(--paper); }
.noUi-handle::before, .noUi-handle::after { display: none; }
.noUi-handle:focus-visible { outline: 2px solid var(--after); outline-offset: 2px; }
"""

CHECK = """
:host { font-size: 13px; color: var(--ink); }
input { accent-color: var(--after); margin: 0 6px 0 0 !important; }
"""
