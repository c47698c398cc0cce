"""
The routing table: which route a host name takes.

Rules of this file:

1. A table never changes; a new table replaces the whole of the old one.
2. Precedence is decided here and nowhere else: the exact name, then the longest wildcard
   suffix (`*.example.com` stands for any depth below example.com), then the catch-all `*`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

CATCH_ALL = "*"


@dataclass(frozen=True, slots=True)
class Backend:
    """
    One address that a route leads to.

    *address* is an IP literal; *name* is the container's name, or the address and port of a
    static backend; *source* is the engine, or the routes file, that told of it.
    """

    name: str
    source: str
    address: str
    port: int


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
    """

    __slots__ = ("_routes", "generation")

    def __init__(self, generation: int, routes: Iterable[Route]) -> None:
        self.generation = generation
        self._routes = {route.host: route for route in routes}

    @property
    def routes(self) -> tuple[Route, ...]:
        """
        All routes, by host.
        """
        return tuple(self._routes[host] for host in sorted(self._routes))

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
