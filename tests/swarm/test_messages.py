"""Messages between processes: what is sent arrives, and what is foreign, malformed or changed is refused."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from nesterov_pp.swarm import messages
from nesterov_pp.swarm.lineage import ROOT
from nesterov_pp.swarm.messages import ClosedError, Link, Message, RefusedError, decode_header, dial, encode_header
from nesterov_pp.swarm.nests import pack, unpack
from nesterov_pp.swarm.peers import Listener
from nesterov_pp.swarm.protocol import KINDS, checked

TOKEN = b"a secret of this test"


def _pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        return one, server.accept()[0]


@contextlib.contextmanager
def _both(change: Callable[[bytes], bytes] = lambda content: content) -> Iterator[tuple[Link, Link]]:
    """The ends of a connection through a relay that may change what the asking end sends after its handshake."""
    sockets = [*_pair(), *_pair()]
    ask, relay_in, relay_out, answer = sockets

    def relay(source: socket.socket, to: socket.socket, change: Callable[[bytes], bytes], handshake: int) -> None:
        with contextlib.suppress(OSError):
            passed = 0
            while content := source.recv(1 << 16):
                to.sendall(change(content) if passed >= handshake else content)
                passed += len(content)
            to.shutdown(socket.SHUT_RDWR)

    ends: list[Link] = []
    threads = [
        threading.Thread(target=relay, args=(relay_in, relay_out, change, 68)),
        threading.Thread(target=relay, args=(relay_out, relay_in, lambda content: content, 0)),
        threading.Thread(target=lambda: ends.append(Link(answer, TOKEN, accepts=True))),
    ]
    for thread in threads:
        thread.start()
    try:
        asking = Link(ask, TOKEN, accepts=False)
        threads[-1].join(5.0)
        yield asking, ends[0]
    finally:
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(5.0)
        for one in sockets:
            one.close()


TENSORS = [
    torch.arange(6.0).reshape(2, 3),
    torch.tensor(2.5, dtype=torch.bfloat16),
    torch.zeros(0, 4),
    torch.arange(5, dtype=torch.int64)[::2],
    torch.tensor([True, False]),
]


def test_what_is_sent_arrives() -> None:
    with _both() as (a, b):
        for k in range(3):
            a.send({"kind": "poke", "k": k, "x": [1, None, "ä"]}, TENSORS)
            b.send({"kind": "poke", "k": -k})
            found = b.receive(5.0)
            assert found is not None
            assert found.header == {"kind": "poke", "k": k, "x": [1, None, "ä"]}
            for one, other in zip(found.tensors, TENSORS, strict=True):
                assert one.dtype == other.dtype
                assert torch.equal(one, other)
            assert a.receive(5.0) == Message({"kind": "poke", "k": -k}, [])
        assert b.receive(0.01) is None
        a.close()
        with pytest.raises(ClosedError):
            b.receive(5.0)


def test_a_large_message_may_take_long_while_the_other_end_waits() -> None:
    """A thread that waits for messages does not shorten the time of one that sends."""
    with _both() as (a, b):
        waiting = threading.Thread(target=lambda: [a.receive(0.05) for _ in range(40)])
        waiting.start()
        large = torch.arange(5_000_000, dtype=torch.float32)
        sending = threading.Thread(target=a.send, args=({"kind": "poke"}, [large]))
        sending.start()
        time.sleep(0.5)  # the buffers are full
        found = b.receive(5.0)
        sending.join(10.0)
        waiting.join(10.0)
        assert found is not None
        assert torch.equal(found.tensors[0], large)


def test_a_changed_message_is_refused() -> None:
    def flipped(content: bytes) -> bytes:
        return content[:-40] + bytes([content[-40] ^ 1]) + content[-39:] if len(content) > 300 else content

    with _both(flipped) as (a, b):
        a.send({"kind": "poke"}, [torch.ones(100)])
        with pytest.raises(RefusedError):
            b.receive(5.0)


def test_a_repeated_message_is_refused() -> None:
    """Also if it is repeated byte for byte: its HMAC covers its place in the connection."""
    passed = bytearray()

    def again(content: bytes) -> bytes:
        passed.extend(content)
        whole = len(passed) == expected
        return content + bytes(passed) if whole else content

    header = encode_header({"kind": "poke"})
    expected = struct.calcsize("<4sIQ") + len(header) + messages.MAC
    with _both(again) as (a, b):
        a.send({"kind": "poke"})
        assert b.receive(5.0) == Message({"kind": "poke"}, [])
        with pytest.raises(RefusedError, match="changed on its way"):
            b.receive(5.0)


@contextlib.contextmanager
def _listener() -> Iterator[tuple[Listener, list[Message], list[str]]]:
    got: list[Message] = []
    said: list[str] = []

    def handle(_: Link, message: Message) -> None:
        got.append(checked(message, "poke", "bundle"))

    listener = Listener("127.0.0.1", 0, TOKEN, handle, said.append)
    try:
        yield listener, got, said
    finally:
        listener.close()


def _until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 5.0
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_strangers_are_refused_and_harm_nobody() -> None:
    with _listener() as (listener, got, said):
        address = f"127.0.0.1:{listener.port}"
        friend = dial(address, TOKEN)
        with pytest.raises(RefusedError, match="token"):
            dial(address, b"another secret")
        with socket.create_connection(("127.0.0.1", listener.port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\nHost: somewhere\r\n\r\n" + b"x" * 100)
            _until(lambda: any("not this protocol" in line for line in said))
        # One that has seen a handshake, but does not have the token.
        with socket.create_connection(("127.0.0.1", listener.port)) as stranger:
            stranger.sendall(messages.MAGIC + bytes(32))
            stranger.recv(100)
            stranger.sendall(bytes(32))
            _until(lambda: any("without this swarm's token" in line for line in said))
        assert all("127.0.0.1:" in line for line in said)
        friend.send({"kind": "poke"})
        _until(lambda: len(got) == 1)
        friend.close()


def test_fuzz_frames_from_a_member_harm_nobody_else() -> None:
    """Someone with the token who sends nonsense is refused, frame by frame, and the others are served."""
    draw = random.Random(0)
    with _listener() as (listener, got, said):
        address = f"127.0.0.1:{listener.port}"
        friend = dial(address, TOKEN)
        for _ in range(150):
            link = dial(address, TOKEN)
            with contextlib.suppress(OSError):
                link._socket.sendall(_nonsense(draw))
            link.close()
        friend.send({"kind": "poke"})
        _until(lambda: len(got) == 1)
        assert len(said) > 20
        friend.close()


def _nonsense(draw: random.Random) -> bytes:
    body = draw.randbytes(draw.randrange(100))
    header = draw.choice(
        [
            draw.randbytes(draw.randrange(80)),
            b'{"kind": "poke"}',
            b"[" * 10_000,
            b'{"kind": "poke", "tensors": [["float32", [99999999, 99999999]]]}',
            b'{"kind": 3}',
            b'{"kind": "poke", "x": NaN}',
        ]
    )
    length = draw.choice([len(header), len(header), draw.randrange(1 << 32)])
    size = draw.choice([0, len(body), 1 << 62])
    magic = draw.choice([messages.MAGIC, messages.MAGIC, draw.randbytes(4)])
    return struct.pack("<4sIQ", magic, length, size) + header + body + draw.randbytes(32)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"{}",
        b'{"kind": ["poke"]}',
        b"[" * 100_000,
        b'{"kind": "poke", "tensors": 3}',
        b'{"kind": "poke", "tensors": [["object", [1]]]}',
        b'{"kind": "poke", "tensors": [["float32", [-1]]]}',
        b'{"kind": "poke", "tensors": [["float32", [true]]]}',
        b'{"kind": "poke", "tensors": [["float32", [1.5]]]}',
        b'{"kind": "poke", "tensors": [["float32", [1, 1, 1, 1, 1, 1, 1, 1, 1]]]}',
        b'{"kind": "poke", "tensors": [["float32", [2]]]}',
        b'{"kind": "poke", "x": Infinity}',
    ],
)
def test_malformed_headers_are_refused(header: bytes) -> None:
    with pytest.raises(RefusedError):
        decode_header(header, 4)


def _good() -> dict[str, dict[str, Any]]:
    hop, pair = ["s0w0", "127.0.0.1:80"], [ROOT, ROOT]
    values: dict[str, Any] = {
        "m": 3, "a": 0, "route": [hop], "count": [True], "stage": 1, "f": [ROOT], "b": [pair], "loss": "0x1p+0",
        "round": "1/2", "worker": "s0w1", "contributions": [{}], "state": None, "address": "10.0.0.1:4000",
        "version": ROOT, "pending": [1], "update": {}, "counted": False, "why": "x", "microbatches": [1],
        "seconds": 0.5, "events": [["forward", 1, 0.5, 1.0]], "run": {}, "lighthouse": 4001,
        "addresses": ["10.0.0.1:4000"], "hop": hop, "to": "10.0.0.1:4000", "before": ROOT,
    }  # fmt: skip
    return {kind: {"kind": kind, **{name: values[name] for name in fields}} for kind, fields in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_checked(kind: str) -> None:
    good = _good()[kind]
    assert checked(Message(good, []), kind).header is good
    junk: list[Any] = [-1, 1.5, "\x00", "x" * 5000, [[]], [None], {"a": 1}, True, 1 << 80, ["a:b"], "0:xyz", "::"]
    for name in KINDS[kind]:
        if name == "state":
            continue
        with pytest.raises(RefusedError):
            checked(Message({k: v for k, v in good.items() if k != name}, []), kind)
        refused = 0
        for value in junk:
            refused += _refuses(Message({**good, name: value}, []), kind, name)
        assert refused >= len(junk) - 5, name


def _refuses(message: Message, kind: str, name: str) -> bool:
    try:
        checked(message, kind)
    except RefusedError as error:
        return name in str(error)
    return False


def test_a_kind_that_is_not_expected_is_refused() -> None:
    with pytest.raises(RefusedError, match="not expected here"):
        checked(Message({"kind": "finish"}, []), "poke")
    with pytest.raises(RefusedError, match="not expected here"):
        checked(Message({"kind": "exec"}, []), "poke")


def test_states_are_packed_without_pickles() -> None:
    state: dict[str, Any] = {
        "a": [1, 2.5, None, True, "x", float("inf")],
        3: (torch.float32, {"t": torch.arange(3.0)}, torch.tensor(2, dtype=torch.float64)),
        "again": [],
    }
    packed, tensors = pack(state)
    content = encode_header({"kind": "state", "state": packed}, tensors)
    header, described = decode_header(content, sum(t.nbytes for t in tensors))
    assert len(described) == len(tensors)
    found = unpack(header["state"], tensors)
    assert found["a"] == state["a"]
    assert found[3][0] == torch.float32
    assert torch.equal(found[3][1]["t"], torch.arange(3.0))
    with pytest.raises(TypeError, match="cannot hold"):
        pack({"x": object()})


def test_fuzz_states_that_were_not_packed() -> None:
    draw = random.Random(1)
    packed, tensors = pack({"a": [torch.ones(2), (1, 2.0)], "b": {"c": None}})
    text = json.dumps(packed)
    for _ in range(500):
        changed = list(text)
        for _ in range(draw.randrange(1, 4)):
            changed[draw.randrange(len(changed))] = draw.choice('[]{}",0123456789abc-. ')
        with contextlib.suppress(ValueError):  # JSON, or MalformedError
            unpack(json.loads("".join(changed)), tensors)
    deep: Any = ["plain", 1]
    for _ in range(100):
        deep = ["list", [deep]]
    with pytest.raises(ValueError, match="deep"):
        unpack(deep, [])
