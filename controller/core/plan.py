"""
The plan: from what the engines list to the routes to serve.

Rules of this file:

1. The same containers give the same plan, in whatever order they come.
2. What is wrong with one container is a problem value and changes no other container's routes.
3. Port: the label, else the only exposed TCP port, else 443 if exposed, else a problem.
4. Network: the label, else the configured one, else the only one that can be reached; of several
   the first by name, with a warning.  IPv4 before IPv6, and both where there are both.
5. A container of a rootless engine none of whose networks can be reached is where its port is
   published, whatever the label or the configuration says of networks; else a problem.
6. Detour: the first reason for which replies to strangers may not leave by that network; none
   where the container's only default route, or the preferred one, goes there.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter

from controller.core.labels import RouteSpec, read_labels
from controller.core.problems import Code, Problem
from controller.core.routes import Backend, Detour, Route

HOST_ADDRESS = "127.0.0.1"
"""Where a container in the host's own network is: the router is there too."""

HTTPS = 443

_JOINED = "container:"

_DETOUR_DRIVERS = frozenset((Detour.MACVLAN, Detour.IPVLAN, Detour.OVERLAY))


@dataclass(frozen=True, slots=True)
class Network:
    """
    One container network that a container is in; an address it lacks is empty.

    *gateway* and *gateway6* are where it offers to route everything else, if it is not *internal*;
    of several such networks the engine takes the one of the highest *priority*.
    """

    name: str
    address: str
    address6: str
    driver: str
    reachable: bool
    internal: bool = False
    gateway: str = ""
    gateway6: str = ""
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Published:
    """
    A port of a container, and the *address* and *host_port* on the host that lead to it.
    """

    port: int
    address: str
    host_port: int


@dataclass(frozen=True, slots=True)
class Container:
    """
    One container that runs or is paused, as its engine tells of it.

    *mode* is the engine's network mode: `host`, `none`, `container:ID`, or the name of a network.
    *rootless* tells that the engine is a user's, with networks of its own.
    """

    id: str
    name: str
    source: str
    labels: Mapping[str, str]
    ports: frozenset[int]
    networks: tuple[Network, ...]
    mode: str
    rootless: bool = False
    published: tuple[Published, ...] = ()
    paused: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """
    The routes to serve, by host, and all that stood in the way of more.
    """

    routes: tuple[Route, ...]
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class Changes:
    """
    The hosts by which two tables differ.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]


def plan(
    containers: Iterable[Container], static: Iterable[Route] = (), network: str | None = None
) -> Plan:
    """
    Plan the routes of all *containers* and the *static* ones.

    *network* is the configured network: it decides for containers that are in it.
    """
    by_id = {(c.source, c.id): c for c in containers}
    pairs = [(route.host, backend) for route in static for backend in route.backends]
    problems: list[Problem] = []
    for container in by_id.values():
        # it can not answer
        if container.paused:
            continue
        reading = read_labels(container.name, container.labels)
        problems += reading.problems
        for spec in reading.specs:
            picker = _Picker(container, spec, problems)
            # both, so that one look shows every problem
            place = picker.place(by_id, network, picker.port())
            if place and (port := place.port):
                backend = Backend(
                    container.name,
                    container.source,
                    place.address,
                    port,
                    spec.client_ip,
                    spec.proxy_protocol,
                    place.detour,
                    place.address6,
                    spec.handoff,
                )
                pairs += [(host, backend) for host in spec.hosts]
    return Plan(pool(pairs), tuple(sorted(set(problems))))


def pool(pairs: Iterable[tuple[str, Backend]]) -> tuple[Route, ...]:
    """
    Gather the backends of each host into one route, in one order and each address once.
    """
    pools: dict[str, dict[tuple[str, int], Backend]] = {}
    for host, backend in sorted(
        pairs, key=lambda pair: (pair[0], *attrgetter("source", "name", "address", "port")(pair[1]))
    ):
        pools.setdefault(host, {}).setdefault((backend.address, backend.port), backend)
    return tuple(Route(host, tuple(backends.values())) for host, backends in pools.items())


def carry(
    routes: Iterable[Route], served: Iterable[Route], sources: Collection[str]
) -> tuple[Route, ...]:
    """
    Add to *routes* the backends of *served* that come from *sources*.

    These are the sources that have not answered yet: what they said last still counts.
    """
    kept = [(r.host, b) for r in served for b in r.backends if b.source in sources]
    return pool([(r.host, b) for r in routes for b in r.backends] + kept)


def addresses(containers: Iterable[Container]) -> frozenset[str]:
    """
    Gather all addresses of *containers* in container networks.
    """
    return frozenset(
        address
        for container in containers
        for network in container.networks
        for address in (network.address, network.address6)
        if address
    )


def diff(old: Iterable[Route], new: Iterable[Route]) -> Changes:
    """
    Compare two tables.
    """
    before, after = {r.host: r for r in old}, {r.host: r for r in new}
    return Changes(
        added=tuple(sorted(after.keys() - before.keys())),
        removed=tuple(sorted(before.keys() - after.keys())),
        changed=tuple(sorted(h for h in after.keys() & before.keys() if after[h] != before[h])),
    )


@dataclass(frozen=True, slots=True)
class _Place:
    address: str
    port: int | None
    detour: Detour
    address6: str = ""


class _Picker:
    """
    Pick port and place for one route of one container; None where there is a problem.
    """

    def __init__(self, container: Container, spec: RouteSpec, problems: list[Problem]) -> None:
        self._container = container
        self._spec = spec
        self._problems = problems

    def port(self) -> int | None:
        exposed = self._container.ports
        if self._spec.port is not None:
            return self._spec.port
        if len(exposed) == 1:
            return next(iter(exposed))
        if HTTPS in exposed:
            return HTTPS
        if exposed:
            ports = ", ".join(map(str, sorted(exposed)))
            self._problem(Code.AMBIGUOUS_PORT, "port", "", f"missing; exposed are {ports}")
        else:
            self._problem(Code.NO_PORT, "port", "", "missing; the container exposes no TCP port")
        return None

    def place(
        self, by_id: Mapping[tuple[str, str], Container], configured: str | None, port: int | None
    ) -> _Place | None:
        owner = self._owner(by_id)
        if owner is None:
            return None
        if owner.mode == "host":
            return _Place(HOST_ADDRESS, port, Detour.HOST_NETWORK)
        if owner.rootless and not any(network.reachable for network in owner.networks):
            return self._published(owner, port)
        network = self._network(owner.networks, configured)
        if network is None:
            return None
        address = network.address or network.address6
        if not address:
            self._problem(
                Code.NO_ADDRESS, "network", network.name, "the container has no address there"
            )
            return None
        address6 = network.address6 if network.address else ""
        return _Place(address, port, _detour(owner, network), address6)

    def _owner(self, by_id: Mapping[tuple[str, str], Container]) -> Container | None:
        # a container may live in the network of another one, that one in a third
        owner, seen = self._container, set[str]()
        while owner.mode.startswith(_JOINED):
            target = owner.mode.removeprefix(_JOINED)
            found = by_id.get((owner.source, target))
            if found is None or target in seen:
                self._problem(
                    Code.NO_NETWORK, "network", owner.mode, "that container is not running"
                )
                return None
            seen.add(target)
            owner = found
        return owner

    def _published(self, owner: Container, port: int | None) -> _Place | None:
        for published in owner.published:
            if published.port == port:
                return _Place(published.address, published.host_port, Detour.ROOTLESS)
        if port is not None:
            detail = "the engine is rootless and its networks can not be reached from here; "
            wanted = self._spec.network or ""
            self._problem(Code.NO_NETWORK, "network", wanted, f"{detail}publish port {port}")
        return None

    def _network(self, networks: tuple[Network, ...], configured: str | None) -> Network | None:
        wanted = self._spec.network
        if wanted is not None:
            found = _named(networks, wanted)
            if not found:
                names = ", ".join(sorted(n.name for n in networks)) or "none"
                detail = f"the container is not in it; it is in: {names}"
                self._problem(Code.UNKNOWN_NETWORK, "network", wanted, detail)
                return None
        else:
            found = _named(networks, configured) if configured else []
            found = found or sorted((n for n in networks if n.reachable), key=attrgetter("name"))
            if not found:
                names = ", ".join(sorted(n.name for n in networks)) or "none"
                detail = f"no container network that can be reached from here; it is in: {names}"
                self._problem(Code.NO_NETWORK, "network", "", detail)
                return None
        if len(found) > 1:
            names = ", ".join(n.name for n in found)
            detail = f"any of {names} would do, taking {found[0].name}"
            self._problem(Code.AMBIGUOUS_NETWORK, "network", wanted or "", detail)
        return found[0]

    def _problem(self, code: Code, key: str, value: str, detail: str) -> None:
        label = self._spec.label(key)
        self._problems.append(Problem(code, self._container.name, label, value, detail))


def _detour(owner: Container, network: Network) -> Detour:
    if owner.rootless:
        return Detour.ROOTLESS
    if network.driver in _DETOUR_DRIVERS:
        return Detour(network.driver)
    if network.internal:
        return Detour.INTERNAL_NETWORK
    if not network.reachable:
        return Detour.NOT_LOCAL
    families = (network.address, "gateway"), (network.address6, "gateway6")
    if any(address and _has_rival(owner, network, gateway) for address, gateway in families):
        return Detour.SEVERAL_NETWORKS
    return Detour.NONE


def _has_rival(owner: Container, network: Network, family: str) -> bool:
    gateway = attrgetter(family)
    rivals = [
        other.priority
        for other in owner.networks
        if other is not network and not other.internal and gateway(other)
    ]
    return bool(rivals) and not (gateway(network) and network.priority > max(rivals))


def _named(networks: Iterable[Network], wanted: str) -> list[Network]:
    # compose puts its project before a network's name: app_web answers to web
    networks = sorted(networks, key=attrgetter("name"))
    exact = [n for n in networks if n.name == wanted]
    return exact or [n for n in networks if n.name.endswith(f"_{wanted}")]
