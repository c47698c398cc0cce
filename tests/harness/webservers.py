"""
nginx, HAProxy and Caddy with TLS, each telling in its own log who its client was.
"""

import contextlib
import json
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trustme

from harness.machines import Here
from harness.tools import VENV, find_program, wait_for

PLAIN = 8001
"""The port of an nginx that takes whoever connects for its client."""

PORTS = {"nginx": 8002, "haproxy": 8003, "caddy": 8004}
"""The ports of those that want a PROXY header."""

Seen = tuple[str, int]

_NGINX = """
daemon off;
pid {folder}/nginx.pid;
error_log stderr;
events {{}}
http {{
    log_format plain "$remote_addr $remote_port";
    log_format told "$proxy_protocol_addr $proxy_protocol_port";
    ssl_certificate {folder}/all.pem;
    ssl_certificate_key {folder}/all.pem;
    server {{
        listen {plain} ssl;
        listen [::]:{plain} ssl;
        access_log {folder}/plain.seen plain;
        return 200 ok;
    }}
    server {{
        listen {nginx} ssl proxy_protocol;
        access_log {folder}/nginx.seen told;
        return 200 ok;
    }}
}}
"""

_HAPROXY = """
global
    log stdout format raw local0
    maxconn 100
defaults
    mode http
    log global
    log-format "%ci %cp"
    timeout connect 10s
    timeout client 10s
    timeout server 10s
frontend web
    bind :{haproxy} ssl crt {folder}/all.pem accept-proxy
    http-request return status 200 content-type text/plain string ok
"""

_CADDY = """
{{
    admin off
    auto_https off
    skip_install_trust
    servers {{
        listener_wrappers {{
            proxy_protocol {{
                allow 0.0.0.0/0
            }}
            tls
        }}
    }}
}}
https://:{caddy} {{
    tls {folder}/all.pem {folder}/all.pem
    log {{
        output file {folder}/caddy.seen
    }}
    respond ok
}}
"""

_SENDER = """
global
    maxconn 100
defaults
    mode tcp
    timeout connect 10s
    timeout client 10s
    timeout server 10s
listen v1
    bind {at}:{v1}
    source {source}
    server sniroute {to}:443 send-proxy
listen v2
    bind {at}:{v2}
    source {source}
    server sniroute {to}:443 send-proxy-v2
"""

SENDERS = {"v1": 9001, "v2": 9002}
"""The ports of a HAProxy that puts a PROXY header before what it passes on."""


@dataclass(frozen=True, slots=True)
class WebServers:
    """
    Running servers; *root* is the CA of their certificate.
    """

    root: str
    folder: Path

    def seen(self, server: str) -> list[Seen]:
        """
        Read from the log of *server*, `plain` or one of PORTS, whom it has served.
        """
        lines = (self.folder / f"{server}.seen").read_text().splitlines()
        return [client for line in lines if (client := _READERS[server](line))]


@contextmanager
def serving(machine: Here, address: str, folder: Path, hosts: list[str]) -> Iterator[WebServers]:
    """
    Run all of them on *machine*, which has *address*, for *hosts*.
    """
    ca = trustme.CA()
    ca.issue_cert(*hosts).private_key_and_cert_chain_pem.write_to_path(folder / "all.pem")
    values = {"folder": folder, "plain": PLAIN, **PORTS}
    # the log is there at once, whenever a server comes to write it
    for server in _READERS:
        (folder / f"{server}.seen").touch()
    commands = {
        "nginx": (find_program("nginx", "nginx"), "-c"),
        "haproxy": (find_program("haproxy", "haproxy"), "-db", "-f"),
        "caddy": (VENV / "bin/caddy", "run", "--adapter", "caddyfile", "--config"),
    }
    with contextlib.ExitStack() as stack:
        for (name, command), text in zip(commands.items(), (_NGINX, _HAPROXY, _CADDY), strict=True):
            config = folder / f"{name}.conf"
            config.write_text(text.format(**values))
            log = folder / ("haproxy.seen" if name == "haproxy" else f"{name}.log")
            stack.enter_context(_running(machine.outside(*command, config), log))
        for port in (PLAIN, *PORTS.values()):
            _wait_for_port(machine, address, port)
        yield WebServers(ca.cert_pem.bytes().decode(), folder)


@contextmanager
def sending(machine: Here, at: str, source: str, to: str, folder: Path) -> Iterator[None]:
    """
    Run a HAProxy on *machine* that listens *at* SENDERS and connects from *source* to *to*.
    """
    config = folder / "sender.conf"
    config.write_text(_SENDER.format(at=at, source=source, to=to, **SENDERS))
    command = (find_program("haproxy", "haproxy"), "-db", "-f", config)
    with _running(machine.outside(*command), folder / "sender.log"):
        for port in SENDERS.values():
            _wait_for_port(machine, at, port)
        yield


@contextmanager
def _running(command: list[str], log: Path) -> Iterator[None]:
    with log.open("w") as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
    try:
        yield
    except BaseException as err:
        err.add_note(log.read_text()[-3000:])
        raise
    finally:
        # nginx ends its workers on SIGTERM, but not on SIGKILL
        process.terminate()
        process.wait(timeout=30)


def _wait_for_port(machine: Here, address: str, port: int) -> None:
    def listens() -> bool:
        with machine.network():
            socket.create_connection((address, port), 1).close()
        return True

    wait_for(f"{address} port {port}", listens)


def _read_words(line: str) -> Seen | None:
    match = re.fullmatch(r"(\S+) (\d+)", line)
    return (match[1], int(match[2])) if match else None


def _read_caddy(line: str) -> Seen:
    request = json.loads(line)["request"]
    return request["remote_ip"], int(request["remote_port"])


_READERS: dict[str, Callable[[str], Seen | None]] = {
    "plain": _read_words,
    "nginx": _read_words,
    "haproxy": _read_words,
    "caddy": _read_caddy,
}
