"""
`sniroute doctor` on a machine of its own, where each thing it is to find is made for real.
"""

import json
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.machines import Machine
from harness.product import SNIROUTE
from harness.tools import CAPABILITIES, VENV, HarnessError, limited, run, wait_for

from bpfprog import PACKET_ABI

STATUS = {"fine": 0, "degraded": 1, "broken": 2}

CLIENT_ADDRESS = "client address: "

BPFFS = "/sys/fs/bpf"
"""Where a machine has a bpf filesystem of its own."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """
    What the doctor printed as JSON, its findings by check.
    """

    state: str
    findings: dict[str, dict[str, str]]

    def but_fine(self) -> dict[str, str]:
        """
        The states of all findings that are not fine.
        """
        states = {name: finding["state"] for name, finding in self.findings.items()}
        return {name: state for name, state in states.items() if state != "fine"}


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    (tmp_path / "routes.toml").write_text(
        '[[route]]\nhost = ["a.example"]\nbackends = ["192.0.2.2:443"]\n'
    )
    with Machine(tmp_path) as machine:
        yield machine


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """
    Settings of a router that needs no engine.
    """
    control = str(tmp_path / "router.sock")
    return ["--engine", "none", "--routes", str(tmp_path / "routes.toml"), "--control", control]


ALLOWED = limited(*CAPABILITIES)


def diagnose(machine: Machine, *words: str, under: list[str] = ALLOWED) -> Diagnosis:
    """
    Run the doctor with what the product is given and no more; its exit status is its state's.
    """
    done = subprocess.run(
        machine.inside(*under, SNIROUTE, "doctor", "--json", *words),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "" == done.stderr
    told = json.loads(done.stdout)
    assert STATUS[told["state"]] == done.returncode
    return Diagnosis(told["state"], {finding["check"]: finding for finding in told["findings"]})


@contextmanager
def running(machine: Machine, *command: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        machine.inside(*command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=30)


def listens(machine: Machine, port: int) -> bool:
    return f":{port} " in machine.run("ss", "--listening", "--tcp", "--numeric", "--no-header")


def everything(machine: Machine) -> list[str]:
    """
    Write down what a router would lay, and what is there besides.
    """
    return [
        machine.run("nft", "list", "ruleset"),
        *(machine.run("ip", v, what, "show", *rest) for v in ("-4", "-6") for what, *rest in LAID),
        run(*machine.inside("find", BPFFS)),
    ]


LAID = (("rule",), ("route", "table", "all"), ("address",))


def test_all_is_fine_with_what_the_product_is_given(machine: Machine, flags: list[str]) -> None:
    """
    With the four capabilities the kernel is proven, nothing is wrong, and nothing has changed.
    """
    before = everything(machine)

    told = diagnose(machine, *flags)

    assert ("fine", {}) == (told.state, told.but_fine())
    for handoff in ("sockmap", "packet"):
        assert "self-test passed" in told.findings[f"hand-off {handoff}"]["detail"]
    assert before == everything(machine)


def serves(control: str) -> bool:
    """
    Tell whether the router at *control* has laid all that it lays.
    """
    try:
        status = json.loads(run(SNIROUTE, "status", "--json", "--control", control))
    except HarnessError:
        return False
    return status["ready"] and status["client_ip"]["working"]


def test_a_router_that_serves_is_known_and_not_disturbed(
    machine: Machine, flags: list[str]
) -> None:
    """
    The ports and the plumbing of a router that serves are its own, and it is told of.
    """
    plug(machine, "one")
    with running(machine, *ALLOWED, SNIROUTE, "run", *flags):
        control = flags[flags.index("--control") + 1]
        wait_for("a router that serves", lambda: serves(control))
        before = everything(machine)
        told = diagnose(machine, *flags)
        after = everything(machine)

    in_use = "in use, by the router that serves here"
    listening = {told.findings[f"listen {address}"]["detail"] for address in LISTEN}
    assert ({}, {in_use}) == (told.but_fine(), listening)
    assert "by one" == told.findings["packet devices"]["detail"]
    assert any(f"{BPFFS}/sniroute/" in line and "ingress-" in line for line in before)
    assert "serves, process" in told.findings["router"]["detail"]
    assert "in place" == told.findings[f"{CLIENT_ADDRESS}plumbing"]["detail"]
    assert before == after


LISTEN = (":443", "127.0.0.1:9443")


# --- packets ---


def plug(machine: Machine, *names: str) -> None:
    """
    Give *machine* devices with Ethernet headers, and have it forward packets.
    """
    for name in names:
        machine.run("ip", "link", "add", name, "type", "bridge")
        # an address that is being tried out would change by itself
        machine.run("sysctl", "-qw", f"net.ipv6.conf.{name}.accept_dad=0")
        machine.run("ip", "link", "set", name, "up")
    machine.run("sysctl", "-qw", "net.ipv4.conf.all.forwarding=1")


@pytest.mark.parametrize(("handoff", "state"), [("auto", "degraded"), ("packet", "broken")])
def test_a_host_without_a_bpf_filesystem_is_told(
    handoff: str, state: str, machine: Machine, flags: list[str]
) -> None:
    """
    Without one the fix is the command that mounts it, and nothing else is blamed.
    """
    told = diagnose(machine, *flags, "--handoff", handoff, "--bpffs", "/run")

    assert {"BPF file system": state, "hand-off packet": state} == told.but_fine()
    assert "no bpf filesystem at /run" in told.findings["BPF file system"]["detail"]
    assert "mount -t bpf bpf /run" in told.findings["BPF file system"]["fix"]


def test_a_bpf_filesystem_that_can_not_be_written_is_told(
    machine: Machine, flags: list[str]
) -> None:
    """
    One that is mounted read only is degraded, and the reason is the kernel's.
    """
    run(*machine.inside("mount", "-o", "remount,ro", BPFFS))

    told = diagnose(machine, *flags)

    assert {"BPF file system": "degraded", "hand-off packet": "degraded"} == told.but_fine()
    assert "Read-only file system" in told.findings["BPF file system"]["detail"]


def test_devices_are_told_by_what_comes_by_them(machine: Machine, flags: list[str]) -> None:
    """
    Devices without Ethernet headers are named beside those with.
    """
    plug(machine, "one", "two")
    machine.run("ip", "tuntap", "add", "tun9", "mode", "tun")
    machine.run("ip", "link", "set", "tun9", "up")

    told = diagnose(machine, *flags)

    assert {} == told.but_fine()
    assert told.findings["packet devices"]["detail"].startswith("by one, two; what comes by tun9,")


def test_a_device_that_forwards_nothing_is_named(machine: Machine, flags: list[str]) -> None:
    """
    Where IPv4 is not forwarded there are no packets to hand over, and a command mends it.
    """
    plug(machine, "one", "two")
    machine.run("sysctl", "-qw", "net.ipv4.conf.two.forwarding=0")

    told = diagnose(machine, *flags)

    finding = told.findings["packet forwarding"]
    assert {"packet forwarding": "degraded"} == told.but_fine()
    assert finding["detail"].startswith("off for IPv4 on two:")
    assert "sysctl -w net.ipv4.conf.all.forwarding=1" in finding["fix"]


def test_a_port_range_that_leaves_too_few_is_told(machine: Machine, flags: list[str]) -> None:
    """
    Where the kernel gives all ports to anyone, it is degraded, until the fix is made.
    """
    machine.run("sysctl", "-qw", "net.ipv4.ip_local_port_range=1024 65535")
    told = diagnose(machine, *flags)

    assert {"ports": "degraded"} == told.but_fine()
    assert "1024 to 65535" in told.findings["ports"]["detail"]
    machine.run(*shlex.split(told.findings["ports"]["fix"]))
    assert {} == diagnose(machine, *flags).but_fine()


@pytest.mark.parametrize(
    ("name", "state", "owner"),
    [
        ("{abi}-{cookie}-0123456789abcdef", "fine", "another control socket"),
        ("0-{cookie}-0123456789abcdef", "degraded", "another version"),
        ("{abi}-fffff-0123456789abcdef", "fine", "another network, which may be gone"),
        ("doctor-1", "fine", "a doctor that was killed"),
    ],
)
def test_pins_of_others_are_named(
    name: str, state: str, owner: str, machine: Machine, flags: list[str]
) -> None:
    """
    What another router has left is told by its folder, and only another version here is bad.
    """
    folder = f"{BPFFS}/sniroute/" + name.format(abi=PACKET_ABI, cookie=cookie(machine))
    run(*machine.inside("mkdir", "-p", folder))

    finding = diagnose(machine, *flags).findings["packet leftovers"]

    assert state == finding["state"]
    assert f"{folder}, of {owner}" in finding["detail"]
    assert "rm -r" in finding["fix"]


def cookie(machine: Machine) -> str:
    with machine.network(), socket.socket() as probe:
        raw = probe.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)
    return f"{int.from_bytes(raw, sys.byteorder):x}"


SO_NETNS_COOKIE = 71


# --- addresses, privileges, limits ---


@pytest.mark.parametrize("bind", ["127.0.0.1", "0.0.0.0", "::"])
def test_a_port_in_use_is_told_with_its_user(bind: str, machine: Machine, flags: list[str]) -> None:
    """
    Another process on a port of ours is broken, and named.
    """
    server = (VENV / "bin/python", "-m", "http.server", "--bind", bind, "443")
    with running(machine, *server):
        wait_for("a server", lambda: listens(machine, 443))
        told = diagnose(machine, *flags, under=[])

    finding = told.findings["listen :443"]
    assert {"listen :443": "broken"} == told.but_fine()
    assert finding["detail"].startswith("in use by python")
    assert finding["fix"]


def test_an_address_of_another_host_can_not_be_listened_on(
    machine: Machine, flags: list[str]
) -> None:
    """
    An address that this host has not is broken, as is one that is none.
    """
    told = diagnose(machine, *flags, "--listen", "192.0.2.7:443,443")

    assert {"listen 192.0.2.7:443": "broken", "listen 443": "broken"} == told.but_fine()


@pytest.mark.parametrize(
    ("missing", "state", "checks"),
    [
        ("bpf", "degraded", {"BPF program", "hand-off sockmap", "hand-off packet"}),
        ("perfmon", "degraded", {"BPF program", "hand-off sockmap", "hand-off packet"}),
        (
            "net_admin",
            "degraded",
            {
                "BPF program",
                "hand-off sockmap",
                "hand-off packet",
                f"{CLIENT_ADDRESS}plumbing",
                f"{CLIENT_ADDRESS}conflicts",
            },
        ),
        ("net_bind_service", "broken", {"listen :443"}),
    ],
)
def test_a_missing_capability_is_told_with_what_is_lost(
    missing: str, state: str, checks: set[str], machine: Machine, flags: list[str]
) -> None:
    """
    Each capability that is missing is named, and all that does not work without it.
    """
    told = diagnose(machine, *flags, under=limited(*({*CAPABILITIES} - {missing})))

    assert (state, checks | {"capabilities"}) == (told.state, {*told.but_fine()})
    assert f"missing\n{missing.upper()}: " in told.findings["capabilities"]["detail"]
    assert f"cap_add: [{missing.upper()}]" in told.findings["capabilities"]["fix"]


def test_what_is_asked_for_by_name_and_does_not_work_is_broken(
    machine: Machine, flags: list[str]
) -> None:
    """
    What must be is broken without its capability; where neither is asked for, all is fine.
    """
    few = limited("net_bind_service")

    insisting = diagnose(machine, *flags, "--handoff", "sockmap", "--client-ip", "off", under=few)
    packets = diagnose(machine, *flags, "--handoff", "packet", "--client-ip", "off", under=few)
    content = diagnose(machine, *flags, "--handoff", "relay", "--client-ip", "off", under=few)

    assert ("broken", "broken", "fine") == (insisting.state, packets.state, content.state)
    assert "broken" == insisting.findings["hand-off sockmap"]["state"]
    assert "broken" == packets.findings["hand-off packet"]["state"]
    assert {} == content.but_fine()


@pytest.mark.parametrize(
    ("limit", "words", "state"),
    [
        (200, (), "broken"),
        (1024, (), "degraded"),
        (5000, (), "fine"),
        (5000, ("--max-connections", "2469"), "broken"),
        (5000, ("--max-connections", "2468"), "fine"),
    ],
)
def test_a_low_limit_of_descriptors(
    limit: int, words: tuple[str, ...], state: str, machine: Machine, flags: list[str]
) -> None:
    """
    The limit is told with the connections it allows, by how bad that is.
    """
    under = ["prlimit", f"--nofile={limit}:{limit}", *ALLOWED]

    told = diagnose(machine, *flags, *words, under=under)

    finding = told.findings["file descriptors"]
    assert (state, state) == (finding["state"], told.state)
    assert f"{limit}, for {(limit - 64) // 2} connections" in finding["detail"]


def test_a_receive_buffer_that_the_kernel_does_not_give(machine: Machine, flags: list[str]) -> None:
    """
    A receive buffer beyond net.core.rmem_max is degraded, and the fix names the number.
    """
    told = diagnose(machine, *flags, "--receive-buffer", "64MiB")

    assert {"receive buffer": "degraded"} == told.but_fine()
    assert f"sysctl -w net.core.rmem_max={64 << 20}" == told.findings["receive buffer"]["fix"]


@pytest.mark.parametrize(
    ("rule", "check"),
    [
        (("priority", "4430", "lookup", "7"), "plumbing"),
        (("priority", "9000", "fwmark", "0x40000000/0xff000000", "lookup", "7"), "plumbing"),
        (("priority", "100", "lookup", "7"), "conflicts"),
    ],
)
def test_a_conflicting_rule_is_named(
    rule: tuple[str, ...], check: str, machine: Machine, flags: list[str]
) -> None:
    """
    A rule in the place of ours, with our mark, or before ours for everything, is degraded.
    """
    machine.run("ip", "-6", "rule", "add", *rule)

    told = diagnose(machine, *flags)

    name = f"{CLIENT_ADDRESS}{check}"
    assert {name: "degraded"} == told.but_fine()
    assert f"IPv6 rule {rule[1]}" in told.findings[name]["detail"]


@pytest.mark.parametrize(
    "rule",
    [
        ("priority", "100", "fwmark", "0x80000/0xff0000", "lookup", "7"),
        ("priority", "100", "from", "192.0.2.0/24", "lookup", "7"),
        ("priority", "9000", "lookup", "7"),
    ],
)
def test_other_rules_are_no_conflict(
    rule: tuple[str, ...], machine: Machine, flags: list[str]
) -> None:
    """
    A rule that asks for something else, or comes behind ours, is left alone.
    """
    machine.run("ip", "rule", "add", *rule)

    assert {} == diagnose(machine, *flags).but_fine()


def test_a_filter_that_takes_the_mark_away_is_named(machine: Machine, flags: list[str]) -> None:
    """
    Another nftables rule that sets the whole mark behind ours is degraded.
    """
    machine.run("nft", "add table ip vpn")
    machine.run("nft", "add chain ip vpn pre { type filter hook prerouting priority 0 ; }")
    machine.run("nft", "add rule ip vpn pre meta mark set 7")

    told = diagnose(machine, *flags)

    name = f"{CLIENT_ADDRESS}conflicts"
    assert {name: "degraded"} == told.but_fine()
    assert "nftables table ip vpn, chain pre" in told.findings[name]["detail"]


@pytest.mark.parametrize(
    ("general", "own", "said"),
    [
        ("1", "0", "strict on lo:"),
        ("2", "1", "not strict on any interface"),
    ],
)
def test_strict_rp_filter_is_explained(
    general: str, own: str, said: str, machine: Machine, flags: list[str]
) -> None:
    """
    Interfaces with a strict rp_filter are named; that is fine, since replies pass it.
    """
    folder = "/proc/sys/net/ipv4/conf"
    write = f"echo {general} >{folder}/all/rp_filter; echo {own} >{folder}/lo/rp_filter"
    machine.run(*machine.inside("sh", "-c", write))

    told = diagnose(machine, *flags)

    finding = told.findings[f"{CLIENT_ADDRESS}rp_filter"]
    assert ("fine", True) == (finding["state"], finding["detail"].startswith(said))


def test_an_engine_that_is_away_is_broken(machine: Machine, flags: list[str]) -> None:
    """
    An engine that was asked for and has no socket is broken, and told by its URL.
    """
    told = diagnose(machine, *flags, "--engine", "unix:///run/none.sock")

    (finding,) = (f for name, f in told.findings.items() if name.startswith("engine "))
    assert ("broken", "broken") == (told.state, finding["state"])
    assert "unix:///run/none.sock" in finding["detail"]


def test_a_network_without_loopback_is_told(machine: Machine, flags: list[str]) -> None:
    """
    Where not even user space can move bytes, that is broken, and the fix is the command for it.
    """
    machine.run("ip", "link", "set", "lo", "down")

    told = diagnose(machine, *flags)

    assert "broken" == told.findings["hand-off relay"]["state"]
    assert "ip link set lo up" == told.findings["hand-off relay"]["fix"]


def test_people_are_told_in_words(machine: Machine, flags: list[str]) -> None:
    """
    Without --json a line tells each finding, with its fix below, and the last one sums up.
    """
    done = subprocess.run(
        machine.inside(*limited("net_bind_service"), SNIROUTE, "doctor", *flags),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    lines = done.stdout.splitlines()
    assert (1, "") == (done.returncode, done.stderr)
    assert any(line.startswith("degraded  capabilities ") for line in lines)
    assert any(line.strip().startswith("fix: as root, or with cap_add: [BPF, ") for line in lines)
    assert "sniroute works here, with what is degraded above." == lines[-1]
