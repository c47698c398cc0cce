"""
The router process: take what privileges it needs, prove the hand-offs, serve, and drain.
"""

import hashlib
import os
import resource
import select
import signal
import socket
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Final

import structlog
from pydantic import ValidationError

from bpfprog import CAPABILITIES, PACKET_ABI, STAND_IN, KernelError, Packet, Splice
from controller import log, privilege
from controller.router._native import lib
from controller.router.control import Control
from controller.router.devices import Devices
from controller.router.flow import Handoff
from controller.router.listen import bind_listener
from controller.router.loop import Loop
from controller.router.metrics import serve
from controller.router.packet import PacketHandoff
from controller.router.relay import RelayHandoff
from controller.router.router import Router
from controller.router.selftest import SelfTestFailed, prove, prove_packet
from controller.router.sockmap import SockmapHandoff
from controller.settings import ClientIp, HandoffChoice, RouterSettings

BIND: Final = "NET_BIND_SERVICE"

SO_NETNS_COOKIE: Final = 71

SPARE_DESCRIPTORS: Final = 64
"""Descriptors kept for all that is no connection: listeners, BPF, control, metrics, logs."""

TURN: Final = 0.0005
"""Seconds that the loop waits for its turn while another thread reads a table or writes a page."""

logger = structlog.get_logger()


class NotPossible(Exception):  # noqa: N818 - what the message says is not possible
    """
    The router can not start as it was asked to.
    """


def main() -> int:
    """
    Run a router as the environment's settings say.
    """
    try:
        settings = RouterSettings()
        log.configure("router", settings.log_level)
        _serve(settings)
    except (NotPossible, OSError, ValueError, ValidationError) as err:
        # an OSError's own text begins with its number; one write, since the log writes here too
        sys.stderr.write(f"sniroute router: {getattr(err, 'strerror', None) or err}\n")
        return 1
    return 0


def _serve(settings: RouterSettings) -> None:
    needed = CAPABILITIES if privilege.holds(CAPABILITIES) else (*CAPABILITIES, STAND_IN)
    capabilities = privilege.drop_to((*needed, BIND))
    sys.setswitchinterval(TURN)
    loop = Loop()
    if lib.hello_init():
        raise NotPossible("OpenSSL does not start")
    router = Router(settings, loop, _max_connections(settings))
    listeners = [bind_listener(address, settings.receive_buffer) for address in settings.listen]
    splice, refusal = _load(settings.handoff, capabilities)
    packet, no_packet = _load_packet(settings)
    # loaded and bound: joining sockets needs no privilege, only a client's address does
    off = settings.client_ip == ClientIp.OFF
    privilege.drop_to(() if off and packet is None else ("NET_ADMIN",))
    _choose(router, splice, refusal, packet, no_packet)
    name = version("sniroute")
    control = Control(router, settings.control, name)
    if settings.metrics != "off":
        serve(settings.metrics, router, control, name)
    _drain_on_signal(router)
    try:
        router.transparency.start()
        if router.devices is not None:
            router.devices.start()
        if error := lib.confine():
            logger.warning("not confined", error=os.strerror(-error))
        # whoever ran before in this place has ended: its control socket is ours
        router.adopt(lambda _: True)
        router.listen(listeners)
        logger.info(
            "router ready",
            version=name,
            listen=settings.listen,
            handoff=router.ladder[0].name,
            reason=router.ladder_reason,
            max_connections=router.max_connections,
            capabilities=sorted(capabilities),
        )
        loop.run()
    finally:
        router.transparency.stop()
        if router.devices is not None:
            router.devices.stop()
        control.close()
    logger.info("router stopped")


def _max_connections(settings: RouterSettings) -> int:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    possible = (hard - SPARE_DESCRIPTORS) // 2
    if settings.max_connections > possible:
        raise NotPossible(
            f"max-connections {settings.max_connections}: the descriptor limit allows {possible}"
        )
    return settings.max_connections or possible


def _load(choice: HandoffChoice, capabilities: frozenset[str]) -> tuple[Splice | None, str]:
    """
    Load the BPF program if it may be used; else say why not.
    """
    if choice == HandoffChoice.RELAY:
        return None, "asked for"
    try:
        return Splice(), ""
    except KernelError as err:
        note = "\n".join(getattr(err, "__notes__", ()))
        reason = str(err.strerror)
        lacking = [f"CAP_{name}" for name in CAPABILITIES if name not in capabilities]
        if lacking and STAND_IN not in capabilities:
            reason += f", without {' and '.join(lacking)}"
        logger.warning("BPF program refused", error=reason, verifier=note[-4096:])
        return None, reason


def _load_packet(settings: RouterSettings) -> tuple[Packet | None, str]:
    if settings.handoff not in (HandoffChoice.AUTO, HandoffChoice.PACKET):
        return None, "not asked for"
    try:
        return Packet(_instance(settings), 0), ""
    except KernelError as err:
        note = "\n".join(getattr(err, "__notes__", ()))
        logger.warning("packet programs refused", error=err.strerror, verifier=note[-4096:])
        return None, str(err.strerror)


def _instance(settings: RouterSettings) -> Path:
    """
    Where the pins of this router are, and those of whoever ran before it in its place.

    Of its place: the network namespace, whose cookie is never another's, and the control socket.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        cookie = int.from_bytes(
            probe.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), sys.byteorder
        )
    place = hashlib.sha256(os.fsencode(settings.control)).hexdigest()[:16]
    return settings.bpffs / "sniroute" / f"{PACKET_ABI}-{cookie:x}-{place}"


def _choose(
    router: Router, splice: Splice | None, refusal: str, packet: Packet | None, no_packet: str
) -> None:
    """
    Build the ladder: the rungs that are allowed and proven, best first.
    """
    settings, loop = router.settings, router.loop
    relay = RelayHandoff(loop)
    ladder: list[Handoff] = [relay]
    if splice is not None:
        sockmap = SockmapHandoff(loop, splice, settings.backlog_limit)
        try:
            prove(loop, sockmap)
            ladder.insert(0, sockmap)
        except SelfTestFailed as err:
            refusal = f"self-test: {err}"
            logger.warning("hand-off refused", handoff=sockmap.name, reason=refusal)
    if packet is not None:
        handoff = PacketHandoff(loop, packet, settings.connect_timeout, settings.packet_idle)
        try:
            prove_packet(loop, handoff)
            router.devices = Devices(packet.follow)
            handoff.on_freed = router.freed
            router.packet = handoff
            ladder.insert(0, handoff)
        except (SelfTestFailed, OSError) as err:
            no_packet = f"self-test: {err}"
            logger.warning("hand-off refused", handoff=handoff.name, reason=no_packet)
    if settings.handoff == HandoffChoice.PACKET and router.packet is None:
        raise NotPossible(f"hand-off packet does not work here: {no_packet}")
    if settings.handoff == HandoffChoice.SOCKMAP and len(ladder) == 1:
        raise NotPossible(f"hand-off sockmap does not work here: {refusal}")
    prove(loop, relay)
    router.ladder = ladder
    router.ladder_reason = refusal if len(ladder) == 1 else "self-test passed"


def _drain_on_signal(router: Router) -> None:
    """
    Have SIGTERM and SIGINT drain, from within the loop.
    """
    wake, alarm = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(alarm)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)

    def on_signal(_: int) -> None:
        os.read(wake, 64)
        router.drain()

    router.loop.watch(wake, select.EPOLLIN, on_signal)


if __name__ == "__main__":
    sys.exit(main())
