"""The kinds of messages of a swarm, and what each must contain. What does not is refused before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nesterov_pp.swarm.lineage import is_count, is_loss, is_version, is_worker
from nesterov_pp.swarm.messages import Message, RefusedError

Check = Callable[[Any], bool]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 4096


def is_address(value: object) -> bool:
    """Whether a value is ``host:port``."""
    if not isinstance(value, str) or len(value) > 300:
        return False
    host, _, port = value.rpartition(":")
    return bool(host) and port.isdecimal() and port.isascii() and 0 < int(port[:6]) < 65_536


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _is_bool(value: object) -> bool:
    return type(value) is bool


def _list_of(check: Check, most: int = 100_000) -> Check:
    return lambda value: isinstance(value, list) and len(value) <= most and all(map(check, value))


def _is_hop(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and is_worker(value[0]) and is_address(value[1])


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_version, value))


def _is_span(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and _is_text(value[0])
        and is_count(value[1])
        and all(map(_is_number, value[2:]))
    )


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


_MICROBATCH: dict[str, Check] = {"m": is_count, "a": is_count}
_ROUTE: dict[str, Check] = {"route": _list_of(_is_hop, 1000), "count": _list_of(_is_bool, 1000)}

KINDS: dict[str, dict[str, Check]] = {
    # from worker to worker
    "activation": {**_MICROBATCH, **_ROUTE, "stage": is_count, "f": _list_of(is_version, 1000)},
    "gradient": {
        **_MICROBATCH,
        "stage": is_count,
        "f": _list_of(is_version, 1000),
        "b": _list_of(_is_pair, 1000),
        "loss": is_loss,
    },
    "poke": {},
    "bundle": {"round": _is_text, "worker": is_worker, "contributions": _list_of(_is_object)},
    "fetch": {},
    "adopt": {**_MICROBATCH, **_ROUTE, "stage": is_count, "f": _list_of(is_version, 1000)},  # also from the coordinator
    "again": {**_MICROBATCH, "stage": is_count, "hop": _is_hop},
    # a worker's state, to whoever asked for it
    "state": {"state": lambda _: True},
    # from a worker to the coordinator
    "hello": {
        "worker": _or_none(is_worker),
        "stage": _or_none(is_count),
        "address": is_address,
        "version": _or_none(is_version),
        "pending": _list_of(is_count),
    },
    "ready": {"version": is_version},
    "update": {"update": _is_object},
    "done": {**_MICROBATCH, "loss": is_loss},
    "cancelled": {**_MICROBATCH, "counted": _is_bool},
    "failed": {**_MICROBATCH, "why": _is_text, "to": _or_none(is_address)},
    "adopted": {**_MICROBATCH, "version": is_version, "before": _or_none(is_version)},
    "beyond": _MICROBATCH,
    "dropped": {"microbatches": _list_of(is_count)},
    "status": {"seconds": _or_none(_is_number), "events": _list_of(_is_span)},
    # from the coordinator to a worker
    "welcome": {
        "worker": is_worker,
        "stage": is_count,
        "run": _is_object,
        "lighthouse": is_count,
    },
    "refused": {"why": _is_text},
    "begin": {"state": lambda _: True},
    "team": {"addresses": _list_of(is_address)},
    "start": {**_MICROBATCH, **_ROUTE},
    "cancel": _MICROBATCH,
    "replace": {**_MICROBATCH, **_ROUTE, "stage": is_count},
    "save": {},
    "finish": {},
}


def checked(message: Message, *kinds: str) -> Message:
    """Return a message that is of one of ``kinds`` and has all that it must have.

    Raises:
        RefusedError: it is of another kind, or a field is missing or malformed.
    """
    kind = message.header["kind"]
    if kind not in kinds:
        raise RefusedError(f"a message of kind {kind[:40]!r}, which is not expected here")
    for name, check in KINDS[kind].items():
        if name not in message.header or not check(message.header[name]):
            raise RefusedError(f"a message of kind {kind!r} with a malformed {name!r}")
    return message
