"""
What a later router has to know of a connection that is handed over as packets.

It lies in a map that outlives routers, so one of another version may have written it.
"""

from dataclasses import dataclass, replace
from typing import Any

import orjson
import structlog
from pydantic import TypeAdapter

from bpfprog import MAX_NOTE
from controller.router.address import Endpoint, pack

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Note:
    """
    One connection; *began* is in seconds of the epoch, *client* who a trusted sender says it is.
    """

    began: float
    route: str
    backend: str
    source: str
    client: tuple[str, int]
    transparent: bool
    server_name: str | None

    @property
    def endpoint(self) -> Endpoint:
        """
        The client's address, packed, and port.
        """
        return pack(self.client)


_NOTE = TypeAdapter(Note)


def write_note(note: Note) -> bytes:
    """
    Write *note*, or as much of it as there is room for.
    """
    text = orjson.dumps(note)
    shorter: tuple[dict[str, Any], ...] = ({"server_name": ""}, {"backend": ""}, {"source": ""})
    for less in shorter:
        if len(text) > MAX_NOTE:
            note = replace(note, **less)
            text = orjson.dumps(note)
    return text


def read_note(text: bytes) -> Note | None:
    """
    Read a note; None if there is none, or it is not as `write_note` writes it, which is logged.
    """
    if not text:
        return None
    try:
        note = _NOTE.validate_json(text, strict=True)
        _ = note.endpoint
    except (ValueError, OSError) as err:
        log.warning("note not understood", note=text.decode(errors="replace"), error=str(err))
        return None
    return note
