"""
When a backend is dialled from the client's own address, and why not.
"""

import ipaddress
import socket

import pytest

from controller.core.clientip import MARK, MASK, Choice, Network, choose

HOST = Network(
    frozenset(
        ipaddress.ip_interface(text)
        for text in (
            "127.0.0.1/8",
            "::1/128",
            "203.0.113.1/24",
            "198.18.1.1/24",
            "198.18.2.1/24",
            "2001:db8:1::1/64",
            "2001:db8:2::1/64",
            "fe80::1/64",
        )
    )
)
CLIENT, BACKEND = "198.51.100.7", "198.18.1.2"
CLIENT6, BACKEND6 = "2001:db8:7::7", "2001:db8:1::2"

CONTAINERS = frozenset(
    map(ipaddress.ip_network, ("198.18.1.0/24", "198.18.2.0/24", "2001:db8:2::/64"))
)

TRANSPARENT = Choice(transparent=True)


def plain(reason: str) -> Choice:
    return Choice(transparent=False, reason=reason)


@pytest.mark.parametrize("mode", ["auto", "transparent"])
@pytest.mark.parametrize(("client", "backend"), [(CLIENT, BACKEND), (CLIENT6, BACKEND6)])
def test_a_client_from_outside_is_lent_its_address(mode: str, client: str, backend: str) -> None:
    """
    Where nothing speaks against it, the backend sees the client.
    """
    assert TRANSPARENT == choose(mode, client, backend, HOST, working=True)


@pytest.mark.parametrize("mode", ["off", "nat"])
def test_who_does_not_ask_for_it_gets_an_ordinary_connection(mode: str) -> None:
    """
    The mode is the reason.
    """
    assert plain(mode) == choose(mode, CLIENT, BACKEND, HOST, working=True)


@pytest.mark.parametrize(
    ("client", "backend", "reason"),
    [
        (CLIENT, BACKEND6, "family"),
        (CLIENT6, BACKEND, "family"),
        ("127.0.0.1", BACKEND, "own_host"),
        ("127.8.9.10", "127.0.0.1", "own_host"),
        ("203.0.113.1", BACKEND, "own_host"),
        ("198.18.1.1", BACKEND, "own_host"),
        ("2001:db8:1::1", BACKEND6, "own_host"),
        ("169.254.3.4", BACKEND, "link_local"),
        ("fe80::7", BACKEND6, "link_local"),
        ("198.18.1.77", BACKEND, "same_network"),
        ("2001:db8:1::77", BACKEND6, "same_network"),
        ("203.0.113.9", "203.0.113.8", "same_network"),
        ("198.18.2.77", BACKEND, ""),
        ("203.0.113.9", BACKEND, ""),
        ("2001:db8:2::77", BACKEND6, ""),
    ],
)
def test_whose_replies_would_not_come_back_is_dialled_plainly(
    client: str, backend: str, reason: str
) -> None:
    """
    The host itself, the backend's own network, other families; but not every neighbour's network.
    """
    chosen = choose("auto", client, backend, HOST, working=True)

    assert (plain(reason) if reason else TRANSPARENT) == chosen


@pytest.mark.parametrize(
    ("client", "backend", "reason"),
    [
        ("198.18.2.77", BACKEND, "container_network"),
        ("2001:db8:2::77", BACKEND6, "container_network"),
        ("198.18.2.77", "203.0.113.8", "container_network"),
        ("198.18.1.77", BACKEND, "same_network"),
        ("198.18.2.1", BACKEND, "own_host"),
        ("203.0.113.9", BACKEND, ""),
        (CLIENT6, BACKEND6, ""),
    ],
)
def test_other_containers_are_known_by_their_networks(
    client: str, backend: str, reason: str
) -> None:
    """
    Engines hide containers' addresses outside their own network, also from our eyes' view.
    """
    chosen = choose("auto", client, backend, HOST, working=True, containers=CONTAINERS)

    assert (plain(reason) if reason else TRANSPARENT) == chosen


def test_only_what_can_never_be_is_refused() -> None:
    """
    Who insists gets what was asked for or nothing; an address of the other family can not be lent.
    """
    refused = Choice(transparent=False, reason="family", refuse=True)

    assert refused == choose("transparent", CLIENT6, BACKEND, HOST, working=True)
    for client in (CLIENT, "198.18.1.77", "203.0.113.1"):
        assert TRANSPARENT == choose(
            "transparent",
            client,
            BACKEND,
            HOST,
            working=False,
            containers=CONTAINERS,
            detour="internal",
            learned=True,
        )


@pytest.mark.parametrize(
    ("detour", "learned", "reason"),
    [("internal", False, "internal"), ("internal", True, "internal"), ("", True, "no_reply")],
)
def test_what_is_known_of_a_backend_counts(detour: str, learned: bool, reason: str) -> None:  # noqa: FBT001 - a parameter of the test
    """
    What the engine tells of it, and what was found out by trying.
    """
    chosen = choose("auto", CLIENT, BACKEND, HOST, working=True, detour=detour, learned=learned)

    assert plain(reason) == chosen


def test_without_plumbing_nothing_is_tried() -> None:
    """
    Broken plumbing, or none for this family, costs no client a timeout.
    """
    without6 = Network(HOST.interfaces, frozenset({4}))

    assert plain("unavailable") == choose("auto", CLIENT, BACKEND, HOST, working=False)
    assert plain("unavailable") == choose("auto", CLIENT6, BACKEND6, without6, working=True)
    assert TRANSPARENT == choose("auto", CLIENT, BACKEND, without6, working=True)


@pytest.mark.parametrize(
    "client",
    [
        socket.inet_pton(socket.AF_INET, "198.18.1.77"),
        socket.inet_pton(socket.AF_INET6, "::ffff:198.18.1.77"),
        "::ffff:198.18.1.77",
    ],
)
def test_an_address_is_the_same_in_every_spelling(client: str | bytes) -> None:
    """
    Packed, or IPv4 as an IPv6 socket reports it.
    """
    assert plain("same_network") == choose("auto", client, BACKEND, HOST, working=True)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("kube-proxy", 0x4000),
        ("kube-proxy", 0x8000),
        ("CNI port mapper, netavark", 0x2000),
        ("Tailscale", 0x40000),
        ("Tailscale", 0x80000),
        ("Weave", 0x20000),
        ("Cilium", 0xF00),
        ("Calico eBPF", 0x1FF00000),
        ("Antrea", 0x80000000),
        ("Mullvad", 0x6D6F6C65),
        ("wg-quick", 51820),
        ("Istio", 1337),
        ("small numbers", 0xFF),
    ],
)
def test_our_mark_is_no_one_elses(name: str, other: int) -> None:
    """
    A packet with another's mark is never taken for ours.
    """
    assert MARK != other & MASK, name
