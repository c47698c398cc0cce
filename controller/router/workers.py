"""
Further workers: processes that accept, read hellos and connect, as this one does.

Rules of this file:

1. A nursery starts them, and starts one anew that ended.  It is forked off before this process has
   a thread or a client, keeps the privileges that a start takes, and reads nothing but how its
   children ended.
2. This process binds and listens for all, so no client is lost with a worker: they wait in its
   queue, and while it is away this process accepts them.
3. A worker is told and asked as a router is by a controller (core.wire), over a socket that it is
   born with; only more, which nobody else may.
4. One that does not answer is killed.
"""

import contextlib
import errno
import json
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, NoReturn

import pyprctl
import structlog

from controller import privilege
from controller.core import wire
from controller.router.control import Control, Peer
from controller.router.numbers import Numbers, dump_numbers, load_numbers, read_numbers
from controller.router.router import Router

PATIENCE: Final = 30.0
"""Seconds that a worker may take to start, or to answer: the largest table takes it one or two."""

FIRST_WAIT: Final = 0.2
LAST_WAIT: Final = 10.0
"""Seconds before an ended worker is started again: doubling from the first to the last."""

LIVED: Final = 10.0
"""Seconds after which a worker counts as having started well."""

STARTING: Final = 0.02
"""Seconds between looks whether all workers have started."""

REPORT: Final = 1024
"""Bytes of a word from the nursery, at most."""

READ_SIZE: Final = 1024 * 1024

Work = Callable[[int, socket.socket], int]
"""What a worker does, by its index and with its end of the socket; returns its exit status."""

log = structlog.get_logger()


# --- the nursery ---


def start_nursery(count: int, work: Work) -> socket.socket:
    """
    Fork off a process that keeps workers 1 to *count* running; none outlives this one.

    Returns:
        A socket on which it reports: each start with the worker's socket, and each end.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    if not os.fork():
        ours.close()
        _be_child(parent, _Nursery(theirs, work, count).run)
    theirs.close()
    return ours


def _be_child(parent: int, task: Callable[[], int]) -> NoReturn:
    """
    Do *task* and end, before any code of the *parent* is reached again; or end with it.
    """
    status = 1
    try:
        pyprctl.set_pdeathsig(signal.SIGKILL)
        # they end when they are told to, by worker 0, which these signals are for
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        if os.getppid() == parent:
            status = task()
    except Exception:  # noqa: BLE001 - the root of the process
        traceback.print_exc()
    finally:
        os._exit(status)


class _Nursery:
    def __init__(self, reports: socket.socket, work: Work, count: int) -> None:
        self._reports = reports
        self._work = work
        self._due = dict.fromkeys(range(1, count + 1), 0.0)
        self._waits = dict.fromkeys(self._due, FIRST_WAIT)
        self._started: dict[int, float] = {}
        self._children: dict[int, int] = {}  # index by pid

    def run(self) -> int:
        """
        Go on until every worker has ended well, for 0.
        """
        # blocked and waited for: an end is never missed
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        while self._due or self._children:
            now = time.monotonic()
            for index in [index for index, due in self._due.items() if due <= now]:
                del self._due[index]
                self._start(index)
            self._reap()
            wait = min(self._due.values(), default=now + LAST_WAIT) - time.monotonic()
            if self._children or wait > 0:
                signal.sigtimedwait({signal.SIGCHLD}, max(0.0, wait))
        return 0

    def _start(self, index: int) -> None:
        ours, theirs = socket.socketpair()
        parent = os.getpid()
        pid = os.fork()
        if not pid:
            ours.close()
            self._reports.close()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            _be_child(parent, partial(self._work, index, theirs))
        self._children[pid] = index
        self._started[index] = time.monotonic()
        report = json.dumps({"index": index, "pid": pid}).encode()
        socket.send_fds(self._reports, [report], [ours.fileno()])
        ours.close()
        theirs.close()

    def _reap(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            index, code = self._children.pop(pid), os.waitstatus_to_exitcode(status)
            self._reports.send(json.dumps({"index": index, "status": code}).encode())
            if code:
                now = time.monotonic()
                lived = now - self._started[index] > LIVED
                wait = self._waits[index] = (
                    FIRST_WAIT if lived else min(2 * self._waits[index], LAST_WAIT)
                )
                self._due[index] = now + wait


# --- the worker's end ---


class WorkerControl(Control):
    """
    What a worker is told and asked by worker 0.
    """

    def __init__(self, router: Router, version: str, listeners: Sequence[socket.socket]) -> None:
        """
        Serve *listeners* when told to.
        """
        super().__init__(router, None, router.settings.control, version)
        self._listeners = listeners
        self._answers |= {
            "numbers": self._tell_numbers,
            "accept": self._accept_clients,
            "adopt": self._adopt,
            "leave": self._leave,
        }

    def attend(self, link: socket.socket) -> None:
        """
        Answer on *link*.
        """
        peer = Peer(self, link)
        self._peers.add(peer)
        peer.start()

    def _tell_numbers(self, *_: object) -> wire.Message:
        return dump_numbers(self.loop.ask(partial(read_numbers, self._router)))

    def _accept_clients(self, *_: object) -> wire.Message:
        self.loop.ask(partial(self._router.serve, self._listeners))
        return {"type": "accept"}

    def _adopt(self, _: Peer, message: wire.Message) -> wire.Message:
        self.loop.ask(partial(self._router.adopt_half, message["half"]))
        return {"type": "adopt"}

    def _leave(self, *_: object) -> wire.Message:
        self._router.transparency.leave()
        return {"type": "leave"}


# --- worker 0's end ---


class NotStarted(Exception):  # noqa: N818 - an outcome, not a fault of the program
    """
    A worker could not be started; the message says which.
    """


class Worker:
    """
    One further worker, as worker 0 knows it.
    """

    def __init__(self, index: int, listeners: Sequence[socket.socket]) -> None:
        self.index = index
        self.listeners = listeners
        self.lock = threading.Lock()
        self.last: Numbers | None = None
        self._link: socket.socket | None = None
        self._pid = 0
        self._decoder = wire.Decoder()

    def born(self, link: socket.socket, pid: int) -> None:
        """
        Take note that it runs, and answers on *link*.
        """
        with self.lock:
            link.settimeout(PATIENCE)
            self._link, self._pid, self._decoder = link, pid, wire.Decoder()

    @property
    def is_away(self) -> bool:
        """
        Whether it can not be asked.
        """
        return self._link is None

    def ended(self) -> None:
        """
        Take note that it runs no more.
        """
        with self.lock:
            self._hang_up()

    def _hang_up(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    def ask(self, message: wire.Message) -> wire.Message | None:
        """
        Send *message* and wait for the answer; None if it is away.
        """
        with self.lock:
            self.say(message)
            return self.hear()

    def say(self, message: wire.Message) -> None:
        """
        Send *message*, unless it is away; to be called with the lock held.
        """
        if self._link is not None:
            self._guard(partial(self._link.sendall, wire.encode(message)))

    def hear(self) -> wire.Message | None:
        """
        Wait for an answer; None if it is away.  To be called with the lock held.
        """
        if self._link is None:
            return None
        return self._guard(partial(self._receive, self._link))

    def count(self) -> None:
        """
        Know its latest numbers as `last`; the ones before if it is away.
        """
        answer = self.ask({"type": "numbers"})
        if answer is not None:
            try:
                self.last = load_numbers(answer)
            except wire.WireError as err:
                log.warning("worker not counted", worker=self.index, error=str(err))

    def _receive(self, link: socket.socket) -> wire.Message:
        while data := link.recv(READ_SIZE):
            for message in self._decoder.feed(data):
                return message
        raise ConnectionResetError(errno.ECONNRESET, "it has ended")

    def _guard(self, talk: Callable[[], wire.Message | None]) -> wire.Message | None:
        try:
            return talk()
        except (TimeoutError, wire.WireError) as err:
            log.error("worker killed", worker=self.index, pid=self._pid, error=str(err))
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
        except OSError:
            pass
        self._hang_up()
        return None


class Workers:
    """
    All further workers of this router; none of them, unless it has several.

    *ends* counts those that ended unasked.
    """

    def __init__(
        self, control: Control, router: Router, groups: Sequence[Sequence[socket.socket]]
    ) -> None:
        """
        Know workers 1, 2..., which have the listeners *groups*.
        """
        self.ends = 0
        self._control = control
        self._router = router
        self._team = [Worker(i, listeners) for i, listeners in enumerate(groups, 1)]
        self._serving = False
        self._changed = threading.Lock()
        self._running: set[int] = set()
        self._failed = ""
        self._past = Numbers()
        self._counting = threading.Lock()

    @property
    def listeners(self) -> list[socket.socket]:
        """
        What the workers accept from.
        """
        return [listener for worker in self._team for listener in worker.listeners]

    @property
    def running(self) -> int:
        """
        How many serve.
        """
        return len(self._running)

    def start(self, reports: socket.socket) -> None:
        """
        Hear what the nursery *reports*, and wait until every worker is ready for clients.

        Raises:
            NotStarted: one is not.
        """
        for task, name in ((partial(self._run, reports), "workers"), (self._drain, "drain")):
            threading.Thread(target=task, name=name, daemon=True).start()
        until = time.monotonic() + PATIENCE
        while len(self._running) < len(self._team):
            if self._failed or time.monotonic() > until:
                raise NotStarted(self._failed or "workers do not start")
            # a controller may be waiting for the loop already
            self._router.loop.turn(STARTING)

    def serve(self) -> None:
        """
        Have all workers accept; worker 0 listens for them.
        """
        # not one_table: whoever has it may wait for the loop, which does not run yet
        with self._changed:
            self._serving = True
            self._router.others.update(self._running)
        self.ask({"type": "accept"})

    def ask(self, message: wire.Message) -> list[wire.Message]:
        """
        Ask every worker that there is, all at once, and return their answers.
        """
        with contextlib.ExitStack() as stack:
            for worker in self._team:
                stack.enter_context(worker.lock)
                worker.say(message)
            answers = [worker.hear() for worker in self._team]
        return [answer for answer in answers if answer is not None]

    def numbers(self) -> Numbers:
        """
        Add up what the workers count, and what those counted that are no more.
        """
        numbers = Numbers()
        with self._counting:
            for worker in self._team:
                worker.count()
                if worker.last is not None:
                    numbers.add(worker.last)
            numbers.add(self._past)
        return numbers

    def _run(self, reports: socket.socket) -> None:
        # capabilities are a thread's
        privilege.drop_to(())
        while True:
            data, fds, _, _ = socket.recv_fds(reports, REPORT, 1)
            if not data:
                break
            report = json.loads(data)
            worker = self._team[report["index"] - 1]
            if fds:
                worker.born(socket.socket(fileno=fds[0]), report["pid"])
                # each in its own time: to start takes a worker half a second
                threading.Thread(
                    target=self._greet, args=(worker,), name="greet", daemon=True
                ).start()
            else:
                self._lose(worker, report["status"])
        if not self._router.closed.is_set():
            log.error("no more workers are started")
            for worker in self._team:
                self._lose(worker, None)

    def _greet(self, worker: Worker) -> None:
        # it answers once it has proven its hand-offs; if it ends before, that is reported too
        if worker.ask({"type": "hello", "version": wire.VERSION}) is None:
            return
        router = self._router
        with self._control.one_table:
            if router.table.generation:
                worker.ask({"type": "table", **wire.dump_table(router.table)})
            if router.packet is not None and not router.packet.is_on:
                worker.ask({"type": "packet", "state": wire.PacketState.OFF})
            with self._changed:
                if worker.is_away:
                    return
                self._running.add(worker.index)
                if self._serving:
                    router.loop.ask(partial(router.stand_down, worker.index, worker.listeners))
            if self._serving:
                worker.ask({"type": "drain" if router.closed.is_set() else "accept"})
        log.info("worker ready", worker=worker.index)

    def _lose(self, worker: Worker, status: int | None) -> None:
        worker.ended()
        with self._counting:
            if worker.last is not None:
                self._past.add(worker.last.grown())
                worker.last = None
        with self._changed:
            # one that ends before it is ready has not been accepting
            stands = self._serving and worker.index in self._running
            self._running.discard(worker.index)
            if status != 0:
                self.ends += 1
                self._failed = f"worker {worker.index} ended with {status}"
                log.error("worker ended", worker=worker.index, status=status)
            if stands:
                router = self._router
                router.loop.ask(partial(router.stand_in, worker.index, worker.listeners))

    def _drain(self) -> None:
        """
        Have all drain when this router listens no more.
        """
        privilege.drop_to(())
        self._router.closed.wait()
        self.ask({"type": "drain"})
