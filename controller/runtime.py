"""
Docker and Podman, through aiodocker: where their sockets are, what runs, and when to look again.

Rules of this file:

1. Events are only a bell.  What they say is not believed; the next list is.
2. Nothing here decides a route: the facts go into `Container` values, and `core.plan` decides.
3. A list is complete or it fails.
"""

import asyncio
import contextlib
import fcntl
import ipaddress
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from aiodocker import Docker
from aiodocker.exceptions import DockerError

from controller.core.labels import is_labelled
from controller.core.plan import HOST_ADDRESS, Container, Network, Published
from controller.settings import ENGINE_AUTO, ENGINE_NONE, ENGINE_SCHEMES

LIST_TIMEOUT = 30
"""Seconds for a whole list: an engine that hangs is an engine that is away."""

_INSPECTS = 8
"""Inspects at once: an engine takes a lock for each, so more are not faster."""

_RINGS = {
    "container": {
        *("start", "die", "died", "stop", "restart", "pause", "unpause"),
        *("rename", "update", "destroy", "remove", "cleanup"),
    },
    "network": {"connect", "disconnect"},
}
"""Actions that can change a route, as Docker and Podman name them; exec, health, attach, top and
the like ring nothing, since a health check alone makes three events every few seconds."""

_NOT_BRIDGED = {"macvlan", "ipvlan", "overlay", "null"}
"""Drivers whose addresses the host can not reach, or reaches by a detour."""

_EVERYWHERE = {"": HOST_ADDRESS, "0.0.0.0": HOST_ADDRESS, "::": "::1"}
"""Where a port is that is published on all of the host's addresses."""

_NS_GET_USERNS = 0xB701
_FIRST_USERNS = 0xEFFFFFFD
"""From linux/nsfs.h: the inode of the machine's own user namespace is a constant."""

_STATES = ("running", "paused")
"""States of containers that have their address: a paused one keeps its connections."""

_ALIVE = json.dumps({"status": _STATES})

_UNIX = "unix://"

_GONE = 404


@dataclass(frozen=True, slots=True)
class EngineAddress:
    """
    One engine: its *name* is the source of its backends, and stays the same over restarts.

    *asked* tells an engine that somebody named from a place where one may be.
    """

    name: str
    url: str
    asked: bool = False

    @property
    def present(self) -> bool:
        """
        Tell whether there is a socket; of a remote engine this can not be told.
        """
        return not self.url.startswith(_UNIX) or Path(self.url.removeprefix(_UNIX)).is_socket()


def usual_places(environ: Mapping[str, str]) -> list[EngineAddress]:
    """
    List where an engine's socket usually is, whether or not there is one.
    """
    places = [
        EngineAddress("docker", "unix:///run/docker.sock"),
        EngineAddress("docker", "unix:///var/run/docker.sock"),
        EngineAddress("podman", "unix:///run/podman/podman.sock"),
    ]
    if own := environ.get("XDG_RUNTIME_DIR"):
        places += [
            EngineAddress("docker-user", f"{_UNIX}{own}/docker.sock"),
            EngineAddress("podman-user", f"{_UNIX}{own}/podman/podman.sock"),
        ]
    return places


def find_engines(
    choice: Iterable[str], environ: Mapping[str, str] = os.environ
) -> tuple[EngineAddress, ...]:
    """
    Resolve the `engine` setting: each engine once, under a name of its own.

    `auto` gives every usual place, also where there is no socket now: an engine that is just
    restarting must not lose its routes.
    """
    usual = usual_places(environ)
    engines: list[EngineAddress] = []
    for text in choice:
        if text == ENGINE_AUTO:
            engines += usual
            urls = (environ.get(name, "") for name in ("DOCKER_HOST", "CONTAINER_HOST"))
            engines += [_named(url, usual) for url in urls if url.startswith(ENGINE_SCHEMES)]
        elif text != ENGINE_NONE:
            engines.append(_named(_UNIX + text if text.startswith("/") else text, usual))
    distinct: dict[object, EngineAddress] = {}
    # one place under two names is one engine; asked for, it is never passed over in silence
    for engine in sorted(engines, key=lambda engine: not engine.asked):
        distinct.setdefault(_place(engine.url), engine)
    # two places under one name are two engines: /run and /var/run may differ in a container
    named: dict[str, EngineAddress] = {}
    for engine in distinct.values():
        name = engine.url if engine.name in named else engine.name
        named[name] = replace(engine, name=name)
    return tuple(named.values())


def _named(url: str, usual: Iterable[EngineAddress]) -> EngineAddress:
    same = (engine.name for engine in usual if _place(engine.url) == _place(url))
    return EngineAddress(next(same, url), url, asked=True)


def _place(url: str) -> object:
    if not url.startswith(_UNIX):
        return url
    path = os.path.realpath(url.removeprefix(_UNIX))
    try:
        at = Path(path).stat()
    except OSError:
        return path
    return at.st_dev, at.st_ino


@dataclass(frozen=True, slots=True)
class Listing:
    """
    What an engine has alive: containers with a label of ours, and those whose network they share.

    *subnets* are those of all its networks on this host: whose containers may be clients.
    """

    containers: tuple[Container, ...]
    subnets: frozenset[str]


class Runtime:
    """
    A connection to one engine, good until the engine goes away.
    """

    def __init__(self, engine: EngineAddress) -> None:
        self._name = engine.name
        self._rootless: bool | None = None
        # a new client asks for the version anew: the engine may have been upgraded meanwhile
        self._docker = Docker(url=engine.url, api_version="auto")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._docker.close()

    async def listen(self, ring: Callable[[float], None]) -> None:
        """
        Call *ring* with the time of every event that can change a route; return at their end.
        """
        # aiodocker's own task is never started a second time once it has ended, so the stream
        # runs in a task of ours, and its end comes as None
        inbox = self._docker.events.subscribe(create_task=False)  # type: ignore[no-untyped-call]
        # since: what happens before the engine takes the subscription is told nevertheless
        stream = asyncio.create_task(
            self._docker.events.run(since=int(time.time())), name=f"events {self._name}"
        )
        try:
            while (event := await inbox.get()) is not None:
                if event.get("Action") in _RINGS.get(event.get("Type"), ()):
                    ring(event.get("timeNano", 0) / 1e9 or time.time())
            await stream
        finally:
            stream.cancel()
            await asyncio.wait([stream])

    async def look(self) -> Listing:
        """
        List what is alive now.
        """
        async with asyncio.timeout(LIST_TIMEOUT):
            listed = await self._docker.containers.list(filters=_ALIVE)
            wanted = {entry["Id"] for entry in listed if is_labelled(entry["Labels"])}
            if self._rootless is None:
                self._rootless = await self._is_rootless()
            networks = {entry["Name"]: entry for entry in await self._docker.networks.list()}
            # a bridge of this host may well have the very subnet of one of a user's
            foreign = self._rootless and not on_users_network()
            found: dict[str, Container] = {}
            asked: set[str] = set()
            while wanted:
                asked |= wanted
                for details in await self._inspect(wanted):
                    container = _read_container(
                        self._name, details, networks, rootless=self._rootless
                    )
                    found[container.id] = _out_of_reach(container) if foreign else container
                modes = (container.mode.partition(":") for container in found.values())
                wanted = {target for mode, _, target in modes if mode == "container"} - asked
            subnets = () if foreign else _local_subnets(networks.values())
            return Listing(tuple(found.values()), frozenset(subnets))

    async def _is_rootless(self) -> bool:
        try:
            info = await self._docker.system.info()
        except DockerError:
            # a proxy before the socket may not let this pass, and routes do not hang on it
            return False
        return is_rootless(info)

    async def _inspect(self, ids: Iterable[str]) -> list[dict[str, Any]]:
        limit = asyncio.Semaphore(_INSPECTS)
        alive: list[dict[str, Any]] = []

        async def inspect(container: str) -> None:
            async with limit:
                try:
                    details = await self._docker.containers.container(container).show()
                except DockerError as err:
                    # it ended since the list: that is an answer, any other error is none
                    if err.status == _GONE:
                        return
                    raise
            # one that restarts has no address
            if details["State"]["Status"] in _STATES:
                alive.append(details)

        async with asyncio.TaskGroup() as tasks:
            for container in ids:
                tasks.create_task(inspect(container), name=f"inspect {container[:12]}")
        return alive


def is_rootless(info: Mapping[str, Any]) -> bool:
    """
    Tell whether an engine that says this of itself runs without root.
    """
    return bool(info.get("Rootless")) or "name=rootless" in (info.get("SecurityOptions") or ())


def on_users_network() -> bool:
    """
    Tell whether the network that this process is on is a user's, as those of rootless engines are.

    Such a network belongs to a user namespace that is not the machine's own.
    """
    try:
        with Path("/proc/self/ns/net").open("rb") as network:
            owner = fcntl.ioctl(network, _NS_GET_USERNS)
    except OSError:
        # it belongs to a user namespace above this process's own: to the host
        return False
    try:
        return os.fstat(owner).st_ino != _FIRST_USERNS
    finally:
        os.close(owner)


def _read_container(
    source: str,
    details: Mapping[str, Any],
    networks: Mapping[str, Mapping[str, Any]],
    *,
    rootless: bool,
) -> Container:
    settings = details["NetworkSettings"]
    # Docker tells of EXPOSE in the one place, Podman of some of it only in the other
    exposed = {**(details["Config"].get("ExposedPorts") or {}), **(settings.get("Ports") or {})}
    return Container(
        id=details["Id"],
        name=details["Name"].lstrip("/"),
        source=source,
        labels=details["Config"]["Labels"] or {},
        ports=frozenset(_tcp_ports(exposed)),
        networks=tuple(
            _read_network(name, entry, networks.get(name, {}))
            for name, entry in (settings.get("Networks") or {}).items()
        ),
        mode=details["HostConfig"].get("NetworkMode") or "",
        rootless=rootless,
        published=tuple(_published(settings.get("Ports") or {})),
        paused=details["State"]["Status"] == "paused",
    )


def _out_of_reach(container: Container) -> Container:
    networks = tuple(replace(network, reachable=False) for network in container.networks)
    return replace(container, networks=networks)


def _read_network(name: str, entry: Mapping[str, Any], about: Mapping[str, Any]) -> Network:
    driver = about.get("Driver") or ""
    address = entry.get("IPAddress") or ""
    address6 = entry.get("GlobalIPv6Address") or ""
    length = entry.get("IPPrefixLen") if address else entry.get("GlobalIPv6PrefixLen")
    return Network(
        name=name,
        address=address,
        address6=address6,
        driver=driver,
        reachable=driver not in _NOT_BRIDGED and is_local(address or address6, length or 128),
        internal=bool(about.get("Internal")),
        gateway=entry.get("Gateway") or "",
        gateway6=entry.get("IPv6Gateway") or "",
        # Podman knows no such thing: it takes every default route there is
        priority=entry.get("GwPriority") or 0,
    )


def _local_subnets(networks: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    for about in networks:
        subnets = []
        for entry in (about.get("IPAM") or {}).get("Config") or ():
            # a subnet that can not be read is one that the engine did not settle
            with contextlib.suppress(ValueError):
                subnets.append(ipaddress.ip_network(entry.get("Subnet") or "", strict=False))
        if about.get("Driver") not in _NOT_BRIDGED and any(
            is_local(str(subnet[0] + 1), subnet.prefixlen) for subnet in subnets
        ):
            yield from map(str, subnets)


def _published(ports: Mapping[str, Any]) -> Iterable[Published]:
    for key, places in ports.items():
        for port in _tcp_ports([key]):
            for place in places or ():
                address = place.get("HostIp") or ""
                yield Published(port, _EVERYWHERE.get(address, address), int(place["HostPort"]))


def _tcp_ports(keys: Iterable[str]) -> Iterable[int]:
    for key in keys:
        port, _, protocol = key.partition("/")
        if port.isdigit() and protocol in ("", "tcp"):
            yield int(port)


def is_local(address: str, length: int) -> bool:
    """
    Tell whether this host has an interface in the subnet of *address*, and would use it.

    A bridge of this host does; the network of a rootless engine, of a virtual machine or of
    another host is behind some other interface, or behind none.
    """
    with contextlib.suppress(OSError, ValueError):
        host = ipaddress.ip_address(address)
        subnet = ipaddress.ip_network((address, min(length, host.max_prefixlen)), strict=False)
        family = socket.AF_INET if host.version == 4 else socket.AF_INET6  # noqa: PLR2004 - IPv4
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            # a connected datagram socket has asked the routing table and sent nothing
            probe.connect((address, 9))
            return ipaddress.ip_address(probe.getsockname()[0]) in subnet
    return False
