"""
Where the promises of every hand-off are kept: on loopback, if a subclass does not say otherwise.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

from harness import loopback
from harness.loopback import LOOPBACK, Address, Product


class Promises:
    """
    What all classes of promises have in common; a subclass names the hand-off.
    """

    handoff: ClassVar[str]

    home: ClassVar[str] = LOOPBACK
    """The address of backends."""

    origin: ClassVar[str] = LOOPBACK
    """The address that clients come from."""

    @classmethod
    @contextmanager
    def at_home(cls) -> Iterator[None]:
        """
        Be where backends are meanwhile: sockets that this thread makes belong there.
        """
        yield

    @classmethod
    @contextmanager
    def router(
        cls,
        routes: Mapping[str, Address],
        *options: str,
        keys: Mapping[str, str] | None = None,
    ) -> Iterator[Product]:
        """
        Run the product with *routes* by this hand-off, as `loopback.router` does.
        """
        with loopback.router(cls.handoff, routes, *options, keys=keys) as product:
            yield product
