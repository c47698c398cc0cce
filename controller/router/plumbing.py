"""
Have replies to a client's address come to the sockets here that borrowed it.

Three parts, in the order in which a reply meets them: an nftables rule marks what belongs to a
transparent socket of this host; an `ip rule` sends what is marked to a routing table of its own;
the one route there says that every address is local.  Nothing else is marked, so each part alone
does nothing, and all of them do nothing without a router.

Rules of this file:

1. What is ours carries our name (the nftables table) or our protocol number (rules and routes).
   That is replaced and removed, whoever left it behind; what is not ours is never touched.
2. Everything can be done twice.

libnftables is called in this process: a program started by a router without uid 0 would not have
the router's capabilities, and a router needs no right to start programs.
"""

import contextlib
import ctypes
import errno
import ipaddress
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import structlog
from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from controller.core.clientip import Network

INTERVAL: Final = 3.0
"""Seconds between looks.  Whoever flushes the filters is answered in a third of the 10 s that are
promised; a look takes some milliseconds."""

PROTOCOL: Final = 143
"""Who made a rule or a route, as routing daemons sign theirs; not in /etc/iproute2/rt_protos."""

MAIN: Final = 254
LOOPBACK: Final = 1
"""Index of lo, in every network namespace."""

HOOK: Final = -149
"""mangle + 1: behind those who set a whole mark at mangle, before the routing decision."""

TABLE: Final = {"family": "inet", "name": "sniroute"}

FAMILIES: Final = {4: socket.AF_INET, 6: socket.AF_INET6}
EVERYTHING: Final = {4: "0.0.0.0/0", 6: "::/0"}

_LIBRARY: Final = "libnftables.so.1"
_OUTPUT_JSON: Final = 1 << 4
_NETLINK_NETFILTER: Final = 12
_GONE: Final = {errno.ENOENT, errno.ESRCH, errno.EAFNOSUPPORT, errno.EOPNOTSUPP}
_RTN_LOCAL: Final = 2
_SCOPE_HOST: Final = 254

log = structlog.get_logger()


class PlumbingError(Exception):
    """
    The plumbing can not be laid; the message says what is in the way or missing.
    """


@dataclass(frozen=True, slots=True)
class Rule:
    """
    An `ip rule`, as far as it matters here.
    """

    priority: int
    mark: int
    mask: int
    table: int
    interface: str = ""
    protocol: int = PROTOCOL


class Plumbing:
    """
    The plumbing of the network namespace that the caller is in.
    """

    def __init__(self, mark: int, mask: int, table: int, priority: int) -> None:
        if not mark or mark & ~mask:
            raise PlumbingError(f"mark {mark:#x}: must be some of the bits of mask {mask:#x}")
        self._table = table
        self._rules = (
            # Who asks for the way back to a packet's source, with the packet's mark, must not be
            # told that it is this host: rp_filter does so where src_valid_mark is set (wg-quick
            # sets it), firewalld does for IPv6.  Both ask in the name of lo; replies come from
            # other interfaces.
            Rule(priority - 1, mark, mask, MAIN, "lo"),
            Rule(priority, mark, mask, table),
        )
        self._ruleset = _ruleset(mark, mask)
        self._listed: Any = None

    def install(self) -> None:
        """
        Lay all that is missing, and replace what an earlier router left.

        Raises:
            PlumbingError: it is not possible, or something of someone else's is in the way.
        """
        with routing() as ip:
            found = {version: read_rules(ip, version) for version in ip_versions()}
            for version, rules in found.items():
                self.look_out(ip, version, rules)
            nft(self._ruleset)
            for version, rules in found.items():
                self._clear(ip, version, keep=self._rules)
                # the route first: a rule that leads to an empty table leads on to the next rule
                if not _routes(ip, version, self._table):
                    _change(ip.route, "add", **_route(version, self._table))
                for rule in self._rules:
                    if rule not in rules:
                        _change(ip.rule, "add", **_fields(version, rule))
        # compared with from now on: how a kernel and a library write a rule back is theirs
        self._listed = _list_table()

    def verify(self) -> tuple[str, ...]:
        """
        Name what is missing.

        Raises:
            PlumbingError: it can not be told.
        """
        missing = []
        with routing() as ip:
            for version in ip_versions():
                rules = read_rules(ip, version)
                missing += [
                    f"IPv{version} rule {rule.priority}"
                    for rule in self._rules
                    if rule not in rules
                ]
                if not _routes(ip, version, self._table):
                    missing.append(f"IPv{version} route in table {self._table}")
        listed = _list_table()
        if listed is None or listed != self._listed:
            missing.append("nftables table {family} {name}".format(**TABLE))
        return tuple(missing)

    def remove(self) -> None:
        """
        Take away all that is ours, from this router or another.

        Raises:
            PlumbingError: something is left.
        """
        nft([{"add": {"table": TABLE}}, {"delete": {"table": TABLE}}])
        with routing() as ip:
            for version in FAMILIES:
                self._clear(ip, version, keep=())

    def _clear(self, ip: IPRoute, version: int, keep: tuple[Rule, ...]) -> None:
        """
        Delete our rules but *keep*, each with the route that it led to.
        """
        kept = {rule.table for rule in keep}
        stale = [
            rule
            for rule in read_rules(ip, version)
            if rule.protocol == PROTOCOL and rule not in keep
        ]
        for rule in stale:
            _change(ip.rule, "del", **_fields(version, rule))
        for table in {self._table, *(rule.table for rule in stale)} - kept - {MAIN}:
            if any(protocol == PROTOCOL for protocol in _routes(ip, version, table)):
                _change(ip.route, "del", **_route(version, table))

    def look_out(self, ip: IPRoute, version: int, rules: list[Rule]) -> None:
        """
        See that nothing of anyone else's would catch our packets, or have its own caught.
        """
        for rule in rules:
            if rule.protocol == PROTOCOL:
                continue
            name = f"IPv{version} rule {rule.priority} (fwmark {rule.mark:#x}/{rule.mask:#x})"
            if rule.priority in {ours.priority for ours in self._rules}:
                raise PlumbingError(f"{name} has the priority of ours: set another")
            ours, common = self._rules[0], rule.mask & self._rules[0].mask
            if common and not (rule.mark ^ ours.mark) & common:
                raise PlumbingError(f"{name} matches our mark {ours.mark:#x}: set another")
        if any(protocol != PROTOCOL for protocol in _routes(ip, version, self._table)):
            raise PlumbingError(f"table {self._table} has IPv{version} routes: set another")


class Watch:
    """
    A thread that keeps *plumbing* whole, and knows what this host is on.

    *on_change* is called in the thread, when the plumbing is found broken (False, and why) and
    when it is whole again (True).
    """

    def __init__(self, plumbing: Plumbing, on_change: Callable[[bool, str], None]) -> None:
        self._plumbing = plumbing
        self._on_change = on_change
        self._state = (True, "")
        self._over = threading.Event()
        self.network = read_network()
        self._thread = threading.Thread(target=self._run, name="plumbing", daemon=True)

    def start(self) -> None:
        """
        Begin; the plumbing has just been installed.
        """
        self._thread.start()

    def stop(self) -> None:
        """
        End, and wait until a repair that is under way is done.
        """
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(INTERVAL):
            try:
                self._look()
            except PlumbingError as err:
                self._tell(False, str(err))
            except Exception as err:
                log.exception("plumbing not looked at")
                self._tell(False, repr(err))

    def _look(self) -> None:
        self.network = read_network()
        if missing := self._plumbing.verify():
            # told once, not before each attempt to repair
            if self._state[0]:
                self._tell(False, f"gone: {', '.join(missing)}")
            self._plumbing.install()
        self._tell(True, "")

    def _tell(self, ok: bool, reason: str) -> None:  # noqa: FBT001 - the state itself
        if self._state != (ok, reason):
            self._state = (ok, reason)
            self._on_change(ok, reason)


def read_network() -> Network:
    """
    Look up what this host is on now.

    Raises:
        PlumbingError: the kernel does not tell.
    """
    with routing() as ip:
        # IFA_LOCAL differs from IFA_ADDRESS on a point-to-point link, where that is the peer's
        found = [(a.get("local") or a.get("address"), a["prefixlen"]) for a in ip.get_addr()]
    return Network(
        frozenset(ipaddress.ip_interface(f"{address}/{length}") for address, length in found),
        frozenset(ip_versions()),
    )


def ip_versions() -> tuple[int, ...]:
    """
    Tell which IP versions there are here: kernels, and namespaces, may have no IPv6.
    """
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        probe.bind(("::1", 0))
        return (4, 6)
    return (4,)


# --- rules and routes ---


@contextlib.contextmanager
def routing() -> Iterator[IPRoute]:
    """
    Talk to the kernel of addresses, rules and routes.

    Raises:
        PlumbingError: it does not answer.
    """
    try:
        # strict: the kernel dumps the table that is asked for, not a million others' routes
        with IPRoute(strict_check=True) as ip:
            yield ip
    except (NetlinkError, OSError) as err:
        code = getattr(err, "code", None) or getattr(err, "errno", None)
        raise PlumbingError(f"rules and routes: {errno.errorcode.get(code or 0, err)}") from err


def _change(call: Callable[..., Any], command: str, **fields: Any) -> None:
    """
    Add what may be there already, or delete what may be gone.
    """
    try:
        call(command, **fields)
    except NetlinkError as err:
        if err.code not in ({errno.EEXIST} if command == "add" else _GONE):
            raise


def read_rules(ip: IPRoute, version: int) -> list[Rule]:
    """
    List the rules that match a mark, or are ours.
    """
    try:
        return [
            Rule(
                rule.get("priority") or 0,
                rule.get("fwmark") or 0,
                rule.get("fwmask") or 0,
                rule.get_attr("FRA_TABLE") or rule["table"],
                rule.get("iifname") or "",
                rule.get("protocol") or 0,
            )
            for rule in ip.get_rules(family=FAMILIES[version])
            if rule["family"] == FAMILIES[version]
        ]
    except NetlinkError as err:
        if err.code in _GONE:
            return []
        raise


def _routes(ip: IPRoute, version: int, table: int) -> list[int]:
    """
    List who made the routes in *table*.
    """
    try:
        return [
            route["proto"]
            for route in ip.get_routes(family=FAMILIES[version], table=table)
            if route["family"] == FAMILIES[version]
        ]
    except NetlinkError as err:
        if err.code in _GONE:
            return []
        raise


def _fields(version: int, rule: Rule) -> dict[str, Any]:
    fields = {
        "family": FAMILIES[version],
        "priority": rule.priority,
        "fwmark": rule.mark,
        "fwmask": rule.mask,
        "table": rule.table,
        "protocol": rule.protocol,
    }
    return fields | ({"iifname": rule.interface} if rule.interface else {})


def _route(version: int, table: int) -> dict[str, Any]:
    return {
        "family": FAMILIES[version],
        "dst": EVERYTHING[version],
        "type": _RTN_LOCAL,
        "scope": _SCOPE_HOST,
        "oif": LOOPBACK,
        "table": table,
        "proto": PROTOCOL,
    }


# --- nftables ---


def _ruleset(mark: int, mask: int) -> list[Any]:
    """
    Write the table as one transaction that replaces it.
    """
    chain = {"family": TABLE["family"], "table": TABLE["name"]}
    old_mark = {"meta": {"key": "mark"}}
    return [
        # deleting needs it to be there, adding does not mind if it is
        {"add": {"table": TABLE}},
        {"delete": {"table": TABLE}},
        {"add": {"table": TABLE}},
        {
            "add": {
                "chain": chain
                | {"name": "pre", "type": "filter", "hook": "prerouting"}
                | {"prio": HOOK, "policy": "accept"}
            }
        },
        {
            "add": {
                "rule": chain
                | {
                    "chain": "pre",
                    "expr": [
                        _match({"meta": {"key": "l4proto"}}, "tcp"),
                        _match({"socket": {"key": "transparent"}}, 1),
                        # a transparent listener on every address is no reason
                        _match({"socket": {"key": "wildcard"}}, 0),
                        {
                            "mangle": {
                                "key": old_mark,
                                "value": {"|": [{"&": [old_mark, ~mask & 0xFFFFFFFF]}, mark]},
                            }
                        },
                    ],
                }
            }
        },
    ]


def _match(left: dict[str, Any], right: str | int) -> dict[str, Any]:
    return {"match": {"op": "==", "left": left, "right": right}}


def _list_table() -> Any:
    """
    Return our table as the library writes it, None if it is not there.
    """
    try:
        objects = nft([{"list": {"table": TABLE}}])["nftables"]
    except PlumbingError:
        return None
    found = [next(iter(entry.items())) for entry in objects]
    return [
        (kind, {name: value for name, value in body.items() if name != "handle"})
        for kind, body in found
        if kind != "metainfo"
    ]


def nft(commands: list[Any]) -> Any:
    """
    Run *commands* as one transaction, and return what they print.

    Raises:
        PlumbingError: none of them took effect.
    """
    try:
        # the library ends the process if it can not open one
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER).close()
        library = ctypes.CDLL(_LIBRARY)
    except OSError as err:
        raise PlumbingError(f"nftables: {err}") from err
    new, read_output, read_error = (
        library.nft_ctx_new,
        library.nft_ctx_get_output_buffer,
        library.nft_ctx_get_error_buffer,
    )
    new.restype = ctypes.c_void_p
    read_output.restype = read_error.restype = ctypes.c_char_p
    context = ctypes.c_void_p(new(0))
    try:
        library.nft_ctx_output_set_flags(context, _OUTPUT_JSON)
        library.nft_ctx_buffer_output(context)
        library.nft_ctx_buffer_error(context)
        text = json.dumps({"nftables": commands}).encode()
        if library.nft_run_cmd_from_buffer(context, text):
            why = (read_error(context) or b"").decode(errors="replace").strip()
            raise PlumbingError(f"nftables: {why.partition(chr(10))[0] or 'refused'}")
        printed = read_output(context)
        return json.loads(printed) if printed else None
    finally:
        library.nft_ctx_free(context)
