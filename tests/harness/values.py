"""
A value for each setting that is not its default.
"""

from ipaddress import ip_network
from pathlib import Path
from typing import Any, Final

from controller.settings import ClientIp, HandoffChoice

OTHER: Final[dict[str, Any]] = {
    "control": Path("/tmp/other.sock"),  # noqa: S108 - never opened
    "log_level": "debug",
    "engine": ("unix:///a.sock", "unix:///b.sock"),
    "routes": Path("/etc/routes.toml"),
    "network": "front",
    "relist_interval": 7.5,
    "listen": ("127.0.0.1:8443", "[::1]:8443"),
    "metrics": "off",
    "handoff": HandoffChoice.RELAY,
    "bpffs": Path("/run/bpf"),
    "packet_idle": 90.0,
    "hello_timeout": 0.25,
    "hello_limit": 8192,
    "connect_timeout": 1.5,
    "drain": 0.0,
    "replace": True,
    "backlog_limit": 131072,
    "receive_buffer": 262144,
    "workers": 4,
    "max_connections": 12,
    "access_log": False,
    "client_ip": ClientIp.NAT,
    "transparent_timeout": 2.5,
    "transparent_mark": 0x100,
    "transparent_mask": 0x1FF,
    "transparent_table": 1234,
    "transparent_priority": 500,
    "proxy_protocol_from": (ip_network("192.0.2.0/24"), ip_network("2001:db8::/32")),
}
