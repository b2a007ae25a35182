"""Hermes, Qwen2.5, Qwen3 and many others.

<tool_call>
{"name": "f", "arguments": {"a": 1}}
</tool_call>
"""

from __future__ import annotations

import re

from mlx_serving.content.reading import Steps
from mlx_serving.content.tools.family import Calls, Family, Forced
from mlx_serving.content.tools.json_call import read_calls

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_BRACES = re.compile(r"[}\]\s]*")


def read(calls: Calls, _opener: str) -> Steps[None]:
    yield from calls.reader.space()
    yield from read_calls(calls)
    # Small models miscount braces.
    yield from calls.reader.run(_BRACES)
    yield from calls.reader.close(CLOSE)


def forced(_template: str) -> Forced:
    return Forced(
        before=OPEN + '\n{"name": "{name}", "arguments": ', after="}\n" + CLOSE, between="\n"
    )


FAMILY = Family("hermes", opens=(OPEN,), read=read, ends=(CLOSE,), forced=forced)
