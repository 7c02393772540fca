"""How the steering page looks: colours and style sheets, all of them in the page itself."""

INK, FAINT, LINE, BEFORE, AFTER = "#1d1f24", "#6a707c", "#e3e6eb", "#b4bac6", "#0072b2"
"""Grey before and blue after differ in lightness as well as in colour, for all kinds of sight."""

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Noto Sans', 'Liberation Sans', sans-serif"

WHOLE = f"""
html {{ scrollbar-gutter: stable; }}
body {{ margin: 0; background: #f5f6f8; --bokeh-base-font: {FONT}; }}
"""

PAGE = f"""
:host {{
  box-sizing: border-box; max-width: 1480px; margin: 0 auto; padding: 16px 20px 32px; gap: 14px;
  color: {INK}; font-size: 13px;
}}
"""

COLUMNS = """
:host { display: grid !important; grid-template-columns: 288px minmax(0, 1fr) 304px; gap: 14px !important;
  align-items: start; }
.side { position: sticky; top: 12px; }
@media (max-width: 1180px) {
  :host { grid-template-columns: 236px minmax(0, 1fr) 240px; gap: 12px !important; }
}
"""

CARD = f"""
:host {{ box-sizing: border-box; background: #fff; border: 1px solid {LINE}; border-radius: 10px; padding: 14px;
  min-width: 0; }}
"""

BUTTONS = ":host { gap: 8px !important; flex-wrap: wrap; align-items: center; }"

TEXT = f"""
:host {{ color: {INK}; font-size: 13px; line-height: 1.4; }}
.bk-clearfix {{ width: 100%; }}
h1 {{ font-size: 19px; font-weight: 650; margin: 0 0 4px; letter-spacing: -0.01em; }}
h2 {{ font-size: 13px; font-weight: 650; margin: 0; }}
h2 small, .faint {{ font-size: 12px; font-weight: 400; color: {FAINT}; }}
p {{ margin: 0; }}
code {{ font: 12px/1.5 ui-monospace, Menlo, Consolas, 'Liberation Mono', monospace; }}
code {{ background: #eef0f3; border-radius: 4px; padding: 1px 4px; }}
.name {{ font-weight: 600; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }}
.strip {{ display: flex; gap: 4px; }}
.strip img {{ width: 42px; height: 42px; border-radius: 4px; object-fit: contain; background: #16171a; }}
.state {{ font-size: 12px; color: {FAINT}; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }}
.state.edited {{ color: {AFTER}; font-weight: 600; }}
.patches {{ min-height: 4.2em; }}
.brand {{ float: right; font-size: 12px; color: {FAINT}; padding-top: 6px; }}
.key i {{ display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin: 0 5px 0 0; }}
.key {{ float: right; font-size: 12px; font-weight: 400; color: {FAINT}; }}
.key span {{ margin-left: 10px; }}
.verdict {{ display: flex; align-items: center; gap: 14px; height: 58px; font-weight: 650; overflow: hidden; }}
.verdict.large {{ font-size: 46px; }}
.verdict.medium {{ font-size: 24px; }}
.verdict.small {{ font-size: 16px; gap: 8px; }}
.word {{ color: {FAINT}; min-width: 0; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }}
.arrow {{ color: {BEFORE}; font-size: 26px; font-weight: 400; }}
.word.changed {{ color: {AFTER}; }}
.said {{ min-height: 4.2em; text-wrap: pretty; }}
.facts {{ font-size: 11.5px; line-height: 1.3; color: {FAINT}; white-space: nowrap; }}
p.title {{ overflow: hidden; text-overflow: ellipsis; }}
"""

ROW = f"""
:host {{ display: grid !important; gap: 0 10px !important; padding: 7px 0; border-top: 1px solid {LINE};
  grid-template-columns: 50px 108px 226px minmax(90px, 1fr) 78px 26px;
  grid-template-areas: "pick caption thumbnails state number reset" "pick caption thumbnails slider number reset";
  align-items: center; }}
.pick {{ grid-area: pick; }} .caption {{ grid-area: caption; min-width: 0; }} .thumbnails {{ grid-area: thumbnails; }}
.state {{ grid-area: state; min-width: 0; }} .slider {{ grid-area: slider; }}
.number {{ grid-area: number; }} .reset {{ grid-area: reset; }}
@media (max-width: 1260px) {{
  :host {{ grid-template-columns: 50px minmax(60px, 1fr) 102px 78px 26px;
    grid-template-areas: "pick caption thumbnails thumbnails thumbnails"
      "state state state number reset" "slider slider slider number reset"; }}
  .state {{ margin-top: 8px; }}
  .number, .reset {{ margin-top: 8px; }}
}}
"""

BUTTON = f"""
.bk-btn {{ border: 1px solid #cfd4dc; background: #fff; color: {INK}; border-radius: 6px; font-size: 13px;
  padding: 5px 10px; line-height: 1.3; }}
.bk-btn:hover {{ background: #f0f2f5; border-color: #b9c0cb; }}
.bk-btn:focus {{ outline: none; }}
.bk-btn:focus-visible {{ outline: 2px solid {AFTER}; outline-offset: 1px; }}
.bk-btn[disabled] {{ opacity: 0.35; }}
"""

STRONG = (
    BUTTON
    + f"""
.bk-btn, .bk-btn:hover {{ background: {AFTER}; border-color: {AFTER}; color: #fff; font-weight: 600; }}
.bk-btn:hover {{ background: #005f95; }}
"""
)

PICK = (
    BUTTON
    + f"""
.bk-btn {{ font-weight: 600; padding: 5px 4px; font-variant-numeric: tabular-nums; }}
:host(.lit) .bk-btn {{ background: {INK}; border-color: {INK}; color: #fdf5aa; }}
"""
)

ROUND = (
    BUTTON
    + f"""
.bk-btn {{ border-color: transparent; background: none; font-size: 17px; line-height: 1; padding: 4px 0;
  color: {FAINT}; }}
.bk-btn[disabled] {{ opacity: 0; }}
"""
)

FIELD = f"""
.bk-input {{ border: 1px solid #cfd4dc; border-radius: 6px; font-size: 13px; color: {INK}; background-color: #fff;
  padding: 4px 8px; height: 30px; min-height: 30px; }}
.bk-spin-btn {{ display: none !important; }}
.bk-spin-wrapper .bk-input {{ padding-right: 6px !important; }}
.bk-input::placeholder {{ color: #9aa1ad; }}
.bk-input:focus {{ outline: 2px solid {AFTER}; outline-offset: -1px; box-shadow: none; }}
.bk-input-group label {{ font-size: 12px; color: {FAINT}; padding: 0 0 2px; }}
"""

SLIDER = f"""
.noUi-target {{ height: 6px; border: none; box-shadow: none; background: #e9ebef; border-radius: 3px;
  margin: 7px 8px 5px; }}
.noUi-connect {{ border-radius: 3px; }}
.noUi-handle.noUi-touch-area, .noUi-handle {{ width: 16px !important; height: 16px !important; border-radius: 50%;
  top: -5px !important; right: -8px !important; border: 2px solid #8b93a1; box-shadow: none; background: #fff; }}
:host(.edited) .noUi-handle {{ border-color: {AFTER}; }}
.noUi-handle::before, .noUi-handle::after {{ display: none; }}
.noUi-handle:focus-visible {{ outline: 2px solid {AFTER}; outline-offset: 2px; }}
"""

CHECK = f"""
:host {{ font-size: 13px; color: {INK}; }}
input {{ accent-color: {INK}; margin: 0 6px 0 0 !important; }}
"""

TABS = f"""
:host {{ color: {INK}; font-size: 13px; }}
"""
