"""The steering page: what is made of a registry, opened in a browser, one session each.

`page` builds it in a Bokeh document; `serve` is the command `saefw serve`.
"""

import re
from collections.abc import Callable
from functools import cache, partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from bokeh.document import Document
from bokeh.models.callbacks import CustomJS
from bokeh.models.layouts import Column, TabPanel, Tabs

import saefw_steering_script as script
import saefw_steering_state as states
import saefw_steering_style as style
from saefw.errors import UserError
from saefw.experiment.choices import choices, store_of
from saefw_compare import Compare
from saefw_explore import Explore
from saefw_steering_layout import card
from saefw_steering_tab import Steer
from saefw_steering_views import div

if TYPE_CHECKING:
    from bokeh.server.server import Server

HERE = ("127.0.0.1", "::1")
"""This machine, as a client of the server."""


TEMPLATE = (
    """{% block preamble %}<meta name="viewport" content="width=device-width, initial-scale=1">{% endblock %}
{% block js_resources %}
{% for line in bokeh_js.splitlines() if "bokeh-mathjax" not in line and "bokeh-gl" not in line %}{{ line }}
{% endfor %}
<style>"""
    + style.WHOLE
    + """</style>
{% endblock %}
{% block contents %}<p id="loading">Loading the page …</p>{{ super() }}{% endblock %}"""
)
"""The page before Bokeh is there. It needs neither formulas nor WebGL, half of Bokeh's code, which took a second."""


class Page:
    """The page of one visitor: its tabs, each built when it is first looked at."""

    def __init__(self, doc: Document, path: Path) -> None:
        """Fill the first tab; one without anything to show has a sentence what to run."""
        self.doc, self._path = doc, path
        self.notice = div("", name="notice")
        self.steer: Steer | None = None
        self._explore: Explore | None = None
        self._kinds: dict[str, Callable[[], Any]] = {
            "Steer": self._steering,
            "Explore": self._exploring,
            "Compare": lambda: Compare(store_of(path), self._look_at, self._steer_unit).panel,
        }
        self._built: set[int] = set()
        reading = "<div class=busy>Reading the store …</div>"
        self._bodies = [Column(children=[div(reading)], sizing_mode="stretch_width") for _ in self._kinds]
        panels: list[Any] = [
            TabPanel(title=title, child=body) for title, body in zip(self._kinds, self._bodies, strict=True)
        ]
        self.tabs = Tabs(tabs=panels, name="tabs", sizing_mode="stretch_width", stylesheets=[style.TABS])
        self.tabs.on_change("active", lambda _attr, _old, active: self._build(active))
        self._build(0)
        for other in (1, 2):
            if not self._built:  # nothing is steered; what the other tabs show may be there all the same
                self._build(other)
                self.tabs.active = other if other in self._built else 0

    def say(self, text: str) -> None:
        """Say what a visitor can mend; an empty text: nothing."""
        self.notice.text = f'<div class="notice">{lines(text)}</div>' if text else ""

    def _build(self, active: int) -> None:
        if active in self._built:
            return
        self._built.add(active)
        title, build = list(self._kinds.items())[active]
        try:
            self._bodies[active].children = [build()]
        except UserError as error:
            self._built.remove(active)  # by the next look something may be made
            nothing = card("nothing", div(f"<h1>{title}</h1><p>{lines(str(error))}</p>"))
            nothing.name = "nothing"
            self._bodies[active].children = [nothing]

    def _steering(self) -> Any:
        self.steer = Steer(self.doc, choices(self._path), self.say, _asked(self))
        return self.steer.panel

    def _exploring(self) -> Any:
        steered = "" if self.steer is None else self.steer.choice.sae.address
        self._explore = Explore(store_of(self._path), self._steer_feature, steered)
        return self._explore.panel

    def _steer_feature(self, sae: str, feature: int) -> None:
        """Show a feature of an SAE in the Steer tab."""
        self.tabs.active = 0
        if self.steer is not None:
            self.say("")
            self.steer.switch(sae, feature=feature)

    def _steer_unit(self, unit: str) -> None:
        """Show in the Steer tab what a steer stage measured."""
        self.tabs.active = 0
        if self.steer is not None:
            self.say("")
            self.steer.open_unit(unit)

    def _look_at(self, sae: str) -> bool:
        """Show an SAE in the Explore tab; return whether there is something to look at."""
        self._build(1)
        if self._explore is None or not self._explore.show(sae):
            return False
        self.tabs.active = 1
        return True


def page(doc: Document, path: Path, public: bool = True) -> Page | None:
    """Fill a document with the page of a registry, and return it; where there is none, with a sentence what to do.

    Args:
        doc: where it is shown.
        path: the registry.
        public: show it to clients of other machines too.

    """
    if doc.session_context is not None:
        _undelayed()
    doc.title = "saefw steering"
    doc.template = cast(Any, TEMPLATE)
    parts: list[Any]
    made: Page | None = None
    if not public and (client := _client(doc)) not in HERE:
        text = (
            f"This page is for its own machine, and not for {client}. To show it to others, serve it with "
            "`bokeh serve steering --args --public`, and with --allow-websocket-origin as Bokeh asks for it."
        )
        parts = [card("refused", div(f"<p>{lines(text)}</p>"))]
    else:
        made = Page(doc, path)
        parts = [made.notice, made.tabs]
    doc.add_root(Column(children=parts, name="page", stylesheets=[style.PAGE], sizing_mode="stretch_width"))
    doc.js_on_event("document_ready", CustomJS(args={"keys": script.KEYS}, code=script.READY))
    return made


@cache
def _undelayed() -> None:
    """Have messages sent at once, by `saefw serve` as by `bokeh serve`.

    Bokeh writes each in three small packets and leaves it to the kernel to hold the second until the browser has
    acknowledged the first, which browsers do up to 40 ms later.
    """
    from bokeh.server.views.ws import WSHandler

    opened = WSHandler.open

    def open_undelayed(handler: WSHandler) -> None:
        opened(handler)
        handler.set_nodelay(True)

    cast(Any, WSHandler).open = open_undelayed


def lines(text: str) -> str:
    """Return what is said, as HTML: between backticks is code; a registry may have many faults, each a line."""
    return "<br>".join(re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(line)) for line in text.splitlines())


def _client(doc: Document) -> str:
    """Return the address of who asks for the page."""
    request = _request(doc)
    return str(request.remote_ip) if request else "nobody"


def _request(doc: Document) -> Any:
    """Return what the browser asked for; None where there is no server."""
    return getattr(doc.session_context, "request", None)


def _asked(page: Page) -> states.State | None:
    """Return the state that the link of the page holds, if it holds one that can be read."""
    request = _request(page.doc)
    texts = request.arguments.get("state", []) if request else []
    if not texts:
        return None
    try:
        return states.read(texts[-1].decode(errors="replace"))
    except UserError as error:
        page.say(str(error))
        return None


def _served(doc: Document, path: Path) -> None:
    page(doc, path)


def serve(
    registry: Annotated[
        Path, typer.Argument(metavar="[FILE]", show_default=False, help="Default: registry.yaml.")
    ] = Path("registry.yaml"),
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where to listen, on this machine only.")] = 5006,
    show: Annotated[bool, typer.Option(help="Open the page in the browser.")] = False,
) -> None:
    """Serve the steering page of an experiment, to this machine alone."""
    if not registry.is_file():
        raise UserError(f"there is no file {registry}; name a registry, or write one by `saefw init`")
    page(Document(), registry)  # so that not even the first visitor waits for models, tables and pictures
    listening = server(registry, port)
    typer.echo(f"The steering page is at http://localhost:{port}/steering (stop it with Ctrl-C).")
    if show:
        listening.io_loop.add_callback(listening.show, "/steering")
    listening.run_until_shutdown()


def server(registry: Path, port: int) -> "Server":
    """Return a server of the page that listens on this machine's loopback alone.

    Raises:
        UserError: the port is taken.

    """
    from bokeh.application import Application
    from bokeh.application.handlers.function import FunctionHandler
    from bokeh.server.server import Server

    app = Application(FunctionHandler(partial(_served, path=registry)))
    # Only pages that this server sent may talk to it: another site in the same browser may not.
    origins = [f"{host}:{port}" for host in ("localhost", "127.0.0.1")]
    try:
        return Server({"/steering": app}, address="127.0.0.1", port=port, allow_websocket_origin=origins)
    except OSError as error:
        raise UserError(f"cannot listen on port {port} ({error.strerror}); name another: --port {port + 1}") from error
