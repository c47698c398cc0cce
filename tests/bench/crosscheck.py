"""
Compare the generators with others' tools, on a bare route: `python -m bench.crosscheck`.

The servers differ where ours speak no HTTP, so figures of one kind need not be equal; one that is
far below another's would say that our generator is the limit.
"""

import argparse
import contextlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import lab
from bench.contestants import CONTESTANTS
from bench.lab import BACKEND, inside, run
from bench.loads import Bench, exchange, named
from bench.report import number
from bench.values import BenchError

IPERF, HTTP, HTTPS = "5201", "8080", "8443"

Other = Callable[[float], float]


def client(*words: str) -> str:
    """
    Run a tool in the client's namespace and return what it printed.
    """
    return run(*inside("client", *words), timeout=120)


def iperf(streams: int, *direction: str) -> Other:
    """
    Measure Gbit/s with iperf3, over what all streams received.
    """

    def measure(seconds: float) -> float:
        options = ("-J", "-t", str(max(1, round(seconds))), "-P", str(streams), *direction)
        said = json.loads(client("iperf3", "-c", BACKEND, "-p", IPERF, *options))
        return float(said["end"]["sum_received"]["bits_per_second"]) / 1e9

    return measure


def wrk(connections: int, *headers: str) -> Other:
    """
    Measure requests a second with wrk, to an nginx that answers 64 bytes.
    """

    def measure(seconds: float) -> float:
        options = ["-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s"]
        said = client("wrk", *options, *headers, f"http://{BACKEND}:{HTTP}/")
        return float(re.search(r"Requests/sec:\s+([\d.]+)", said)[1])  # type: ignore[index]

    return measure


def h2load(seconds: float) -> float:
    """
    Measure TLS handshakes a second with h2load, one request on each connection.
    """
    count = str(round(1000 * max(1, seconds)))
    said = client("h2load", "--h1", "-n", count, "-c", count, f"https://{BACKEND}:{HTTPS}/")
    return float(re.search(r"([\d.]+) req/s", said)[1])  # type: ignore[index]


PAIRS: tuple[tuple[str, str, Other], ...] = (
    ("down-1", "iperf3 -R", iperf(1, "-R")),
    ("down-8", "iperf3 -R -P 8", iperf(8, "-R")),
    ("up-1", "iperf3", iperf(1)),
    ("up-8", "iperf3 -P 8", iperf(8)),
    ("trips-1", "wrk -c1", wrk(1)),
    ("trips-32", "wrk -c32", wrk(32)),
    ("trips-256", "wrk -c256", wrk(256)),
    ("burst", "wrk -c64, closing", wrk(64, "-H", "Connection: close")),
    ("single", "wrk -c1, closing", wrk(1, "-H", "Connection: close")),
    ("tls", "h2load", h2load),
)


@contextlib.contextmanager
def servers(work: Path) -> Iterator[None]:
    """
    Run what the other tools talk to, in the backend's namespace.
    """
    config = work / "crosscheck.conf"
    config.write_text(f"""
daemon off; worker_processes 1; pid {work}/crosscheck.pid; error_log stderr;
worker_rlimit_nofile 20000;
events {{ worker_connections 16384; }}
http {{
  access_log off;
  keepalive_requests 1000000000;
  ssl_certificate {work}/chain.pem;
  ssl_certificate_key {work}/key.pem;
  ssl_protocols TLSv1.3;
  ssl_session_tickets off;
  server {{
    listen {BACKEND}:{HTTP} backlog=4096;
    listen {BACKEND}:{HTTPS} ssl backlog=4096;
    return 200 "{"x" * 64}";
  }}
}}
""")
    with contextlib.ExitStack() as stack, (work / "crosscheck.log").open("wb") as log:
        for words in (
            ("iperf3", "-s", "-p", IPERF),
            ("nginx", "-p", str(work), "-c", str(config)),
        ):
            started = subprocess.Popen(inside("backend", *words), stdout=log, stderr=log)
            stack.enter_context(lab.ended(started, 5))
        deadline = time.monotonic() + 10
        while True:
            with contextlib.suppress(BenchError):
                client("wrk", "-t1", "-c1", "-d1s", f"http://{BACKEND}:{HTTP}/")
                client("iperf3", "-c", BACKEND, "-p", IPERF, "-n", "1")
                break
            if time.monotonic() > deadline:
                raise BenchError(
                    "the servers did not start: " + (work / "crosscheck.log").read_text()
                )
        yield


def check(work: Path, rounds: int, seconds: float) -> int:
    """
    Measure each pair side by side, and print the best of each.
    """
    lab.build_network(rps=False)
    ends = lab.compile_end("traffic"), lab.compile_end("tls", "-lssl", "-lcrypto")
    bench = Bench(work, *ends)
    bench.prepare()
    direct = CONTESTANTS[0]
    wrong: list[str] = []
    print(f"{'load':12}{'ours':>12}{'other':>12}  {'ratio':>6}  tool")
    with servers(work), bench.running(direct, []) as at:
        for name, tool, other in PAIRS:
            load = named([name])[0]
            ours, theirs = 0.0, 0.0
            for _ in range(rounds):
                sample, said = exchange(bench, at, load, seconds)
                wrong += said
                ours, theirs = max(ours, sample.value), max(theirs, other(seconds))
            ratio = f"{ours / theirs:6.2f}"
            print(f"{name:12}{number(ours):>12}{number(theirs):>12}  {ratio}  {tool}", flush=True)
    print(*(f"error: {x}" for x in wrong), sep="\n", end="\n" * bool(wrong))
    return bool(wrong)


def main(argv: list[str]) -> int:
    """
    Move into namespaces of its own and compare there.
    """
    parser = argparse.ArgumentParser("bench.crosscheck", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    tools = ("cc", "ip", "nsenter", "iperf3", "wrk", "h2load", "nginx")
    if missing := [x for x in tools if not shutil.which(x)]:
        parser.error(f"not found: {', '.join(missing)}")
    if not args.inside:
        return lab.in_namespaces("bench.crosscheck", argv)
    try:
        return check(args.inside, args.rounds, args.seconds)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
