"""
Processors that are at work on packets of one flow in the same instant.
"""

import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path

from harness.forge import ACK, PSH, Segment
from harness.packet_lab import PATIENCE, PacketLab
from harness.tools import VENV, wait_for

from bpfprog import Packet

HELLO = b"hello"

BYTES = 100_000
"""That both send, together: as many as lie in the window that nobody opens again."""

RIVAL = """
import os, sys
from pathlib import Path
from bpfprog import Packet

pins, step, number, first, until, segment = sys.argv[1:]
step, first, until = int(step), int(first), int(until)
head, tail = bytes.fromhex(segment[:48]), bytes.fromhex(segment[56:])
processors = sorted(os.sched_getaffinity(0))
os.sched_setaffinity(0, {processors[step % len(processors)]})
with Packet(Path(pins), step, joins=True) as packet:
    way = packet.flow(int(number)).ways[0]
    print("ready", flush=True)
    sys.stdin.readline()
    lost = 0
    while (come := (way.next - first) % 2**32) < until:
        packet.translate(head + ((first + come + step - 1) % 2**32).to_bytes(4) + tail)
        lost += (way.next - first) % 2**32 < come + step
    print(lost, flush=True)
"""
"""Sends one byte after the other, *step* behind what has come, and counts those not taken note of.

A segment that another processor has overtaken in the very instant is no less behind what has come.
"""


def test_no_processor_overlooks_what_another_has_noted(lab: PacketLab) -> None:
    """
    Where two take note of segments at once, the further one counts, and every byte once.

    With a single try of the compare-and-swap dozens of a hundred thousand are lost, if there are
    two processors to be had.
    """
    pins = lab.bpffs / "sniroute" / "one"
    with ExitStack() as stack:
        packet = stack.enter_context(Packet(pins, 0))
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        client, near, far, _ = (
            stack.enter_context(end) for _ in range(2) for end in connected(listener)
        )
        client.sendall(HELLO)
        wait_for("the hello", lambda: near.recv(9, socket.MSG_PEEK) == HELLO)
        pairs = [(near.fileno(), far.fileno(), False)]
        ((number, sent, _),) = packet.install(pairs, 1, anywhere=True)
        way = packet.flow(number).ways[0]
        first, before = way.next, way.bytes
        segment = Segment.expected(client).but(flags=PSH | ACK, payload=b"x")
        arguments = number, first, BYTES, segment.packet().hex()
        rivals = [stack.enter_context(rival(pins, step, *arguments)) for step in (1, 2)]
        for each in rivals:
            stack.callback(each.kill)
        ready = [each.stdout.readline() for each in rivals]
        for each in rivals:
            each.stdin.write("go\n")
            each.stdin.flush()
        lost = [int(each.communicate(timeout=PATIENCE)[0]) for each in rivals]
        come = (way.next - first) % 2**32
        counted = way.bytes - before

    assert sent
    assert ["ready\n"] * 2 == ready
    assert [0, 0] == lost
    assert come == counted >= BYTES


def connected(listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    """
    Make a connection to *listener*, and return both its ends.
    """
    one = socket.create_connection(listener.getsockname(), PATIENCE)
    other, _ = listener.accept()
    other.settimeout(PATIENCE)
    return one, other


def rival(pins: Path, *arguments: object) -> "subprocess.Popen[str]":
    """
    Start a process that sends segments of a flow.
    """
    command = [VENV / "bin/python", "-c", RIVAL, pins, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
