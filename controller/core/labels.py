"""
The labels of one container: what they ask for, and what is wrong with them.

    sniroute.host            host patterns, comma separated
    sniroute.port            the container's port
    sniroute.network         the container network to reach it by
    sniroute.client-ip       auto, transparent or nat: whose address the container sees
    sniroute.proxy-protocol  off, v1 or v2: the header that it wants before the hello
    sniroute.handoff         auto, packet, sockmap or relay: the best hand-off that it may have
    sniroute.enable          false: nothing of this container
    sniroute.NAME.KEY        the same for a further route; .enable=false switches off only that

Rules of this file:

1. A label that can not be read is a problem and takes nothing else with it: not the other hosts
   of a list, not the container's other routes.
2. In doubt nothing is exposed: a route with a key that can not be read is no route.  A backend
   that trusts the address it is told must not be told another one.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches

from controller.core.hostname import HostnameError, read_pattern
from controller.core.problems import Code, Problem
from controller.core.routes import CLIENT_IPS, HANDOFFS, PROXY_PROTOCOLS

PREFIX = "sniroute."

_KEYS = ("host", "port", "network", "client-ip", "proxy-protocol", "handoff", "enable")
_LABEL = re.compile(
    r"sniroute\.(?:(?!(?:{keys})\.)([A-Za-z0-9_-]+)\.)?({keys})".format(keys="|".join(_KEYS))
)
_BOOLS = {
    **dict.fromkeys(("true", "1", "yes", "on"), True),
    **dict.fromkeys(("false", "0", "no", "off"), False),
}


@dataclass(frozen=True, slots=True)
class RouteSpec:
    """
    One route that a container's labels ask for; *name* is empty for the short form.

    *client_ip*, *proxy_protocol* and *handoff* are as in `Backend`.
    """

    name: str
    hosts: tuple[str, ...]
    port: int | None
    network: str | None
    client_ip: str = ""
    proxy_protocol: str = "off"
    handoff: str = "auto"

    def label(self, key: str) -> str:
        """
        Name the label of this route that holds *key*.
        """
        return _label(self.name, key)


@dataclass(frozen=True, slots=True)
class Reading:
    """
    What the labels of one container come to.
    """

    specs: tuple[RouteSpec, ...]
    problems: tuple[Problem, ...]


def is_labelled(labels: Mapping[str, str] | None) -> bool:
    """
    Tell whether a container has anything to do with us.
    """
    return any(label.startswith(PREFIX) for label in labels or ())


def read_labels(container: str, labels: Mapping[str, str]) -> Reading:
    """
    Read the labels of the container named *container*.
    """
    return _Reader(container).read(labels)


class _Reader:
    def __init__(self, container: str) -> None:
        self._container = container
        self._problems: list[Problem] = []

    def read(self, labels: Mapping[str, str]) -> Reading:
        routes: dict[str, dict[str, str]] = {}
        for label, value in sorted(labels.items()):
            if not label.startswith(PREFIX):
                continue
            if (match := _LABEL.fullmatch(label)) is None:
                self._problem(Code.UNKNOWN_LABEL, label, value, _hint(label))
                continue
            routes.setdefault(match[1] or "", {})[match[2]] = value

        # first of all: a container that is switched off has no other problems
        short = routes.get("", {})
        if "enable" in short and not self._bool(PREFIX + "enable", short.pop("enable")):
            off = [p for p in self._problems if p.code is Code.BAD_BOOL]
            return Reading((), tuple(off))
        if not short and len(routes) > 1:
            routes.pop("", None)

        specs = [self._spec(name, values) for name, values in sorted(routes.items())]
        return Reading(tuple(self._distinct(filter(None, specs))), tuple(self._problems))

    def _spec(self, name: str, values: dict[str, str]) -> RouteSpec | None:
        enable = values.get("enable")
        if enable is not None and not self._bool(_label(name, "enable"), enable):
            return None
        if "host" not in values:
            have = " and ".join(_label(name, key) for key in values) or PREFIX + "enable"
            self._problem(
                Code.NO_HOST, _label(name, "host"), "", f"missing; {have} means nothing without it"
            )
            return None
        hosts = self._hosts(_label(name, "host"), values["host"])
        # of a host list the good ones remain; of what follows any problem ends the route
        before = len(self._problems)
        port = self._port(_label(name, "port"), values["port"]) if "port" in values else None
        client_ip = self._word(name, values, "client-ip", CLIENT_IPS, Code.BAD_CLIENT_IP)
        proxy_protocol = self._word(
            name, values, "proxy-protocol", PROXY_PROTOCOLS, Code.BAD_PROXY_PROTOCOL
        )
        handoff = self._word(name, values, "handoff", HANDOFFS, Code.BAD_HANDOFF)
        if not hosts or len(self._problems) > before:
            return None
        network = values.get("network")
        return RouteSpec(
            name, hosts, port, network, client_ip, proxy_protocol or "off", handoff or "auto"
        )

    def _hosts(self, label: str, value: str) -> tuple[str, ...]:
        hosts: dict[str, None] = {}
        for part in value.split(","):
            text = part.strip()
            if not text and value.strip(", "):
                continue
            try:
                hosts[read_pattern(text)] = None
            except HostnameError as err:
                self._problem(Code.BAD_HOST, label, text, str(err))
        return tuple(hosts)

    def _port(self, label: str, value: str) -> int | None:
        text = value.strip()
        if re.fullmatch(r"[0-9]{1,5}", text) and 0 < int(text) < 65536:  # noqa: PLR2004 - the range of a port
            return int(text)
        self._problem(Code.BAD_PORT, label, value, "not a port: a number from 1 to 65535")
        return None

    def _bool(self, label: str, value: str) -> bool:
        answer = _BOOLS.get(value.strip().lower())
        if answer is None:
            self._problem(Code.BAD_BOOL, label, value, "neither true nor false; taken as false")
        return bool(answer)

    def _word(
        self, name: str, values: Mapping[str, str], key: str, words: Collection[str], code: Code
    ) -> str:
        if key not in values:
            return ""
        word = values[key].strip().lower()
        # what writes YAML may have made false of an off
        if _BOOLS.get(word) is False:
            word = "off"
        if word not in words:
            detail = f"none of {', '.join(words)}"
            self._problem(code, _label(name, key), values[key], detail)
        return word

    def _distinct(self, specs: "filter[RouteSpec]") -> list[RouteSpec]:
        # a host of two routes of one container would be one pool with both ports in it
        taken: dict[str, RouteSpec] = {}
        result = []
        for spec in specs:
            own = []
            for host in spec.hosts:
                if host in taken:
                    other = taken[host].label("host")
                    self._problem(
                        Code.DUPLICATE_HOST, spec.label("host"), host, f"{other} has it already"
                    )
                else:
                    taken[host] = spec
                    own.append(host)
            if own:
                result.append(replace(spec, hosts=tuple(own)))
        return result

    def _problem(self, code: Code, label: str, value: str, detail: str) -> None:
        self._problems.append(Problem(code, self._container, label, value, detail))


def _label(name: str, key: str) -> str:
    return f"{PREFIX}{name}.{key}" if name else PREFIX + key


def _hint(label: str) -> str:
    route, _, key = label.removeprefix(PREFIX).rpartition(".")
    close = get_close_matches(key.lower(), _KEYS, n=1)
    if close and "." not in route and route not in _KEYS:
        return f"no such label; did you mean {_label(route, close[0])}?"
    return f"no such label; there are {', '.join(_KEYS)}, as in sniroute.host or sniroute.NAME.host"
