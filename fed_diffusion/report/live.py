"""report.html while a run trains: it is written anew beside the training, as often as is cheap."""

from __future__ import annotations

import logging
import threading
import time

from fed_diffusion.store.rundir import RunDir

EVERY_S = 30.0
"""The seconds between two pages, at least; the first import of matplotlib alone takes seconds."""
SHARE = 0.05
"""The share of the time, at most, that goes into pages: one of a second is written every 20 s."""
logger = logging.getLogger(__name__)


class LivePage:
    """Renews the page of a run that trains; at most one page is being written at a time."""

    def __init__(self, run: RunDir):
        self._run = run
        self._thread: threading.Thread | None = None
        self._next = time.monotonic() + EVERY_S

    def refresh(self) -> None:
        """Write the page with the round that has just ended, unless a page was written a moment
        ago.

        The call returns at once; training goes on meanwhile.
        """
        writing = self._thread is not None and self._thread.is_alive()
        if writing or time.monotonic() < self._next:
            return
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Wait for a page that is being written; this object begins no more of them."""
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
