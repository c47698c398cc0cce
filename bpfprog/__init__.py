"""
Everything that knows BPF: the programs, the headers that they share with user space, the loaders.
"""

from bpfprog.packet import ABI as PACKET_ABI
from bpfprog.packet import (
    MAX_FLOWS,
    MAX_NOTE,
    MAX_OWNERS,
    QUARANTINE,
    Event,
    Installed,
    Kind,
    Packet,
    State,
    sequence_numbers,
    silence,
    take_down,
)
from bpfprog.splice import CAPABILITIES, MAX_CONNECTIONS, STAND_IN, Joined, KernelError, Splice

__all__ = [
    "CAPABILITIES",
    "MAX_CONNECTIONS",
    "MAX_FLOWS",
    "MAX_NOTE",
    "MAX_OWNERS",
    "PACKET_ABI",
    "QUARANTINE",
    "STAND_IN",
    "Event",
    "Installed",
    "Joined",
    "KernelError",
    "Kind",
    "Packet",
    "Splice",
    "State",
    "sequence_numbers",
    "silence",
    "take_down",
]
