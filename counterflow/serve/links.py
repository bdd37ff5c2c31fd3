"""Sockets between the rank that listens for clients and the others, and what the others do.

All ranks step together, so each is told before every step what is new for it: nothing, as a rule. A socket rather than
a collective, for three reasons. Ranks without work wait at it for hours, where a collective gives up; what a rank has
written comes back when it is there, and nobody waits for it; and if a process dies, its socket ends at once, which says
who died, while the others may still stand in a pass of the model that needs it.

Messages are pickled, so who connects must bring the key that the ranks agreed on.
"""

import hmac
import os
import queue
import secrets
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from counterflow.comm.mesh import Mesh
from counterflow.errors import ConfigError, RankError
from counterflow.infer.engine import Engine
from counterflow.serve.desk import Desk
from counterflow.train.launch import PEER_LOST

KEY_BYTES = 32
RANK_BYTES = 4
PATIENCE_S = 120.0
"""How long ranks wait for each other's sockets, once all have their part of the model."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Link:
    """One end of the socket between the first rank and another; None is the last word of either."""

    def __init__(self, connected: socket.socket) -> None:
        connected.settimeout(None)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._connection = Connection(connected.detach())

    def listen(self, heard: Callable[[Any], None], lost: Callable[[], None]) -> None:
        """From now on call `heard` with each message, None too, and `lost` if the other goes without that word.

        Both are called by a thread of the link's own.
        """
        threading.Thread(target=self._read, args=(heard, lost), name="link", daemon=True).start()

    def send(self, message: object) -> None:
        """Send one; if the other is gone, `lost` is how it is known."""
        with suppress(OSError):
            self._connection.send(message)

    def _read(self, heard: Callable[[Any], None], lost: Callable[[], None]) -> None:
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                lost()
                return
            heard(message)
            if message is None:
                return


def connect(mesh: Mesh) -> list[Link]:
    """The first rank's links to all others, by rank; another rank's one to the first. A collective.

    Fails: ConfigError where the first cannot be reached, RankError where another does not come.
    """
    if mesh.size == 1:
        return []
    address = os.environ["MASTER_ADDR"]
    server = _listening(address) if mesh.first else None
    port, key = mesh.first_does(lambda: (server and server.getsockname()[1], secrets.token_bytes(KEY_BYTES)))
    if server is not None:
        with server:
            return _accepted(server, mesh.size, key)
    try:
        connected = socket.create_connection((address, port), timeout=PATIENCE_S)
        connected.sendall(key + mesh.rank.to_bytes(RANK_BYTES))
    except OSError as error:
        raise ConfigError(
            f"rank {mesh.rank} cannot reach the first rank on {address} port {port} ({error}); let the ranks' hosts "
            "reach each other on any port."
        ) from None
    return [Link(connected)]


def follow(engine: Engine, link: Link) -> None:
    """Step when the first rank does, by what it says, until it says that this is the end."""
    desk, told = Desk(engine), queue.SimpleQueue()
    link.listen(told.put, lambda: os._exit(PEER_LOST))  # a pass of the model may never end without that rank
    while (news := told.get()) is not None:
        report = desk.step(news)
        if report is not None:
            link.send(report)
    link.send(None)


def _listening(address: str) -> socket.socket:
    """A socket that the others reach by `address`: on every interface, unless it is this machine's own."""
    if address in LOOPBACK:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, 0), family=family)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _accepted(server: socket.socket, size: int, key: bytes) -> list[Link]:
    """The others' sockets, by rank; who brings no key is sent away."""
    found: dict[int, Link] = {}
    server.settimeout(PATIENCE_S)
    while len(found) < size - 1:
        try:
            connected, _ = server.accept()
        except TimeoutError:
            missing = ", ".join(str(rank) for rank in range(1, size) if rank not in found)
            raise RankError(
                f"rank {missing} did not connect within {PATIENCE_S:.0f} s; see what it said last."
            ) from None
        connected.settimeout(1.0)
        said = b""
        with suppress(OSError):
            while len(said) < KEY_BYTES + RANK_BYTES and (
                more := connected.recv(KEY_BYTES + RANK_BYTES - len(said))
            ):
                said += more
        if hmac.compare_digest(said[:KEY_BYTES], key):
            found[int.from_bytes(said[KEY_BYTES:])] = Link(connected)
        else:
            connected.close()
    return [found[rank] for rank in range(1, size)]
