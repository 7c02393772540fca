"""What all commands have in common: how plugins add some, how they are stopped, what is said of errors."""

import ast
import errno
import os
import signal
import sys
import threading
import time
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from saefw.errors import UserError, escaped

GRACE = 5.0
"""Seconds that a command has to end in order once it is told to stop. It may need them to write a checkpoint; but it
may also not hear, in the midst of a long query."""

KEPT = "what is kept stays, and the next run goes on from there"

SHOWN = "\x1b[?25h"
"""Shows the cursor."""


class Plugged(TyperCommand):
    """A command that a plugin adds; listed without importing the plugin."""

    def __init__(self, point: EntryPoint) -> None:
        """Take the help from the source of the function."""
        super().__init__(name=point.name, help=_first_line(point) or f"Added by {point.value}.")
        self.point = point

    def make_context(self, *args: Any, **more: Any) -> Any:
        """Import the function; the command made of it does the rest.

        Raises:
            UserError: it cannot be imported.

        """
        try:
            function = self.point.load()
        except Exception as error:
            raise UserError(f"command '{self.name}' ({self.point.value}) cannot be imported: {error!r}") from error
        wrapped = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        wrapped.command(self.name)(function)
        command: Any = typer.main.get_command(wrapped)
        return command.make_context(*args, **more)


class Commands(TyperGroup):
    """All commands; those of plugins come from the entry-point group `saefw.commands`."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names, own ones first."""
        own = super().list_commands(ctx)
        return [*own, *sorted(set(entry_points(group="saefw.commands").names) - set(own))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command by name; a plugin's is not imported yet."""
        own = super().get_command(ctx, cmd_name)
        points = [] if own else list(entry_points(group="saefw.commands", name=cmd_name))
        return Plugged(points[0]) if points else own

    def invoke(self, ctx: Any) -> Any:
        """Run a command; of the user's errors print the text alone, and treat SIGTERM like Ctrl-C."""
        stopped = over = False

        def said() -> str:
            return f"stopped; {KEPT}" if ctx.invoked_subcommand == "run" else "stopped"

        def leave() -> None:
            # A store is safe whenever a process ends; the cursor of a terminal is not, where a bar moves.
            os.write(2, f"{SHOWN if sys.stderr.isatty() else ''}{said()}\n".encode())
            os._exit(130)

        def watch() -> None:
            if os.read(heard, 1):
                time.sleep(GRACE)
            os.close(heard)
            if not over:
                leave()

        def stop(number: int, frame: FrameType | None) -> None:
            nonlocal stopped
            # Told twice; or in an import, where an exception may be caught by anybody, or abort the process.
            if stopped or _importing(frame):
                leave()
            stopped = True
            raise KeyboardInterrupt

        # Written to by the system itself, also while no Python code runs.
        heard, told = os.pipe()
        os.set_blocking(told, False)
        fd = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        threading.Thread(target=watch, daemon=True).start()

        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, stop)
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt) as error:
            # DuckDB, for one, makes an error of its own of an interrupted query.
            if stopped:
                print(said(), file=sys.stderr)
                raise typer.Exit(130) from error
            if isinstance(error, UserError):
                print("\n".join(map(escaped, str(error).split("\n"))), file=sys.stderr)
                raise typer.Exit(1) from error
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                print(f"{error.filename or 'writing'}: {error.strerror}; {KEPT}", file=sys.stderr)
                raise typer.Exit(1) from error
            raise
        finally:
            over = True
            signal.set_wakeup_fd(fd)
            os.close(told)
            for number, handler in before.items():
                signal.signal(number, handler)


def _importing(frame: FrameType | None) -> bool:
    """Whether a frame runs for the sake of an import."""
    while frame and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _first_line(point: EntryPoint) -> str:
    """Return the first line of a function's docstring, read from its file so that nothing is imported."""
    if "." in point.module:  # to find it would import its package
        return ""
    spec = find_spec(point.module)
    if not spec or not spec.origin or not spec.origin.endswith(".py"):
        return ""
    for node in ast.parse(Path(spec.origin).read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == point.attr:
            return (ast.get_docstring(node) or "").split("\n")[0]
    return ""
