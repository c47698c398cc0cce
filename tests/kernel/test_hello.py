"""
Every hello finds its backend, and no bad one does, through the kernel.
"""

from harness.hello_promises import HelloPromises


class TestSockmap(HelloPromises):
    """
    The promises about hellos, through the sockmap.
    """

    handoff = "sockmap"
