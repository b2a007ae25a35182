"""Orders of roles that agents send and templates refuse, or leave a message out of."""

from __future__ import annotations

import itertools
import random

import pytest

from mlx_serving.content.template import CHATML, ChatTemplate
from mlx_serving.content.turns import LATE_SYSTEM, fit
from mlx_serving.errors import InvalidRequest
from mlx_serving.types import ChatPrompt, Message

ALTERNATING = (
    "{% set turns = messages[1:] if messages[0].role == 'system' else messages %}"
    "{% set head = messages[0].content + '\n' if messages[0].role == 'system' else '' %}"
    "{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) or m.role == 'system' %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<{{ m.role }}>{{ head if loop.first }}{{ m.content }}{% endfor %}"
)
SYSTEM_FIRST = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning.') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)
LEAVES_OUT = (
    "{% for m in messages %}{% if m.role != 'system' or loop.first %}<{{ m.role }}>{{ m.content }}"
    "{% endif %}{% endfor %}"
)


def said(text: str) -> tuple[Message, ...]:
    """`s:a u:b`: the system says a, the user b."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return tuple(
        Message(role=roles[item[0]], content=item[2:])  # type: ignore[arg-type]
        for item in text.split()
    )


@pytest.mark.parametrize(
    ("template", "conversation", "shown"),
    [
        (CHATML, "s:a u:b s:c", "<|im_start|>system\nc<|im_end|>\n"),
        (SYSTEM_FIRST, "s:a u:b s:c", "<system>a<user>b<user>c"),
        (SYSTEM_FIRST, "s:a s:b u:c u:d", "<system>a\n\nb<user>c<user>d"),
        (SYSTEM_FIRST, "u:a a:b s:c", "<user>a<assistant>b<user>c"),
        (LEAVES_OUT, "s:a u:b s:c", "<system>a<user>b<user>c"),
        (ALTERNATING, "s:a u:b s:c", "<user>a\nb\n\nc"),
        (ALTERNATING, "s:a s:b u:c u:d a:e s:f u:g", "<user>a\n\nb\nc\n\nd<assistant>e<user>f\n\ng"),
        (ALTERNATING, "s:a u:b a:c u:d", "<user>a\nb<assistant>c<user>d"),
    ],
)  # fmt: skip
def test_every_message_is_shown(template: str, conversation: str, shown: str) -> None:
    prompt = ChatPrompt(messages=said(conversation))
    assert shown in ChatTemplate({"default": template}).render(prompt)


def test_what_no_order_mends_is_refused_in_the_templates_words() -> None:
    prompt = ChatPrompt(messages=said("u:a a:b a:c"))
    with pytest.raises(InvalidRequest, match="must alternate"):
        ChatTemplate({"default": ALTERNATING}).render(prompt)


def test_users_of_different_names_stay_apart() -> None:
    named = (
        Message(role="user", content="a", name="x"),
        Message(role="user", content="b", name="y"),
    )
    assert list(fit(named, lambda _: False)) == list(named)


def test_what_a_template_takes_is_left_alone() -> None:
    messages = said("s:a u:b u:c s:d")
    assert fit(messages, lambda _: True) is messages
    assert fit(said("s:a u:b a:c"), lambda _: pytest.fail("nothing to ask")) == said("s:a u:b a:c")


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_and_longer_conversations_begin_alike(seed: int) -> None:
    rng = random.Random(seed)
    messages = tuple(
        Message(role=rng.choice(("system", "user", "assistant")), content=f"<{i}>")
        for i in range(rng.randint(2, 12))
    )
    for takes_late in (False, True):
        fitted = fit(messages, lambda roles, late=takes_late: late and roles == LATE_SYSTEM)  # type: ignore[misc]
        text = "".join(f"{m.content}" for m in fitted).replace("\n\n", "")
        assert text == "".join(m.content or "" for m in messages)
        roles = [m.role for m in fitted]
        assert ("user", "user") not in set(itertools.pairwise(roles))
        assert takes_late or "system" not in roles[1:]
        head = fit(messages[:-1], lambda roles, late=takes_late: late and roles == LATE_SYSTEM)  # type: ignore[misc]
        assert list(head[:-1]) == list(fitted[: len(head) - 1])
