"""Reasoning that models write before their answer, between tags of their family's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mlx_serving.content.draft import Draft
from mlx_serving.content.reading import Reader, Steps, stops


@dataclass(frozen=True, slots=True)
class Tags:
    """What reasoning stands between.

    Attributes:
        ends: markup of calls that ends it too.
        always: the answer begins within reasoning, whatever the prompt ends with.
    """

    open: str
    close: str
    ends: tuple[str, ...] = ()
    always: bool = False

    @property
    def markup(self) -> frozenset[str]:
        return frozenset((self.open, self.close))


TAGS: Mapping[str, Tags] = {
    "think": Tags("<think>", "</think>"),
    "deepseek_r1": Tags("<think>", "</think>", always=True),
    "kimi": Tags("<think>", "</think>", ends=("<|tool_calls_section_begin|>",)),
    "kimi_vl": Tags("◁think▷", "◁/think▷"),
    "mistral": Tags("[THINK]", "[/THINK]"),
    "seed_oss": Tags("<seed:think>", "</seed:think>"),
    "cohere": Tags("<|START_THINKING|>", "<|END_THINKING|>"),
    "gemma4": Tags("<|channel>", "<channel|>"),
}
"""Reasoning parsers by name; `harmony` is besides, and reads the whole answer."""

_IN_TEMPLATES = (
    # (all of these texts in the template, the tags); the first that fits
    (("<|channel>", "<channel|>"), "gemma4"),
    (("[THINK]",), "mistral"),
    (("<seed:think>",), "seed_oss"),
    (("◁think▷",), "kimi_vl"),
    (("<|START_THINKING|>",), "cohere"),
    (("<|tool_calls_section_begin|>", "</think>"), "kimi"),
    (("</think>",), "think"),
    (("<think>",), "think"),
)


def reasoning_in(template: str) -> str | None:
    """The name of the tags that a chat template knows; None: its model does not reason."""
    if "<|channel|>" in template and "analysis" in template:
        return "harmony"
    for texts, name in _IN_TEMPLATES:
        if all(text in template for text in texts):
            return name
    return None


def read_reasoning(
    reader: Reader, draft: Draft, tags: Tags, openers: tuple[str, ...] = ()
) -> Steps[str]:
    """From after the opening tag to what ends it, which is returned: the closing tag, or one of
    `openers` that the tags let end it."""
    draft.set_apart()
    if tags.open == "<|channel>":
        yield from reader.accept("thought")
    ends = stops(tags.close, *(end for end in tags.ends if end in openers))
    end = yield from reader.until(ends, draft.think)
    draft.set_apart()
    return end
