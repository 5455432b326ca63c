"""Connections between workers: one that listens, and one to each address that is written to."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from nesterov_pp.swarm.lineage import MalformedError
from nesterov_pp.swarm.messages import ClosedError, Header, Link, Message, RefusedError, dial

MOST_CONNECTIONS = 512
IDLE_SECONDS = 1.0
CONNECT_SECONDS = 5.0
JOIN_SECONDS = 3.0

Handle = Callable[[Link, Message], None]


class Listener:
    """Accepts connections in threads, and hands every message to ``handle``, which may raise ``RefusedError``.

    A connection that is refused is closed and reported to ``log``, and harms no other. ``closed`` is told of the end of
    every connection that was accepted.
    """

    def __init__(
        self,
        host: str,
        port: int,
        token: bytes,
        handle: Handle,
        log: Callable[[str], None],
        closed: Callable[[Link], None] = lambda _: None,
    ) -> None:
        self._token, self._handle, self._log, self._closed = token, handle, log, closed
        self._closing = threading.Event()
        self._room = threading.Semaphore(MOST_CONNECTIONS)
        self._links: set[Link] = set()
        self._socket = socket.create_server((host, port), backlog=128)
        self._socket.settimeout(IDLE_SECONDS)
        self.port = int(self._socket.getsockname()[1])
        self._threads = {threading.Thread(target=self._accept, name="listener", daemon=True)}
        for thread in self._threads:
            thread.start()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._socket.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            if not self._room.acquire(blocking=False):
                connection.close()
                continue
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads = {old for old in self._threads if old.is_alive()} | {thread}
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        link = None
        who = "someone"
        try:
            host, port = connection.getpeername()[:2]
            who = f"{host}:{port}"
            link = Link(connection, self._token, accepts=True)
            self._links.add(link)
            while not self._closing.is_set():
                message = link.receive(IDLE_SECONDS)
                if message is not None:
                    self._handle(link, message)
        except (RefusedError, MalformedError) as error:
            self._log(f"refused {error} from {who}")
        except (ClosedError, OSError):
            pass
        except Exception as error:  # whatever is wrong with a message, only its connection ends
            self._log(f"closed the connection of {who}, whose message led to {error!r}")
        finally:
            if link is not None:
                self._links.discard(link)
                link.close()
                self._closed(link)
            connection.close()
            self._room.release()

    def close(self) -> None:
        self._closing.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._socket.close()
        for link in list(self._links):
            link.close()
        join(self._threads)


def join(threads: Iterable[threading.Thread]) -> None:
    """Wait for threads that are about to end. One that is inside torch when Python ends would abort the process."""
    until = time.monotonic() + JOIN_SECONDS
    for thread in threads:
        if thread.ident is not None and thread is not threading.current_thread():
            thread.join(max(0.0, until - time.monotonic()))


class Peers:
    """Sends messages to other workers in order, one thread for each.

    ``failed`` gets the address, the header and the reason of what was not sent.
    """

    def __init__(self, token: bytes, failed: Callable[[str, Header, str], None]) -> None:
        self._token, self._failed = token, failed
        self._outboxes: dict[str, _Outbox] = {}
        self._lock = threading.Lock()

    def send(self, address: str, header: Header, tensors: Sequence[Tensor] = ()) -> None:
        """Send a message soon. Its tensors must not change any more."""
        with self._lock:
            box = self._outboxes.get(address)
            if box is None or box.ended:
                box = self._outboxes[address] = _Outbox(address, self._token, self._failed)
            box.put(header, tensors)

    def close(self) -> None:
        with self._lock:
            for box in self._outboxes.values():
                box.close()
            join([box.thread for box in self._outboxes.values()])


class _Outbox:
    def __init__(self, address: str, token: bytes, failed: Callable[[str, Header, str], None]) -> None:
        self._address, self._token, self._failed = address, token, failed
        self._queue: queue.Queue[tuple[Header, Sequence[Tensor]] | None] = queue.Queue()
        self.ended = False
        self.thread = threading.Thread(target=self._run, name=f"to {address}", daemon=True)
        self.thread.start()

    def put(self, header: Header, tensors: Sequence[Tensor]) -> None:
        self._queue.put((header, tensors))

    def close(self) -> None:
        self._queue.put(None)

    def _run(self) -> None:
        link: Link | None = None
        while (item := self._queue.get()) is not None:
            try:
                link = link or dial(self._address, self._token, CONNECT_SECONDS)
                link.send(*item)
            except (ClosedError, RefusedError) as error:
                link = None
                self._failed(self._address, item[0], str(error))
        if link is not None:
            link.close()
        self.ended = True
