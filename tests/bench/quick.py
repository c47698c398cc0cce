"""
The short form of the benchmark, for CI: a few loads and contestants, in under three minutes.
"""

import sys

from bench.__main__ import Kind, main

QUICK = Kind(
    "bench.quick",
    "quick",
    ("burst", "single", "down-1", "trips-32"),
    ("direct", "packet", "sockmap", "relay", "haproxy", "nginx"),
)

if __name__ == "__main__":
    sys.exit(main(QUICK, sys.argv[1:]))
