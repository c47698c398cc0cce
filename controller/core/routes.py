"""
The routing table: which route a host name takes.

Rules of this file:

1. A table never changes; a new table replaces the whole of the old one.
2. Precedence is decided here and nowhere else: the exact name, then the longest wildcard
   suffix (`*.example.com` stands for any depth below example.com), then the catch-all `*`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

CATCH_ALL = "*"

CLIENT_IPS = ("auto", "transparent", "nat")
PROXY_PROTOCOLS = ("off", "v1", "v2")
HANDOFFS = ("auto", "packet", "sockmap", "relay")
"""All hand-offs, the best first; `auto` stands for the best that there is."""


class Detour(StrEnum):
    """
    Why a backend's replies to a foreign address may not come back through this host.

    NOT_LOCAL: this host is not in the backend's network.  SEVERAL_NETWORKS: the backend is in
    others too, and its default route may lead there.
    """

    NONE = ""
    HOST_NETWORK = "host_network"
    ROOTLESS = "rootless"
    MACVLAN = "macvlan"
    IPVLAN = "ipvlan"
    OVERLAY = "overlay"
    INTERNAL_NETWORK = "internal_network"
    NOT_LOCAL = "not_local"
    SEVERAL_NETWORKS = "several_networks"


@dataclass(frozen=True, slots=True)
class Backend:
    """
    One container, or one static address, that a route leads to.

    *address* is an IP literal; *name* is the container's name, or the address and port of a
    static backend; *source* is the engine, or the routes file, that told of it.  *client_ip* is
    one of CLIENT_IPS, or empty for the router's default; *proxy_protocol* is one of
    PROXY_PROTOCOLS; *detour* is a `Detour`; *address6* is an IPv6 literal where *address* is an
    IPv4 one and there are both, else empty; *handoff* is one of HANDOFFS, the first that its
    connections may take.
    """

    name: str
    source: str
    address: str
    port: int
    client_ip: str = ""
    proxy_protocol: str = "off"
    detour: str = Detour.NONE
    address6: str = ""
    handoff: str = "auto"

    def reached_from(self, version: int) -> str:
        """
        Give the address for clients of IP *version*: of their family, if there is one.
        """
        return (version == 6 and self.address6) or self.address  # noqa: PLR2004 - IPv6


@dataclass(frozen=True, slots=True)
class Route:
    """
    One host pattern and its pool of backends.

    *host* is the route's identity (in metrics and logs too): a normalised host name, `*.suffix`
    or `*`.
    """

    host: str
    backends: tuple[Backend, ...]


class RouteTable:
    """
    An immutable set of routes under a generation number.

    *networks* are the subnets, as text and sorted, of all container networks on this host;
    *alive* are, for each source, the addresses of its labelled containers, routed to or not.
    """

    __slots__ = ("_routes", "alive", "generation", "networks")

    def __init__(
        self,
        generation: int,
        routes: Iterable[Route],
        networks: Iterable[str] = (),
        alive: Mapping[str, Iterable[str]] | None = None,
    ) -> None:
        self.generation = generation
        self.networks = tuple(sorted(networks))
        self.alive = {source: frozenset(found) for source, found in (alive or {}).items()}
        self._routes = {route.host: route for route in routes}

    @property
    def routes(self) -> tuple[Route, ...]:
        """
        All routes, by host.
        """
        return tuple(self._routes[host] for host in sorted(self._routes))

    def lacks(self, source: str, address: str) -> bool:
        """
        Tell whether no container of *source* has *address*; not so of a source that is not told of.
        """
        return source in self.alive and address not in self.alive[source]

    def find(self, name: str) -> Route | None:
        """
        Find the route for *name*, a host name as `read_hostname` returns it.
        """
        route = self._routes.get(name)
        if route is not None:
            return route
        dot = name.find(".")
        while dot != -1:
            route = self._routes.get("*" + name[dot:])
            if route is not None:
                return route
            dot = name.find(".", dot + 1)
        return self._routes.get(CATCH_ALL)
