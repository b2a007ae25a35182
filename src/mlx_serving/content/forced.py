"""Grammars that hold a model to its family's own call format (llguidance's Lark)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from mlx_serving.content.output import Format
from mlx_serving.content.tools import harmony
from mlx_serving.content.tools.family import Forced

_JSON_OPTIONS = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""As templates write arguments; white space cannot run away."""
_ANY = "/(?s:.*)/"

SpecialId = Callable[[str], int | None]
"""A text's token id if it is a special token, which plain text cannot spell."""
Functions = Mapping[str, Mapping[str, Any]]
"""Names and their parameters' schemas, as a grammar follows them."""


def forcing_grammar(
    form: Format,
    template: str,
    functions: Functions,
    special_id: SpecialId,
    *,
    parallel: bool,
    thinking: bool,
) -> str | None:
    """Calls of `functions` and nothing else, after reasoning if the model has any. None: the
    family's format cannot be forced."""
    forced = form.family.forced(template) if form.family else None
    if forced is None:
        return None
    spell = _Speller(form.markup, special_id)
    rules = _Rules(spell)
    call = rules.functions("f", forced, functions)
    rules.add("calls", _calls(forced, spell, call, call, parallel))
    return rules.start(f"{_thoughts(form, rules, thinking)} calls")


def guarding_grammar(
    form: Format,
    template: str,
    functions: Functions,
    special_id: SpecialId,
    *,
    parallel: bool,
    thinking: bool,
) -> str | None:
    """Free text, then perhaps calls of `functions`. None: the family's format cannot be forced, or
    has no beginning to watch for."""
    forced = form.family.forced(template) if form.family else None
    if form.family is None or forced is None or not form.family.opens:
        return None
    marker, text = form.family.opens[0], forced.open or forced.before
    if not text.startswith(marker):
        return None
    spell = _Speller(form.markup, special_id)
    rules = _Rules(spell)
    call = rules.functions("f", forced, functions)
    rest = text.removeprefix(marker)
    if forced.open:
        begun = Forced(forced.before, forced.after, rest, forced.between, forced.close)
        first = call
    else:
        begun = forced
        first = rules.functions("g", Forced(rest, forced.after), functions)
    rules.add("calls", _calls(begun, spell, first, call, parallel))
    rules.up_to("free", marker)
    if (special := spell.special(marker)) is None:
        rules.lines.append(f"TEXT: {_ANY} & ~/(?s:.*){_regex(marker)}(?s:.*)/")
    ending = _ANY if special is not None else "TEXT"
    return rules.start(f"{_thoughts(form, rules, thinking)} (free calls | {ending})")


def reasoning_grammar(form: Format, special_id: SpecialId, *, thinking: bool) -> str:
    """Rules, `before` among them, for what a model writes before a constrained answer; "" for
    nothing."""
    if form.tags is None and not form.channels:
        return ""
    rules = _Rules(_Speller(form.markup, special_id))
    body = _thoughts(form, rules, thinking)
    if form.channels:
        body += " " + rules.spell(f"{harmony.CHANNEL}final{harmony.MESSAGE}")
    rules.add("before", body)
    return "\n".join(rules.lines)


def _calls(forced: Forced, spell: _Speller, first: str, call: str, parallel: bool) -> str:
    more = f"({spell(forced.between)} {call})*" if parallel else ""
    return f"{spell(forced.open)} {first} {more} {spell(forced.close)}"


def _thoughts(form: Format, rules: _Rules, thinking: bool) -> str:
    """Reasoning before the answer, perhaps with nothing in it."""
    if form.channels:
        h = harmony
        rules.up_to("thoughts", h.END)
        opening = rules.spell(f"{h.CHANNEL}analysis{h.MESSAGE}")
        return f"({opening} thoughts {rules.spell(h.START + 'assistant')})?"
    if form.tags is None:
        return ""
    rules.up_to("thoughts", form.tags.close)
    rules.add("after", r"thoughts /\s{0,4}/")
    if thinking or form.tags.always:
        return "after"
    return f"({rules.spell(form.tags.open)} after)?"


class _Rules:
    def __init__(self, spell: _Speller) -> None:
        self.spell = spell
        self.lines: list[str] = []

    def add(self, name: str, body: str) -> None:
        self.lines.append(f"{name}: {body}")

    def up_to(self, name: str, end: str) -> None:
        """Any text and the first `end` after it."""
        if self.spell.special(end) is None:
            self.lines.append(f"{name}[suffix={_quoted(end)}]: {_ANY}")
        else:
            self.add(name, f"{_ANY} {self.spell(end)}")

    def functions(self, prefix: str, forced: Forced, functions: Functions) -> str:
        """A rule for a call of any of `functions`; returns its name."""
        for i, (name, parameters) in enumerate(functions.items()):
            before = self.spell(forced.before.replace("{name}", name))
            # Closed unless it says otherwise, as OpenAI's strict mode has it.
            closed = {"additionalProperties": False} if "properties" in parameters else {}
            schema = {**closed, **parameters, "x-guidance": _JSON_OPTIONS}
            self.add(f"{prefix}{i}", f"{before} {prefix}a{i} {self.spell(forced.after)}")
            self.add(f"{prefix}a{i}", f"%json {json.dumps(schema)}")
        self.add(f"{prefix}s", " | ".join(f"{prefix}{i}" for i in range(len(functions))))
        return f"{prefix}s"

    def start(self, body: str) -> str:
        return "\n".join([f"start: {body}", *self.lines])


class _Speller:
    """Text as Lark: literals, and special tokens by their ids."""

    def __init__(self, markup: frozenset[str], special_id: SpecialId) -> None:
        self._ids = {text: i for text in markup if (i := special_id(text)) is not None}
        texts = sorted(self._ids, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, texts)) + ")" if texts else r"((?!))")

    def __call__(self, text: str) -> str:
        parts = [part for part in self._cut.split(text) if part]
        return " ".join(f"<[{self._ids[p]}]>" if p in self._ids else _quoted(p) for p in parts)

    def special(self, text: str) -> int | None:
        return self._ids.get(text)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _regex(text: str) -> str:
    return re.escape(text).replace("/", r"\/").replace("\n", r"\n")
