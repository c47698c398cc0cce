"""
What holds for every hello by every hand-off: the folders loopback/ and kernel/ each run these.

The catch-all `*` leads into a trap: a hello that is cut up, odd or bad must never get there.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from controller.core.alert import HANDSHAKE_FAILURE, UNRECOGNIZED_NAME, alert
from harness import hellos
from harness.echoes import Echoes, Speech, greeting
from harness.hellos import BadHello, Hello
from harness.loopback import Product
from harness.promises import Promises
from harness.tools import wait_for

CATCH_ALL = "*"
HELLO_TIMEOUT = 1
CONNECTIONS = "sniroute_connections_total"
BYTES = "sniroute_forward_bytes_total"


def named(cases: Iterable[Hello | BadHello]) -> pytest.MarkDecorator:
    """
    Run a test for each of *cases*.
    """
    return pytest.mark.parametrize("hello", list(cases), ids=lambda case: case.name)


@dataclass(frozen=True, slots=True)
class Stage:
    """
    A router, the backends behind it, and the play between client and backend.
    """

    product: Product
    echoes: Echoes

    def plays(self, host: str, *takes: tuple[bytes, ...], pause: float = 0) -> None:
        """
        Send each of *takes*, and hear the backend of *host* repeat it to the byte.
        """
        said = [greeting(host) + b"".join(parts) for parts in takes]
        speeches = [
            Speech(parts, pause, ends_after=len(whole))
            for parts, whole in zip(takes, said, strict=True)
        ]

        heard = self.echoes.say(self.product.listen, *speeches)

        # only what is wrong: a comparison of thousands of hellos is no message
        pairs = enumerate(zip(said, heard, strict=True))
        assert not [(number, answer) for number, (whole, answer) in pairs if whole != answer]
        assert self.echoes.accepted[CATCH_ALL] == 0

    def refuses(self, speech: Speech, code: int | None, result: str) -> None:
        """
        Hear only the alert *code*, see it counted as *result*, and no backend reached.
        """
        before = self.product.counts(CONNECTIONS, "result")
        accepted = self.echoes.accepted.total()

        heard = self.echoes.say(self.product.listen, speech)

        expected = before | {result: before.get(result, 0) + 1}
        wait_for("the count", lambda: self.product.counts(CONNECTIONS, "result") != before)
        assert [alert(code) if code else b""] == heard
        assert expected == self.product.counts(CONNECTIONS, "result")
        assert accepted == self.echoes.accepted.total()


class HelloPromises(Promises):
    """
    The promises; a subclass names the hand-off.
    """

    @classmethod
    def echoes(cls, stack: ExitStack, hosts: Iterable[str]) -> Echoes:
        """
        Run a backend for each of *hosts* until *stack* is closed.
        """
        with cls.at_home():
            return stack.enter_context(Echoes(hosts, cls.home))

    @pytest.fixture(scope="class")
    @classmethod
    def stage(cls) -> Iterator[Stage]:
        """
        Run a router with a route for each good hello, and the trap.
        """
        hosts = {hello.server_name for hello in (*hellos.good(), *hellos.odd())} | {CATCH_ALL}
        with ExitStack() as stack:
            echoes = cls.echoes(stack, hosts)
            yield Stage(stack.enter_context(cls.router(echoes.addresses)), echoes)

    @pytest.fixture(scope="class")
    @classmethod
    def hasty_stage(cls) -> Iterator[Stage]:
        """
        Run a router that waits a short time for hellos, with one route and the trap.
        """
        with ExitStack() as stack:
            echoes = cls.echoes(stack, ("app.example.com", CATCH_ALL))
            options = ("--hello-timeout", str(HELLO_TIMEOUT))
            product = stack.enter_context(cls.router(echoes.addresses, *options))
            yield Stage(product, echoes)

    @pytest.fixture(scope="class")
    @classmethod
    def trapless_stage(cls) -> Iterator[Stage]:
        """
        Run a router with one route only.
        """
        with ExitStack() as stack:
            echoes = cls.echoes(stack, ("app.example.com",))
            yield Stage(stack.enter_context(cls.router(echoes.addresses)), echoes)

    @named(hellos.good())
    def test_cut_at_every_byte_reaches_its_backend(self, stage: Stage, hello: Hello) -> None:
        """
        A hello in two segments, wherever the cut, reaches its backend as it was sent.
        """
        cuts = range(1, len(hello.data))

        stage.plays(hello.server_name, *((hello.data[:cut], hello.data[cut:]) for cut in cuts))

    @named(hellos.good())
    def test_waits_for_the_rest(self, stage: Stage, hello: Hello) -> None:
        """
        A pause of 200 ms in a hello, as from a lost segment, changes nothing.
        """
        name = hello.data.index(hello.server_name.encode())
        cuts = (1, 4, 5, 6, 9, 44, name, name + 3, len(hello.data) // 2, len(hello.data) - 1)

        stage.plays(
            hello.server_name, *((hello.data[:cut], hello.data[cut:]) for cut in cuts), pause=0.2
        )

    @named(hellos.good())
    def test_one_byte_a_segment(self, stage: Stage, hello: Hello) -> None:
        """
        A hello in segments of one byte reaches its backend as it was sent.
        """
        stage.plays(hello.server_name, tuple(bytes((byte,)) for byte in hello.data))

    @named(hellos.good())
    def test_many_records_with_cuts_in_the_name(self, stage: Stage, hello: Hello) -> None:
        """
        A hello in several TLS records, with cuts all over the name, reaches its backend.
        """
        message = hellos.payload(hello.data)
        name = message.index(hello.server_name.encode())
        inside = range(name, name + len(hello.server_name) + 1)

        stage.plays(
            hello.server_name,
            *((hellos.as_records(message, [cut]),) for cut in inside),
            *((hellos.as_records(message, [2, cut, len(message) - 1]),) for cut in inside),
            (hellos.as_records(message, inside),),
            (hellos.as_records(message, range(1, len(message))),),
        )

    @named(hellos.good())
    def test_many_records_in_many_segments(self, stage: Stage, hello: Hello) -> None:
        """
        Where records end and where segments end has nothing to do with each other.
        """
        message = hellos.payload(hello.data)
        name = message.index(hello.server_name.encode())
        data = hellos.as_records(message, [1, name + 1, name + 4])
        cuts = range(name, name + 40)

        stage.plays(hello.server_name, *((data[:cut], data[cut:]) for cut in cuts))

    @named((*hellos.good(), *hellos.odd()))
    def test_end_behind_the_hello(self, stage: Stage, hello: Hello) -> None:
        """
        A client that ends its side right behind the hello still gets its answer.
        """
        speech = Speech((hello.data,), ends_after=0)

        heard = stage.echoes.say(stage.product.listen, speech)

        assert [greeting(hello.server_name) + hello.data] == heard
        assert stage.echoes.accepted[CATCH_ALL] == 0

    @named(hellos.odd())
    def test_odd_but_right(self, stage: Stage, hello: Hello) -> None:
        """
        A hello that no client is known to send, but that is right, reaches its backend.
        """
        stage.plays(hello.server_name, (hello.data,))

    @named(hellos.bad())
    def test_refuses(self, hasty_stage: Stage, hello: BadHello) -> None:
        """
        A bad hello gets its alert, is counted by its reason, and reaches no backend.
        """
        speech = Speech((hello.data,), ends_after=0 if hello.ends else None)

        hasty_stage.refuses(speech, hello.alert, hello.result)

    @named(h for h in hellos.bad() if h.result in ("bad_name", "hello_invalid") and not h.ends)
    def test_refuses_in_pieces(self, hasty_stage: Stage, hello: BadHello) -> None:
        """
        A bad hello in two segments gets the same as in one.
        """
        data, middle = hello.data[:400], min(len(hello.data), 400) // 2
        parts = (data[:middle], data[middle:], hello.data[400:])

        hasty_stage.refuses(Speech(parts, pause=0.05), hello.alert, hello.result)

    def test_a_drip_is_no_hello(self, hasty_stage: Stage) -> None:
        """
        The time for a hello is for all of it: a byte now and then does not prolong it.
        """
        data = hellos.odd()[0].data
        drip = tuple(bytes((byte,)) for byte in data[: HELLO_TIMEOUT * 20])

        hasty_stage.refuses(Speech(drip, pause=0.1), HANDSHAKE_FAILURE, "hello_timeout")

    def test_silence_is_no_hello(self, hasty_stage: Stage) -> None:
        """
        A client that says nothing is let go when the time for a hello is over.
        """
        hasty_stage.refuses(Speech(()), None, "hello_timeout")

    @named(hellos.good())
    def test_an_unknown_name_has_no_route(self, trapless_stage: Stage, hello: Hello) -> None:
        """
        Without a catch-all, a name that has no route is refused as unrecognized.
        """
        trapless_stage.refuses(Speech((hello.data,)), UNRECOGNIZED_NAME, "no_route")

    def test_goes_by_this_hand_off(self, stage: Stage) -> None:
        """
        A hello goes by the hand-off that was asked for, which counts its bytes.
        """
        hello = hellos.good()[0]
        both_ways = 2 * len(hello.data) + len(greeting(hello.server_name))
        before = stage.product.counts(BYTES, "handoff")

        stage.plays(hello.server_name, (hello.data,))

        expected = before | {self.handoff: before.get(self.handoff, 0) + both_ways}
        assert expected == stage.product.counts(BYTES, "handoff")

    def test_leaves_nothing_behind(self, stage: Stage) -> None:
        """
        When all clients are gone, no connection is left.
        """
        counts = stage.product.counts

        stage.plays(hellos.good()[0].server_name, (hellos.good()[0].data,))

        for gauge in ("sniroute_connections_active", "sniroute_connections_pending"):
            wait_for(f"no more {gauge}", lambda g=gauge: sum(counts(g, "").values()) == 0)
