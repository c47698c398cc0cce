"""
`sniroute run`: a router and a controller as two processes, each with its own privileges.

The one that ends is started again; connections live in the router, so it is never restarted for
the controller's sake.  Each drops what it must not have by itself, before it reads anything.
"""

import os
import secrets
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Final

import pyprctl
import structlog

from controller import log
from controller.settings import RUN, RunSettings

FIRST_WAIT: Final = 0.2
LAST_WAIT: Final = 10.0
"""Seconds before an ended process is started again: doubling from the first to the last."""

LIVED: Final = 10.0
"""Seconds after which a process counts as having started well."""

GRACE: Final = 5.0
"""Seconds beyond the drain before a process that was asked to stop is killed."""

logger = structlog.get_logger()


@dataclass(slots=True)
class Child:
    """
    One of the two processes.
    """

    name: str
    module: str
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    started: float = 0.0
    wait: float = FIRST_WAIT
    due: float = field(default_factory=time.monotonic)

    def start(self, environment: dict[str, str]) -> None:
        """
        Start it, now.
        """
        self.starts += 1
        self.started = time.monotonic()
        self.process = subprocess.Popen(  # noqa: S603 - our own modules, -P: from nowhere else
            [sys.executable, "-P", "-m", self.module],
            env=environment,
            stdin=subprocess.DEVNULL,
            preexec_fn=_child,  # noqa: PLW1509 - the supervisor has no threads
        )
        logger.info("started", child=self.name, pid=self.process.pid)

    def reap(self) -> int | None:
        """
        Return the exit status of a process that has ended, and plan its next start.
        """
        if self.process is None or (status := self.process.poll()) is None:
            return None
        self.process = None
        now = time.monotonic()
        self.wait = FIRST_WAIT if now - self.started > LIVED else min(2 * self.wait, LAST_WAIT)
        self.due = now + self.wait
        return status


def _child() -> None:
    """
    Undo what is the supervisor's own; do not outlive it, but drain as for a SIGTERM.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    pyprctl.set_pdeathsig(signal.SIGTERM)


def run(settings: RunSettings) -> int:
    """
    Run both processes until SIGTERM or SIGINT.

    Returns:
        The exit status: 0 after a clean stop, 1 when the router could not even start.
    """
    log.configure("supervisor", settings.log_level)
    environment = {**os.environ, **settings.environment(), RUN: secrets.token_hex(8)}
    children = [
        Child("router", "controller.router"),
        Child("controller", "controller"),
    ]
    signals = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}
    # blocked and waited for: a signal is never missed and never interrupts anything
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    while True:
        for child in children:
            status = child.reap()
            if status is not None:
                lived = time.monotonic() - child.started
                if child.name == "router" and not status:
                    # drained through its control socket, or replaced: what was asked for is the end
                    return _stop(children, settings.drain)
                logger.error("ended", child=child.name, status=status, seconds=round(lived, 1))
                if child.name == "router" and child.starts == 1 and status > 0 and lived < LIVED:
                    _stop(children, settings.drain)
                    return 1
            if child.process is None and child.due <= time.monotonic():
                child.start(environment)
        waits = [child.due - time.monotonic() for child in children if child.process is None]
        caught = signal.sigtimedwait(signals, max(0.0, min(waits, default=1.0)))
        if caught is not None and caught.si_signo != signal.SIGCHLD:
            return _stop(children, settings.drain)


def _stop(children: list[Child], drain: float) -> int:
    """
    Ask all to stop, the router after its connections, and see that they do.
    """
    until = time.monotonic() + drain + GRACE
    for child in children:
        if child.process is not None:
            child.process.terminate()
    for child in children:
        if child.process is None:
            continue
        try:
            child.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            logger.error("killed", child=child.name, pid=child.process.pid)
            child.process.kill()
            child.process.wait()
    return 0
