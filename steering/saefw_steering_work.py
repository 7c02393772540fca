"""Runs what takes time beside the page, the newest wish first and none that is stale."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from bokeh.document import Document, without_document_lock

from saefw.errors import UserError

POOL = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saefw")
"""One at a time, for all sessions: a model uses every core anyway."""


def later(doc: Document, call: Callable[[], Any]) -> None:
    """Call back under the document's lock, if its visitor is still there."""
    if doc.session_context is not None and not doc.session_context.destroyed:
        doc.add_next_tick_callback(call)


class Newest:
    """Takes wishes, carries out the newest, and shows what came of it."""

    def __init__(self, doc: Document, failed: Callable[[str], None]) -> None:
        """Work for a document; `failed` is told what a user can mend."""
        self._doc, self._failed = doc, failed
        self._next: tuple[Callable[[], Any], Callable[[Any], None]] | None = None
        self._busy = False
        self.open = False
        """Whether there is somebody who waits; until then, what is asked for is done at once."""

    @property
    def waited_for(self) -> bool:
        """Whether what is asked for is done beside the page; a document without a server has nobody who waits."""
        return self.open and self._doc.session_context is not None

    def ask(self, job: Callable[[], Any], show: Callable[[Any], None]) -> None:
        """Do `job` in a thread and give its result to `show`; what was asked before and not begun is dropped."""
        if not self.waited_for:
            try:
                result = job()
            except (UserError, OSError) as error:
                self._failed(str(error))
            else:
                show(result)
            return
        self._next = job, show
        if not self._busy:
            self._busy = True
            work: Any = self._work
            self._doc.add_next_tick_callback(without_document_lock(work))

    async def _work(self) -> None:
        # Without the document's lock, so that what a visitor does meanwhile arrives and replaces what is next.
        loop = asyncio.get_running_loop()
        try:
            while self._next is not None:
                (job, show), self._next = self._next, None
                try:
                    result = await loop.run_in_executor(POOL, job)
                except (UserError, OSError) as error:
                    later(self._doc, partial(self._failed, str(error)))
                else:
                    later(self._doc, partial(show, result))
        finally:
            self._busy = False
