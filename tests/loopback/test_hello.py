"""
Every hello finds its backend, and no bad one does, through the user-space relay.
"""

from harness.hello_promises import HelloPromises


class TestRelay(HelloPromises):
    """
    The promises about hellos, through the relay.
    """

    handoff = "relay"
