"""
Everything that knows BPF: the program, the header that it shares with user space, the loader.
"""

from bpfprog.splice import CAPABILITIES, MAX_CONNECTIONS, STAND_IN, KernelError, Splice

__all__ = ["CAPABILITIES", "MAX_CONNECTIONS", "STAND_IN", "KernelError", "Splice"]
