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
from bench.values import BenchError, Floor, Results, read_floors
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


FEW_ROUNDS = 3
"""The least that have a median: an odd one of them does not count."""

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
    parser.add_argument(
        "--rounds", type=int, default=5, help=f"at most {FEW_ROUNDS} where there is no floor"
    )
    parser.add_argument("--seconds", type=float, default=1, help="for each measurement")
    parser.add_argument("--rps", action="store_true", help="spread softirqs over all CPUs")
    parser.add_argument("--json", type=Path, help="write every sample to this file")
    parser.add_argument("--plots", type=Path, help="draw an SVG of each load into this folder")
    parser.add_argument("--floors-only", action="store_true", help="only what has a floor")
    parser.add_argument("--check", action="store_true", help="fail below floors.json")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if unknown := set(args.what) - set(loads):
        parser.error(f"no such load: {', '.join(sorted(unknown))}")
    args.what = args.what or list(kind.loads)
    return args


def need(contestants: list[Contestant]) -> None:
    """
    Name everything that is missing, and make what only the network brings, before anything starts.
    """
    if os.geteuid():
        raise BenchError("namespaces need root")
    tools = ["cc", "ip", "nsenter", "setpriv", "unshare", "sysctl"]
    missing = [x for x in tools if not shutil.which(x)]
    missing += [said for x in contestants if (said := x.missing())]
    if missing:
        raise BenchError(f"not found: {', '.join(dict.fromkeys(missing))}")
    if any(x.trixie for x in contestants):
        roots.trixie(*TRIXIE)


@dataclass(frozen=True, slots=True)
class Part:
    """
    One load of a run, the contestants that are measured under it, and in how many rounds.
    """

    load: Load
    contestants: list[Contestant]
    rounds: int


def plan(kind: Kind, args: argparse.Namespace) -> list[Part]:
    """
    Say what a run measures.
    """
    parts = []
    for load in named(args.what):
        floors = [x for x in floors_of(kind) if x.load == load.name]
        contestants = [
            x
            for x in CONTESTANTS
            if x.name in args.only
            and x.fits(load.name)
            and (not args.floors_only or any(floor.compares(x.name, PEERS) for floor in floors))
        ]
        rounds = args.rounds if floors else min(args.rounds, FEW_ROUNDS)
        if contestants:
            parts.append(Part(load, contestants, rounds))
    return parts


def floors_of(kind: Kind) -> list[Floor]:
    """
    Read the floors of a kind of run.
    """
    return read_floors(json.loads((lab.HERE / "floors.json").read_text())[kind.floors])


def turns(parts: list[Part]) -> Iterator[tuple[int, Load, Contestant]]:
    """
    List what is measured, round by round, each load beginning with another contestant in each.
    """
    for turn in range(max(x.rounds for x in parts)):
        for part in parts:
            if turn < part.rounds:
                first = turn % len(part.contestants)
                for me in part.contestants[first:] + part.contestants[:first]:
                    yield turn, part.load, me


def measure(bench: Bench, parts: list[Part], seconds: float) -> Results:
    """
    Start everyone, and measure everything so many times.
    """
    results = Results()
    out: set[tuple[Load, Contestant]] = set()
    with contextlib.ExitStack() as stack:
        standing = {}
        for me in chosen(parts):
            mine = [x.load for x in parts if me in x.contestants and not x.load.fresh]
            if mine and not me.alone:
                print(f"starting {me.name}", file=sys.stderr, flush=True)
                standing[me.name] = stack.enter_context(bench.running(me, mine))
        results.background = lab.busy_share(1)
        for turn, load, me in turns(parts):
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
                    sample, wrong = load.measure(bench, at, load, seconds * load.stretch)
                    wrong += bench.guard(at, load)
                results.add(load.name, me.name, sample)
            except BenchError as error:
                # the others' hour is not lost; the run has failed all the same
                out.add((load, me))
                results.samples.get(load.name, {}).pop(me.name, None)
                wrong = [str(error)]
            results.errors += [f"{where}: {x}" for x in wrong]
    # the order of the first round is not the order to read in
    for part in parts:
        of = results.samples.get(part.load.name, {})
        results.samples[part.load.name] = {
            x.name: of[x.name] for x in part.contestants if x.name in of
        }
    return results


def chosen(parts: list[Part]) -> list[Contestant]:
    """
    Name everyone that takes part, in their order.
    """
    return [x for x in CONTESTANTS if any(x in part.contestants for part in parts)]


def bench_inside(kind: Kind, args: argparse.Namespace, parts: list[Part]) -> int:
    """
    Build, measure and print; runs as the first process of its own namespaces.
    """
    lab.build_network(rps=args.rps)
    ends = lab.compile_end("traffic"), lab.compile_end("tls", "-lssl", "-lcrypto")
    bench = Bench(args.inside, *ends)
    bench.prepare()
    results = measure(bench, parts, args.seconds)
    broken = [x.broken(results, PEERS) for x in floors_of(kind) if x.load in args.what]
    below = [x for x in broken if x]
    kept = {"machine": report.machine(chosen(parts), rps=args.rps), "seconds": args.seconds}
    kept |= {"below_floors": below} | asdict(results)
    if args.json:
        args.json.write_text(json.dumps(kept, indent=2) + "\n")
    report.show(kept)
    if args.plots:
        report.draw(results, args.plots)
    return bool(results.errors or (args.check and below))


def main(kind: Kind, argv: list[str]) -> int:
    """
    Move into namespaces of its own and measure there.
    """
    args = parse(kind, argv)
    parts = plan(kind, args)
    try:
        if args.inside:
            return bench_inside(kind, args, parts)
        need(chosen(parts))
    except (BenchError, HarnessError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return lab.in_namespaces(kind.module, argv)


if __name__ == "__main__":
    sys.exit(main(FULL, sys.argv[1:]))
