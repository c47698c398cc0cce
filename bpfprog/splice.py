"""
Load the BPF program and join sockets with it.

This is the mechanism: two sockets become one pipe in the kernel, and the counts say how far it
has come.  When to join, to half-close and to give up is the caller's policy.

Rules of this file:

1. A socket joined here is never read by anyone but `pump` in the caller's slow mode, and the
   directions of a connection are left only after both its sockets are closed.
2. Nothing is pinned: the program and its maps end with the process, like the sockets in them.
"""

import errno
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

from bpfprog._ffi import ffi, lib

OBJECT = Path(__file__).with_name("splice.bpf.o")

CAPABILITIES: Final = ("BPF", "PERFMON", "NET_ADMIN")
"""
What loading needs: BPF for program and maps, PERFMON to read tcp_sock (bpf_skc_to_tcp_sock),
NET_ADMIN for a program on sockets (bpf_prog_load, sock_hash_alloc).  Joining needs none.
"""

STAND_IN: Final = "SYS_ADMIN"
"""What stands for BPF and PERFMON where an engine is older than those two (bpf_capable)."""

MAX_CONNECTIONS: Final[int] = lib.MAX_CONNECTIONS


# `struct join`: what goes in, and what comes out
_JOIN: Final = struct.Struct("=iiI")
_JOINED: Final = struct.Struct("=12xiQQ")
_JOIN_SIZE: Final = ffi.sizeof("struct join")


class Joined(NamedTuple):
    """
    What has become of two sockets, and the cookies to leave with.

    *result* is 0; or -errno, when the kernel refused the client (MPTCP, or half-closed: EOPNOTSUPP)
    and neither socket has changed; or 1, when it refused the backend and the client was in already:
    that stays in the map and passes all it receives to user space, which must relay.
    """

    result: int
    cookies: tuple[int, int]


class KernelError(OSError):
    """
    The kernel refused a step; *errno* says how, and a note carries the verifier's log.
    """


class Splice:
    """
    The loaded program with its maps; a context manager.

    Connections are numbered by the caller, 0 to MAX_CONNECTIONS - 1; direction 2n is from the
    client of connection n, direction 2n + 1 from its backend.
    """

    def __init__(self, path: Path = OBJECT) -> None:
        """
        Load the program from *path*.

        Raises:
            KernelError: the object is missing or stale, or the kernel refuses it.
        """
        self._ring = ffi.NULL
        self._maps: list[Any] = []
        lib.splice_log_start()
        self._object = lib.bpf_object__open_file(os.fsencode(path), ffi.NULL)
        if self._object == ffi.NULL:
            raise error(ffi.errno, f"open {path.name}")
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        check(lib.bpf_object__load(self._object), "load the BPF program")
        sockets, _ = self._map("sockets", "uint64_t")
        directions, _ = self._map("directions", "struct direction")
        _, counts = self._map("counts", "struct counts", lib.MAX_DIRECTIONS)
        _, consumed = self._map("consumed", "uint64_t", lib.MAX_DIRECTIONS)
        _, self._faults = self._map("faults", "struct faults", 1)
        events, _ = self._map("events", None)
        self._splice = ffi.new(
            "struct splice *",
            {"sockets": sockets, "directions": directions, "counts": counts, "consumed": consumed},
        )
        self._joins = ffi.new("struct join[]", 64)
        self._ring = lib.splice_ring(events)
        if self._ring == ffi.NULL:
            raise error(ffi.errno, "open the event ring")
        program = lib.bpf_object__find_program_by_name(self._object, b"verdict")
        check(
            lib.bpf_prog_attach(lib.bpf_program__fd(program), sockets, lib.ATTACH_VERDICT, 0),
            "attach the verdict program",
        )

    def _map(self, name: str, value: str | None, mapped: int = 0) -> tuple[int, Any]:
        """
        Find a map, check that its values are laid out as C has them here, and map *mapped* of them.
        """
        bpf_map = lib.bpf_object__find_map_by_name(self._object, name.encode())
        if bpf_map == ffi.NULL:
            raise KernelError(errno.ENOENT, f"stale {OBJECT.name}: no map {name!r}")
        fd = lib.bpf_map__fd(bpf_map)
        if value is None:
            return fd, None
        size = ffi.sizeof(value)
        if lib.bpf_map__value_size(bpf_map) != size:
            raise KernelError(errno.EINVAL, f"stale {OBJECT.name}: values of {name!r} differ")
        if not mapped:
            return fd, None
        address = lib.splice_map(fd, mapped * size)
        if address == ffi.NULL:
            raise error(ffi.errno, f"map {name!r}")
        self._maps.append((address, mapped * size))
        return fd, ffi.cast(f"{value} *", address)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """
        Unload; sockets that are still joined stop moving bytes.
        """
        if self._object == ffi.NULL:
            return
        if self._ring != ffi.NULL:
            lib.ring_buffer__free(self._ring)
        for address, size in self._maps:
            lib.splice_unmap(address, size)
        lib.bpf_object__close(self._object)
        self._object = ffi.NULL

    @property
    def events_fd(self) -> int:
        """
        The descriptor that becomes readable when a direction went slow.
        """
        return int(lib.ring_buffer__epoll_fd(self._ring))

    def events(self) -> list[int]:
        """
        The directions that went slow since the last call, at most MAX_EVENTS of them.
        """
        lib.splice_n_events = 0
        lib.ring_buffer__consume(self._ring)
        return list(lib.splice_events[0 : lib.splice_n_events])

    @property
    def lost_events(self) -> int:
        """
        How often the event ring was full; after a change, look at every direction.
        """
        return int(self._faults.lost_events)

    def join(self, pairs: Sequence[tuple[int, int, int]], limit: int) -> list[Joined]:
        """
        Join pairs of sockets; what is queued in them moves at the next segment, or a kick.

        A pair is the client's socket, the backend's, and the connection's number.
        """
        count = len(pairs)
        if count > len(self._joins):
            self._joins = ffi.new("struct join[]", count)
        buffer = ffi.buffer(self._joins, count * _JOIN_SIZE)
        for at, pair in enumerate(pairs):
            _JOIN.pack_into(buffer, at * _JOIN_SIZE, *pair)
        lib.splice_join_all(self._splice, self._joins, count, limit)
        return [
            Joined(result, (client, backend))
            for result, client, backend in _JOINED.iter_unpack(buffer)
        ]

    def leave(self, cookies: Iterable[int]) -> None:
        """
        Forget connections by their cookies; their sockets must be closed already.
        """
        keys = ffi.new("uint64_t[]", list(cookies))
        check(lib.splice_leave(self._splice, keys, len(keys)), "leave")

    @property
    def addresses(self) -> tuple[int, int]:
        """
        Where the `struct counts` and the consumed counts of all directions lie, for native code.
        """
        splice = self._splice
        return (
            int(ffi.cast("uintptr_t", splice.counts)),
            int(ffi.cast("uintptr_t", splice.consumed)),
        )


def check(answer: int, what: str) -> int:
    """
    Take *answer* of libbpf, and return it.

    Raises:
        KernelError: it says that *what* is not possible.
    """
    if answer < 0:
        raise error(-answer if answer != -1 else ffi.errno, what)
    return answer


def error(number: int, what: str) -> KernelError:
    """
    Make an error of an errno, with what libbpf and the verifier have said.
    """
    made = KernelError(number, f"{what}: {os.strerror(number)}")
    if log := ffi.string(lib.splice_log()).decode(errors="replace").strip():
        made.add_note(log)
    return made
