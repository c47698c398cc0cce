"""
Every setting of both processes: its name, its default, and the reason for the default.

A setting is one field.  The command line (`--hello-timeout`), the environment
(`SNIROUTE_HELLO_TIMEOUT`) and `--help` are made from it; nothing else repeats it.
"""

import os
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ByteSize, Field, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from controller.core import clientip

LONGEST = 1_000_000
"""Seconds that anything may take, 11 days: epoll counts a wait in 2^31 milliseconds."""

MAX_WORKERS = 16
"""Two routers, while one replaces the other, share the 32 event rings of the packet hand-off."""

Number = Annotated[
    int, BeforeValidator(lambda value: int(value, 0) if isinstance(value, str) else value)
]
"""A whole number, which may be written as 0x..."""

Seconds = Annotated[float, Field(gt=0, le=LONGEST)]

Network = IPv4Network | IPv6Network

RUN = "SNIROUTE_RUN"
"""Where `sniroute run` names itself to its two processes, so that a controller stays with its own
router while another takes that one's place."""

ENGINE_AUTO = "auto"
ENGINE_NONE = "none"
ENGINE_SCHEMES = ("unix://", "tcp://", "http://", "https://")


class HandoffChoice(StrEnum):
    """
    The best hand-off to use; `auto` takes the best that the start-up self-test proved.
    """

    AUTO = "auto"
    PACKET = "packet"
    SOCKMAP = "sockmap"
    RELAY = "relay"


class ClientIp(StrEnum):
    """
    Whose address a backend sees as the other end of its connections.
    """

    AUTO = "auto"
    TRANSPARENT = "transparent"
    NAT = "nat"
    OFF = "off"


def _control_path() -> Path:
    run = "/run" if os.geteuid() == 0 else os.environ.get("XDG_RUNTIME_DIR", "/tmp")  # noqa: S108 - the fallback of XDG_RUNTIME_DIR
    return Path(run) / "sniroute" / "router.sock"


def _comma_list(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    return tuple(part.strip() for part in ",".join(map(str, texts)).split(",") if part.strip())


def _engines(texts: tuple[str, ...]) -> tuple[str, ...]:
    for text in texts:
        if text not in (ENGINE_AUTO, ENGINE_NONE) and not text.startswith(("/", *ENGINE_SCHEMES)):
            raise PydanticCustomError(
                "engine",
                "{engine}: neither auto nor none, no path, and no URL of {schemes}",
                {"engine": repr(text), "schemes": ", ".join(ENGINE_SCHEMES)},
            )
    return texts


class CommonSettings(BaseSettings):
    """
    What both processes and the client commands share.
    """

    model_config = SettingsConfigDict(env_prefix="SNIROUTE_", frozen=True, extra="ignore")

    control: Path = Field(
        default_factory=_control_path,
        description="The control socket: the router listens on it, the controller connects.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="debug, info, warning or error."
    )

    def environment(self) -> dict[str, str]:
        """
        Write the settings as environment variables that read back as the same settings.
        """
        prefix = self.model_config["env_prefix"]
        values = self.model_dump(mode="json", exclude_none=True)
        return {
            prefix + name.upper(): ",".join(map(str, v)) if isinstance(v, list) else str(v)
            for name, v in values.items()
        }


class ControllerSettings(CommonSettings):
    """
    The controller process: which engines and files tell it of routes.
    """

    engine: Annotated[tuple[str, ...], NoDecode] = Field(
        (ENGINE_AUTO,),
        min_length=1,
        description="URLs of engine sockets (unix:///run/docker.sock), comma separated or "
        "repeated; `auto` takes every Docker and Podman socket in the usual places, "
        "`none` no engine.",
    )
    routes: Path | None = Field(
        None, description="A TOML file of static routes, read again whenever it changes."
    )
    network: str | None = Field(
        None,
        description="The container network to reach containers by, where they have several and "
        "no sniroute.network label.",
    )
    relist_interval: Seconds = Field(
        60,
        description="Seconds between full lists, in case an engine lost an event.",
    )

    _split_engine = field_validator("engine", mode="before")(_comma_list)
    _check_engine = field_validator("engine")(_engines)


class RouterSettings(CommonSettings):
    """
    The router process: where it listens and what it allows.
    """

    listen: Annotated[tuple[str, ...], NoDecode] = Field(
        (":443",),
        min_length=1,
        description="Addresses to accept TLS on: ADDR:PORT, [ADDR]:PORT, or :PORT for every "
        "IPv4 and IPv6 address; comma separated or repeated.",
    )
    metrics: str = Field(
        "127.0.0.1:9443",
        description="Where /metrics and /healthz are served; `off` serves neither.  Loopback, "
        "since it tells host names and traffic.",
    )
    handoff: HandoffChoice = Field(
        HandoffChoice.AUTO,
        description="How bytes move after the hello: packet (the kernel translates packets), "
        "sockmap (the kernel joins sockets), relay (in user space), or auto: the best that passes "
        "the self-test at start.  Where one does not take a connection, the next one does.",
    )
    bpffs: Path = Field(
        Path("/sys/fs/bpf"),
        description="The bpf filesystem where the packet hand-off keeps what outlives the router.",
    )
    packet_idle: Seconds = Field(
        7500,
        description="Seconds of silence after which a connection handed over as packets is reset: "
        "2 h 5 min, longer than TCP's own keepalive asks.",
    )
    hello_timeout: Seconds = Field(
        5,
        description="Seconds a client has for its whole ClientHello; a real one takes one round "
        "trip, and each waiting client holds a socket.",
    )
    hello_limit: ByteSize = Field(
        ByteSize(64 * 1024),
        ge=4096,
        le=256 * 1024,
        description="Bytes that a ClientHello may have, records and all; with post-quantum key "
        "shares real ones have 2 KiB.",
    )
    connect_timeout: Seconds = Field(
        5, description="Seconds a backend has to accept a connection before the next is tried."
    )
    drain: float = Field(
        30, ge=0, le=LONGEST, description="Seconds that connections have to finish after SIGTERM."
    )
    replace: bool = Field(
        default=False,
        description="Take the place of the router that has the control socket, if there is one: "
        "its table, its addresses, and all new clients; it drains, and none of its clients is "
        "refused or reset.",
    )
    backlog_limit: ByteSize = Field(
        ByteSize(1024 * 1024),
        ge=65536,
        le=64 * 1024 * 1024,
        description="Bytes that the kernel may queue between the two sockets of a connection, each "
        "way, before the source has to wait: one to two round trips of a 10 Gbit/s bridge.",
    )
    receive_buffer: ByteSize = Field(
        ByteSize(1024 * 1024),
        ge=131072,
        le=64 * 1024 * 1024,
        description="SO_RCVBUF of both sockets: all that a connection may send ahead of a slow "
        "other side, on top of the backlog.",
    )
    workers: int = Field(
        1,
        ge=1,
        le=MAX_WORKERS,
        description="Processes that accept clients and read hellos, each on a processor of its "
        "own.  One does thousands of new connections a second, and what the kernel moves uses "
        "every processor anyway.",
    )
    max_connections: int = Field(
        0,
        ge=0,
        description="Connections at once; further ones wait in the listen queue.  0: what the "
        "file descriptor limit allows, two for each connection.  Workers share them out evenly.",
    )
    client_ip: ClientIp = Field(
        ClientIp.AUTO,
        description="Whose address backends see: auto (the client's, wherever its replies come "
        "back through this host), transparent (the client's, or no connection), nat (this "
        "host's), or off: nat, and nothing is laid in nftables and routing.",
    )
    transparent_timeout: Seconds = Field(
        1,
        description="Seconds that a backend has to answer to the client's address before auto "
        "connects from this host's; a container answers within a millisecond.",
    )
    transparent_mark: Number = Field(
        clientip.MARK,
        gt=0,
        le=0xFFFFFFFF,
        description="Packet mark of replies to clients' addresses; bits that no one else's mark "
        "uses.",
    )
    transparent_mask: Number = Field(
        clientip.MASK, gt=0, le=0xFFFFFFFF, description="The bits that must read as in the mark."
    )
    transparent_table: int = Field(
        clientip.TABLE,
        gt=0,
        le=0xFFFFFFFF,
        description="Routing table that takes marked packets in; nobody else's.",
    )
    transparent_priority: int = Field(
        clientip.PRIORITY,
        gt=1,
        lt=32766,
        description="Priority of the rule that leads there, and, less one, of a second; before any "
        "that would send replies elsewhere.",
    )
    proxy_protocol_from: Annotated[tuple[Network, ...], NoDecode] = Field(
        (),
        description="Networks whose connections begin with a PROXY header, version 1 or 2, which "
        "then tells the client's address; comma separated or repeated.  From anyone else a header "
        "is refused, since anyone could write it.",
    )
    access_log: bool = Field(
        default=True, description="Log one line for each connection, at its end."
    )

    _split_listen = field_validator("listen", "proxy_protocol_from", mode="before")(_comma_list)


class RunSettings(ControllerSettings, RouterSettings):
    """
    Both processes, for `sniroute run`.
    """
