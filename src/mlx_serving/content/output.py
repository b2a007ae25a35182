"""An answer's text to its parts: content, reasoning, tool calls; incremental."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_serving.content.draft import Draft, Parsed, new_call_id
from mlx_serving.content.reading import SPACE, Reader, Steps, stops
from mlx_serving.content.reasoning import TAGS, Tags, read_reasoning, reasoning_in
from mlx_serving.content.tools import harmony, mistral
from mlx_serving.content.tools.family import Calls, Complete, Family, Tools, attempt
from mlx_serving.content.tools.select import FAMILIES, family_in


@dataclass(frozen=True, slots=True)
class Format:
    """How a model marks up its answers.

    Attributes:
        family: how it writes tool calls; None: it does not, or nobody is to look for them.
        tags: what its reasoning stands between; None: it has none, or channels.
        channels: the answer is written in harmony's messages.
    """

    family: Family | None = None
    tags: Tags | None = None
    channels: bool = False

    @property
    def markup(self) -> frozenset[str]:
        """Texts that must reach the parser although they may be special tokens."""
        texts = harmony.FAMILY.markup if self.channels else frozenset[str]()
        for part in (self.family, self.tags):
            texts |= part.markup if part is not None else frozenset()
        return texts


def choose_format(template: str, tool_parser: str, reasoning_parser: str) -> Format:
    """The format that a chat template's text shows, or that the settings name (`auto`, `none`)."""
    reasoning = reasoning_in(template) if reasoning_parser == "auto" else reasoning_parser
    family = family_in(template) if tool_parser == "auto" else FAMILIES.get(tool_parser)
    return Format(
        family, TAGS.get(reasoning or ""), "harmony" in (reasoning, family and family.name)
    )


class OutputParser:
    """One answer. Any cut of its text into pushes gives the same message.

    `tools` are those that the request offers, in OpenAI's shape; without any, markup of calls is
    plain text. `thinking`: the prompt's end has opened the reasoning. `single`: one call at most;
    `done` says that it is complete and the answer over.

    Attributes:
        markup: texts that must reach it even where they are special tokens.
    """

    def __init__(
        self,
        form: Format,
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        thinking: bool = False,
        single: bool = False,
        new_id: Callable[[], str] | None = None,
    ) -> None:
        if new_id is None:
            new_id = mistral.new_id if form.family is mistral.FAMILY else new_call_id
        self.markup = form.markup
        self.each_token = single or form.channels or form.tags is not None
        """What it finds is counted in tokens: they are to be pushed one by one."""
        self._reader = Reader()
        self._draft = Draft(single=single, new_id=new_id)
        calls = Calls(self._reader, self._draft, Tools(tools))
        if form.channels:
            steps = harmony.read_answer(calls)
        else:
            steps = _read_answer(calls, form.family if tools else None, form.tags, thinking)
        self._steps: Generator[None, None, None] | None = steps
        next(steps)

    @property
    def calls(self) -> int:
        """How many calls have been made."""
        return self._draft.calls

    @property
    def malformed(self) -> bool:
        """Something began like a call and was not one."""
        return self._draft.malformed > 0

    @property
    def done(self) -> bool:
        return self._draft.done

    def push(self, text: str) -> Parsed:
        """What the text up to here adds for certain."""
        if text:
            self._advance(text, ended=False)
        return self._draft.take()

    def finish(self) -> Parsed:
        """What was held back; nothing may be pushed after it."""
        self._advance("", ended=True)
        return self._draft.take(last=True)

    def _advance(self, text: str, *, ended: bool) -> None:
        if self._steps is None:
            return
        self._reader.feed(text, ended=ended)
        try:
            next(self._steps)
        except (StopIteration, Complete):
            self._steps = None


def _read_answer(
    calls: Calls, family: Family | None, tags: Tags | None, thinking: bool
) -> Steps[None]:
    """The whole answer. Reasoning is looked for where an answer begins, and after calls."""
    reader, draft = calls.reader, calls.draft
    opens, ends, bare = (family.opens, family.ends, family.bare) if family else ((), (), None)
    inside, fresh = tags is not None and (thinking or tags.always), True
    while True:
        opener = ""
        if fresh:
            draft.say((yield from reader.run(SPACE)))
            if tags and (inside or (yield from reader.accept(tags.open))):
                inside = False
                opener = yield from read_reasoning(reader, draft, tags, opens)
                if opener == tags.close:
                    continue
            elif bare:
                steps, bare = bare(calls), None
                if (yield from attempt(calls, steps, stops(*ends))):
                    continue
        opener = opener or (yield from reader.until(stops(*opens), draft.say))
        if not opener:
            return
        assert family is not None, "only a family has openers"
        steps = family.read(calls, opener)
        fresh = yield from attempt(calls, steps, stops(*ends), opener=opener)
