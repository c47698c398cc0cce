"""
Every byte arrives, by the kernel.
"""

from harness.transfer_promises import TransferPromises


class TestSockmap(TransferPromises):
    """
    The promises of every hand-off.
    """

    handoff = "sockmap"
