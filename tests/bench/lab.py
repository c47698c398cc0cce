"""
Where a run happens: client, router and backend, joined as a container engine would have them.

    client             router                        backend
    198.51.100.2 ----- 198.51.100.1 | 203.0.113.1 ----- 203.0.113.2
                 veth               bridge          veth

Rules of this file:

1. Everything is in namespaces of its own, processes and mounts included, so that the end of
   the first process ends all of it, however that comes.
2. It knows no contestant and no load.
"""

import contextlib
import ctypes
import os
import resource
import signal
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import trustme
from bench.values import BenchError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

# Documentation networks (RFC 5737): client side and backend side of the router.
CLIENT, ROUTER, BRIDGE, BACKEND = "198.51.100.2", "198.51.100.1", "203.0.113.1", "203.0.113.2"

FETCH_SECONDS = 10

_NAMESPACES = ("client", "router", "backend")
_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)


def run(*command: str, timeout: float = 30) -> str:
    """
    Run a command that must succeed.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    if done.returncode:
        raise BenchError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def in_namespaces(module: str, argv: list[str]) -> int:
    """
    Run *module* again as the first process of its own namespaces, and wait for it.
    """
    # Both must pass through every `finally`.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    spaces = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
    die_with_me = ("setpriv", "--pdeathsig", "KILL")
    with tempfile.TemporaryDirectory(prefix="bench-") as work:
        again = [sys.executable, "-m", module, "--inside", work, *argv]
        process = subprocess.Popen([*die_with_me, "unshare", *spaces, *again])
        try:
            return process.wait()
        finally:
            # Takes the inner process along, and the kernel everything in its namespaces.
            process.kill()
            process.wait()


def inside(namespace: str, *command: str, root: Path | None = None) -> list[str]:
    """
    Name the command that runs *command* in a network namespace, without a process between.
    """
    where = [f"--net=/run/netns/{namespace}"]
    if root:
        where += [f"--root={root}", f"--wd={root}"]
    return ["nsenter", *where, *command]


def enter(namespace: str) -> None:
    """
    Move the calling thread into a network namespace, for good.
    """
    with Path(f"/run/netns/{namespace}").open() as file:
        if _LIBC.setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")


def build_network(*, rps: bool) -> None:
    """
    Join client, router and backend: a veth to the router, a bridge behind it, as engines do.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    Path("/run/netns").mkdir(exist_ok=True)
    run("mount", "-t", "tmpfs", "bench", "/run/netns")
    for name in _NAMESPACES:
        run("ip", "netns", "add", name)
    for line in (
        "link add eth0 netns client type veth peer name outside netns router",
        "link add eth0 netns backend type veth peer name port netns router",
        "-n router link add inside type bridge",
        "-n router link set port master inside",
        f"-n client address add {CLIENT}/24 dev eth0",
        f"-n router address add {ROUTER}/24 dev outside",
        f"-n router address add {BRIDGE}/24 dev inside",
        f"-n backend address add {BACKEND}/24 dev eth0",
        *(f"-n {n} link set lo up" for n in _NAMESPACES),
        *(f"-n router link set {d} up" for d in ("outside", "inside", "port")),
        "-n client link set eth0 up",
        "-n backend link set eth0 up",
        f"-n client route add default via {ROUTER}",
        f"-n backend route add default via {BRIDGE}",
    ):
        run("ip", *line.split())
    cpus = f"{(1 << (os.cpu_count() or 1)) - 1:x}" if rps else "0"
    for name in _NAMESPACES:
        # Tens of thousands of connections a second between two addresses outrun 28,000 ports
        # and a minute of TIME_WAIT.
        run(*inside(name, "sysctl", "-qw", "net.ipv4.ip_local_port_range=1024 65535"))
        run(*inside(name, "sysctl", "-qw", "net.ipv4.tcp_tw_reuse=1"))
        run(*inside(name, "sysctl", "-qw", "net.ipv4.ip_forward=1"))
        spread = f"for f in /sys/class/net/*/queues/rx-*/rps_cpus; do echo {cpus} > $f; done"
        run("ip", "netns", "exec", name, "sh", "-c", spread)


def fetch(namespace: str, url: str) -> str:
    """
    Get what an HTTP server in a network namespace says.
    """

    def get() -> str:
        with urllib.request.urlopen(url, timeout=FETCH_SECONDS) as answer:  # noqa: S310 - our own
            return str(answer.read(), "utf-8")

    with ThreadPoolExecutor(1, initializer=enter, initargs=(namespace,)) as thread:
        return thread.submit(get).result()


@contextlib.contextmanager
def bpffs(path: Path) -> Iterator[None]:
    """
    Mount a bpf filesystem; at the end of the block what is pinned there goes with it.
    """
    path.mkdir(exist_ok=True)
    run("mount", "-t", "bpf", "bench", str(path))
    try:
        yield
    finally:
        run("umount", str(path))


def client_hello(host: str) -> bytes:
    """
    Let OpenSSL write the hello that a client would send for *host*.
    """
    out = ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), out, server_hostname=host)
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return out.read()


def make_certificate(host: str, folder: Path) -> None:
    """
    Write `ca.pem`, `chain.pem` and `key.pem` (ECDSA P-256) for *host*.
    """
    ca = trustme.CA(key_type=trustme.KeyType.ECDSA)
    leaf = ca.issue_cert(host, key_type=trustme.KeyType.ECDSA)
    ca.cert_pem.write_to_path(folder / "ca.pem")
    leaf.private_key_pem.write_to_path(folder / "key.pem")
    with (folder / "chain.pem").open("wb") as chain:
        chain.writelines(pem.bytes() for pem in leaf.cert_chain_pems)


def compile_end(name: str, *libraries: str) -> Path:
    """
    Build one of the generators, outside of version control.
    """
    binary = ROOT / ".cache" / "bench" / name
    binary.parent.mkdir(parents=True, exist_ok=True)
    # Renamed into place: another run may be using the old one.
    fresh = binary.with_suffix(f".{os.getpid()}")
    run("cc", "-O2", "-Wall", "-Werror", "-o", str(fresh), str(HERE / f"{name}.c"), *libraries)
    return fresh.replace(binary)


# --- what the machine spends ------------------------------------------------------------


def busy_seconds() -> float:
    """
    Read the machine's CPU time so far, but for idling, waiting and what was stolen.
    """
    user, nice, system, _idle, _iowait, irq, softirq = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8]
    )
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def busy_share(seconds: float) -> float:
    """
    Watch for so long, and return how many CPUs were busy on average.
    """
    before, start = busy_seconds(), time.monotonic()
    time.sleep(seconds)
    return (busy_seconds() - before) / (time.monotonic() - start)


def process_memory(pid: int | None) -> int:
    """
    Add up the memory of a process and all below it; shared pages are shared out.
    """
    if pid is None:
        return 0
    main = psutil.Process(pid)
    return sum(x.memory_full_info().pss for x in [main, *main.children(recursive=True)])


def kernel_memory() -> int:
    """
    Add up what the kernel has for itself, and for the bytes queued in its TCP sockets.
    """
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    ours = ("Slab", "KernelStack", "PageTables", "Percpu", "VmallocUsed")
    kilobytes = sum(int(fields[name].split()[0]) for name in ours)
    return kilobytes * 1024 + socket_pages() * os.sysconf("SC_PAGE_SIZE")


def socket_pages() -> int:
    """
    Read how many pages all TCP sockets hold; the kernel counts them for the whole machine.
    """
    for line in Path("/proc/net/sockstat").read_text().splitlines():
        if line.startswith("TCP:"):
            return int(line.split()[-1])
    raise BenchError("/proc/net/sockstat has no TCP line")


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes], patience: float) -> Iterator[None]:
    """
    End a process and all below it when the block ends.
    """
    try:
        yield
    finally:
        below = []
        with contextlib.suppress(psutil.NoSuchProcess):
            below = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for left in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
