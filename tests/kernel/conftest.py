"""
What several of these modules begin with; one that means another lab says so itself.
"""

from collections.abc import Iterator

import pytest
from harness.packet_lab import PacketLab


@pytest.fixture
def lab() -> Iterator[PacketLab]:
    """
    A lab of the test's own, whose product hands over as packets.
    """
    with PacketLab() as lab:
        yield lab
