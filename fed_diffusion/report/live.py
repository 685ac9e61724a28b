"""report.html while a run trains: written anew beside the training, as often as costs little."""

from __future__ import annotations

import logging
import threading
import time

from fed_diffusion.store.rundir import RunDir

EVERY_S = 30.0
"""Between two pages at least; the first import of matplotlib alone takes seconds."""
SHARE = 0.05
"""Of the time, at most, that goes into pages: one that takes a second is written every 20."""
logger = logging.getLogger(__name__)


class LivePage:
    """Keeps the page of a run that trains; at most one page is being written at a time."""

    def __init__(self, run: RunDir):
        self._run = run
        self._thread: threading.Thread | None = None
        self._next = time.monotonic() + EVERY_S

    def refresh(self) -> None:
        """Write the page with the round that has just ended, unless one was written a moment ago.

        It returns at once; training goes on meanwhile.
        """
        writing = self._thread is not None and self._thread.is_alive()
        if writing or time.monotonic() < self._next:
            return
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Wait for a page that is being written; no more are begun by this."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self) -> None:
        from fed_diffusion.report.html import write_report  # matplotlib takes seconds to import

        began = time.monotonic()
        try:
            self._run.check_lock()
            write_report(self._run.path)
        except Exception as error:  # the last page of the run is written apart from this
            logger.warning("report.html could not be renewed: %s: %s", type(error).__name__, error)
        took = time.monotonic() - began
        self._next = time.monotonic() + max(EVERY_S, took / SHARE)
