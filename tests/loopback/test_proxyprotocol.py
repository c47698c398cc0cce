"""
PROXY headers as HAProxy and nginx write and read them.
"""

import contextlib
import socket
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trustme
from harness.ends import NAME, PATIENCE
from harness.loopback import LOOPBACK, Address
from harness.tools import find_program, wait_for

from controller.core.proxyprotocol import Header, NeedMore, Version, read_header, write_header

LOOPBACK6 = "::1"

CLIENT = ("198.51.100.77", 43210)
LOCAL = ("192.0.2.1", 443)
CLIENT6 = ("2001:db8::77", 43210)
LOCAL6 = ("2001:db8::1", 443)

HAPROXY = """
defaults
  timeout connect 60s
  timeout client 60s
  timeout server 60s
"""

NGINX = """
daemon off;
master_process off;
error_log stderr;
load_module modules/ngx_stream_module.so;
events {}
"""

HAPROXY_TELLS = "%[src] %[src_port] %[dst] %[dst_port]"
NGINX_TELLS = "$proxy_protocol_addr $proxy_protocol_port {}".format(
    "$proxy_protocol_server_addr $proxy_protocol_server_port"
)

REQUEST = b"GET / HTTP/1.0\r\n\r\n"


@contextmanager
def running(*command: str | Path, pass_fds: tuple[int, ...] = ()) -> Iterator[None]:
    """
    Run *command* until the block ends; what it said is a note to the block's error.
    """
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=said, pass_fds=pass_fds
        )
        try:
            yield
        except BaseException as err:
            said.seek(0)
            err.add_note(said.read())
            raise
        finally:
            process.kill()
            process.wait()


def haproxy(folder: Path, config: str) -> tuple[str | Path, ...]:
    file = folder / "haproxy.cfg"
    file.write_text(HAPROXY + config)
    return find_program("haproxy", "haproxy"), "-db", "-f", file


def nginx(folder: Path, config: str) -> tuple[str | Path, ...]:
    file = folder / "nginx.conf"
    file.write_text(f"pid {folder}/nginx.pid;{NGINX}{config}")
    return find_program("nginx", "nginx"), "-c", file


@contextmanager
def sending(
    folder: Path, listener: socket.socket, options: str, bind: str = ""
) -> Iterator[socket.socket]:
    """
    Run HAProxy behind *listener*, with *options* for its server: the listening socket yielded.
    """
    fd = listener.fileno()
    with socket.create_server((LOOPBACK, 0)) as backend:
        backend.settimeout(PATIENCE)
        config = f"""
listen sender
  mode tcp
  bind fd@{fd} {bind}
  server backend {LOOPBACK}:{backend.getsockname()[1]} {options}
"""
        with running(*haproxy(folder, config), pass_fds=(fd,)):
            yield backend


def receive(backend: socket.socket) -> tuple[Header, bytes]:
    """
    Accept a connection, read its header and not one byte more, and then what follows.
    """
    connection, _ = backend.accept()
    with connection:
        connection.settimeout(PATIENCE)
        data = b""
        while isinstance(header := read_header(data), NeedMore):
            piece = connection.recv(header.at_least - len(data))
            assert piece, f"the header ends after {data!r}"
            data += piece
        assert len(data) == header.size
        # a health check ends with a reset
        with contextlib.suppress(ConnectionResetError):
            return header, connection.recv(100)
        return header, b""


def ask(path: Path, header: bytes, request: bytes = b"") -> bytes:
    """
    Send *header* and *request* to the server at *path*, and return all that it answers.
    """

    def connect() -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(PATIENCE)
        try:
            connection.connect(str(path))
        except OSError:
            connection.close()
            raise
        return connection

    with wait_for("a listening server", connect) as connection:
        connection.sendall(header + request)
        answer = b""
        # a server that drops us before it has read all resets
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(4096):
                answer += piece
        return answer


ALL = "send-proxy-v2 proxy-v2-options ssl,cert-cn,ssl-cipher,cert-sig,cert-key,authority,crc32c"

SENDERS = {
    "v1": ("send-proxy", None),
    "v2": ("send-proxy-v2", None),
    "v2 with a checksum": ("send-proxy-v2 proxy-v2-options crc32c", None),
    "v2 with everything": (f"{ALL},unique-id", NAME),
}


@pytest.mark.parametrize("host", [LOOPBACK, LOOPBACK6])
@pytest.mark.parametrize(("options", "authority"), SENDERS.values(), ids=SENDERS)
def test_reads_what_haproxy_writes(
    tmp_path: Path, host: str, options: str, authority: str | None
) -> None:
    """
    The header of a client that came over TLS is read, and what follows it is left alone.
    """
    authorities = trustme.CA()
    pem = tmp_path / "server.pem"
    authorities.issue_cert(NAME).private_key_and_cert_chain_pem.write_to_path(pem)
    context = ssl.create_default_context()
    authorities.configure_trust(context)
    context.set_alpn_protocols(["h2"])
    family = socket.AF_INET6 if host == LOOPBACK6 else socket.AF_INET
    with (
        socket.create_server((host, 0), family=family) as listener,
        sending(tmp_path, listener, options, f"ssl crt {pem} alpn h2") as backend,
        socket.create_connection(listener.getsockname()[:2], PATIENCE) as plain,
        context.wrap_socket(plain, server_hostname=NAME) as client,
    ):
        client.sendall(b"the first bytes")
        header, rest = receive(backend)

        source, destination = client.getsockname()[:2], client.getpeername()[:2]
        assert Header(header.size, source, destination, authority) == header
        assert b"the first bytes" == rest


@pytest.mark.parametrize("options", ["send-proxy", "send-proxy-v2 proxy-v2-options crc32c"])
def test_a_client_without_an_ip_address_has_none(tmp_path: Path, options: str) -> None:
    """
    For a client on a UNIX socket HAProxy writes UNKNOWN or UNIX: read, and no address taken.
    """
    path = tmp_path / "front.sock"
    with (
        socket.socket(socket.AF_UNIX) as listener,
        socket.socket(socket.AF_UNIX) as client,
    ):
        listener.bind(str(path))
        listener.listen()
        with sending(tmp_path, listener, options) as backend:
            client.connect(str(path))
            client.sendall(b"the first bytes")
            header, rest = receive(backend)

            assert Header(header.size) == header
            assert b"the first bytes" == rest


def test_a_health_check_has_no_client(tmp_path: Path) -> None:
    """
    HAProxy's own connection, which it calls LOCAL, is read, and no address taken.
    """
    options = "send-proxy-v2 proxy-v2-options crc32c check inter 100"
    with (
        socket.create_server((LOOPBACK, 0)) as listener,
        sending(tmp_path, listener, options) as backend,
    ):
        header, rest = receive(backend)

        assert Header(header.size) == header
        assert b"" == rest


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Path]:
    """
    Run an HAProxy that answers with what the header told it: its socket.
    """
    path = tmp_path / "receiver.sock"
    config = f"""
listen receiver
  mode http
  bind unix@{path} accept-proxy
  http-request return content-type text/plain lf-string "{HAPROXY_TELLS} %[fc_pp_authority]"
"""
    with running(*haproxy(tmp_path, config)):
        yield path


TOLD = {
    "IPv4": (CLIENT, LOCAL, "198.51.100.77 43210 192.0.2.1 443"),
    "IPv6": (CLIENT6, LOCAL6, "2001:db8::77 43210 2001:db8::1 443"),
    "IPv4 to IPv6": (CLIENT, LOCAL6, "::ffff:198.51.100.77 43210 2001:db8::1 443"),
    "IPv6 to IPv4": (CLIENT6, LOCAL, "2001:db8::77 43210 ::ffff:192.0.2.1 443"),
}


@pytest.mark.parametrize(("client", "local", "told"), TOLD.values(), ids=TOLD)
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_haproxy_reads_what_we_write(
    receiver: Path, version: Version, client: Address, local: Address, told: str
) -> None:
    """
    HAProxy takes the client from our header, and in version 2 the server name too.
    """
    header = write_header(version, client, local, authority=NAME, alpn=b"h2")

    answer = ask(receiver, header, REQUEST)

    name = NAME if version == "v2" else ""
    assert f"{told} {name}" == answer.decode().partition("\r\n\r\n")[2]


def test_haproxy_checks_our_checksum(receiver: Path) -> None:
    """
    With one bit of the checksum wrong, HAProxy drops the connection; so it was right before.
    """
    header = write_header("v2", CLIENT, LOCAL, authority=NAME, alpn=b"h2")
    wrong = header[:-1] + bytes((header[-1] ^ 1,))

    assert b"" == ask(receiver, wrong, REQUEST)


@pytest.mark.parametrize(("client", "local", "told"), TOLD.values(), ids=TOLD)
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_nginx_reads_what_we_write(
    tmp_path: Path, version: Version, client: Address, local: Address, told: str
) -> None:
    """
    The stream module of nginx takes the client from our header.
    """
    path = tmp_path / "receiver.sock"
    config = f"""
stream {{
  server {{
    listen unix:{path} proxy_protocol;
    return "{NGINX_TELLS}";
  }}
}}
"""
    with running(*nginx(tmp_path, config)):
        answer = ask(path, write_header(version, client, local, authority=NAME, alpn=b"h2"))

    assert told == answer.decode()
