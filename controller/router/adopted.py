"""
A connection that an earlier router has accepted, handed over as packets, and left.
"""

import time
from typing import TYPE_CHECKING

import orjson

from controller.core.clientip import Choice
from controller.core.routes import Backend, Route
from controller.router._native import ffi
from controller.router.address import pack, readable
from controller.router.connection import Connection, Hello
from controller.router.packet import PacketFlow

if TYPE_CHECKING:
    from controller.router.router import Router

UNKNOWN = "unknown"
"""The route and the backend of a connection whose router ended before it had taken notes."""


class Adopted(Connection):
    """
    What is known of it: the flow, and what the earlier router has noted.
    """

    __slots__ = ()

    def __init__(self, router: "Router", flow: PacketFlow, note: bytes) -> None:
        """
        Read *note*, as `Connection.note` writes it; it may be empty.
        """
        client, backend = flow.endpoints
        address, port = client
        endpoint = {"address": address, "size": len(address), "port": port}
        arrival = ffi.new("struct arrival *", {"peer": endpoint})
        super().__init__(router, -1, arrival, time.monotonic())
        self.flow = flow
        self.result = "forwarded"
        known = orjson.loads(note) if note else {}
        if known:
            self.began -= time.time() - known["began"]
            self.client = pack(tuple(known["client"]))
            self.choice = Choice(transparent=known["transparent"])
        self.hello = Hello(server_name=known.get("server_name"))
        self.route = Route(known.get("route", UNKNOWN), ())
        self.backend = Backend(
            known.get("backend", UNKNOWN),
            known.get("source", ""),
            *readable(backend),
        )
