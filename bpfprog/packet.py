"""
Load, attach and pin the programs that translate packets, and make flows of pairs of sockets.

This is the mechanism: a flow is two connections whose packets the kernel turns into those of one.
Which pairs, from when on and until when, is the caller's policy.

Rules of this file:

1. What is pinned outlives the process: maps, and the programs' links to devices.  A loader finds
   what an earlier one left and takes it over; programs are replaced in place.
2. Who uses what is pinned has a lock on its folder; it is taken down by one who is alone with it,
   also where a loader of another version has left it.
3. A flow's number may be another's only `QUARANTINE` seconds after its end.
"""

import contextlib
import errno
import fcntl
import os
import socket
import struct
import zlib
from collections.abc import Iterable, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from bpfprog._ffi import ffi, lib
from bpfprog.splice import KernelError, check, error

OBJECT = Path(__file__).with_name("packet.bpf.o")

ABI: Final[int] = lib.PACKET_ABI
MAX_FLOWS: Final[int] = lib.MAX_FLOWS
MAX_OWNERS: Final[int] = lib.MAX_OWNERS
MAX_NOTE: Final[int] = lib.NOTE_BYTES

QUARANTINE: Final = 10
"""Seconds that a flow stays after its end: late packets of its own find it, and no processor that
has looked it up can still be at work when its number is given to another."""


class State(IntEnum):
    """
    What a flow is; see `enum flow_state`.
    """

    FREE = lib.FLOW_FREE
    CLAIMED = lib.FLOW_CLAIMED
    HELLO = lib.FLOW_HELLO
    OPEN = lib.FLOW_OPEN
    ENDED = lib.FLOW_ENDED
    RESET = lib.FLOW_RESET
    FORGOTTEN = lib.FLOW_FORGOTTEN
    REAPED = lib.FLOW_REAPED


class Kind(IntEnum):
    """
    What an event tells; see `enum flow_event_kind`.
    """

    ACKED = lib.EVENT_ACKED
    ENDED = lib.EVENT_ENDED
    RESET = lib.EVENT_RESET
    ABANDONED = lib.EVENT_ABANDONED
    FRAGMENT = lib.EVENT_FRAGMENT
    TOO_BIG = lib.EVENT_TOO_BIG
    UNANSWERED = lib.EVENT_UNANSWERED


LIVE: Final = (State.HELLO, State.OPEN)
OVER: Final = (State.ENDED, State.RESET, State.FORGOTTEN, State.REAPED)

_ETHERNET: Final = 14
_REDIRECT: Final = 7
"""TC_ACT_REDIRECT."""

_PINNED: Final = ("ends", "flows", "begun", "seen", "notes", "rings", "lost")

_FLOW_SIZE: Final = ffi.sizeof("struct flow")
_ENTRY_AT: Final = ffi.offsetof("struct flow", "ways")
_ENTRY_SIZE: Final = ffi.sizeof("struct tuple")
_EVENT: Final = struct.Struct("=IHHII")

# `struct pair`: what goes in, and what comes out
_PAIR: Final = struct.Struct("=Qii?")
_OUTCOME: Final = struct.Struct("=20xiI??2x")
_PAIR_SIZE: Final = ffi.sizeof("struct pair")

_REASONS: Final = {
    getattr(lib, name): name.removeprefix("INSTALL_").lower()
    for name in dir(lib)
    if name.startswith("INSTALL_")
}


class Installed(NamedTuple):
    """
    A flow.

    *sent* says whether what waited was sent, without which there is nothing but to end the flow;
    *is_open* is what `Packet.acknowledged` would tell.
    """

    number: int
    sent: bool
    is_open: bool


class Event(NamedTuple):
    """
    What the programs tell of a flow: *kind* is a `Kind`, *end* a side, 0 for the client's.
    """

    flow: int
    kind: int
    end: int
    seq: int
    mtu: int


class Packet:
    """
    The loaded programs with their maps.
    """

    def __init__(
        self,
        directory: Path,
        owner: int,
        path: Path = OBJECT,
        *,
        joins: bool = False,
        has_tcx: bool = True,
    ) -> None:
        """
        Load the programs, with the maps that are pinned in *directory* of a bpffs, or new ones.

        *owner* is which of the rings is this process's, below MAX_OWNERS.  One that *joins* another
        process makes nothing that is pinned, and takes nothing down.  Without *has_tcx* the
        programs are attached as on kernels before 6.6, to the qdisc clsact.

        Raises:
            KernelError: that is not possible; the message says what and why.
        """
        self.directory = directory
        self._ring = ffi.NULL
        self._object = ffi.NULL
        self._links: dict[tuple[int, str], int] = {}
        self._has_tcx = has_tcx
        # of the filters of all routers, as long as a qdisc is common to them
        self._handle = _handle(directory)
        self._classic: set[int] = set()
        self._found: set[int] = set()
        self._maps: list[Any] = []
        self._lock = -1
        lib.splice_log_start()
        try:
            if not joins:
                self._lock = _enter(directory)
            elif not directory.is_dir():
                raise KernelError(errno.ENOENT, f"{directory}: nothing is pinned")  # noqa: TRY301
            self._object = lib.bpf_object__open_file(os.fsencode(path), ffi.NULL)
            if self._object == ffi.NULL:
                raise error(ffi.errno, f"open {path.name}")  # noqa: TRY301
            self._load(owner)
            if not joins:
                self._found = {n for n, _ in socket.if_nameindex() if self._has_filter(n)}
        except BaseException:
            # a folder that holds nothing is of no use to anyone
            if self.is_alone():
                with contextlib.suppress(OSError):
                    directory.rmdir()
            self.close()
            raise

    def _load(self, owner: int) -> None:
        for name in _PINNED:
            pin = os.fsencode(self.directory / name)
            check(lib.bpf_map__set_pin_path(self._map(name), pin), f"pin {name}")
        check(lib.bpf_object__load(self._object), "load the packet programs")
        flows = self._map("flows")
        if lib.bpf_map__value_size(flows) != _FLOW_SIZE:
            raise KernelError(errno.EINVAL, f"stale {OBJECT.name}: values of 'flows' differ")
        self._flows = ffi.cast("struct flow *", self._mapped("flows", MAX_FLOWS * _FLOW_SIZE))
        self._lost = ffi.cast("uint64_t *", self._mapped("lost", MAX_OWNERS * 8))
        self._packet = ffi.new(
            "struct packet *",
            {
                "install": self._program("install"),
                "emit": self._program("emit"),
                "ends": lib.bpf_map__fd(self._map("ends")),
                "notes": lib.bpf_map__fd(self._map("notes")),
                "rings": lib.bpf_map__fd(self._map("rings")),
                "flows": self._flows,
                "owner": owner,
                # two that start at once look for free places in different parts
                "cursor": owner * (MAX_FLOWS // MAX_OWNERS),
            },
        )
        self._ring = lib.packet_ring(self._packet)
        if self._ring == ffi.NULL:
            raise error(ffi.errno, "open the event ring")
        self._pairs = ffi.new("struct pair[]", 64)
        self._memory = ffi.buffer(self._flows, MAX_FLOWS * _FLOW_SIZE)

    def _map(self, name: str) -> Any:
        found = lib.bpf_object__find_map_by_name(self._object, name.encode())
        if found == ffi.NULL:
            raise KernelError(errno.ENOENT, f"stale {OBJECT.name}: no map {name!r}")
        return found

    def _mapped(self, name: str, size: int) -> Any:
        address = lib.splice_map(lib.bpf_map__fd(self._map(name)), size)
        if address == ffi.NULL:
            raise error(ffi.errno, f"map {name!r}")
        self._maps.append((address, size))
        return address

    def _program(self, name: str) -> int:
        found = lib.bpf_object__find_program_by_name(self._object, name.encode())
        return int(lib.bpf_program__fd(found))

    def close(self) -> None:
        """
        Give up what is this process's; what is pinned goes on.
        """
        if self._ring != ffi.NULL:
            lib.ring_buffer__free(self._ring)
            self._ring = ffi.NULL
        for address, size in self._maps:
            lib.splice_unmap(address, size)
        self._maps.clear()
        for fd in self._links.values():
            os.close(fd)
        self._links.clear()
        if self._object != ffi.NULL:
            lib.bpf_object__close(self._object)
            self._object = ffi.NULL
        self._leave()

    def _leave(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- devices ---

    def follow(self, devices: Iterable[int]) -> dict[int, str]:
        """
        Be attached to *devices*, their indices, and to no others.

        Returns:
            Those that this was not possible for, with the reasons.
        """
        wanted = set(devices)
        refused = {}
        for device in {device for device, _ in self._links} | self._classic | self._left():
            if device not in wanted:
                self._detach(device)
        for device in sorted(wanted - {device for device, _ in self._links} - self._classic):
            try:
                self._attach(device)
            except KernelError as err:
                refused[device] = str(err.strerror)
        return refused

    @property
    def devices(self) -> set[int]:
        """
        The devices attached to.
        """
        return {device for device, _ in self._links} | self._classic

    def _left(self) -> set[int]:
        """
        The devices that pins, or filters, say an earlier loader was attached to.
        """
        names = (pin.name.partition("-") for pin in self.directory.iterdir())
        pinned = {int(device) for hook, _, device in names if hook in ("ingress", "egress")}
        return pinned | self._found

    def _pin(self, hook: str, device: int) -> Path:
        return self.directory / f"{hook}-{device}"

    def _attach(self, device: int) -> None:
        if not self._has_tcx:
            self._attach_classic(device)
            return
        for hook, kind in (("ingress", lib.TCX_INGRESS), ("egress", lib.TCX_EGRESS)):
            program, pin = self._program(hook), self._pin(hook, device)
            link = lib.bpf_obj_get(os.fsencode(pin))
            if link >= 0 and (
                lib.packet_link_device(link) != device
                or lib.bpf_link_update(link, program, ffi.NULL) < 0
            ):
                # of a device that is gone, or was another's
                os.close(link)
                pin.unlink()
                link = -1
            if link < 0:
                link = lib.bpf_link_create(program, device, kind, ffi.NULL)
                if link == -errno.EINVAL:
                    self._has_tcx = False
                    self._attach_classic(device)
                    return
                check(link, f"attach to device {device}")
                if lib.bpf_obj_pin(link, os.fsencode(pin)) < 0:
                    failed = error(ffi.errno, f"pin the link to device {device}")
                    os.close(link)
                    raise failed
            self._links[device, hook] = link

    def _clsact(self, what: int, device: int, hook: str) -> int:
        program, egress = self._program(hook), hook == "egress"
        return int(lib.packet_clsact(what, device, egress, self._handle, program))

    def _attach_classic(self, device: int) -> None:
        for hook in ("ingress", "egress"):
            check(self._clsact(lib.CLSACT_ATTACH, device, hook), f"attach to device {device}")
        self._classic.add(device)

    def _has_filter(self, device: int) -> bool:
        return any(
            not self._clsact(lib.CLSACT_FIND, device, hook) for hook in ("ingress", "egress")
        )

    def _detach(self, device: int) -> None:
        if device in self._classic | self._found:
            self._classic.discard(device)
            self._found.discard(device)
            for hook in ("ingress", "egress"):
                self._clsact(lib.CLSACT_DETACH, device, hook)
        for hook in ("ingress", "egress"):
            link = self._links.pop((device, hook), -1)
            if link >= 0:
                os.close(link)
            with contextlib.suppress(FileNotFoundError):
                self._pin(hook, device).unlink()

    def is_alone(self) -> bool:
        """
        Whether nobody else uses what is pinned; if so, nobody can begin to before `unpin` or close.

        Not if it has been taken down.
        """
        if self._lock < 0:
            return False
        if not _lock_alone(self._lock):
            # the kernel has given up the lock that was to become that one
            fcntl.flock(self._lock, fcntl.LOCK_SH)
            return False
        # meanwhile another may have been alone
        return _is_at(self._lock, self.directory)

    def unpin(self) -> None:
        """
        Leave nothing behind: the programs go off their devices, and the maps end with the process.
        """
        self.follow(())
        for name in _PINNED:
            with contextlib.suppress(FileNotFoundError):
                (self.directory / name).unlink()
        with contextlib.suppress(OSError):
            self.directory.rmdir()
        self._leave()

    # --- events ---

    @property
    def events_fd(self) -> int:
        """
        The descriptor that becomes readable when there are events.
        """
        return int(lib.ring_buffer__epoll_fd(self._ring))

    def events(self) -> list[Event]:
        """
        What has been told since the last call, at most 1024.
        """
        lib.packet_n_events = 0
        lib.ring_buffer__consume(self._ring)
        told = ffi.buffer(lib.packet_events, lib.packet_n_events * _EVENT.size)
        return list(map(Event._make, _EVENT.iter_unpack(told)))

    # --- flows ---

    def install(
        self, pairs: Sequence[tuple[int, int, bool]], serial: int, *, anywhere: bool = False
    ) -> "list[Installed | str]":
        """
        Make flows of pairs of connected sockets, and send backends what waits in the clients'.

        A pair is the client's socket, the backend's, and whether that may have an address that is
        neither this host's nor the client's.  From then on the flow's packets are translated; the
        sockets must stay until `acknowledged`.  *serial* is the first flow's, the others' follow;
        *anywhere* is for a trial: the ends may be reached in any way.

        Returns:
            For each what was made; or why there is no flow, a word, and both sockets are as they
            were.
        """
        count = len(pairs)
        if count > len(self._pairs):
            self._pairs = ffi.new("struct pair[]", count)
        buffer = ffi.buffer(self._pairs, count * _PAIR_SIZE)
        for at, (client, backend, foreign) in enumerate(pairs):
            _PAIR.pack_into(buffer, at * _PAIR_SIZE, serial + at, client, backend, foreign)
        lib.packet_install_all(self._packet, self._pairs, count, anywhere)
        return [
            _why_not(result) if result else Installed(number, sent, is_open)
            for result, number, sent, is_open in _OUTCOME.iter_unpack(buffer)
        ]

    @property
    def lost_events(self) -> int:
        """
        How often an event found no room in our ring; after a change, look at every flow.
        """
        return int(self._lost[self._packet.owner])

    @property
    def owner(self) -> int:
        """
        Which ring is ours; a flow's owner hears of it.
        """
        return int(self._packet.owner)

    def flow(self, number: int) -> Any:
        """
        A flow's `struct flow`, as it stands.
        """
        return self._flows[number]

    def entry(self, number: int) -> bytes:
        """
        A flow's `struct tuple` of what the backend gets: the router's endpoint, and the backend's.
        """
        at = number * _FLOW_SIZE + _ENTRY_AT
        entry: bytes = self._memory[at : at + _ENTRY_SIZE]
        return entry

    def address(self, number: int) -> Any:
        """
        Where a flow's `struct flow` lies, for native code.
        """
        return self._flows + number

    def acknowledged(self, number: int) -> bool:
        """
        Whether the backend has the hello; where not, there will be a Kind.ACKED or an end.
        """
        return bool(lib.packet_acknowledged(self._packet, number))

    def end(self, number: int) -> bool:
        """
        Translate no more; whether that was news.
        """
        return bool(lib.packet_end(self._packet, number))

    def reap(self, number: int, serial: int) -> bool:
        """
        Free the place of a flow that has been over for QUARANTINE, unless it is another's by now.

        Returns:
            Whether that is done; else it is to be asked for again, after a while.
        """
        return bool(lib.packet_reap(self._packet, number, serial))

    def numbers(self) -> list[int]:
        """
        The numbers of all flows, whoever made them.
        """
        numbers = ffi.new("uint32_t[]", MAX_FLOWS)
        return list(numbers[0 : lib.packet_list(self._packet, numbers, MAX_FLOWS)])

    def idle(self, before: int) -> list[int]:
        """
        The flows of ours of which nobody has heard since *before*, in monotonic seconds.
        """
        numbers = ffi.new("uint32_t[]", 1024)
        return list(numbers[0 : lib.packet_idle(self._packet, before, numbers, 1024)])

    def adopt(self, number: int) -> None:
        """
        Hear of the flow *number* from now on: what becomes of it later is told in our ring.
        """
        self._flows[number].owner = self._packet.owner

    def note(self, number: int, text: bytes) -> None:
        """
        Keep *text*, of at most MAX_NOTE bytes, with a flow.
        """
        lib.packet_note(self._packet, number, text, len(text))

    def read_note(self, number: int) -> bytes:
        """
        What is kept with a flow, or nothing.
        """
        note = ffi.new("struct note *")
        if lib.packet_read_note(self._packet, number, note):
            return b""
        return bytes(ffi.string(note.text))

    def translate(self, packet: bytes) -> bytes | None:
        """
        Give an IPv4 packet to the ingress program, as a trial.

        Returns:
            What it made of it, or None if it would not send it on.
        """
        frame = bytes(12) + b"\x08\x00" + packet
        out, size = ffi.new("char[]", len(frame) + 64), ffi.new("uint32_t *", len(frame) + 64)
        program = self._program("ingress")
        answer = lib.packet_run(program, ffi.from_buffer(frame), len(frame), out, size)
        if answer != _REDIRECT:
            return None
        return bytes(ffi.buffer(out, size[0]))[_ETHERNET:]

    def emit(self, packet: bytes, device: int) -> bool:
        """
        Send an IP packet by *device*, one of those followed; whether it is on its way.
        """
        kind = b"\x86\xdd" if packet[0] >> 4 == 6 else b"\x08\x00"  # noqa: PLR2004 - IPv6
        frame = bytes(12) + kind + packet
        return not lib.packet_emit(self._packet, ffi.from_buffer(frame), len(frame), device)


def take_down(directory: Path) -> int | None:
    """
    Leave nothing of what a loader of any version has pinned in *directory*, or all.

    All it is if flows are under way, or somebody uses it.

    Returns:
        How many are; None where somebody uses what is pinned.

    Raises:
        OSError: it is not as a loader leaves it, or the kernel refuses a step; the message says
            what.
    """
    lib.splice_log_start()
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not _lock_alone(fd) or not _is_at(fd, directory):
            return None
        flows, links = directory / "flows", ("ingress-", "egress-")
        # the map of flows last: what is left without it would be understood by nobody
        pins = sorted(directory.iterdir(), key=lambda p: (p == flows, not p.name.startswith(links)))
        # without any, a loader has failed here
        if pins and (found := check(lib.packet_under_way(os.fsencode(flows)), "count the flows")):
            return found
        _remove_filters(_handle(directory))
        for pin in pins:
            pin.unlink()
        directory.rmdir()
        return 0
    finally:
        os.close(fd)


def _remove_filters(handle: int) -> None:
    for device, name in socket.if_nameindex():
        for egress in (False, True):
            if not lib.packet_clsact(lib.CLSACT_FIND, device, egress, handle, -1):
                answer = lib.packet_clsact(lib.CLSACT_DETACH, device, egress, handle, -1)
                check(answer, f"take a filter off {name}")


def _handle(directory: Path) -> int:
    """
    Make the handle of the filters of those whose pins are in *directory*.
    """
    return zlib.crc32(os.fsencode(directory.name)) or 1


def _enter(directory: Path) -> int:
    """
    Make *directory*, if need be, and lock it as one of those that use it; a descriptor.

    Raises:
        KernelError: that is not possible; the message says why.
    """
    while True:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as err:
            raise KernelError(err.errno, f"{directory}: {err.strerror}") from None
        fcntl.flock(fd, fcntl.LOCK_SH)
        # whoever had it alone has taken it down
        if _is_at(fd, directory):
            return fd
        os.close(fd)


def _lock_alone(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(fd: int, directory: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), directory.stat())
    except FileNotFoundError:
        return False


def _why_not(result: int) -> str:
    if result < 0:
        return errno.errorcode.get(-result, "unknown").lower()
    return _REASONS.get(result, "unknown")


def silence(one: int, other: int) -> None:
    """
    Have two sockets go without a word when they are closed.

    Raises:
        OSError: without NET_ADMIN.
    """
    if answer := lib.packet_silence(one, other):
        raise OSError(-answer, os.strerror(-answer))


def sequence_numbers(fd: int) -> tuple[int, int]:
    """
    Read the numbers of the next byte that a silenced socket would send, and receive.

    Raises:
        OSError: it is not silenced.
    """
    numbers = ffi.new("uint32_t[2]")
    if answer := lib.packet_sequence(fd, numbers):
        raise OSError(-answer, os.strerror(-answer))
    return numbers[0], numbers[1]
