"""
Where in a bpf filesystem the pins of a router are, and which are somebody else's.

Each router has a folder of its own, named for the layout of what is in it, for the network
namespace, whose cookie is never another's, and for the control socket.
"""

import hashlib
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bpfprog import PACKET_ABI
from controller.settings import RouterSettings

FOLDER: Final = "sniroute"

DOCTOR: Final = "doctor"
"""How the names of folders begin that are there for a trial only."""

MOUNTS: Final = Path("/proc/self/mountinfo")

SO_NETNS_COOKIE: Final = 71


@dataclass(frozen=True, slots=True)
class Left:
    """
    A folder of pins that is not this router's; *here* says that its network is ours.
    """

    path: Path
    abi: str
    here: bool


def own(settings: RouterSettings) -> Path:
    """
    Where the pins of this router are, and those of whoever ran before it in its place.

    Raises:
        OSError: the kernel has no cookies of network namespaces, which it has since Linux 5.14.
    """
    place = hashlib.sha256(os.fsencode(settings.control)).hexdigest()[:16]
    return settings.bpffs / FOLDER / f"{PACKET_ABI}-{_cookie()}-{place}"


def are_left(settings: RouterSettings) -> bool:
    """
    Whether there are any where those of this router belong.
    """
    try:
        return own(settings).is_dir()
    except OSError:
        return False


def others(settings: RouterSettings) -> list[Left]:
    """
    Find the folders of other routers, whether they run or not.
    """
    mine, cookie = own(settings), _cookie()
    try:
        found = sorted(mine.parent.iterdir())
    except FileNotFoundError:
        return []
    names = ((path, path.name.split("-")) for path in found if path != mine)
    return [Left(path, name[0], cookie in name[1:2]) for path, name in names]


def of_other_versions(settings: RouterSettings) -> list[Path]:
    """
    Find the folders of routers of other versions that had, or have, this one's place.

    Raises:
        OSError: nobody may look there, or as for `own`.
    """
    place = own(settings).name.partition("-")[2]
    paths = (left.path for left in others(settings))
    return [path for path in paths if path.name.partition("-")[2] == place]


def is_bpffs(path: Path) -> bool:
    """
    Whether *path* lies in a bpf filesystem.
    """
    try:
        number = path.stat().st_dev
    except OSError:
        return False
    device = f"{os.major(number)}:{os.minor(number)}"
    for line in MOUNTS.read_text().splitlines():
        # proc(5): the optional fields end with a hyphen; the kind of filesystem follows
        fields, _, kind = line.partition(" - ")
        if kind.split()[0] == "bpf" and fields.split()[2] == device:
            return True
    return False


def _cookie() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        cookie = probe.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)
    return f"{int.from_bytes(cookie, sys.byteorder):x}"
