"""Messages between the processes of a swarm: a JSON header and raw tensors over TCP, with a key from a shared token.

A message is ``"NPPS", header bytes (4), body bytes (8), header, body, HMAC-SHA256 (32)``. The header is a JSON object
with ``"kind"`` and, if there are tensors, ``"tensors": [[dtype, shape], ...]``; the body is their contiguous bytes, one
after another. The two ends of a connection prove to each other that they have the token, by HMACs of two fresh random
numbers, before anything else is read. The HMAC of a message covers its place in the connection and its direction, so
that none can be changed, repeated, reordered or sent back. Nothing is encrypted.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import math
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

MAGIC = b"NPPS"
NONCE, MAC = 32, 32
LARGEST_HEADER = 4 << 20
LARGEST_BODY = 1 << 32
MOST_TENSORS, MOST_DIMENSIONS = 16_384, 8
HANDSHAKE_SECONDS = 5.0
MESSAGE_SECONDS = 60.0
"""The time in which the rest of a message has to arrive, or to be taken, once it has begun."""

PIECE = 1 << 18
"""Bytes that are sent at a time; the time for a piece is bounded, not that of a large message."""

_PREFIX = struct.Struct("<4sIQ")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.int64,
        torch.int32,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}

Header = dict[str, Any]


class RefusedError(Exception):
    """What arrived is not a message of this swarm. The connection is closed, and nothing else is changed."""


class ClosedError(Exception):
    """The other end has closed the connection, or cannot be reached."""


class Message(NamedTuple):
    """A message as it arrived: checked in form, not yet in meaning."""

    header: Header
    tensors: list[Tensor]


def encode_header(header: Header, tensors: Sequence[Tensor] = ()) -> bytes:
    """Return the header's bytes, with the description of the tensors that follow."""
    described = {**header, "tensors": [[str(t.dtype).removeprefix("torch."), list(t.shape)] for t in tensors]}
    return json.dumps(described if tensors else header, allow_nan=False, separators=(",", ":")).encode()


def decode_header(content: bytes, body: int) -> tuple[Header, list[tuple[torch.dtype, tuple[int, ...]]]]:
    """Return a header and the dtypes and shapes of its tensors.

    Raises:
        RefusedError: it is not a JSON object with a kind, or does not describe a body of ``body`` bytes.
    """
    try:
        header = json.loads(content, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise RefusedError("a header that is not JSON") from None
    if not isinstance(header, dict) or not isinstance(header.get("kind"), str):
        raise RefusedError("a header without a kind")
    described = header.pop("tensors", [])
    if not isinstance(described, list) or len(described) > MOST_TENSORS:
        raise RefusedError("a header with a malformed list of tensors")
    found = [_described(one) for one in described]
    if sum(_bytes(dtype, shape) for dtype, shape in found) != body:
        raise RefusedError(f"a body of {body} bytes that is not that of its tensors")
    return header, found


def _no_constant(text: str) -> float:
    raise ValueError(text)


def _described(one: object) -> tuple[torch.dtype, tuple[int, ...]]:
    match one:
        case [str(name), list(shape)] if name in _DTYPES and len(shape) <= MOST_DIMENSIONS:
            if all(type(size) is int and 0 <= size <= LARGEST_BODY for size in shape):
                return _DTYPES[name], tuple(shape)
    raise RefusedError("a header with a malformed tensor")


def _bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    return math.prod(shape) * dtype.itemsize


def _memory(t: Tensor) -> memoryview:
    # NumPy's arrays are buffers, but its types say so from Python 3.12 on only.
    return memoryview(cast(Any, t.reshape(-1).view(torch.uint8).numpy())) if t.numel() else memoryview(b"")


class Link:
    """One end of a connection whose other end has proved that it has the token. Several threads may send.

    ``heard`` is when something arrived last, by ``time.monotonic``.
    """

    def __init__(self, connection: socket.socket, token: bytes, *, accepts: bool) -> None:
        """Do the handshake on a connected socket, which the link owns from here on.

        Raises:
            RefusedError: the other end does not have the token, or speaks something else.
            ClosedError: it went away, or took too long.
        """
        self._socket = connection
        self._sending = threading.Lock()
        self._sent = self._received = 0
        self.peer = _name_of(connection)
        try:
            connection.settimeout(HANDSHAKE_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            key = self._answer(token) if accepts else self._ask(token)
        except BaseException as error:
            self.close()
            raise error if isinstance(error, RefusedError | ClosedError) else ClosedError(str(error)) from None
        connection.settimeout(MESSAGE_SECONDS)
        self.heard = time.monotonic()
        here, there = (b"answering", b"asking") if accepts else (b"asking", b"answering")
        self._out, self._in = _mac(key, here), _mac(key, there)

    def _ask(self, token: bytes) -> bytes:
        ours = os.urandom(NONCE)
        self._socket.sendall(MAGIC + ours)
        answer = self._exactly(len(MAGIC) + NONCE + MAC, HANDSHAKE_SECONDS)
        theirs, proof = answer[len(MAGIC) : len(MAGIC) + NONCE], answer[-MAC:]
        if answer[: len(MAGIC)] != MAGIC or not hmac.compare_digest(proof, _mac(token, b"server", ours, theirs)):
            raise RefusedError("an answer without this swarm's token")
        self._socket.sendall(_mac(token, b"client", ours, theirs))
        return _mac(token, b"key", ours, theirs)

    def _answer(self, token: bytes) -> bytes:
        question = self._exactly(len(MAGIC) + NONCE, HANDSHAKE_SECONDS)
        if question[: len(MAGIC)] != MAGIC:
            raise RefusedError("something that is not this protocol")
        theirs, ours = question[len(MAGIC) :], os.urandom(NONCE)
        self._socket.sendall(MAGIC + ours + _mac(token, b"server", theirs, ours))
        proof = self._exactly(MAC, HANDSHAKE_SECONDS)
        if not hmac.compare_digest(proof, _mac(token, b"client", theirs, ours)):
            raise RefusedError("a stranger without this swarm's token")
        return _mac(token, b"key", theirs, ours)

    def send(self, header: Header, tensors: Sequence[Tensor] = ()) -> None:
        """Send a message; it has been handed to the operating system when this returns.

        Raises:
            ClosedError: the connection is gone, or the other end took less than a piece of it in ``MESSAGE_SECONDS``.
        """
        parts = [t.detach().contiguous() for t in tensors]
        content = encode_header(header, parts)
        body = [_memory(t) for t in parts]
        prefix = _PREFIX.pack(MAGIC, len(content), sum(map(len, body)))
        with self._sending:
            mac = hmac.new(self._out, self._sent.to_bytes(8, "little") + prefix + content, hashlib.sha256)
            for part in body:
                mac.update(part)
            try:
                for whole in (memoryview(prefix + content), *body, memoryview(mac.digest())):
                    for start in range(0, len(whole), PIECE):
                        self._socket.sendall(whole[start : start + PIECE])
            except (OSError, ValueError) as error:
                self.close()
                raise ClosedError(f"{self.peer}: {error}") from None
            self._sent += 1

    def receive(self, idle: float) -> Message | None:
        """Return the next message, or None if none has begun within ``idle`` seconds.

        Raises:
            RefusedError: what arrived is malformed, too large, or was not sent by the other end in this place.
            ClosedError: the connection is gone, or the message stopped in its middle.
        """
        try:
            first = self._first(idle)
            return None if first is None else self._rest(first)
        except (RefusedError, ClosedError):
            self.close()
            raise

    def _first(self, idle: float) -> bytes | None:
        # Not by the socket's own timeout: that would also be the one of a thread that sends.
        try:
            waiting = select.poll()
            waiting.register(self._socket, select.POLLIN)
            if not waiting.poll(1000.0 * idle):
                return None
        except (OSError, ValueError) as error:
            raise ClosedError(f"{self.peer}: {error}") from None
        return self._exactly(1, MESSAGE_SECONDS)

    def _rest(self, first: bytes) -> Message:
        prefix = first + self._exactly(_PREFIX.size - 1, MESSAGE_SECONDS)
        magic, length, body = _PREFIX.unpack(prefix)
        if magic != MAGIC or length > LARGEST_HEADER or body > LARGEST_BODY:
            raise RefusedError("something that is not this protocol, or is too large")
        content = self._exactly(length, MESSAGE_SECONDS)
        header, described = decode_header(content, body)
        mac = hmac.new(self._in, self._received.to_bytes(8, "little") + prefix + content, hashlib.sha256)
        tensors = []
        for dtype, shape in described:
            tensor = torch.empty(shape, dtype=dtype)
            memory = _memory(tensor)
            self._fill(memory, MESSAGE_SECONDS)
            mac.update(memory)
            tensors.append(tensor)
        if not hmac.compare_digest(self._exactly(MAC, MESSAGE_SECONDS), mac.digest()):
            raise RefusedError("a message that was changed on its way")
        self._received += 1
        return Message(header, tensors)

    def _exactly(self, count: int, seconds: float) -> bytes:
        found = bytearray(count)
        self._fill(memoryview(found), seconds)
        return bytes(found)

    def _fill(self, memory: memoryview, seconds: float) -> None:
        until, done = time.monotonic() + seconds, 0
        while done < len(memory):
            try:
                count = self._socket.recv_into(memory[done:])
            except (OSError, ValueError) as error:
                raise ClosedError(f"{self.peer}: {error}") from None
            if not count:
                raise ClosedError(f"{self.peer} has closed the connection")
            done += count
            self.heard = time.monotonic()
            # A large message may take longer than a small one, but never stands still or crawls.
            if time.monotonic() > until + done / 1e5:
                raise ClosedError(f"{self.peer} sends too slowly")

    def close(self) -> None:
        """Close the connection; whoever waits for it is told so."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def dial(address: str, token: bytes, seconds: float = HANDSHAKE_SECONDS) -> Link:
    """Connect to ``host:port`` and do the handshake. Raises RefusedError or ClosedError."""
    host, _, port = address.rpartition(":")
    try:
        connection = socket.create_connection((host, int(port)), timeout=seconds)
    except (OSError, ValueError) as error:
        raise ClosedError(f"{address}: {error}") from None
    return Link(connection, token, accepts=False)


def _mac(key: bytes, *parts: bytes) -> bytes:
    return hmac.new(key, b"/".join(parts), hashlib.sha256).digest()


def _name_of(connection: socket.socket) -> str:
    try:
        name = connection.getpeername()
    except OSError:
        return "someone who has left"
    return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else "a process of this machine"
