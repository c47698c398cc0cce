"""
A value for each setting that is not its default.
"""

from pathlib import Path
from typing import Any, Final

from controller.settings import HandoffChoice

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
    "hello_timeout": 0.25,
    "hello_limit": 8192,
    "connect_timeout": 1.5,
    "drain": 0.0,
    "backlog_limit": 131072,
    "receive_buffer": 262144,
    "max_connections": 12,
    "access_log": False,
}
