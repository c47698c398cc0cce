"""
Load that notices: connections that stay and talk, and new ones all the time.
"""

import itertools
import threading
from typing import Self

from harness import fetch
from harness.apps import BLOB, App
from harness.machines import Machine
from harness.tools import HarnessError, wait_for

_STAYING = 6
_PAUSE = 0.1
"""Seconds between the requests of a connection: load enough to notice, on a small machine too."""


class Load:
    """
    Clients on *machine* that ask *at* for each of *apps*, by the host names given.

    `failures` says all that ever went wrong: a broken connection, a refused one, a wrong byte.
    """

    def __init__(self, machine: Machine, at: fetch.Endpoint, apps: dict[str, App]) -> None:
        self.failures: list[str] = []
        self._machine = machine
        self._at = at
        self._apps = apps
        self._end = threading.Event()
        hosts = itertools.islice(itertools.cycle(apps), _STAYING)
        # one count a thread, each with one writer
        self._counts = [0] * (_STAYING + 1)
        self._threads = [
            threading.Thread(target=self._guard, args=(self._stay, i, host), name=f"stay {i}")
            for i, host in enumerate(hosts)
        ]
        self._threads.append(
            threading.Thread(target=self._guard, args=(self._come, _STAYING, ""), name="come")
        )

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        try:
            self.wait_for_progress()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """
        End the load; what goes wrong from now on is no failure of anyone.
        """
        self._end.set()
        for thread in self._threads:
            thread.join(timeout=30)

    def wait_for_progress(self) -> None:
        """
        Wait until every connection has had two more answers, and two new ones were served.

        Raises:
            HarnessError: That does not happen, or something has failed.
        """
        before = list(self._counts)

        def progress() -> bool:
            if self.failures:
                raise HarnessError(f"under load: {self.failures}")
            return all(now >= then + 2 for then, now in zip(before, self._counts, strict=True))

        wait_for("load goes on", progress)

    def _guard(self, play: object, number: int, host: str) -> None:
        try:
            play(number, host)
        except Exception as err:  # noqa: BLE001 - whatever it is, it is what the test looks for
            self.failures.append(f"{threading.current_thread().name}: {err!r}")

    def _stay(self, number: int, host: str) -> None:
        with fetch.connect(self._machine, self._at, host, self._apps[host].root) as sock:
            while not self._end.wait(_PAUSE):
                if fetch.get(sock, host, "/blob") != BLOB:
                    raise HarnessError(f"wrong bytes from {host}")
                self._counts[number] += 1

    def _come(self, number: int, _: str) -> None:
        for host in itertools.cycle(self._apps):
            if self._end.wait(_PAUSE / 2):
                return
            app = self._apps[host]
            answer = fetch.fetch(self._machine, self._at, host, app.root)
            if answer.app != app.name:
                raise HarnessError(f"{host} answered by {answer}")
            self._counts[number] += 1
