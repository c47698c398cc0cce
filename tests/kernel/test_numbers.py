"""
The numbers that the plumbing takes are the operator's to choose.
"""

from pathlib import Path

from harness.ends import NAME, Backend
from harness.loopback import router
from harness.machines import Machine
from harness.tools import wait_for

WORKING = "sniroute_transparency_working"

NUMBERS = {
    "--transparent-mark": "0x2000",
    "--transparent-mask": "0x3000",
    "--transparent-table": "300",
    "--transparent-priority": "310",
}


def test_the_numbers_of_the_settings_are_laid(tmp_path: Path) -> None:
    """
    Mark, mask, table and priority of a running router are those of its flags; then all are gone.
    """
    flags = [word for pair in NUMBERS.items() for word in pair]
    with Machine(tmp_path) as machine, machine.network(), Backend() as backend:
        before = machine.run("ip", "rule")
        with router("relay", {NAME: backend.address}, "--client-ip", "auto", *flags) as product:
            wait_for("the plumbing", lambda: product.counts(WORKING, "") == {"": 1})

            rules = machine.run("ip", "rule")
            route = machine.run("ip", "route", "show", "table", "300").split()

            assert "310:\tfrom all fwmark 0x2000/0x3000 lookup 300" in rules
            assert "309:\tfrom all fwmark 0x2000/0x3000 iif lo lookup main" in rules
            assert route[:4] == ["local", "default", "dev", "lo"]
            assert "0x00002000" in machine.run("nft", "list", "table", "inet", "sniroute")

        assert before == machine.run("ip", "rule")
        assert machine.run("nft", "list", "tables") == ""
