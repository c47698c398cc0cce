"""
Every byte arrives, by the kernel.
"""

import json
from pathlib import Path

from harness.loopback import Product
from harness.tools import run
from harness.transfer_promises import TransferPromises, router_pid

MAPS = {"sockets", "directions"}


class TestSockmap(TransferPromises):
    """
    The promises of every hand-off.
    """

    handoff = "sockmap"

    def left_in_kernel(self, product: Product) -> int:
        """
        Count the entries of the router's maps of sockets and directions.
        """
        counted = left = 0
        for info in Path(f"/proc/{router_pid(product)}/fdinfo").iterdir():
            numbers = dict(
                line.split(":\t") for line in info.read_text().splitlines() if ":\t" in line
            )
            if "map_id" not in numbers:
                continue
            of_map = ("id", numbers["map_id"].strip())
            if json.loads(run("bpftool", "--json", "map", "show", *of_map))["name"] in MAPS:
                counted += 1
                left += len(json.loads(run("bpftool", "--json", "map", "dump", *of_map)))

        assert len(MAPS) == counted

        return left
