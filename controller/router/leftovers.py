"""
See off the pins of routers of other versions that had this one's place.

Flows that a router of another version has left go on with its programs.  This one can not see to
them, but it can count them; once the last has ended, those programs would only be in the way of
every packet.

Rules of this file:

1. What is in use, or has flows under way, or is not understood, is left alone.
2. What is told of it is told once.
"""

from pathlib import Path
from typing import Final

import structlog

from bpfprog import take_down
from controller.router import pins
from controller.router.loop import Loop
from controller.settings import RouterSettings

LOOK: Final = 60.0
"""Seconds between looks: a handful of system calls, and milliseconds while there are flows."""

log = structlog.get_logger()


class Leftovers:
    """
    All of them, as far as anything has been told.
    """

    def __init__(self, loop: Loop, settings: RouterSettings) -> None:
        self._loop = loop
        self._settings = settings
        self._told: set[tuple[str, Path]] = set()

    def look(self) -> None:
        """
        Take down what has no flows any more, now and every while.
        """
        self._loop.later(LOOK, self.look)
        try:
            paths = pins.of_other_versions(self._settings)
        except OSError:
            # who may not look has left nothing there either
            return
        for path in paths:
            try:
                flows = take_down(path)
            except FileNotFoundError:
                # somebody else was first
                continue
            except OSError as err:
                if self._is_news("error", path):
                    error = err.strerror
                    log.warning("pins of another version left alone", pins=str(path), error=error)
                continue
            if flows:
                if self._is_news("flows", path):
                    log.info("flows of another version", pins=str(path), flows=flows)
            elif flows == 0:
                log.info("pins of another version taken down", pins=str(path))

    def _is_news(self, what: str, path: Path) -> bool:
        known = (what, path) in self._told
        self._told.add((what, path))
        return not known
