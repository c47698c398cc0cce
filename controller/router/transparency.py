"""
The client's own address at the backend: whether a connection may be dialled from it.

What is possible by nature decides `core.clientip`; this adds what only time tells.  A backend's
address that does not answer to a client's but to ours is remembered until the backend changes,
unless it has answered to a client's before: then the fault is not its way back, and is remembered
of the client.
"""

import contextlib
import time
from collections import Counter, OrderedDict
from ipaddress import ip_network
from typing import Final

import structlog

from controller.core.clientip import Choice, IPNetwork, Network, choose
from controller.core.routes import Backend, RouteTable
from controller.router.address import ip_version
from controller.router.plumbing import Plumbing, PlumbingError, Watch, read_network
from controller.router.probe import probe
from controller.settings import ClientIp, RouterSettings

log = structlog.get_logger()

MAX_ASTRAY: Final = 4096
"""Pairs of backend and client that are remembered; about 1 MB."""

# a member of an enumeration takes ten times as long to find
_AUTO, _TRANSPARENT = ClientIp.AUTO, ClientIp.TRANSPARENT

_OFF: Final = Choice(transparent=False, reason="off")
_REQUIRED: Final = Choice(transparent=False, reason="off", refuse=True)


class Transparency:
    """
    The plumbing, and what is known of backends; also without any, where it is switched off.

    *connects* counts dials that succeeded, by `transparent` or `nat`, and why.
    """

    def __init__(self, settings: RouterSettings) -> None:
        self._settings = settings
        self._is_off = settings.client_ip == ClientIp.OFF
        self._plumbing: Plumbing | None = None
        self._watch: Watch | None = None
        self._containers: frozenset[IPNetwork] = frozenset()
        self._no_reply: set[tuple[Backend, str]] = set()
        self._proven: set[tuple[Backend, str]] = set()
        self._astray: OrderedDict[tuple[Backend, bytes], None] = OrderedDict()
        self._told: set[tuple[Backend, str]] = set()
        self._worked_since = 0.0
        self.working = False
        self.reason = "off"
        self.connects: Counter[tuple[str, str]] = Counter()

    def start(self) -> None:
        """
        Lay the plumbing, unless switched off; what stands in its way is a reason, no error.
        """
        settings = self._settings
        if self._is_off:
            return
        try:
            found = probe()
            if found.ok is False:
                self._say(False, found.reason)
                return
            plumbing = Plumbing(
                settings.transparent_mark,
                settings.transparent_mask,
                settings.transparent_table,
                settings.transparent_priority,
            )
            plumbing.install()
            self._plumbing = plumbing
            self._watch = Watch(plumbing, self._say)
            self._watch.start()
            self._say(True, found.reason)
        except PlumbingError as err:
            self._say(False, str(err))

    def stop(self) -> None:
        """
        Take the plumbing away.
        """
        if self._watch is not None:
            self._watch.stop()
        if self._plumbing is not None:
            try:
                self._plumbing.remove()
            except PlumbingError as err:
                log.warning("plumbing left behind", reason=str(err))

    @property
    def plumbed(self) -> bool:
        """
        Tell whether there is plumbing to take away.
        """
        return self._plumbing is not None

    def leave(self) -> None:
        """
        Look after the plumbing no more, and let it stand: it is another router's from now on.
        """
        if self._watch is not None:
            self._watch.stop()
        self._plumbing = None

    def _say(self, ok: bool, reason: str) -> None:  # noqa: FBT001 - the callback of `Watch`
        # may run in the watch's thread: each step is a single assignment or call
        if ok and not self.working:
            self._no_reply = set()
            self._astray = OrderedDict()
            self._worked_since = time.monotonic()
        self.working = ok
        self.reason = reason
        (log.info if ok else log.warning)("transparency", working=ok, reason=reason)

    def mode(self, backend: Backend) -> str:
        """
        How *backend* is to be dialled: its own wish, or the router's setting.
        """
        return backend.client_ip or self._settings.client_ip

    def choose(self, client: bytes, backend: Backend) -> Choice:
        """
        Choose for a connection from *client*, a packed address, to *backend*.
        """
        mode = self.mode(backend)
        if self._is_off:
            # a backend that must see the client is not to be reached as someone else
            return _REQUIRED if mode == _TRANSPARENT else _OFF
        address = backend.reached_from(ip_version(client))
        choice = choose(
            mode,
            client,
            address,
            self._watch.network if self._watch is not None else Network(),
            working=self.working,
            containers=self._containers,
            detour=backend.detour,
            learned=self._is_without_reply(backend, address, client),
        )
        if mode == _AUTO and not choice.transparent:
            self._tell(backend, choice.reason)
        return choice

    def _is_without_reply(self, backend: Backend, address: str, client: bytes) -> bool:
        astray = self._astray
        # a backend takes its time to be looked up, and mostly there is nothing to find
        if self._no_reply and (backend, address) in self._no_reply:
            return True
        if not astray or (pair := (backend, _site(client))) not in astray:
            return False
        astray.move_to_end(pair)
        return True

    def connected(self, client: bytes, backend: Backend, choice: Choice, began: float) -> None:
        """
        Take note that *backend* accepted a connection for *client*, dialled as *choice* says.

        *began* is when the client came: no reply to who came before the plumbing stood is no news.
        """
        tried = backend, backend.reached_from(ip_version(client))
        if choice.transparent:
            self.connects["transparent", ""] += 1
            self._proven.add(tried)
            return
        self.connects["nat", choice.reason] += 1
        if choice is NO_REPLY and began > self._worked_since:
            if tried in self._proven:
                self._astray[backend, _site(client)] = None
                if len(self._astray) > MAX_ASTRAY:
                    self._astray.popitem(last=False)
            else:
                self._no_reply.add(tried)
            self._tell(backend, choice.reason)
        if choice is NOT_THERE:
            self._tell(backend, choice.reason)

    def keep(self, table: RouteTable) -> None:
        """
        Forget all backends but those of *table*: a changed backend begins anew.
        """
        self._containers = frozenset(map(ip_network, table.networks))
        if self._watch is not None:
            # a new backend's network may be new too, and a neighbour of it must be known as one
            with contextlib.suppress(PlumbingError):
                self._watch.network = read_network()
        # the way of a client's replies may have changed with the table, and hangs on no backend
        self._astray.clear()
        kept = {backend for route in table.routes for backend in route.backends}
        for known in (self._no_reply, self._proven, self._told):
            known.difference_update([entry for entry in known if entry[0] not in kept])

    def _tell(self, backend: Backend, reason: str) -> None:
        if (backend, reason) not in self._told:
            self._told.add((backend, reason))
            log.info("client address not passed on", backend=backend.name, reason=reason)


def _site(client: bytes) -> bytes:
    """
    Take of a packed address what one client can not change at will: all of IPv4, a /64 of IPv6.
    """
    return client[:8]


NO_REPLY: Final = Choice(transparent=False, reason="no_reply")
"""An ordinary connection after one from the client's address that was not answered."""

NOT_THERE: Final = Choice(transparent=False, reason="family")
"""An ordinary connection after the backend's address of the client's family was refused."""
