"""
Every byte arrives once, also on a bad network.
"""

from harness.lossy_promises import LossyPromises


class TestSockmap(LossyPromises):
    """
    The promises, by the kernel.
    """

    handoff = "sockmap"


class TestRelay(LossyPromises):
    """
    The promises, by the relay.
    """

    handoff = "relay"
