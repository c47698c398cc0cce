"""
PROXY headers in and out, by the relay.
"""

from harness.proxy_promises import ProxyPromises


class TestRelay(ProxyPromises):
    """
    The promises of every hand-off.
    """

    handoff = "relay"
