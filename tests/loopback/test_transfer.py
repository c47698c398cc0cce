"""
Every byte arrives, by the relay.
"""

from harness.transfer_promises import TransferPromises


class TestRelay(TransferPromises):
    """
    The promises of every hand-off.
    """

    handoff = "relay"
