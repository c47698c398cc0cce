"""
Logs: one JSON object a line on standard error, for all processes.

A log that nobody reads must not stop a router: lines wait in a bounded queue for a thread that
writes them, and are dropped, and counted, when it is full.
"""

import atexit
import contextlib
import logging
import queue
import sys
import threading
from typing import Any, Final

import orjson
import structlog

from controller import privilege

QUEUE_LINES: Final = 16384
"""Lines that may wait: about a second of connections, and 10 MB."""

LAST_LINES: Final = 2.0
"""Seconds that the end of the process waits for the lines in the queue."""


class Writer:
    """
    Where structlog's lines go.
    """

    def __init__(self) -> None:
        self.dropped = 0
        self._lines: queue.Queue[bytes | None] = queue.Queue(QUEUE_LINES)
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()
        atexit.register(self._finish)

    def msg(self, line: bytes) -> None:
        """
        Queue *line*.
        """
        try:
            self._lines.put_nowait(line + b"\n")
        except queue.Full:
            self.dropped += 1

    debug = info = warning = error = critical = exception = msg

    def _write(self) -> None:
        # capabilities are a thread's: those of a process that logs before it drops its own
        # would stay in this one
        privilege.drop_to(())
        out = sys.stderr.buffer
        while (line := self._lines.get()) is not None:
            with contextlib.suppress(OSError):
                out.write(line)
                if self._lines.empty():
                    out.flush()

    def _finish(self) -> None:
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=LAST_LINES)
        self._thread.join(LAST_LINES)


_writers: list[Writer] = []


def dropped_lines() -> int:
    """
    How many lines found the queue full.
    """
    return sum(writer.dropped for writer in _writers)


def _writer(*_: Any) -> Writer:
    if not _writers:
        _writers.append(Writer())
    return _writers[0]


def configure(process: str, level: str) -> None:
    """
    Send this process's log to standard error; *process* is in every line.

    Raises:
        ValueError: *level* is not the name of a level.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"log level {level!r}: one of debug, info, warning, error")
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(serializer=orjson.dumps),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=_writer,
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(process=process)
