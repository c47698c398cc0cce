"""
The routes file: static routes for backends that are no containers.

    [[route]]
    host = ["a.example.com", "*.b.example.com"]
    backends = ["198.51.100.2:443", "[2001:db8::1]:443"]
    client-ip = "nat"              # auto, transparent or nat; else the router's default
    proxy-protocol = "v2"          # off, v1 or v2
    handoff = "relay"              # auto, packet, sockmap or relay

Rules of this file:

1. All of it or nothing: a file with a problem gives no routes, and the old ones stay.
2. It looks at the path, not at the file behind it: a rename over it or a new bind mount is seen.
3. A file still being written is left alone until it has kept still for one look.
"""

import ipaddress
import re
import tomllib
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from controller.core.hostname import read_pattern
from controller.core.plan import pool
from controller.core.problems import Code, Problem
from controller.core.routes import CLIENT_IPS, HANDOFFS, PROXY_PROTOCOLS, Backend, Route

SOURCE = "file"

_T = TypeVar("_T")

_KEYS = {"host", "backends", "client-ip", "proxy-protocol", "handoff"}

_BACKEND = re.compile(r"(?:\[([^\]]+)\]|([^:\[\]]+)):([0-9]{1,5})")


@dataclass(frozen=True, slots=True)
class Reading:
    """
    What a routes file says; with a problem in it, only that.
    """

    routes: tuple[Route, ...]
    problems: tuple[Problem, ...]


class RoutesFile:
    """
    A routes file on disk, watched by looking at it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._taken: object = None
        self._seen: object = None

    def poll(self) -> Reading | None:
        """
        Read the file if it is not as it was when last read.
        """
        first = self._seen is None
        now = self._stat()
        settled, self._seen = now == self._seen, now
        if now == self._taken or not (settled or first):
            return None
        self._taken = now
        return self.read()

    def read(self) -> Reading:
        """
        Read the file now.
        """
        try:
            return read_routes_file(self._path.read_bytes().decode(), str(self._path))
        except (OSError, UnicodeDecodeError) as err:
            return Reading((), (_problem(str(self._path), "", "", str(err)),))

    def _stat(self) -> object:
        try:
            at = self._path.stat()
        except OSError as err:
            return str(err)
        return at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns


def read_routes_file(text: str, path: str) -> Reading:
    """
    Read the *text* of the routes file at *path*.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as err:
        # the message has the line in it
        return Reading((), (_problem(path, "", "", f"not TOML: {err}"),))
    return _Reader(path).read(data)


class _Reader:
    def __init__(self, path: str) -> None:
        self._path = path
        self._problems: list[Problem] = []

    def read(self, data: dict[str, Any]) -> Reading:
        self._only(data, "", {"route"})
        entries = data.get("route")
        if entries is None:
            # more likely cut off than meant: an editor empties the file before it writes
            self._problem("route", "", "missing; for no routes at all write: route = []")
        taken: dict[tuple[str, str], Backend] = {}
        for i, entry in enumerate(self._list(entries or [], "route")):
            where = f"route[{i}]"
            if not isinstance(entry, dict):
                self._problem(where, entry, "not a table")
                continue
            self._only(entry, f"{where}.", _KEYS)
            hosts = self._each(entry, where, "host", read_pattern)
            client_ip = self._word(entry, where, "client-ip", CLIENT_IPS)
            proxy_protocol = self._word(entry, where, "proxy-protocol", PROXY_PROTOCOLS) or "off"
            handoff = self._word(entry, where, "handoff", HANDOFFS) or "auto"
            for address in self._each(entry, where, "backends", read_backend):
                backend = replace(
                    address, client_ip=client_ip, proxy_protocol=proxy_protocol, handoff=handoff
                )
                for host in hosts:
                    if taken.setdefault((host, backend.name), backend) != backend:
                        detail = f"an earlier route has {backend.name} with other settings"
                        self._problem(f"{where}.host", host, detail)
        if self._problems:
            return Reading((), tuple(self._problems))
        return Reading(pool((host, backend) for (host, _), backend in taken.items()), ())

    def _word(self, entry: dict[str, Any], where: str, key: str, words: Collection[str]) -> str:
        if key not in entry:
            return ""
        word = entry[key]
        if word not in words:
            self._problem(f"{where}.{key}", word, f"none of {', '.join(words)}")
        return str(word)

    def _each(
        self, entry: dict[str, Any], where: str, key: str, read: Callable[[str], _T]
    ) -> list[_T]:
        where = f"{where}.{key}"
        items = self._list(entry.get(key, []), where)
        if not items:
            self._problem(where, "", "missing or empty")
        values: list[_T] = []
        for i, item in enumerate(items):
            if not isinstance(item, str):
                self._problem(f"{where}[{i}]", item, "not a string")
                continue
            try:
                values.append(read(item))
            except ValueError as err:
                self._problem(f"{where}[{i}]", item, str(err))
        return values

    def _list(self, value: object, where: str) -> list[Any]:
        if isinstance(value, list):
            return value
        self._problem(where, value, "not a list")
        return []

    def _only(self, table: dict[str, Any], where: str, keys: set[str]) -> None:
        for key in sorted(table.keys() - keys):
            detail = f"no such key; there are: {', '.join(sorted(keys))}"
            self._problem(where + key, table[key], detail)

    def _problem(self, key: str, value: object, detail: str) -> None:
        self._problems.append(_problem(self._path, key, str(value), detail))


def read_backend(text: str) -> Backend:
    """
    Read an address and port, as `198.51.100.2:443` or `[2001:db8::1]:443`.

    Raises:
        ValueError: *text* is not that.
    """
    match = _BACKEND.fullmatch(text)
    if match is None or not 0 < int(match[3]) < 65536:  # noqa: PLR2004 - the range of a port
        raise ValueError("not ADDRESS:PORT or [ADDRESS]:PORT")
    address = str(ipaddress.IPv6Address(match[1]) if match[1] else ipaddress.IPv4Address(match[2]))
    name = f"[{address}]:{int(match[3])}" if match[1] else f"{address}:{int(match[3])}"
    return Backend(name, SOURCE, address, int(match[3]))


def _problem(path: str, key: str, value: str, detail: str) -> Problem:
    return Problem(Code.BAD_ROUTES_FILE, path, key, value, detail)
