"""
Measure sniroute beside others, in namespaces of its own: `make bench` (README.md has the method).

Rules:

1. A number counts only relative to another of the same round; rounds are interleaved.
2. Any wrong byte, refused or stuck connection is printed and fails the run.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import lab, report
from bench.contestants import CONTESTANTS, PEERS, TRIXIE, Contestant
from bench.loads import LOADS, Bench, Load, named
from bench.values import BenchError, Results, read_floors
from harness import roots
from harness.tools import HarnessError


@dataclass(frozen=True, slots=True)
class Kind:
    """
    One kind of run: its module, its floors, and what it takes unless told otherwise.
    """

    module: str
    floors: str
    loads: tuple[str, ...]
    contestants: tuple[str, ...]


FULL = Kind("bench", "full", tuple(x.name for x in LOADS), tuple(x.name for x in CONTESTANTS))


def parse(kind: Kind, argv: list[str]) -> argparse.Namespace:
    """
    Read the command line.
    """
    parser = argparse.ArgumentParser(kind.module, description=(__doc__ or "").split(":")[0])
    loads = [x.name for x in LOADS]
    names = [x.name for x in CONTESTANTS]
    parser.add_argument("what", nargs="*", metavar="LOAD", help=", ".join(loads))
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="NAME", default=list(kind.contestants)
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="for each measurement")
    parser.add_argument("--rps", action="store_true", help="spread softirqs over all CPUs")
    parser.add_argument("--json", type=Path, help="write every sample to this file")
    parser.add_argument("--plots", type=Path, help="draw an SVG of each load into this folder")
    parser.add_argument("--check", action="store_true", help="fail below floors.json")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if unknown := set(args.what) - set(loads):
        parser.error(f"no such load: {', '.join(sorted(unknown))}")
    args.what = args.what or list(kind.loads)
    return args


def need(chosen: list[Contestant]) -> None:
    """
    Name everything that is missing, and make what only the network brings, before anything starts.
    """
    if os.geteuid():
        raise BenchError("namespaces need root")
    tools = ["cc", "ip", "nsenter", "setpriv", "unshare", "sysctl"]
    missing = [x for x in tools if not shutil.which(x)]
    missing += [said for x in chosen if (said := x.missing())]
    if missing:
        raise BenchError(f"not found: {', '.join(dict.fromkeys(missing))}")
    if any(x.trixie for x in chosen):
        roots.trixie(*TRIXIE)


def turns(
    loads: list[Load], chosen: list[Contestant], turn: int
) -> Iterator[tuple[Load, Contestant]]:
    """
    List what a round measures, each load beginning with another contestant in each round.
    """
    for load in loads:
        if fitting := [x for x in chosen if x.fits(load.name)]:
            first = turn % len(fitting)
            for me in fitting[first:] + fitting[:first]:
                yield load, me


def measure(bench: Bench, args: argparse.Namespace, chosen: list[Contestant]) -> Results:
    """
    Start everyone, and measure everything so many times.
    """
    results = Results()
    loads = named(args.what)
    out: set[tuple[Load, Contestant]] = set()
    with contextlib.ExitStack() as stack:
        standing = {}
        for me in chosen:
            mine = [x for x in loads if me.fits(x.name) and not x.fresh]
            if mine and not me.alone:
                print(f"starting {me.name}", file=sys.stderr, flush=True)
                standing[me.name] = stack.enter_context(bench.running(me, mine))
        results.background = lab.busy_share(1)
        for turn in range(args.rounds):
            for load, me in turns(loads, chosen, turn):
                where = f"round {turn + 1}, {load.name}, {me.name}"
                if (load, me) in out:
                    continue
                print(where, file=sys.stderr, flush=True)
                try:
                    with contextlib.ExitStack() as once:
                        at = standing.get(me.name) if not load.fresh else None
                        if at is None:
                            also = named([load.name, "burst"])
                            at = once.enter_context(bench.running(me, also, again=True))
                        sample, wrong = load.measure(bench, at, load, args.seconds * load.stretch)
                    results.add(load.name, me.name, sample)
                except BenchError as error:
                    # the others' hour is not lost; the run has failed all the same
                    out.add((load, me))
                    results.samples.get(load.name, {}).pop(me.name, None)
                    wrong = [str(error)]
                results.errors += [f"{where}: {x}" for x in wrong]
    return results


def bench_inside(kind: Kind, args: argparse.Namespace, chosen: list[Contestant]) -> int:
    """
    Build, measure and print; runs as the first process of its own namespaces.
    """
    lab.build_network(rps=args.rps)
    ends = lab.compile_end("traffic"), lab.compile_end("tls", "-lssl", "-lcrypto")
    bench = Bench(args.inside, *ends)
    bench.prepare()
    results = measure(bench, args, chosen)

    # the order of the first round is not the order to read in
    for name, of in results.samples.items():
        results.samples[name] = {x.name: of[x.name] for x in chosen if x.name in of}
    facts = report.machine(chosen, rps=args.rps)
    for key, value in facts.items():
        shown = "; ".join(map(": ".join, value.items())) if isinstance(value, dict) else value
        print(f"{key}: {shown}")
    print(f"background: {results.background:.2f} CPUs busy before the first round")
    print(f"{args.rounds} rounds of {args.seconds} s; ratios are medians of the rounds' ratios")
    measured = [x for x in named(list(results.samples)) if results.samples[x.name]]
    for load in measured:
        print("\n" + report.table(results, load))
    floors = read_floors(json.loads((lab.HERE / "floors.json").read_text())[kind.floors])
    broken = [x.broken(results, PEERS) for x in floors if x.load in args.what]
    below = [x for x in broken if x]
    if args.json:
        kept = {"machine": facts, "rounds": args.rounds, "seconds": args.seconds}
        kept |= {"below_floors": below} | asdict(results)
        args.json.write_text(json.dumps(kept, indent=2) + "\n")
    if args.plots:
        args.plots.mkdir(parents=True, exist_ok=True)
        ours = {x.name for x in chosen} - PEERS - {"direct"}
        for load in measured:
            drawn = report.plot(results, load, ours)
            (args.plots / f"{load.name}.svg").write_text(drawn)
    failures = [f"error: {x}" for x in results.errors]
    failures += [f"below the floor: {x}" for x in below if args.check]
    print(*failures, sep="\n", end="\n" * bool(failures))
    return bool(failures)


def main(kind: Kind, argv: list[str]) -> int:
    """
    Move into namespaces of its own and measure there.
    """
    args = parse(kind, argv)
    chosen = [
        x for x in CONTESTANTS if x.name in args.only and any(x.fits(load) for load in args.what)
    ]
    try:
        if args.inside:
            return bench_inside(kind, args, chosen)
        need(chosen)
    except (BenchError, HarnessError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return lab.in_namespaces(kind.module, argv)


if __name__ == "__main__":
    sys.exit(main(FULL, sys.argv[1:]))
