"""Conversations in an order of roles that a chat template takes.

Agents put system messages between the turns and say several things in a row as the user. Some
templates refuse such an order and some leave a message out; for those the same texts are put into
turns that they show, and always the same way, so that a longer conversation begins like a shorter.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import msgspec

from mlx_serving.types import Message

LATE_SYSTEM = ("system", "user", "system", "assistant", "user")
REPEATED_USER = ("user", "user")


def fit(messages: Sequence[Message], takes: Callable[[tuple[str, ...]], bool]) -> Sequence[Message]:
    """`takes` says of an order of roles whether the template shows every message of it."""
    if any(m.role == "system" for m in messages[1:]) and not takes(LATE_SYSTEM):
        messages = _without_late_system(messages)
    if _repeats(messages) and not takes(REPEATED_USER):
        messages = _joined(messages)
    return messages


def _without_late_system(messages: Sequence[Message]) -> list[Message]:
    """System messages at the beginning become one, later ones the user's."""
    first = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
    head = [_join(messages[:first])] if first else []
    return head + [
        msgspec.structs.replace(m, role="user") if m.role == "system" else m
        for m in messages[first:]
    ]


def _repeats(messages: Sequence[Message]) -> bool:
    return any(_same_speaker(a, b) for a, b in itertools.pairwise(messages))


def _same_speaker(a: Message, b: Message) -> bool:
    return a.role == b.role == "user" and a.name == b.name


def _joined(messages: Sequence[Message]) -> list[Message]:
    """What the user says in a row becomes one turn."""
    turns: list[list[Message]] = []
    for message in messages:
        if turns and _same_speaker(turns[-1][-1], message):
            turns[-1].append(message)
        else:
            turns.append([message])
    return [_join(turn) for turn in turns]


def _join(turn: Sequence[Message]) -> Message:
    if len(turn) == 1:
        return turn[0]
    texts = [message.content for message in turn if message.content]
    return msgspec.structs.replace(turn[0], content="\n\n".join(texts))
