"""
A connection that an earlier router has accepted, handed over as packets, and left.
"""

import time
from typing import TYPE_CHECKING, Any

from controller.core.clientip import Choice
from controller.core.routes import Backend, Route
from controller.router._native import ffi
from controller.router.address import readable
from controller.router.connection import Connection, Hello
from controller.router.note import read_note
from controller.router.packet import PacketFlow

if TYPE_CHECKING:
    from controller.router.router import Router

UNKNOWN = "unknown"
"""The route and the backend of a connection of which there is no note."""

UNNOTED = {"alpn", "tls_versions", "ech", "hello_bytes", "hello_seconds", "connect_seconds"}
"""Fields of the log of which an earlier router leaves no word."""


class Adopted(Connection):
    """
    What is known of it: the flow, and what the earlier router has noted.
    """

    __slots__ = ()

    def __init__(self, router: "Router", flow: PacketFlow, note: bytes) -> None:
        """
        Read *note*; without one that is understood, little is known.
        """
        client, backend = flow.endpoints
        address, port = client
        endpoint = {"address": address, "size": len(address), "port": port}
        arrival = ffi.new("struct arrival *", {"peer": endpoint})
        super().__init__(router, -1, arrival, time.monotonic())
        self.flow = flow
        self.result = "forwarded"
        known = read_note(note)
        if known:
            self.began -= time.time() - known.began
            self.client = known.endpoint
            self.choice = Choice(transparent=known.transparent)
        self.hello = Hello(server_name=known.server_name if known else None)
        self.route = Route(known.route if known else UNKNOWN, ())
        self.backend = Backend(
            known.backend if known else UNKNOWN,
            known.source if known else "",
            *readable(backend),
        )

    def record(self, reason: str) -> dict[str, Any]:
        """
        Tell it as `Connection.record` does, without what nobody has noted.
        """
        line = super().record(reason)
        return {name: line[name] for name in line if name not in UNNOTED}
