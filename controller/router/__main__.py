"""
The router process: take what privileges it needs, prove the hand-offs, serve, and drain.
"""

import errno
import fcntl
import gc
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Final

import structlog
from pydantic import ValidationError

from bpfprog import CAPABILITIES, STAND_IN, KernelError, Packet, Splice
from controller import log, privilege
from controller.core.wire import WireError
from controller.router import pins
from controller.router._native import lib
from controller.router.control import Control, listen
from controller.router.devices import Devices
from controller.router.flow import Handoff
from controller.router.leftovers import Leftovers
from controller.router.listen import bind_listener
from controller.router.listen import name as socket_name
from controller.router.loop import Loop
from controller.router.metrics import serve
from controller.router.packet import PacketHandoff
from controller.router.ports import Ports
from controller.router.relay import RelayHandoff
from controller.router.replace import Predecessor, find
from controller.router.router import OWNERS, Router
from controller.router.selftest import SelfTestFailed, prove, prove_packet
from controller.router.sockmap import SockmapHandoff
from controller.router.workers import NotStarted, WorkerControl, Workers, start_nursery
from controller.settings import ClientIp, HandoffChoice, RouterSettings

LAST_BREATH: Final = 2.0
"""Seconds that a killed router's workers have to end, which hold its flows as long as they live."""

BIND: Final = "NET_BIND_SERVICE"

SPARE_DESCRIPTORS: Final = 64
"""Descriptors kept for all that is no connection: listeners, BPF, control, metrics, logs."""

TURN: Final = 0.0005
"""Seconds that the loop waits for its turn while another thread reads a table or writes a page."""

YOUNG: Final = 20_000
"""Objects that may be new before the interpreter looks for circles among them: a connection leaves
none, and what stood at start is not looked at again."""

logger = structlog.get_logger()


class NotPossible(Exception):  # noqa: N818 - what the message says is not possible
    """
    The router can not start as it was asked to.
    """


def main() -> int:
    """
    Run a router as the environment's settings say.
    """
    return _run(_start)


def _start() -> None:
    settings = RouterSettings()
    log.configure("router", settings.log_level)
    _serve(settings)


def _run(task: Callable[[], None]) -> int:
    """
    Do *task*, and say why if it is not possible; the exit status.
    """
    try:
        task()
    except (NotPossible, NotStarted, OSError, ValueError, ValidationError) as err:
        # an OSError's own text begins with its number; one write, since the log writes here too
        sys.stderr.write(f"sniroute router: {getattr(err, 'strerror', None) or err}\n")
        return 1
    return 0


def _serve(settings: RouterSettings) -> None:
    needed = CAPABILITIES if privilege.holds(CAPABILITIES) else (*CAPABILITIES, STAND_IN)
    capabilities = privilege.drop_to((*needed, BIND))
    sys.setswitchinterval(TURN)
    shares = _shares(settings)
    predecessor = _predecessor(settings)
    replacing = predecessor is not None
    beside = predecessor.sockets if predecessor is not None else ()
    # first: who has the name has the place, and with it the pins
    place = listen(settings.control, replacing=replacing)
    half, other = _take_half(settings.control, predecessor)
    owner = half * OWNERS
    groups = _bind(settings, beside)

    def work(worker: int, link: socket.socket) -> int:
        place.close()
        if predecessor is not None:
            predecessor.forget()
        log.configure("router", settings.log_level, worker=worker)
        make = partial(_make, settings, capabilities, shares[worker], worker, owner + worker)
        status = _run(partial(_work, make, groups[worker], link))
        log.finish()
        return status

    # before there is a thread
    reports = start_nursery(settings.workers - 1, work) if settings.workers > 1 else None
    router = _make(settings, capabilities, shares[0], 0, owner)
    name = version("sniroute")
    control = Control(router, place, settings.control, name, replacing=replacing)
    if predecessor is not None:
        if predecessor.table.generation:
            router.replace_table(predecessor.table)
        if router.packet is not None and predecessor.is_off:
            router.packet.off()
    if settings.metrics != "off":
        control.metrics = serve(settings.metrics, router, control, name, beside)
    _drain_on_signal(router)
    try:
        router.start()
        control.workers = workers = Workers(control, router, groups[1:])
        if reports is not None:
            workers.start(reports)
        _open(router, control, workers, groups[0], predecessor)
        # it asks the loop, and the workers
        settle = partial(_settle, control, 1 - half, other)
        threading.Thread(target=settle, name="settle", daemon=True).start()
        logger.info(
            "router ready",
            version=name,
            listen=settings.listen,
            handoff=router.ladder[0].name,
            reason=router.ladder_reason,
            workers=settings.workers,
            max_connections=sum(shares),
            capabilities=sorted(capabilities),
        )
        _go(router)
    finally:
        router.stop()
        control.close()
    logger.info("router stopped")


def _take_half(control: Path, predecessor: Predecessor | None) -> tuple[int, int]:
    """
    Take a half of the owners of flows, for as long as this process or one of its workers lives.

    Returns:
        Which, and a descriptor of what stands for the other, for `_settle`.

    Raises:
        NotPossible: routers that are still at work have both.
    """
    halves = [0, 1] if predecessor is None else [1 - predecessor.owner // OWNERS]
    files = [_half(control, half) for half in range(2)]
    until = time.monotonic() + LAST_BREATH
    while True:
        for half in halves:
            if _lock(files[half], fcntl.LOCK_NB):
                return half, files[1 - half]
        if time.monotonic() > until:
            raise NotPossible("routers that ran here before are still at work: try again later")
        time.sleep(0.05)


def _half(control: Path, half: int) -> int:
    """
    Open the file that stands for *half* of the owners.
    """
    path = control.with_name(f"{control.name}.{half}")
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _lock(fd: int, flags: int = 0) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | flags)
    except BlockingIOError:
        return False
    return True


def _settle(control: Control, half: int, fd: int) -> None:
    """
    Take over the flows of the other *half* of owners, once nobody has it any more.

    Meanwhile nobody else can take it; then it is free for who replaces this router.
    """
    # capabilities are a thread's
    privilege.drop_to(())
    _lock(fd)
    control.settle(half)
    # the nursery has it open too
    fcntl.flock(fd, fcntl.LOCK_UN)


def _open(
    router: Router,
    control: Control,
    workers: Workers,
    listeners: Sequence[socket.socket],
    predecessor: Predecessor | None,
) -> None:
    """
    Let the clients in, those of *predecessor* too.
    """
    if predecessor is not None:
        control.take_over()
    _confine()
    router.adopt_own_half()
    router.listen(listeners, workers.listeners)
    workers.serve()
    if predecessor is not None:
        sockets = [*router.held, *([control.metrics.socket] if control.metrics else [])]
        predecessor.switch(sockets, router.transparency.plumbed)


def _make(
    settings: RouterSettings,
    capabilities: frozenset[str],
    max_connections: int,
    worker: int,
    owner: int,
) -> Router:
    """
    Make one worker's router with its ladder, and give up what only that took.
    """
    loop = Loop()
    if lib.hello_init():
        raise NotPossible("OpenSSL does not start")
    router = Router(settings, loop, max_connections, worker)
    router.owner = owner
    splice, refusal = _load(settings.handoff, capabilities)
    packet, no_packet = _load_packet(settings, owner, worker)
    if not worker:
        # the first time with all capabilities: to take filters off needs NET_ADMIN
        Leftovers(loop, settings).look()
    # loaded and bound: joining sockets needs no privilege, only a client's address does
    off = settings.client_ip == ClientIp.OFF
    privilege.drop_to(() if off and packet is None else ("NET_ADMIN",))
    _choose(router, splice, refusal, packet, no_packet)
    return router


def _work(
    make: Callable[[], Router],
    listeners: Sequence[socket.socket],
    link: socket.socket,
) -> None:
    """
    Be a further worker, until worker 0 has it drain.
    """
    # not before worker 0 has made its own, and what is pinned with it
    select.select([link], [], [])
    router = make()
    control = WorkerControl(router, version("sniroute"), listeners)
    try:
        router.transparency.start()
        _confine()
        router.adopt_own_half()
        control.attend(link)
        _go(router)
    finally:
        # it is worker 0's to take away
        router.transparency.leave()
        control.close()


def _go(router: Router) -> None:
    """
    Serve until the end; of several workers each on a processor of its own.
    """
    if router.settings.workers > 1:
        processors = sorted(os.sched_getaffinity(0))
        # only the loop's thread: the others have little to do, and may do it anywhere
        os.sched_setaffinity(0, {processors[router.worker % len(processors)]})
    gc.freeze()
    gc.set_threshold(YOUNG)
    router.loop.run()


def _confine() -> None:
    if error := lib.confine():
        logger.warning("not confined", error=os.strerror(-error))


def _bind(settings: RouterSettings, beside: Collection[str]) -> list[list[socket.socket]]:
    """
    Bind each worker's sockets to the addresses to listen on.
    """
    first = [bind_listener(a, settings.receive_buffer, beside) for a in settings.listen]
    ours = {socket_name(listener) for listener in first}
    return [
        first,
        *(
            [bind_listener(a, settings.receive_buffer, ours) for a in settings.listen]
            for _ in range(1, settings.workers)
        ),
    ]


def _predecessor(settings: RouterSettings) -> Predecessor | None:
    """
    Find the router whose place this one takes, if it is to, and there is one.
    """
    if not settings.replace:
        return None
    try:
        return find(settings.control)
    except (OSError, WireError) as err:
        reason = getattr(err, "strerror", None) or err
        raise NotPossible(f"router at {settings.control} not replaced: {reason}") from None


def _shares(settings: RouterSettings) -> list[int]:
    """
    Share out the connections that are allowed, to each worker its own.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    workers = settings.workers
    # worker 0 has the listeners of all
    spare = SPARE_DESCRIPTORS + (workers - 1) * (len(settings.listen) + 1)
    possible = (hard - spare) // 2
    if settings.max_connections > possible * workers:
        raise NotPossible(
            f"max-connections {settings.max_connections}: "
            f"the descriptor limit allows {possible * workers}"
        )
    if 0 < settings.max_connections < workers:
        raise NotPossible(
            f"max-connections {settings.max_connections}: fewer than the {workers} workers"
        )
    total = settings.max_connections or possible * workers
    return [(total + worker) // workers for worker in range(workers)]


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


def _load_packet(settings: RouterSettings, owner: int, worker: int) -> tuple[Packet | None, str]:
    """
    Load the packet programs if they may be used, or for the flows that an earlier router has left.

    Returns:
        They, if so, and why they are not to be used.
    """
    asked = settings.handoff in (HandoffChoice.AUTO, HandoffChoice.PACKET)
    reason = "" if asked else "not asked for"
    # what is pinned is worker 0's to make
    if not (asked and not worker) and not pins.are_left(settings):
        return None, reason or "switched off"
    try:
        if not pins.is_bpffs(settings.bpffs):
            raise KernelError(errno.ENOENT, f"no bpf filesystem at {settings.bpffs}")
        return Packet(pins.own(settings), owner, joins=worker > 0), reason
    except OSError as err:
        note = "\n".join(getattr(err, "__notes__", ()))
        logger.warning("packet programs refused", error=err.strerror, verifier=note[-4096:])
        return None, str(err.strerror)


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
        handoff.on_freed = router.freed
        handoff.ports = Ports(packet.owner // OWNERS, router.worker, settings.workers)
        router.packet = handoff
        no_packet = no_packet or _prove_packet(router, handoff)
        if no_packet:
            handoff.retire(no_packet)
        else:
            ladder.insert(0, handoff)
    if settings.handoff == HandoffChoice.PACKET and no_packet and not router.worker:
        if router.packet is not None:
            router.packet.close()
        raise NotPossible(f"hand-off packet does not work here: {no_packet}")
    if settings.handoff == HandoffChoice.SOCKMAP and len(ladder) == 1:
        raise NotPossible(f"hand-off sockmap does not work here: {refusal}")
    prove(loop, relay)
    router.packet_reason = no_packet
    router.ladder = ladder
    router.ladder_reason = refusal if len(ladder) == 1 else "self-test passed"
    if settings.handoff == HandoffChoice.AUTO and no_packet:
        router.ladder_reason += f"; no packets: {no_packet}"


def _prove_packet(router: Router, handoff: PacketHandoff) -> str:
    """
    Prove the packet hand-off, and attach it to the devices; the reason why it is not to be used.
    """
    try:
        prove_packet(router.loop, handoff)
        if not router.worker:
            router.devices = Devices(handoff.packet.follow)
            handoff.on_drained = router.devices.stop
    except (SelfTestFailed, OSError) as err:
        reason = f"self-test: {err}"
        logger.warning("hand-off refused", handoff=handoff.name, reason=reason)
        return reason
    return ""


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
