"""
The probe tells what is so, quickly, and nobody notices.
"""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
from harness.machines import Machine
from harness.tools import CAPABILITIES, REPOSITORY, limited, run, wait_for

from controller.router.probe import ProbeResult, probe

PROBE = (sys.executable, "-P", "-m", "controller.router.probe")

NO_PLUMBING = """
from controller.router import probe
probe.Plumbing.install = lambda self: None
probe.main()
"""

STUCK = """
import time
from controller.router import probe
def stuck(*_):
    print("in", flush=True)
    time.sleep(600)
probe._dial = stuck
probe.main()
"""

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""

PROVEN = ProbeResult(ok=True, reason="proven for IPv4 and IPv6")


def answer(*command: str) -> ProbeResult:
    return ProbeResult(**json.loads(run(*command)))


def test_transparency_is_proven_within_a_second() -> None:
    """
    On this kernel it works, and to say so takes less than a second.
    """
    began = time.monotonic()
    found = probe()
    took = time.monotonic() - began

    assert PROVEN == found
    assert took < 1


def test_the_products_capabilities_are_enough() -> None:
    """
    A user namespace stands in for CAP_SYS_ADMIN, which the product does not have.
    """
    assert PROVEN == answer(*limited(*CAPABILITIES), "--no-new-privs", *PROBE)


def test_our_own_network_is_left_alone(tmp_path: Path) -> None:
    """
    Filters, rules, routes and devices around the probe are what they were.
    """

    def network() -> list[str]:
        commands = ("nft list ruleset", "ip rule", "ip -6 rule", "ip -o addr", "ip route")
        return [machine.run(*command.split()) for command in commands]

    with Machine(tmp_path) as machine:
        before = network()
        found = answer(*machine.outside(*PROBE))
        after = network()

    assert PROVEN == found
    assert before == after


def test_replies_that_do_not_come_are_seen() -> None:
    """
    The probe can fail: without the plumbing it does.
    """
    expected = ProbeResult(ok=False, reason="IPv4: replies to the client do not come back")

    assert expected == answer(sys.executable, "-c", NO_PLUMBING)


def test_where_namespaces_are_refused_nothing_is_claimed() -> None:
    """
    No private network is no proof, neither way.
    """
    refuse = 'echo 0 > /proc/sys/user/max_net_namespaces && exec "$@"'
    found = answer("unshare", "--user", "--map-root-user", "sh", "-c", refuse, "sh", *PROBE)

    assert found.ok is None
    assert found.reason.startswith("not proven: no private network here: ")


def test_it_ends_with_its_parent() -> None:
    """
    A router that is killed in the middle of it leaves no process, so no namespace either.
    """
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, STUCK], cwd=REPOSITORY, stdout=subprocess.PIPE
    ) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        running = child.status()
        parent.kill()

    def gone() -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return child.status() == psutil.STATUS_ZOMBIE
        return True

    assert running != psutil.STATUS_ZOMBIE
    wait_for("the end of the probe", gone, timeout=5)
