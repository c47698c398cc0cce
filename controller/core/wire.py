"""
The control socket's messages: one JSON object a line, both ways.

    controller -> router   hello   {version}
    router -> controller   hello   {version, run, TABLE}              the table it serves now
    controller -> router   table   {TABLE}                            always the whole table
    router -> controller   ack     {generation}
    router -> controller   nack    {generation, error}                the old table stays
    controller -> router   report  {engines, problems}                what the controller sees
    anyone -> router       status | routes | drain                    answered by one line each
    anyone -> router       connections  {after}                       of higher ids than this, by id
    router -> anyone       connections  {connections, more}           at most PAGE of them
    anyone -> router       kill         {ids}
    router -> anyone       kill         {killed}                      those that there were
    anyone -> router       packet       {state}                       off, on or status
    router -> anyone       packet       {packet} or {error}           how it is then
    new router -> old      replace                                    I shall take your place
    old router -> new      listening  {sockets, owner}                or nack {error}
    new router -> old      switched   {plumbing}                      all new clients are mine
    old router -> new      closed                                     when it listens no more
    worker 0 -> another    accept | numbers | adopt {half} | leave    answered by one line each

TABLE is `generation, routes, networks, alive`.  `networks` are the subnets of the host's container
networks.  `alive` has for each source, as backends name it, the sorted addresses of its labelled
containers, routed to or not: one that is not there has gone with its container, while one that is
only no longer routed to still is.
`run` names the `sniroute run` that started the router, empty if none did; `sockets` counts them by
address; `owner` is what the flows of the packet hand-off that are the old router's are marked with;
`plumbing` tells whether the old router's is the new one's from now on.

Rules of this file: a message that is not exactly as written here raises `WireError`; nothing is
guessed.  The router checks the whole of a table before it takes any of it.
"""

import ipaddress
import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import fields
from enum import StrEnum
from typing import Any

from controller.core.hostname import read_pattern
from controller.core.routes import (
    CLIENT_IPS,
    HANDOFFS,
    PROXY_PROTOCOLS,
    Backend,
    Detour,
    Route,
    RouteTable,
)

VERSION = 1

MAX_LINE = 64 * 1024 * 1024
"""Longest message in bytes: a table of three hundred thousand backends, at 200 bytes each."""

PAGE = 1000
"""Connections told in one answer: some 300 KB, in a few milliseconds."""

MAX_GENERATION = 2**53
"""Largest number that every reader of JSON, of metrics and of logs takes as it is."""

Message = dict[str, Any]

_BACKEND = {field.name for field in fields(Backend)}
_DETOURS = frozenset(map(str, Detour))
_TABLE = {"generation", "routes", "networks", "alive"}


_ENGINE = {
    "name": str,
    "url": str,
    "connected": bool,
    "containers": int,
    "last_list": float | int | None,
    "events": int,
    "lists": int,
    "failed_lists": int,
}
_PROBLEM = dict.fromkeys(("code", "severity", "container", "label", "value", "detail"), str)


class PacketState(StrEnum):
    """
    What may be asked of the packet hand-off.
    """

    OFF = "off"
    ON = "on"
    STATUS = "status"


class WireError(ValueError):
    """
    The peer sent something that is not a message of this protocol.
    """


def encode(message: Message) -> bytes:
    """
    Write *message* as one line.
    """
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class Decoder:
    """
    Cut a byte stream into messages.
    """

    def __init__(self) -> None:
        self._rest = bytearray()
        self._looked = 0

    def feed(self, data: bytes) -> Iterator[Message]:
        """
        Take *data* from the stream and yield every message that is complete.

        Raises:
            WireError: a line is longer than MAX_LINE or is no JSON object with a `type`.
        """
        self._rest += data
        # looking at a byte once keeps a long message linear in its length
        while (end := self._rest.find(b"\n", self._looked)) != -1:
            line = bytes(self._rest[:end])
            del self._rest[: end + 1]
            self._looked = 0
            yield _read_message(line)
        self._looked = len(self._rest)
        if len(self._rest) > MAX_LINE:
            raise WireError(f"message longer than {MAX_LINE} bytes")


def _read_message(line: bytes) -> Message:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as err:
        raise WireError(f"not JSON: {err}") from None
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise WireError("not a JSON object with a type")
    return message


def dump_routes(routes: Iterable[Route]) -> list[Message]:
    """
    Write *routes* as the `routes` member of a hello, table or routes message.
    """
    return [
        {
            "host": route.host,
            # written out: asdict takes many times as long, and tables may be large
            "backends": [
                {
                    "name": b.name,
                    "source": b.source,
                    "address": b.address,
                    "address6": b.address6,
                    "port": b.port,
                    "client_ip": b.client_ip,
                    "proxy_protocol": b.proxy_protocol,
                    "detour": b.detour,
                    "handoff": b.handoff,
                }
                for b in route.backends
            ],
        }
        for route in routes
    ]


def dump_table(table: RouteTable) -> Message:
    """
    Write *table* as the members of a hello or table message that tell it.
    """
    return {
        "generation": table.generation,
        "routes": dump_routes(table.routes),
        "networks": list(table.networks),
        "alive": {source: sorted(found) for source, found in table.alive.items()},
    }


def read_routes(value: object) -> tuple[Route, ...]:
    """
    Read the `routes` member of a message, all of it or nothing.

    Raises:
        WireError: names the member that is wrong, as in `routes[3].host: ...`.
    """
    routes = []
    for i, item in enumerate(_list(value, "routes")):
        where = f"routes[{i}]"
        entry = _members(item, where, {"host", "backends"})
        host = _str(entry["host"], f"{where}.host")
        try:
            normal = read_pattern(host)
        except ValueError as err:
            raise WireError(f"{where}.host: {err}") from None
        if normal != host:
            raise WireError(f"{where}.host: not normalised: {host!r}")
        backends = tuple(
            _read_backend(b, f"{where}.backends[{j}]")
            for j, b in enumerate(_list(entry["backends"], f"{where}.backends"))
        )
        if not backends:
            raise WireError(f"{where}.backends: empty")
        routes.append(Route(host, backends))
    if len({route.host for route in routes}) != len(routes):
        raise WireError("routes: a host occurs twice")
    return tuple(routes)


def read_hello(message: Message) -> RouteTable:
    """
    Read the router's `hello`: the table it serves; generation 0 when it has none yet.

    Raises:
        WireError: another version, or as `read_table`.
    """
    if message.get("type") != "hello" or message.get("version") != VERSION:
        raise WireError(f"hello: not from a router of version {VERSION}")
    _members(message, "hello", {"type", "version", "run", *_TABLE})
    _str(message["run"], "hello.run")
    return _read_table(message, "hello", 0)


def read_table(message: Message) -> RouteTable:
    """
    Read a `table` message.

    Raises:
        WireError: as `read_routes`, or the generation is not a positive number, or the networks
            or addresses are not written as they should be.
    """
    _members(message, "table", {"type", *_TABLE})
    return _read_table(message, "table", 1)


def read_listening(message: Message) -> tuple[dict[str, int], int, bool]:
    """
    Read a `listening` message: how many sockets listen on each address, and whose flows are whose.

    The last is whether somebody has switched packets off.

    Raises:
        WireError: it is none; a nack's error is the text.
    """
    if message.get("type") == "nack":
        raise WireError(str(message.get("error")))
    if message.get("type") != "listening":
        raise WireError(f"not an answer to replace: {str(message)[:200]}")
    members = {"type": str, "sockets": dict, "owner": int, "packet_off": bool}
    _typed(message, "listening", members)
    sockets = _typed(
        message["sockets"], "listening.sockets", dict.fromkeys(message["sockets"], int)
    )
    return sockets, message["owner"], message["packet_off"]


def read_switched(message: Message) -> bool:
    """
    Read a `switched` message: whether the plumbing is the new router's.

    Raises:
        WireError: names the member that is wrong.
    """
    return bool(_typed(message, "switched", {"type": str, "plumbing": bool})["plumbing"])


def read_connections(message: Message) -> int:
    """
    Read a `connections` question: the id after which to begin.

    Raises:
        WireError: names the member that is wrong.
    """
    _members(message, "connections", {"type", "after"})
    return _id(message["after"], "connections.after")


def read_kill(message: Message) -> list[int]:
    """
    Read a `kill` message: the ids of the connections to end.

    Raises:
        WireError: names the member that is wrong.
    """
    _members(message, "kill", {"type", "ids"})
    return [_id(item, f"ids[{i}]") for i, item in enumerate(_list(message["ids"], "ids"))]


def read_packet(message: Message) -> PacketState:
    """
    Read a `packet` message: the state that is asked for.

    Raises:
        WireError: names the member that is wrong.
    """
    _members(message, "packet", {"type", "state"})
    return PacketState(_word(message["state"], "packet.state", frozenset(PacketState)))


def read_report(message: Message) -> Message:
    """
    Read a `report` message: as far as anyone relies on it.

    Raises:
        WireError: names the member that is wrong.
    """
    _members(message, "report", {"type", "engines", "problems"})
    return {
        name: [
            _typed(item, f"{name}[{i}]", types) for i, item in enumerate(_list(message[name], name))
        ]
        for name, types in (("engines", _ENGINE), ("problems", _PROBLEM))
    }


def _read_table(message: Message, where: str, least: int) -> RouteTable:
    generation = _generation(message["generation"], f"{where}.generation", least)
    routes = read_routes(message["routes"])
    networks = [
        _network(_str(item, f"networks[{i}]"), f"networks[{i}]")
        for i, item in enumerate(_list(message["networks"], "networks"))
    ]
    if networks != sorted(set(networks)):
        raise WireError("networks: not sorted, or one occurs twice")
    return RouteTable(generation, routes, networks, _read_alive(message["alive"]))


def _read_alive(value: object) -> dict[str, list[str]]:
    if not isinstance(value, dict):
        raise WireError("alive: not an object")
    alive = {}
    for source, items in value.items():
        where = f"alive[{source!r}]"
        addresses = [_str(item, f"{where}[{i}]") for i, item in enumerate(_list(items, where))]
        for i, address in enumerate(addresses):
            _version(address, f"{where}[{i}]")
        if addresses != sorted(set(addresses)):
            raise WireError(f"{where}: not sorted, or one occurs twice")
        alive[source] = addresses
    return alive


def _network(text: str, where: str) -> str:
    try:
        normal = str(ipaddress.ip_network(text))
    except ValueError as err:
        raise WireError(f"{where}: {err}") from None
    if normal != text:
        raise WireError(f"{where}: not normalised: {text!r}")
    return text


def _read_backend(item: object, where: str) -> Backend:
    entry = _members(item, where, _BACKEND)
    address = _str(entry["address"], f"{where}.address")
    version = _version(address, f"{where}.address")
    address6 = _str(entry["address6"], f"{where}.address6")
    if address6 and (version, _version(address6, f"{where}.address6")) != (4, 6):
        raise WireError(f"{where}.address6: not IPv6 beside IPv4: {address6!r}")
    port = entry["port"]
    if not isinstance(port, int) or isinstance(port, bool) or not 0 < port < 65536:  # noqa: PLR2004 - the range of a port
        raise WireError(f"{where}.port: not a port: {port!r}")
    return Backend(
        _str(entry["name"], f"{where}.name"),
        _str(entry["source"], f"{where}.source"),
        address,
        port,
        _word(entry["client_ip"], f"{where}.client_ip", ("", *CLIENT_IPS)),
        _word(entry["proxy_protocol"], f"{where}.proxy_protocol", PROXY_PROTOCOLS),
        _word(entry["detour"], f"{where}.detour", _DETOURS),
        address6,
        _word(entry["handoff"], f"{where}.handoff", HANDOFFS),
    )


def _version(address: str, where: str) -> int:
    try:
        return ipaddress.ip_address(address).version
    except ValueError as err:
        raise WireError(f"{where}: {err}") from None


def _id(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise WireError(f"{where}: not an id: {value!r}")
    return value


def _generation(value: object, where: str, least: int) -> int:
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or not least <= value <= MAX_GENERATION
    ):
        raise WireError(f"{where}: not a number from {least} to {MAX_GENERATION}: {value!r}")
    return value


def _members(value: object, where: str, names: set[str]) -> Message:
    if not isinstance(value, dict):
        raise WireError(f"{where}: not an object")
    if value.keys() != names:
        odd = sorted(value.keys() ^ names)
        raise WireError(f"{where}: missing or unknown: {', '.join(map(str, odd))}")
    return value


def _typed(value: object, where: str, types: dict[str, Any]) -> Message:
    entry = _members(value, where, set(types))
    for name, kind in types.items():
        if not isinstance(entry[name], kind):
            raise WireError(f"{where}.{name}: not {kind}: {entry[name]!r}")
    return entry


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise WireError(f"{where}: not a list")
    return value


def _str(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise WireError(f"{where}: not a string")
    return value


def _word(value: object, where: str, words: Collection[str]) -> str:
    word = _str(value, where)
    if word not in words:
        raise WireError(f"{where}: no such word: {word!r}")
    return word
