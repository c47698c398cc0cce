"""
What holds for all tests.
"""

import pytest

# assertions in these explain themselves as those in test files do
pytest.register_assert_rewrite(
    "harness.hello_promises",
    "harness.lossy_promises",
    "harness.packet_lab",
    "harness.proxy_promises",
    "harness.transfer_promises",
)
