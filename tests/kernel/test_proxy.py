"""
PROXY headers in and out, by the kernel.
"""

from harness.proxy_promises import ProxyPromises


class TestSockmap(ProxyPromises):
    """
    The promises of every hand-off.
    """

    handoff = "sockmap"
