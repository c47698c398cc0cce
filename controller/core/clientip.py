"""
Decide whether a backend is dialled from the client's own address.

The client's address can only be lent if the backend's replies to it come back through this host.
Where they would not, an ordinary connection is the answer, with one of these reasons:

off, nat       nobody asked for it
family         the client has IPv4 and the backend IPv6, or the other way round
unavailable    the plumbing does not stand, or not for this family
own_host       the client is this host, so its address is taken
not_unicast    a trusted sender told of a client that no one can be
link_local     the client's address means nothing beyond one link
same_network   the backend sees the client on its own network, and would answer it directly
container_network
               the client is a container, whose address its engine hides beyond its own network
no_reply       it was tried, and no reply came

and whatever word the controller has for a backend whose replies take another way.
"""

import ipaddress
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

MARK: Final = 0x40000000
"""
The mark on replies that belong to this host.

Marks are one number that all of a host shares.  Taken are: the third byte by Tailscale, bit 12 and
below by Cilium and Istio, 13 by the CNI port mapper and netavark (Podman), 14 and 15 by
kube-proxy, 17 by Weave, 28 and below by Calico as it uses its default mask 0xffff0000, 31 by
Antrea; Docker sets none.  That leaves bits 29 and 30.
"""

MASK: Final = 0xE0000000
"""
The bits that must read as in MARK.

Three and not one: whole numbers are used as marks too, and one that looks like ours would be
delivered here.  With bits 29 and 31 clear neither Antrea's 0x80000000 nor Mullvad's 0x6d6f6c65 do;
wg-quick's 0xca6c and the small numbers that people choose do not either.  Cilium writes identities
into the upper half: beside it, take mark and mask 0x2000.
"""

TABLE: Final = 4430
"""
The routing table: not in the first 255, where people, VPNs and clouds number theirs, and none of
Cilium's (2004, 2005), sing-box's (2022) and wg-quick's (51820).
"""

PRIORITY: Final = 4430
"""
The priority of the rules, before Tailscale's 5210 to 5270 and wg-quick's 32764 on, which would send
a reply to a client out through the VPN; and clear of Cilium's 9 to 200, the AWS CNI's 512 to 1536,
mwan3's 1001 to 3253, OVN's 2000, 5000 and 6000, sing-box's 9000.  The rule just before it is ours
too.
"""


@dataclass(frozen=True, slots=True)
class Network:
    """
    What this host is on: the addresses of its interfaces, each with its network's length.

    *families* are the IP versions for which the plumbing stands.
    """

    interfaces: frozenset[Interface] = frozenset()
    families: frozenset[int] = frozenset({4, 6})


@dataclass(frozen=True, slots=True)
class Choice:
    """
    Whether to dial from the client's address, and if not, why.

    *refuse*: an ordinary connection is not allowed either.
    """

    transparent: bool
    reason: str = ""
    refuse: bool = False


_TRANSPARENT: Final = Choice(transparent=True)
_PLAIN: Final = {mode: Choice(transparent=False, reason=mode) for mode in ("off", "nat")}


@lru_cache(4096)
def choose(  # noqa: PLR0911 - one return for each reason
    mode: str,
    client: str | bytes,
    backend: str,
    network: Network,
    *,
    working: bool,
    containers: frozenset[IPNetwork] = frozenset(),
    detour: str = "",
    learned: bool = False,
) -> Choice:
    """
    Choose for a connection from *client* to *backend*, addresses as text or packed.

    *mode* is auto, transparent, nat or off; `transparent` yields only to what can never be.
    *containers* are the container networks of this host; *learned* tells that this backend's
    replies did not come when it was tried.
    """
    if mode in _PLAIN:
        return _PLAIN[mode]
    source, target = _plain(ipaddress.ip_address(client)), _parse(backend)
    if source.version != target.version:
        return Choice(transparent=False, reason="family", refuse=mode == "transparent")
    if mode == "transparent":
        return _TRANSPARENT
    if not working or source.version not in network.families:
        return Choice(transparent=False, reason="unavailable")
    if flaw := _flaw(source, network):
        return Choice(transparent=False, reason=flaw)
    if any(source in shared for shared in _shared(network, target)):
        return Choice(transparent=False, reason="same_network")
    if _within(source, containers):
        return Choice(transparent=False, reason="container_network")
    if detour or learned:
        return Choice(transparent=False, reason=detour or "no_reply")
    return _TRANSPARENT


def _flaw(source: Address, network: Network) -> str:
    """
    Find why *source* can be lent to no backend at all.
    """
    if source.is_loopback or source in _addresses(network):
        return "own_host"
    if source.is_multicast or source.is_unspecified:
        return "not_unicast"
    return "link_local" if source.is_link_local else ""


def _plain(address: Address) -> Address:
    """
    Write an IPv4 address that an IPv6 socket reported as what it is.
    """
    return getattr(address, "ipv4_mapped", None) or address


@lru_cache(4096)
def _parse(address: str) -> Address:
    return _plain(ipaddress.ip_address(address))


# a network changes seldom, so what follows from one is worked out once


@lru_cache(4)
def _addresses(network: Network) -> frozenset[Address]:
    return frozenset(interface.ip for interface in network.interfaces)


def _within(address: Address, networks: frozenset[IPNetwork]) -> bool:
    return any(address in network for network in networks)


@lru_cache(4096)
def _shared(network: Network, backend: Address) -> tuple[IPNetwork, ...]:
    """
    Find the networks that an interface of this host shares with *backend*.
    """
    return tuple({i.network for i in network.interfaces if backend in i.network})
