"""
Measure sniroute beside a bare route, HAProxy and nginx, in one run: `make bench-quick`.

Rules of this file (README.md has the method and what its numbers mean):

1. Everything runs in namespaces of its own, processes and mounts included, so that the end
   of this process ends all of it, however it ends.
2. A number counts only relative to another of the same round; rounds are interleaved.
3. Any wrong byte, refused or stuck connection is printed and fails the run.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SNIROUTE = ROOT / ".venv" / "bin" / "sniroute"
NGINX_STREAM = Path("/usr/lib/nginx/modules/ngx_stream_module.so")

# Documentation networks (RFC 5737): client side and backend side of the router.
CLIENT, ROUTER, BRIDGE, BACKEND = "198.51.100.2", "198.51.100.1", "203.0.113.1", "203.0.113.2"

START_SECONDS = 15  # sniroute tests its kernel at start
SPARE_SECONDS = 20  # over the measured time, until a generator is called stuck


class BenchError(Exception):
    """
    The run cannot go on, or did not hold what it must.
    """


@dataclass(frozen=True, slots=True)
class Load:
    """
    One kind of traffic; *at_once* is 0 for a single stream.
    """

    name: str
    title: str
    at_once: int
    cpu_unit: str
    cpu_scale: float

    @property
    def host(self) -> str:
        """
        The server name that stands for this load's backend.
        """
        return f"{self.name}.example.com"


LOADS = (
    Load("burst", "connections/s, 64 at once", 64, "CPU us each", 1e6),
    Load("single", "connections/s, one after the other", 1, "CPU us each", 1e6),
    Load("bulk", "Gbit/s, one download", 0, "CPU s/GB", 1e9),
)


@dataclass(frozen=True, slots=True)
class Contestant:
    """
    One way from the client to the backends; *number* keeps its ports apart from the others'.
    """

    name: str
    number: int

    def listen(self, load: Load) -> tuple[str, int]:
        """
        Where the client dials for *load*.
        """
        if self.name == "direct":
            return BACKEND, self.backend_port(load)
        return ROUTER, 4430 + self.number

    def backend_port(self, load: Load) -> int:
        """
        Keep every contestant's backends on ports of their own, so that no TIME_WAIT is shared.
        """
        return 5000 + 10 * self.number + LOADS.index(load)

    def greeting(self, load: Load) -> str:
        """
        What only the right backend says.
        """
        return f"{self.name} {load.host} answered by the right backend".ljust(64)


CONTESTANTS = tuple(
    Contestant(name, number)
    for number, name in enumerate(("direct", "haproxy", "nginx", "sockmap", "relay"))
)


@dataclass(frozen=True, slots=True)
class Sample:
    """
    One measurement: connections/s or Gbit/s, and the machine's CPU time for one or for a byte.
    """

    rate: float
    cpu: float


@dataclass(slots=True)
class Results:
    """
    Every sample of a run, by load and contestant in order of rounds, and every error.
    """

    samples: dict[str, dict[str, list[Sample]]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def add(self, load: str, contestant: str, sample: Sample) -> None:
        """
        Append the sample of one round.
        """
        self.samples.setdefault(load, {}).setdefault(contestant, []).append(sample)

    def ratio(self, load: str, contestant: str, base: str) -> float | None:
        """
        Compare round by round, then take the median: noise that both met cancels out.
        """
        of = self.samples.get(load, {})
        if contestant not in of or base not in of:
            return None
        pairs = zip(of[contestant], of[base], strict=True)
        return median(a.rate / b.rate if b.rate else 0 for a, b in pairs)


# --- what runs: the contestants ---------------------------------------------------------


def haproxy(me: Contestant, work: Path) -> list[str]:
    """
    HAProxy as its manual has it for SNI, splicing in the kernel.
    """
    config = work / "haproxy.cfg"
    address, port = me.listen(LOADS[0])
    lines = [
        "global",
        "  nbthread 1",
        "  maxconn 4000",  # two sockets and a pipe each must fit the descriptors
        "defaults",
        "  mode tcp",
        "  option splice-auto",
        "  timeout connect 5s",
        "  timeout client 30s",
        "  timeout server 30s",
        "frontend tls",
        f"  bind {address}:{port}",
        "  tcp-request inspect-delay 5s",
        "  tcp-request content accept if { req.ssl_hello_type 1 }",
        *(f"  use_backend {x.name} if {{ req.ssl_sni {x.host} }}" for x in LOADS),
    ]
    for load in LOADS:
        lines += [f"backend {load.name}", f"  server one {BACKEND}:{me.backend_port(load)}"]
    config.write_text("\n".join(lines) + "\n")
    return ["haproxy", "-db", "-f", str(config)]


def nginx(me: Contestant, work: Path) -> list[str]:
    """
    Nginx with ssl_preread, one worker.
    """
    config = work / "nginx.conf"
    address, port = me.listen(LOADS[0])
    backends = "".join(f"{x.host} {BACKEND}:{me.backend_port(x)};" for x in LOADS)
    module = f"load_module {NGINX_STREAM};" if NGINX_STREAM.exists() else ""
    config.write_text(f"""{module}
daemon off; worker_processes 1; pid {work}/nginx.pid; error_log stderr;
events {{ worker_connections 8192; }}
stream {{
  access_log off;
  map $ssl_preread_server_name $backend {{ {backends} }}
  server {{ listen {address}:{port} reuseport; ssl_preread on; proxy_pass $backend; }}
}}
""")
    return ["nginx", "-p", str(work), "-c", str(config)]


def sniroute(me: Contestant, work: Path) -> list[str]:
    """
    Run sniroute as anybody would without an engine, with the hand-off it is named for.
    """
    routes = work / f"{me.name}.toml"
    address, port = me.listen(LOADS[0])
    routes.write_text(
        "".join(
            f'[[route]]\nhost = ["{x.host}"]\nbackends = ["{BACKEND}:{me.backend_port(x)}"]\n'
            for x in LOADS
        )
    )
    command = f"run --engine none --routes {routes} --listen {address}:{port} --metrics off"
    quiet = f"--control {work}/{me.name}.sock --handoff {me.name} --no-access-log"
    return [str(SNIROUTE), *command.split(), *quiet.split()]


def handoff_of(me: Contestant, work: Path) -> str:
    """
    Ask a running sniroute for the hand-off that it chose.
    """
    control = f"{work}/{me.name}.sock"
    status = json.loads(run(str(SNIROUTE), "status", "--json", "--control", control))
    return str(status["handoff"]["chosen"])


COMMANDS = {"haproxy": haproxy, "nginx": nginx, "sockmap": sniroute, "relay": sniroute}


# --- where it runs ----------------------------------------------------------------------


def run(*command: str) -> str:
    """
    Run a command that must succeed.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    if done.returncode:
        raise BenchError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def inside(namespace: str, *command: str) -> list[str]:
    """
    Name the command that runs *command* in a network namespace, without a process between.
    """
    return ["nsenter", f"--net=/run/netns/{namespace}", *command]


def build_network() -> None:
    """
    Join client, router and backend: a veth to the router, a bridge behind it, as engines do.
    """
    Path("/run/netns").mkdir(exist_ok=True)
    run("mount", "-t", "tmpfs", "bench", "/run/netns")
    for name in ("client", "router", "backend"):
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
        *(f"-n {n} link set {d} up" for n in ("client", "router", "backend") for d in ("lo",)),
        *(f"-n router link set {d} up" for d in ("outside", "inside", "port")),
        "-n client link set eth0 up",
        "-n backend link set eth0 up",
        f"-n client route add default via {ROUTER}",
        f"-n backend route add default via {BRIDGE}",
    ):
        run("ip", *line.split())
    for name in ("client", "router", "backend"):
        # Tens of thousands of connections a second between two addresses outrun 28,000 ports
        # and a minute of TIME_WAIT.
        run(*inside(name, "sysctl", "-qw", "net.ipv4.ip_local_port_range=1024 65535"))
        run(*inside(name, "sysctl", "-qw", "net.ipv4.tcp_tw_reuse=1"))
        run(*inside(name, "sysctl", "-qw", "net.ipv4.ip_forward=1"))
        off = "for f in /sys/class/net/*/queues/rx-*/rps_cpus; do echo 0 > $f; done"
        run("ip", "netns", "exec", name, "sh", "-c", off)


def client_hello(host: str) -> bytes:
    """
    Let OpenSSL write the hello that a client would send for *host*.
    """
    out = ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), out, server_hostname=host)
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return out.read()


def busy_seconds() -> float:
    """
    Read the machine's CPU time so far, but for idling, waiting and what was stolen.
    """
    user, nice, system, _idle, _iowait, irq, softirq = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8]
    )
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


# --- one measurement --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bench:
    """
    A built network with its generator, ready to measure.
    """

    work: Path
    traffic: Path

    def measure(self, me: Contestant, load: Load, seconds: float) -> tuple[Sample, list[str]]:
        """
        Put *load* on a contestant for so long; the second value is what went wrong.
        """
        greeting, hello = me.greeting(load), str(self.work / load.host)
        address, port = me.listen(load)
        bulk = 0 if load.at_once else seconds
        behind = [BACKEND, str(me.backend_port(load)), hello, greeting, str(bulk)]
        front = [address, str(port), hello, greeting, str(seconds)]
        verb = ["client", *front, str(load.at_once)] if load.at_once else ["stream", *front]

        with subprocess.Popen(
            inside("backend", str(self.traffic), "backend", *behind),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as backend:
            if not backend.stdout or backend.stdout.readline() != "ready\n":
                raise BenchError("the backend did not start")
            before = busy_seconds()
            client = subprocess.run(
                inside("client", str(self.traffic), *verb),
                stdout=subprocess.PIPE,
                text=True,
                check=False,
                timeout=seconds + SPARE_SECONDS,
            )
            spent = busy_seconds() - before
            said, _ = backend.communicate(timeout=SPARE_SECONDS)
        if client.returncode or backend.returncode:
            raise BenchError(f"{me.name} {load.name}: a generator failed")
        there, here = json.loads(said), json.loads(client.stdout)

        wrong = [x["first_error"] + f" ({x['errors']} such)" for x in (here, there) if x["errors"]]
        if not wrong and there["ended"] != here["done"]:
            wrong.append(f"{here['done']} connections came out as {there['ended']}")
        if not wrong and bulk and there["bytes"] != here["bytes"]:
            wrong.append(f"{there['bytes']} bytes came out as {here['bytes']}")
        units = here["bytes"] if bulk else here["done"]
        return Sample(here["rate"], spent / units if units else 0), wrong

    @contextlib.contextmanager
    def running(self, me: Contestant) -> Iterator[None]:
        """
        Start a contestant in the router's namespace and wait until it routes every name.
        """
        if me.name not in COMMANDS:
            yield
            return
        log = self.work / f"{me.name}.log"
        command = inside("router", *COMMANDS[me.name](me, self.work))
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, cwd=self.work)
        try:
            deadline = time.monotonic() + START_SECONDS
            waiting = list(LOADS)
            while waiting:
                _, wrong = self.measure(me, waiting[0], 0.05)
                if not wrong:
                    waiting.pop(0)
                elif process.poll() is not None or time.monotonic() > deadline:
                    tail = log.read_text(errors="replace")[-2000:]
                    raise BenchError(f"{me.name} does not route: {wrong[0]}\n{tail}")
                else:
                    time.sleep(0.1)
            if COMMANDS[me.name] is sniroute and handoff_of(me, self.work) != me.name:
                raise BenchError(f"{me.name}: runs as {handoff_of(me, self.work)}")
            yield
        finally:
            process.terminate()
            try:
                process.wait(SPARE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def rounds(bench: Bench, chosen: list[Contestant], count: int, seconds: float) -> Results:
    """
    Measure everything *count* times, every round beginning with another contestant.
    """
    results = Results()
    for number in range(count):
        print(f"round {number + 1} of {count}", file=sys.stderr, flush=True)
        turn = number % len(chosen)
        for load in LOADS:
            for me in chosen[turn:] + chosen[:turn]:
                sample, wrong = bench.measure(me, load, seconds)
                results.add(load.name, me.name, sample)
                where = f"round {number + 1}, {me.name}, {load.name}"
                results.errors += [f"{where}: {x}" for x in wrong]
    return results


# --- what it prints ---------------------------------------------------------------------


def version(*command: str) -> str:
    """
    Ask a program for its version, in its own words.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return (done.stdout + done.stderr).strip().split("\n")[0]


def machine(chosen: list[Contestant]) -> dict[str, Any]:
    """
    Say what the numbers were measured on.
    """
    asks = {"haproxy": ("haproxy", "-v"), "nginx": ("nginx", "-v")}
    ask_sniroute = ("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    cpu = [x for x in Path("/proc/cpuinfo").read_text().split("\n") if x.startswith("model name")]
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "cpu": cpu[0].partition(": ")[2] if cpu else platform.machine(),
        "congestion_control": run("sysctl", "-n", "net.ipv4.tcp_congestion_control").strip(),
        "rps": "off",
        "openssl": ssl.OPENSSL_VERSION,
        "versions": {
            "sniroute": version(*ask_sniroute),
            **{x.name: version(*asks[x.name]) for x in chosen if x.name in asks},
        },
    }


def number(value: float | None) -> str:
    """
    Three or more significant digits.
    """
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def table(results: Results, load: Load) -> str:
    """
    Lay out one load: medians with their range, ratios, and what it cost.
    """
    rows: list[tuple[str, ...]] = [
        ("", "median", "min", "max", "/direct", "/haproxy", load.cpu_unit)
    ]
    for name, samples in results.samples[load.name].items():
        rates = [x.rate for x in samples]
        ratios = [results.ratio(load.name, name, base) for base in ("direct", "haproxy")]
        cpu = median(x.cpu for x in samples) * load.cpu_scale
        rows.append((name, *map(number, (median(rates), min(rates), max(rates), *ratios, cpu))))
    lines = ["".join(f"{x:>12}" if i else f"{x:10}" for i, x in enumerate(row)) for row in rows]
    return "\n".join([f"{load.title}:", *lines])


def below_floors(results: Results, floors: list[dict[str, Any]]) -> list[str]:
    """
    Compare with the floors; what cannot be compared is below.
    """
    below = []
    for floor in floors:
        where = floor["load"], floor["contestant"], floor["relative_to"]
        ratio = results.ratio(*where)
        if ratio is None or ratio < floor["floor"]:
            got = "not measured" if ratio is None else f"{ratio:.2f}"
            below.append(f"{where[0]}: {where[1]} / {where[2]} = {got}, floor {floor['floor']}")
    return below


# --- the command ------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    """
    Read the command line.
    """
    names = [x.name for x in CONTESTANTS]
    parser = argparse.ArgumentParser(description="measure sniroute beside others, in namespaces")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="for each measurement")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--json", type=Path, help="write every sample to this file")
    parser.add_argument("--check", action="store_true", help="fail below floors.json")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def need(chosen: list[Contestant]) -> None:
    """
    Name everything that is missing, before anything starts.
    """
    if os.geteuid():
        raise BenchError("namespaces need root")
    programs = ["cc", "ip", "nsenter", "setpriv", "unshare", "sysctl"]
    programs += [x.name for x in chosen if x.name in ("haproxy", "nginx")]
    programs += [str(SNIROUTE)] * any(COMMANDS.get(x.name) is sniroute for x in chosen)
    if missing := [x for x in programs if not shutil.which(x)]:
        raise BenchError(f"not found: {', '.join(missing)} (README.md names the packages)")


def compile_traffic() -> Path:
    """
    Build the generator, outside of version control.
    """
    binary = ROOT / ".cache" / "bench" / "traffic"
    binary.parent.mkdir(parents=True, exist_ok=True)
    # Renamed into place: another run may be using the old one.
    fresh = binary.with_suffix(f".{os.getpid()}")
    run("cc", "-O2", "-Wall", "-Werror", "-o", str(fresh), str(HERE / "traffic.c"))
    return fresh.replace(binary)


def bench_inside(args: argparse.Namespace, chosen: list[Contestant]) -> int:
    """
    Build, measure and print; runs as the first process of its own namespaces.
    """
    build_network()
    bench = Bench(args.inside, compile_traffic())
    for load in LOADS:
        (bench.work / load.host).write_bytes(client_hello(load.host))
    with contextlib.ExitStack() as stack:
        for me in chosen:
            stack.enter_context(bench.running(me))
        results = rounds(bench, chosen, args.rounds, args.seconds)

    facts = machine(chosen)
    for key, value in facts.items():
        shown = "; ".join(map(": ".join, value.items())) if isinstance(value, dict) else value
        print(f"{key}: {shown}")
    print(f"{args.rounds} rounds of {args.seconds} s; ratios are medians of the rounds' ratios")
    for load in LOADS:
        print("\n" + table(results, load))
    below = below_floors(results, json.loads((HERE / "floors.json").read_text()))
    if args.json:
        report = {"machine": facts, "rounds": args.rounds, "seconds": args.seconds}
        report |= {"below_floors": below} | asdict(results)
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    failures = [f"error: {x}" for x in results.errors]
    failures += [f"below the floor: {x}" for x in below if args.check]
    print(*failures, sep="\n", end="\n" * bool(failures))
    return bool(failures)


def main(argv: list[str]) -> int:
    """
    Move into namespaces of its own and measure there.
    """
    args = parse(argv)
    chosen = [x for x in CONTESTANTS if x.name in args.only]
    # Both must pass through every `finally`.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        need(chosen)
        if args.inside:
            return bench_inside(args, chosen)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1

    spaces = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
    with tempfile.TemporaryDirectory(prefix="bench-") as work:
        again = [sys.executable, str(Path(__file__).resolve()), "--inside", work, *argv]
        die_with_me = ("setpriv", "--pdeathsig", "KILL")
        process = subprocess.Popen([*die_with_me, "unshare", *spaces, *again])
        try:
            return process.wait()
        finally:
            # Takes the inner process along, and the kernel everything in its namespaces.
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
