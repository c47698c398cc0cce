"""
A cable between a UNIX socket and its clients, to be cut.
"""

import contextlib
import socket
import socketserver
import threading
from pathlib import Path
from typing import Self


class Cable:
    """
    A socket at *path* that leads to the one at *far*.
    """

    def __init__(self, path: Path, far: Path) -> None:
        self.path = path
        self._far = far
        self._live: set[socket.socket] = set()
        self._server: socketserver.ThreadingUnixStreamServer | None = None

    def __enter__(self) -> Self:
        self.plug()
        return self

    def __exit__(self, *_: object) -> None:
        self.unplug()

    def plug(self) -> None:
        """
        Take connections.
        """
        cable = self

        class Carrier(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                cable.carry(self.request)

        self._server = socketserver.ThreadingUnixStreamServer(str(self.path), Carrier)
        self._server.daemon_threads = True
        # shutdown() waits for the next poll
        loop = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="cable")
        loop.start()

    def unplug(self) -> None:
        """
        Take no more connections, and cut those that there are.
        """
        if self._server is None:
            return
        self.path.unlink(missing_ok=True)
        self._server.shutdown()
        self.cut()
        self._server.server_close()
        self._server = None

    def cut(self) -> None:
        """
        Cut all connections, in the middle of whatever they carry; new ones are taken.
        """
        for sock in list(self._live):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def carry(self, near: socket.socket) -> None:
        """
        Carry bytes between *near* and the far end until both have ended.
        """
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as far:
            far.connect(str(self._far))
            self._live |= {near, far}
            back = threading.Thread(target=_pump, args=(far, near), name="cable back")
            back.start()
            _pump(near, far)
            back.join()
            self._live -= {near, far}


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
