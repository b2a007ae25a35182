"""Grammars that hold a model to its family's own call format (llguidance's Lark)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mlx_serving.content.output import Format
from mlx_serving.content.tools import harmony
from mlx_serving.content.tools.family import Forced

_JSON_OPTIONS = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""As templates write arguments; white space cannot run away."""
_NOT_TEXT = ("integer", "number", "boolean", "null", "array", "object")
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
    if call is None:
        return None
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
        begun, first = replace(forced, open=rest), call
    else:
        begun = forced
        first = rules.functions("g", replace(forced, before=rest), functions)
    if first is None or call is None:
        return None
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
        if self.spell.begins_special(end):
            self.add(name, f"{_ANY} {self.spell(end)}")
        else:
            self.lines.append(f"{name}[suffix={_quoted(end)}]: {_ANY}")

    def functions(self, prefix: str, forced: Forced, functions: Functions) -> str | None:
        """A rule for a call of any of `functions`; returns its name. None: the format cannot say
        what a schema wants."""
        for i, (name, parameters) in enumerate(functions.items()):
            before = self.spell(forced.before.replace("{name}", name))
            rest, own = f"{prefix}r{i}", f"{prefix}{i}"
            if forced.element is None:
                # Closed unless it says otherwise, as OpenAI's strict mode has it.
                closed = {"additionalProperties": False} if "properties" in parameters else {}
                self.json(f"{rest}a", {**closed, **parameters})
                self.add(rest, f"{rest}a {self.spell(forced.after)}")
            elif not self._elements(rest, forced.element, forced.after, parameters):
                return None
            self.add(own, f"{before} {rest}")
        self.add(f"{prefix}s", " | ".join(f"{prefix}{i}" for i in range(len(functions))))
        return f"{prefix}s"

    def json(self, name: str, schema: Mapping[str, Any]) -> None:
        self.add(name, f"%json {json.dumps({**schema, 'x-guidance': _JSON_OPTIONS})}")

    def _elements(
        self, name: str, element: tuple[str, str], after: str, parameters: Mapping[str, Any]
    ) -> bool:
        """A rule for a call's arguments and its end, in the order of their schema."""
        if "properties" not in parameters:
            self.up_to(name, after)
            return parameters.keys() <= {"type"}
        if not parameters.keys() <= {"type", "properties", "required", "additionalProperties"}:
            return False
        required = parameters.get("required", [])
        if not isinstance(required, list):
            return False
        body = ""
        for i, (key, schema) in enumerate(parameters["properties"].items()):
            rule = f"{name}e{i}"
            if not self._element(rule, key, element, schema):
                return False
            body += f"{rule} " if key in required else f"{rule}? "
        self.add(name, f"{body}{self.spell(after)}")
        return all(key in parameters["properties"] for key in required)

    def _element(self, name: str, key: str, element: tuple[str, str], schema: Any) -> bool:
        """One argument: a text as it is, one of some texts, or JSON. False: a schema of text that says
        more, or of text or something else."""
        if not isinstance(schema, Mapping) or '"$ref"' in json.dumps(schema):
            return False
        choices = schema.get("enum", [schema["const"]] if "const" in schema else [])
        if not isinstance(choices, list):
            return False
        of_text = [isinstance(choice, str) for choice in choices]
        texts = bool(choices) and all(of_text)
        plain = schema == {"type": "string"}
        before, after = (part.replace("{key}", key) for part in element)
        before = self.spell(before.replace("{string}", "true" if plain or texts else "false"))
        value = f"{name}v"
        if plain:
            self.up_to(value, after)
            self.add(name, f"{before} {value}")
            return True
        if texts:
            self.add(value, " | ".join(self.spell(str(choice)) or '""' for choice in choices))
        elif schema.get("type") in _NOT_TEXT or (choices and not any(of_text)):
            self.json(value, schema)
        else:
            return False
        self.add(name, f"{before} {value} {self.spell(after)}")
        return True

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

    def begins_special(self, text: str) -> bool:
        return any(text.startswith(special) for special in self._ids)

    def special(self, text: str) -> int | None:
        return self._ids.get(text)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _regex(text: str) -> str:
    return re.escape(text).replace("/", r"\/").replace("\n", r"\n")
