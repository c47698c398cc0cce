"""
Tell what this host lets a router do: `python -m controller.router.doctor` prints findings as JSON.

Rules of this file:

1. It changes nothing, and a router that serves here does not notice: what it loads and binds ends
   with it, it listens on no address that clients know, and its bytes stay on loopback.
2. One function for each check.  One that fails in a way that nobody thought of is a finding too.
3. A finding is broken only if a router with these settings can not serve.
"""

import contextlib
import errno
import functools
import ipaddress
import json
import os
import platform
import re
import resource
import socket
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyprctl
from pyroute2 import IPRoute

from bpfprog import (
    CAPABILITIES,
    MAX_CONNECTIONS,
    PACKET_ABI,
    STAND_IN,
    KernelError,
    Packet,
    Splice,
)
from controller import log
from controller.core import wire
from controller.core.finding import Finding, State
from controller.router import pins
from controller.router.__main__ import BIND, SPARE_DESCRIPTORS
from controller.router.address import read_listen
from controller.router.devices import ETHERNET, LOOPBACK, list_devices
from controller.router.flow import Handoff
from controller.router.loop import Loop
from controller.router.packet import PacketHandoff
from controller.router.plumbing import (
    FAMILIES,
    HOOK,
    TABLE,
    Plumbing,
    PlumbingError,
    ip_versions,
    nft,
    read_rules,
    routing,
)
from controller.router.ports import ENOUGH, find_range
from controller.router.probe import probe as try_probe
from controller.router.relay import RelayHandoff
from controller.router.selftest import SelfTestFailed, prove, prove_packet
from controller.router.sockmap import SockmapHandoff
from controller.settings import ClientIp, HandoffChoice, RouterSettings

PROC_SYS: Final = Path("/proc/sys/net")
INTERFACES: Final = Path("/sys/class/net")

MENDED: Final = ((6, 1, 142), (6, 6, 95), (6, 12, 35), (6, 15, 4), (6, 16))
"""The first of each series in which a redirect that has to wait neither loses nor doubles bytes
(7683167196bd, 3b4f14b79428, 5ca2e29f6834); all after the last."""

TCX: Final = (6, 6)
"""The first version with hooks whose programs go with their pins."""

FEW_DESCRIPTORS: Final = 256
"""Below this a router is of no use: less than a hundred connections."""

SOME_DESCRIPTORS: Final = 4096
"""Below this a browser's rush of connections from a few hundred clients has to wait."""

SELECTORS: Final = tuple(
    f"FRA_{name}"
    for name in (
        *("SRC", "DST", "IIFNAME", "OIFNAME", "FWMARK", "L3MDEV", "IP_PROTO"),
        *("SPORT_RANGE", "DPORT_RANGE", "UID_RANGE"),
    )
)
"""What an `ip rule` may ask of a packet (linux/fib_rules.h), besides tos."""

LOOKUP: Final = 1
"""The action of an `ip rule` that leads to a table."""

VERIFIER_LINES: Final = 5
"""Lines at the end of the verifier's log, which tell where it stopped."""

UP: Final = 1
"""IFF_UP."""

ANSWER_TIMEOUT: Final = 2.0
"""Seconds that a router has to say that it is one; it takes milliseconds."""

LOST: Final = {
    "BPF": "no BPF program: bytes are copied in user space",
    "PERFMON": "the BPF program may not read TCP's state: bytes are copied in user space",
    "NET_ADMIN": "no BPF program on sockets, and backends do not see the client's address",
    BIND: "no listening below port {first_port}",
}
"""What is lost without a capability."""


@dataclass(frozen=True, slots=True)
class Host:
    """
    What every check may need: the settings, and the router that serves with them, if one does.

    *router* is its process, 0 if that is of another namespace, None if no router answers; *status*
    what it answers, and *packet* what it tells of that hand-off, nothing where it is not in use.
    """

    settings: RouterSettings
    router: int | None
    status: wire.Message
    packet: wire.Message


Check = Callable[[Host], Finding]


def examine(settings: RouterSettings) -> list[Finding]:
    """
    Make every check that these settings ask for.
    """
    host = Host(settings, *_ask_router(settings.control))
    return [_guarded(check, host) for check in _checks(settings)]


def _checks(settings: RouterSettings) -> Iterator[Check]:
    yield from (kernel, capabilities, descriptors, receive_buffer)
    if settings.handoff != HandoffChoice.RELAY:
        yield from (jit, type_information, program, sockmap)
    if settings.handoff in (HandoffChoice.AUTO, HandoffChoice.PACKET):
        yield from (bpffs, packet, devices, forwarding, ports, leftovers)
    yield from (relay, steering)
    if settings.client_ip != ClientIp.OFF:
        yield from (plumbing, conflicts, probe, reverse_path)
    addresses = [*settings.listen, *([settings.metrics] if settings.metrics != "off" else [])]
    yield from (functools.partial(listen, address=address) for address in addresses)
    yield running


def _guarded(check: Check, host: Host) -> Finding:
    try:
        return check(host)
    except Exception as err:  # noqa: BLE001 - the others still tell something
        name = getattr(check, "func", check).__name__
        return Finding(name, State.DEGRADED, f"check failed: {err!r}")


def _hindered(
    host: Host,
    check: str,
    detail: str,
    fix: str,
    handoff: HandoffChoice = HandoffChoice.SOCKMAP,
) -> Finding:
    """
    Tell of something without which there is no *handoff*, which may be asked for by name.
    """
    insists = host.settings.handoff == handoff
    return Finding(check, State.BROKEN if insists else State.DEGRADED, detail, fix)


# --- kernel and BPF ---


def kernel(_: Host) -> Finding:
    """
    Look at the version; what it means is for the self-test to say.
    """
    release, version = platform.release(), _version()
    mended = version >= MENDED[-1] or any(version[:2] == m[:2] and version >= m for m in MENDED)
    detail = f"Linux {release}"
    if not mended:
        detail += (
            "; upstream, sockmap lost or doubled bytes in this version; distributions mend"
            " theirs, so what counts is the self-test"
        )
    return Finding("kernel", State.FINE, detail)


def _version() -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", platform.release())[:3])


def jit(_: Host) -> Finding:
    """
    Look whether BPF is compiled.
    """
    enabled = _read(PROC_SYS / "core/bpf_jit_enable")
    if enabled == "0":
        return Finding(
            "BPF compiler",
            State.DEGRADED,
            "off: the BPF program is interpreted, for each segment",
            "sysctl -w net.core.bpf_jit_enable=1",
        )
    return Finding("BPF compiler", State.FINE, "on" if enabled else "not told in this namespace")


def type_information(host: Host) -> Finding:
    """
    Look for the kernel's own types, to which the program is fitted.
    """
    path = Path("/sys/kernel/btf/vmlinux")
    if path.exists():
        return Finding("BPF types", State.FINE, f"{path} is there")
    return _hindered(
        host,
        "BPF types",
        f"no {path}: the BPF program can not be fitted to this kernel",
        "a kernel with CONFIG_DEBUG_INFO_BTF, as distributions have it; /sys in the container",
    )


def program(host: Host) -> Finding:
    """
    Load the BPF program with its maps, and unload it.
    """
    try:
        with Splice():
            return Finding("BPF program", State.FINE, "the kernel takes it")
    except KernelError as err:
        lines = "\n".join(getattr(err, "__notes__", ())).splitlines()[-VERIFIER_LINES:]
        permission = err.errno in (errno.EPERM, errno.EACCES)
        return _hindered(
            host,
            "BPF program",
            "\n".join([f"refused: {err.strerror}", *lines]),
            "the capabilities that are missing"
            if permission
            else "a newer kernel, with CONFIG_BPF_STREAM_PARSER",
        )


def sockmap(host: Host) -> Finding:
    """
    Move real bytes through the kernel, from loopback to loopback.
    """
    loop = Loop()
    try:
        with Splice() as splice:
            why = _prove(loop, SockmapHandoff(loop, splice, host.settings.backlog_limit))
    except KernelError:
        detail = "not tried, since the BPF program does not load; bytes are copied in user space"
        return _hindered(host, "hand-off sockmap", detail, "as for the BPF program")
    if not why:
        return Finding("hand-off sockmap", State.FINE, "self-test passed: the kernel moves bytes")
    return _hindered(
        host,
        "hand-off sockmap",
        f"self-test failed: {why}; bytes are copied in user space",
        "a newer kernel; --handoff relay says that this is meant",
    )


def relay(_: Host) -> Finding:
    """
    Move real bytes through user space.
    """
    loop = Loop()
    if why := _prove(loop, RelayHandoff(loop)):
        return Finding("hand-off relay", State.BROKEN, why, "ip link set lo up")
    return Finding("hand-off relay", State.FINE, "self-test passed")


def _prove(loop: Loop, handoff: Handoff) -> str:
    try:
        prove(loop, handoff)
    except SelfTestFailed as err:
        return str(err)
    return ""


# --- packets ---


def bpffs(host: Host) -> Finding:
    """
    Look for the bpf filesystem, and whether something can be left in it.
    """
    check, path = "BPF file system", host.settings.bpffs
    try:
        with _scratch(path):
            return Finding(check, State.FINE, f"{path} can be written")
    except OSError as err:
        return _hindered(
            host,
            check,
            f"{err.strerror}: no connection is handed over as packets",
            f"mount -t bpf bpf {path}, as root; in a container, mount the host's /sys/fs/bpf to a"
            " path that is not below /sys, where AppArmor forbids to write, and name that with"
            " --bpffs",
            HandoffChoice.PACKET,
        )


@contextlib.contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """
    Have a folder of our own in the bpf filesystem *path*, as a router has, for a moment.

    Raises:
        OSError: that is not possible; the message names the path.
    """
    if not pins.is_bpffs(path):
        raise OSError(errno.ENOENT, f"no bpf filesystem at {path}")
    folder = path / pins.FOLDER
    mine = folder / f"{pins.DOCTOR}-{os.getpid()}"
    made = not folder.exists()
    try:
        mine.mkdir(mode=0o700, parents=True)
    except OSError as err:
        raise OSError(err.errno, f"{mine}: {err.strerror}") from None
    try:
        yield mine
    finally:
        for left in mine.iterdir():
            left.unlink()
        mine.rmdir()
        if made:
            # unless a router began meanwhile
            with contextlib.suppress(OSError):
                folder.rmdir()


def packet(host: Host) -> Finding:
    """
    Have the kernel translate packets of a trial flow, on no device.
    """
    check = "hand-off packet"
    try:
        with _scratch(host.settings.bpffs) as folder:
            why, fix = _try_packets(host.settings, folder)
    except OSError as err:
        why, fix = f"not tried: {err.strerror}", "as for the BPF file system"
    if why:
        return _hindered(host, check, why, fix, HandoffChoice.PACKET)
    hook = "TCX" if _version() >= TCX else "clsact"
    detail = f"self-test passed: the kernel translates packets, by programs at its {hook} hooks"
    return Finding(check, State.FINE, detail)


def _try_packets(settings: RouterSettings, folder: Path) -> tuple[str, str]:
    """
    Load the programs, with maps in *folder*, and prove them; say what is wrong and what mends it.
    """
    loop = Loop()
    try:
        with Packet(folder, 0) as programs:
            patience, idle = settings.connect_timeout, settings.packet_idle
            prove_packet(loop, PacketHandoff(loop, programs, patience, idle))
    except KernelError as err:
        lines = "\n".join(getattr(err, "__notes__", ())).splitlines()[-VERIFIER_LINES:]
        why = "\n".join([f"programs refused: {err.strerror}", *lines])
        if err.errno == errno.EPERM:
            return why, "the capabilities that are missing"
        return why, "Linux 5.17 or newer, for bpf_loop, with CONFIG_NET_CLS_BPF"
    except SelfTestFailed as err:
        return (
            f"self-test failed: {err}",
            "a newer kernel; --handoff sockmap says that this is meant",
        )
    return "", ""


def devices(host: Host) -> Finding:
    """
    Tell by which devices connections can be handed over as packets, and by which not.
    """
    check = "packet devices"
    followed, others = _devices()
    on = host.packet.get("state") == wire.PacketState.ON
    missing = sorted({*followed} - {*host.packet["devices"]}) if on else []
    if missing:
        return Finding(
            check,
            State.DEGRADED,
            f"the router that serves here is not at {_names(missing)}: what comes by it takes the"
            " next hand-off",
            "its log tells why: device not followed",
        )
    detail = f"by {_names(followed)}"
    if others:
        detail += f"; what comes by {_names(others)}, without Ethernet headers, takes the next one"
    return Finding(check, State.FINE, detail)


def _devices() -> tuple[list[str], list[str]]:
    """
    Name the devices that the packet programs belong on, and those that they can not be on.
    """
    with IPRoute(strict_check=True) as ip:
        wanted = list_devices(ip)
        links = [(str(link.get_attr("IFLA_IFNAME")), link) for link in ip.get_links()]
    followed = (name for name, link in links if link["index"] in wanted)
    others = (
        name
        for name, link in links
        if link["ifi_type"] != ETHERNET and link["flags"] & UP and not link["flags"] & LOOPBACK
    )
    return sorted(followed), sorted(others)


def forwarding(host: Host) -> Finding:
    """
    See whether this host forwards what comes by those devices.
    """
    check = "packet forwarding"
    names, _ = _devices()
    v4, v6 = (
        [name for name in names if _read(PROC_SYS / v / "conf" / name / "forwarding") == "0"]
        for v in ("ipv4", "ipv6")
    )
    if v4:
        return _hindered(
            host,
            check,
            f"off for IPv4 on {_names(v4)}: what comes by it takes the next hand-off",
            "sysctl -w net.ipv4.conf.all.forwarding=1, as engines do when they make a bridge",
            HandoffChoice.PACKET,
        )
    detail = f"on, but for IPv6 on {_names(v6)}" if v6 else "on"
    return Finding(check, State.FINE, detail)


def ports(_: Host) -> Finding:
    """
    See whether the kernel leaves enough ports to dial from, where no one else comes upon them.
    """
    check = "ports"
    ours, are_apart = find_range()
    numbers = f"{ours.start} to {ours.stop - 1}"
    if are_apart:
        return Finding(check, State.FINE, f"{numbers} are for connections handed over as packets")
    return Finding(
        check,
        State.DEGRADED,
        f"net.ipv4.ip_local_port_range is {numbers}, and leaves fewer than {ENOUGH}: what else on"
        " this host dials a backend may be given the port of a connection handed over as packets,"
        " and then gets no answer",
        'sysctl -w net.ipv4.ip_local_port_range="32768 60999"',
    )


def leftovers(host: Host) -> Finding:
    """
    Name what other routers have pinned, and whether programs of another version are in our way.
    """
    check = "packet leftovers"
    left = pins.others(host.settings)
    if not left:
        return Finding(check, State.FINE, "none")
    stale = any(item.here and item.abi != str(PACKET_ABI) for item in left)
    return Finding(
        check,
        State.DEGRADED if stale else State.FINE,
        "\n".join(["not this router's:", *(f"{item.path}, of {_owner(item)}" for item in left)]),
        "what another version has left in its place a router takes down after its last connection;"
        " where no router runs that it is of: rm -r that folder, which resets its connections"
        + ("" if _version() >= TCX else "; tc qdisc del dev DEVICE clsact, for each device"),
    )


def _owner(left: pins.Left) -> str:
    if left.abi == pins.DOCTOR:
        return "a doctor that was killed"
    if not left.here:
        return "another network, which may be gone"
    return "another control socket" if left.abi == str(PACKET_ABI) else "another version"


# --- privileges and limits ---


def capabilities(host: Host) -> Finding:
    """
    Compare what this process may do with what a router needs for these settings.
    """
    held = {cap.name for cap in pyprctl.CapState.get_current().permitted}
    if STAND_IN in held:
        held |= {"BPF", "PERFMON"}
    first_port = int(_read(PROC_SYS / "ipv4/ip_unprivileged_port_start") or 1024)
    needed = set() if host.settings.handoff == HandoffChoice.RELAY else set(CAPABILITIES)
    needed |= set() if host.settings.client_ip == ClientIp.OFF else {"NET_ADMIN"}
    with contextlib.suppress(ValueError):
        if any(read_listen(address)[1] < first_port for address in host.settings.listen):
            needed.add(BIND)
    if missing := sorted(needed - held):
        lost = [f"{name}: {LOST[name].format(first_port=first_port)}" for name in missing]
        return Finding(
            "capabilities",
            State.DEGRADED,
            "\n".join(["missing", *lost]),
            f"as root, or with cap_add: [{', '.join(missing)}]; SYS_ADMIN stands for BPF and"
            " PERFMON where an engine is older than these",
        )
    return Finding("capabilities", State.FINE, ", ".join(sorted(needed)) or "none needed")


def descriptors(host: Host) -> Finding:
    """
    Tell how many connections the limit of descriptors allows.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    possible = min(max(0, hard - SPARE_DESCRIPTORS) // 2, MAX_CONNECTIONS)
    wanted = host.settings.max_connections
    state = State.DEGRADED if hard < SOME_DESCRIPTORS else State.FINE
    detail = f"{hard}, for {possible} connections at once"
    if hard < FEW_DESCRIPTORS or wanted > possible:
        state = State.BROKEN
        detail += f", not --max-connections {wanted}" if wanted > possible else ""
    fix = "ulimit -Hn, LimitNOFILE= of the service, or ulimits: nofile of the container"
    return Finding("file descriptors", state, detail, "" if state == State.FINE else fix)


def receive_buffer(host: Host) -> Finding:
    """
    See whether sockets to backends get the receive buffer that is set.
    """
    wanted = int(host.settings.receive_buffer)
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, wanted)
        # the kernel doubles it, for its own bookkeeping
        given = trial.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2
    if given < wanted:
        return Finding(
            "receive buffer",
            State.DEGRADED,
            f"{given} bytes for sockets to backends, not the {wanted} that are set:"
            " large downloads are slower",
            f"sysctl -w net.core.rmem_max={wanted}",
        )
    return Finding("receive buffer", State.FINE, f"{wanted} bytes")


def steering(_: Host) -> Finding:
    """
    Tell which virtual interfaces spread their packets over cores.
    """
    on: list[str] = []
    off: list[str] = []
    for interface in sorted(INTERFACES.iterdir()):
        # hardware has a device; loopback is no way to a container
        if (interface / "device").exists() or interface.name == "lo":
            continue
        masks = [_read(path) or "" for path in interface.glob("queues/rx-*/rps_cpus")]
        (on if any(mask.strip("0,") for mask in masks) else off).append(interface.name)
    return Finding(
        "packet steering",
        State.FINE,
        f"RPS is on for {_names(on)}, off for {_names(off)}; it lifts the throughput of a sockmap"
        " a little, and costs all else on hosts where waking another core is dear: measure",
    )


# --- the client's address ---


def plumbing(host: Host) -> Finding:
    """
    See whether what a router lays is there, or could be.
    """
    check = "client address: plumbing"
    try:
        missing = _missing(host.settings)
    except PlumbingError as err:
        return Finding(
            check,
            State.DEGRADED,
            f"{err}; backends see this host's address",
            "give the router NET_ADMIN and libnftables; where something is in the way, another"
            " --transparent-mark, --transparent-table or --transparent-priority",
        )
    if missing and host.router is not None:
        return Finding(
            check,
            State.DEGRADED,
            f"gone, though a router serves: {', '.join(missing)}",
            "none if it is back in 10 s; else find out who removes it",
        )
    return Finding(check, State.FINE, "nothing is in its way" if missing else "in place")


def _missing(settings: RouterSettings) -> tuple[str, ...]:
    """
    Name what of the plumbing is not there.

    Raises:
        PlumbingError: it could not be laid.
    """
    ours = Plumbing(
        settings.transparent_mark,
        settings.transparent_mask,
        settings.transparent_table,
        settings.transparent_priority,
    )
    with routing() as ip:
        for version in ip_versions():
            ours.look_out(ip, version, read_rules(ip, version))
    # whether the table is as it was laid, only who laid it can tell
    laid = any(item.get("table", {}).items() >= TABLE.items() for item in _ruleset())
    return tuple(part for part in ours.verify() if not (laid and part.startswith("nftables")))


def _ruleset() -> list[dict[str, Any]]:
    ruleset: list[dict[str, Any]] = nft([{"list": {"ruleset": None}}])["nftables"]
    return ruleset


def probe(_: Host) -> Finding:
    """
    Try a connection from another's address, in network namespaces of its own.
    """
    check = "client address: probe"
    result = try_probe()
    if result.ok is None:
        detail = f"{result.reason}; the first connections to each backend will tell"
        return Finding(check, State.FINE, detail)
    if result.ok:
        return Finding(check, State.FINE, f"{result.reason}, in a network of its own")
    detail = f"{result.reason}; backends see this host's address"
    return Finding(check, State.DEGRADED, detail, "a kernel with CONFIG_NFT_SOCKET; libnftables")


def conflicts(host: Host) -> Finding:
    """
    Look for rules that would have a reply before ours, or take its mark away.
    """
    check = "client address: conflicts"
    try:
        setters = list(_mark_setters(_ruleset()))
    except PlumbingError as err:
        return Finding(check, State.DEGRADED, f"not looked for: {err}", "NET_ADMIN; libnftables")
    found = [*_earlier_rules(host.settings.transparent_priority), *setters]
    if not found:
        return Finding(check, State.FINE, "no other rule takes the replies")
    return Finding(
        check,
        State.DEGRADED,
        "\n".join(["replies to clients may go astray:", *found]),
        "a lower --transparent-priority; rules that set some bits of the mark (mark or 0x1)",
    )


def _earlier_rules(priority: int) -> Iterator[str]:
    """
    Find `ip rule`s before ours that ask nothing of a packet.
    """
    with IPRoute() as ip:
        for version in ip_versions():
            for rule in ip.get_rules(family=FAMILIES[version]):
                # the first of all leads to this host's own addresses, and has the priority 0
                before = 0 < (rule.get_attr("FRA_PRIORITY") or 0) < priority
                asks = any(rule.get_attr(name) for name in SELECTORS) or rule["tos"]
                if before and not asks and rule["action"] == LOOKUP:
                    table = rule.get_attr("FRA_TABLE")
                    number = rule.get_attr("FRA_PRIORITY")
                    yield f"IPv{version} rule {number}: everything looks up table {table}"


def _mark_setters(ruleset: Iterable[dict[str, Any]]) -> Iterator[str]:
    """
    Find nftables rules behind ours, and before routing, that set the whole mark.
    """
    late = set()
    for item in ruleset:
        if (chain := item.get("chain")) and chain.get("hook") == "prerouting":
            if chain["prio"] >= HOOK:
                late.add((chain["family"], chain["table"], chain["name"]))
        elif rule := item.get("rule"):
            place = rule["family"], rule["table"], rule["chain"]
            if place in late and any(map(_sets_mark, rule["expr"])):
                yield "nftables table {} {}, chain {}: sets the mark".format(*place)


def _sets_mark(statement: dict[str, Any]) -> bool:
    mangle = statement.get("mangle", {})
    # what works on the old mark keeps the bits that are not its own
    keeps = isinstance(mangle.get("value"), dict) and mangle["value"].keys() & {"|", "&", "^"}
    return mangle.get("key") == {"meta": {"key": "mark"}} and not keeps


def reverse_path(_: Host) -> Finding:
    """
    Tell which interfaces take a packet only from where its source is routed to.
    """
    folder = PROC_SYS / "ipv4/conf"
    modes = {path.name: int(_read(path / "rp_filter") or 0) for path in sorted(folder.iterdir())}
    general = modes.pop("all", 0)
    modes.pop("default", None)
    # the kernel takes the larger number: 1 is strict, 2 is loose
    strict = [name for name, mode in modes.items() if max(general, mode) == 1]
    detail = "not strict on any interface"
    if strict:
        detail = (
            f"strict on {_names(strict)}: good for containers that answer over the network they"
            " are reached by; one that answers over another of its networks is not heard, and"
            " gets an ordinary connection"
        )
    return Finding("client address: rp_filter", State.FINE, detail)


# --- addresses and the router that has them ---


def listen(host: Host, address: str) -> Finding:
    """
    See whether *address* can be listened on, without listening.
    """
    check = f"listen {address}"
    try:
        name, port = read_listen(address)
        family = socket.AF_INET6 if ":" in name or not name else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            # with this a bind meets those that listen, and none that has ended
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(bool(name)))
            trial.bind((name or "::", port))
    except ValueError:
        return Finding(check, State.BROKEN, "no address", "ADDR:PORT, [ADDR]:PORT or :PORT")
    except OSError as err:
        if err.errno != errno.EADDRINUSE:
            fix = {
                errno.EACCES: f"CAP_{BIND}, or sysctl -w net.ipv4.ip_unprivileged_port_start=0",
                errno.EADDRNOTAVAIL: "an address of this host; see: ip address",
                errno.EAFNOSUPPORT: "IPv6 is off: name IPv4 addresses, as in 0.0.0.0:443",
            }
            detail = os.strerror(err.errno or 0)
            return Finding(check, State.BROKEN, detail, fix.get(err.errno or 0, ""))
        return _in_use(host, check, name, port)
    return Finding(check, State.FINE, "free")


def _in_use(host: Host, check: str, name: str, port: int) -> Finding:
    owners = _owners(_listening(name, port))
    if host.router is not None and (host.router in owners or not owners):
        return Finding(check, State.FINE, "in use, by the router that serves here")
    who = _names(f"{name} (process {pid})" for pid, name in owners.items())
    return Finding(
        check,
        State.BROKEN,
        f"in use by {who if owners else 'a process that can not be seen from here'}",
        "stop it, or another address with --listen or --metrics",
    )


def _listening(name: str, port: int) -> set[str]:
    """
    Find the sockets that listen where *name* and *port* would, by their numbers in /proc.
    """
    wanted = ipaddress.ip_address(socket.getaddrinfo(name or "::", port)[0][4][0])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in (_read(Path("/proc/net") / table) or "").splitlines()[1:]:
            fields = line.split()
            local, _, number = fields[1].partition(":")
            words = [bytes.fromhex(local[i : i + 8]) for i in range(0, len(local), 8)]
            packed = b"".join(w[::-1] if sys.byteorder == "little" else w for w in words)
            here = ipaddress.ip_address(packed)
            overlaps = here == wanted or here.is_unspecified or wanted.is_unspecified
            if fields[3] == "0A" and int(number, 16) == port and overlaps:
                found.add(f"socket:[{fields[9]}]")
    return found


def _owners(sockets: set[str]) -> dict[int, str]:
    """
    Find the processes that hold any of *sockets*, as far as we may look.
    """
    owners = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            held = {str(fd.readlink()) for fd in (process / "fd").iterdir()}
        except OSError:
            continue
        if held & sockets:
            owners[int(process.name)] = _read(process / "comm") or "?"
    return owners


def running(host: Host) -> Finding:
    """
    Tell of the router that serves here.
    """
    control = host.settings.control
    if host.router is None:
        return Finding("router", State.FINE, f"none answers at {control}")
    handoff, client_ip = host.status["handoff"], host.status["client_ip"]
    detail = (
        f"{host.status['version']} serves, process {host.router or 'in another namespace'},"
        f" hand-off {handoff['chosen']} ({handoff['reason']})"
    )
    if client_ip["mode"] != ClientIp.OFF and not client_ip["working"]:
        detail += f"; backends see this host's address: {client_ip['reason']}"
        return Finding("router", State.DEGRADED, detail, "see the findings on client address")
    return Finding("router", State.FINE, detail)


def _ask_router(path: Path) -> tuple[int | None, wire.Message, wire.Message]:
    """
    Find the process behind the control socket at *path*, if it is a router, and what it tells.
    """
    decoder = wire.Decoder()
    router: int | None = None
    status: wire.Message = {}
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(ANSWER_TIMEOUT)
            connection.connect(str(path))
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            connection.sendall(wire.encode({"type": "status"}))
            connection.sendall(wire.encode({"type": "packet", "state": wire.PacketState.STATUS}))
            while data := connection.recv(65536):
                for answer in decoder.feed(data):
                    if answer["type"] == "status":
                        router, status = struct.unpack("iII", credentials)[0], answer
                    elif answer["type"] == "packet":
                        return router, status, answer.get("packet") or {}
    except (OSError, wire.WireError):
        pass
    return router, status, {}


# --- small things ---


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def main() -> int:
    """
    Print the findings for the environment's settings.
    """
    settings = RouterSettings()
    log.configure("doctor", "error")
    print(json.dumps([finding.fields() for finding in examine(settings)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
