"""
What is noted of a connection is read by another router, or not believed.
"""

from dataclasses import replace

import orjson
import pytest

from bpfprog import MAX_NOTE
from controller.router.note import Note, read_note, write_note

NOTE = Note(1.5, "app.test", "app-1", "docker", ("192.0.2.7", 40000), True, "www.app.test")


@pytest.mark.parametrize("client", [("192.0.2.7", 40000), ("2001:db8::7", 1)])
@pytest.mark.parametrize("server_name", ["www.app.test", None])
def test_a_note_is_read_as_it_was_meant(client: tuple[str, int], server_name: str | None) -> None:
    """
    What one router writes is what the next one knows.
    """
    note = replace(NOTE, client=client, server_name=server_name)

    assert note == read_note(write_note(note))


def test_a_long_note_is_shortened() -> None:
    """
    Names give way to room, the least needed first; the rest stays readable.
    """
    long = replace(NOTE, server_name="s" * 250, backend="b" * 255)
    text = write_note(long)

    assert len(text) <= MAX_NOTE
    assert replace(long, server_name="") == read_note(text)


@pytest.mark.parametrize(
    "text",
    [
        b"\xff\x00",
        b"[]",
        b"7",
        b"{",
        b"{}",
        orjson.dumps({"began": 1.5}),
        write_note(NOTE)[:-1],
        write_note(replace(NOTE, client=("nobody", 1))),
        write_note(NOTE).replace(b"1.5", b'"1.5"'),
        write_note(NOTE).replace(b'"app.test"', b"null"),
    ],
)
def test_what_is_no_note_is_not_believed(text: bytes) -> None:
    """
    Whatever lies there, it is no fault, and nothing of it counts.
    """
    assert read_note(text) is None


def test_what_a_later_version_adds_is_left_out() -> None:
    """
    A member more is no reason to forget the others.
    """
    assert NOTE == read_note(write_note(NOTE).replace(b"{", b'{"more":1,', 1))
