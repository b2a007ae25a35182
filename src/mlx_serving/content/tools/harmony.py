"""gpt-oss: every part of the answer is a message to a channel.

<|channel|>analysis<|message|>Reasoning.<|end|><|start|>assistant<|channel|>commentary
to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>

<|channel|>final<|message|>The answer.<|return|>
"""

from __future__ import annotations

import re

from mlx_serving.content.reading import Malformed, Steps, stops
from mlx_serving.content.tools.family import Calls, Family, Forced, attempt, check_name

START, CHANNEL, CONSTRAIN = "<|start|>", "<|channel|>", "<|constrain|>"
MESSAGE, END, CALL, RETURN = "<|message|>", "<|end|>", "<|call|>", "<|return|>"
_ENDS = stops(END, CALL, RETURN, START, CHANNEL)
_HEAD_ENDS = stops(MESSAGE, END, CALL, RETURN)
_RECIPIENT = re.compile(r"\bto=(?P<name>[^\s<]+)")
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(?P<name>\w+)")
_MAX_HEAD = 1024
_TO = " to="


def read_answer(calls: Calls) -> Steps[None]:
    """A whole answer: reasoning from the analysis channel, calls from what is sent to functions."""
    reader, draft = calls.reader, calls.draft
    end = ""
    # The prompt ends with the role, so a channel or a recipient comes first.
    for opening in (CHANNEL, _TO):
        if not end and (yield from reader.accept(opening)):
            end = opening
    end = end or (yield from reader.until(_ENDS, draft.say))
    while end:
        if end in (START, CHANNEL, _TO):
            end = yield from _message(calls, end)
        elif (yield from reader.accept(START)):
            end = START
        else:
            end = yield from reader.until(_ENDS, draft.say)


def _message(calls: Calls, head: str) -> Steps[str]:
    """One message from its head on; returns the markup that ended it."""
    reader, draft = calls.reader, calls.draft
    parts = [head]
    end = yield from reader.until(_HEAD_ENDS, parts.append)
    if end != MESSAGE:  # cut short: a head says nothing to anyone
        return end
    head = "".join(parts)[:_MAX_HEAD]
    recipient, channel = _RECIPIENT.search(head), _CHANNEL.search(head)
    draft.set_apart()
    if recipient is not None and calls.tools.schemas():
        name = recipient["name"].removeprefix("functions.")
        yield from attempt(calls, _call(calls, name), _ENDS)
        return (yield from reader.until(_ENDS, len))
    thinks = channel is not None and channel["name"] == "analysis"
    return (yield from reader.until(_ENDS, draft.think if thinks else draft.say))


def _call(calls: Calls, name: str) -> Steps[None]:
    yield from calls.reader.space()
    yield from calls.json_arguments(check_name(name))


def _read(_calls: Calls, _opener: str) -> Steps[None]:
    raise Malformed("harmony is read as a whole answer")
    yield


def forced(_template: str) -> Forced:
    return Forced(
        before=f"{CHANNEL}commentary to=functions.{{name}} {CONSTRAIN}json{MESSAGE}", after=""
    )


FAMILY = Family(
    "harmony",
    opens=(),
    read=_read,
    inner=(START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL, RETURN),
    forced=forced,
)
