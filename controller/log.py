"""
Logs: one JSON object a line on standard error, for all processes.

A log that nobody reads must not stop a router: lines wait in a bounded queue for a thread that
writes them, and are dropped, and counted, when it is full, or the disk is.  The thread lets lines
gather: one that woke for each would take more time from the router's loop than the line itself.
"""

import atexit
import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any, Final

import orjson
import structlog

from controller import privilege

QUEUE_LINES: Final = 16384
"""Lines that may wait: about a second of connections, and 10 MB."""

GATHER: Final = 0.02
"""Seconds for which lines gather; nobody who reads a log sees it."""

BATCH: Final = 1024
"""Lines in one write."""

_STDERR: Final = 2

LAST_LINES: Final = 2.0
"""Seconds that the end of the process waits for the lines in the queue."""


class Writer:
    """
    Where structlog's lines go.
    """

    def __init__(self) -> None:
        self.dropped = 0
        self._begun = b""
        self._lines: deque[bytes] = deque()
        self._bell = threading.Event()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()
        atexit.register(self.finish)

    def msg(self, line: bytes) -> None:
        """
        Queue *line*.
        """
        if len(self._lines) >= QUEUE_LINES:
            self.dropped += 1
            return
        self._lines.append(line)
        if not self._bell.is_set():
            self._bell.set()

    debug = info = warning = error = critical = exception = msg

    def _write(self) -> None:
        # capabilities are a thread's: those of a process that logs before it drops its own
        # would stay in this one
        privilege.drop_to(())
        lines = self._lines
        while lines or not self._ending.is_set():
            self._bell.wait()
            self._ending.wait(GATHER)
            # before the look at the queue, so that no line is left in it without a bell
            self._bell.clear()
            while lines:
                batch = [lines.popleft() for _ in range(min(len(lines), BATCH))]
                self._put(b"\n".join((*batch, b"")))

    def _put(self, text: bytes) -> None:
        """
        Write *text*, and drop the lines that can not be written; but one that is begun is to end.
        """
        text = self._begun + text
        written = 0
        # not by a buffered file, which would keep what fails, and try it again at the exit
        with contextlib.suppress(OSError):
            while written < len(text):
                written += os.write(_STDERR, text[written:])
        is_begun = text[written - 1 : written] != b"\n" if written else bool(self._begun)
        end = text.find(b"\n", written) + 1 if is_begun else written
        self._begun = text[written:end]
        self.dropped += text.count(b"\n", end)

    def finish(self) -> None:
        """
        Write what is in the queue, and no more after that.
        """
        self._ending.set()
        self._bell.set()
        self._thread.join(LAST_LINES)


_writers: list[Writer] = []

_line = {"event": "connection", "level": "", "process": ""}
"""What is in all lines of connections; no level, no lines."""


def dropped_lines() -> int:
    """
    How many lines found the queue, or the disk, full.
    """
    return sum(writer.dropped for writer in _writers)


def finish() -> None:
    """
    Wait for the lines in the queue; for a process that ends in another way than by its own.
    """
    for writer in _writers:
        writer.finish()


def _writer(*_: Any) -> Writer:
    if not _writers:
        _writers.append(Writer())
    return _writers[0]


def connection(fields: dict[str, Any]) -> None:
    """
    Write the line of a connection, as `info` would, in a fifth of its time.
    """
    if _line["level"]:
        now = {"timestamp": datetime.now(UTC)}
        _writer().msg(orjson.dumps(fields | _line | now, option=orjson.OPT_UTC_Z))


def configure(process: str, level: str, **fields: Any) -> None:
    """
    Send this process's log to standard error; *process* and *fields* are in every line.

    Raises:
        ValueError: *level* is not the name of a level.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"log level {level!r}: one of debug, info, warning, error")

    def add_fields(_: Any, __: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        # not by context variables, which a thread does not inherit
        line.update(fields, process=process)
        return line

    structlog.configure(
        processors=[
            add_fields,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(serializer=orjson.dumps),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=_writer,
        cache_logger_on_first_use=True,
    )
    _line.update(fields, process=process, level="info" if number <= logging.INFO else "")
