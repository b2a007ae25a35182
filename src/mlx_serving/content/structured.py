"""What the output must look like: from the shapes in which clients say it to a bounded `Grammar`.

Here the shape, the size and the keywords are checked, so that most of what cannot be had is
refused before any work; the worker, which compiles the grammar next to the vocabulary, refuses
the rest (a regular expression that does not parse, a `$ref` to nowhere). Nothing is approximated:
a keyword that restricts and cannot be followed is an error that names it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from decimal import Decimal
from typing import Any

import msgspec

from mlx_serving.content.gbnf import BadGrammar, parse
from mlx_serving.content.lexemes import to_lark
from mlx_serving.errors import InvalidRequest, UnsupportedParameter
from mlx_serving.types import Grammar
from mlx_serving.unknown import refuse_others

MAX_CHARS = 65_536
"""Of a schema as JSON, an expression, a grammar, a list of choices."""
MAX_DEPTH = 32
"""Schemas within schemas."""
MAX_PROPERTIES = 500
"""Of one object; twice as many in all."""
MAX_PATTERN_PROPERTIES = 32
MAX_ALTERNATIVES = 200
"""That `anyOf` and `oneOf` make for one value; `allOf` multiplies them."""
MAX_CONJUNCTION = 8
"""Patterns and formats that one value must match at once, and `&` in a Lark grammar."""
MAX_MODULUS = 1_000
"""Of `multipleOf`, less its factors 2 and 5: the states that telling a multiple takes."""
MAX_CHOICES = 2_000
MAX_WHITE_SPACE_CHARS = 256

_ANNOTATIONS = frozenset(
    [
        "title",
        "description",
        "default",
        "examples",
        "example",
        "$comment",
        "deprecated",
        "readOnly",
        "writeOnly",
        "$schema",
        "$id",
        "contentEncoding",
        "contentMediaType",
        "contentSchema",
        "discriminator",
        "nullable",
        "externalDocs",
        "xml",
        "markdownDescription",
    ]
)
_FOLLOWED = frozenset(
    [
        "type",
        "const",
        "enum",
        "anyOf",
        "oneOf",
        "allOf",
        "$ref",
        "$defs",
        "definitions",
        "properties",
        "required",
        "additionalProperties",
        "patternProperties",
        "minProperties",
        "maxProperties",
        "items",
        "prefixItems",
        "additionalItems",
        "minItems",
        "maxItems",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
        "minLength",
        "maxLength",
        "pattern",
        "format",
    ]
)
_NEUTRAL: Mapping[str, Any] = {"uniqueItems": False}
"""Values that ask for nothing, of keywords that are not followed."""
_NUMBER_FORMATS = frozenset({"int32", "int64", "uint32", "uint64", "float", "double"})
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_LISTED = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "additionalItems")


class _JSONSchemaFormat(msgspec.Struct, kw_only=True):
    schema: dict[str, Any] | bool
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class _ResponseFormat(msgspec.Struct, kw_only=True):
    type: str
    json_schema: dict[str, Any] | None = None


class _StructuredOutputs(msgspec.Struct, kw_only=True):
    json: dict[str, Any] | bool | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool = False
    disable_fallback: bool = False
    """There is nothing to fall back to."""


def response_format(value: Any, *, param: str = "response_format") -> Grammar | None:
    """OpenAI's `response_format`; None for text. `strict` or not, the schema is followed exactly."""
    given = _convert(value, _ResponseFormat, param)
    if given.type != "json_schema" and given.json_schema is not None:
        raise InvalidRequest(
            f"'{param}.json_schema' needs 'type': 'json_schema'.", param=f"{param}.json_schema"
        )
    match given.type:
        case "text":
            return None
        case "json_object":
            return Grammar(kind="json_object", param=param)
        case "json_schema":
            at = f"{param}.json_schema"
            if given.json_schema is None:
                raise InvalidRequest(f"'{at}' is missing.", param=at)
            return json_schema(
                _convert(given.json_schema, _JSONSchemaFormat, at).schema, param=param
            )
    raise UnsupportedParameter(
        f"'{param}.type' must be text, json_object or json_schema.", param=f"{param}.type"
    )


def structured_outputs(value: Any, *, param: str = "structured_outputs") -> Grammar:
    """vLLM's `structured_outputs`: one of json, regex, choice, grammar (Lark), json_object."""
    given = _convert(value, _StructuredOutputs, param)
    white_space = "" if given.disable_any_whitespace else given.whitespace_pattern
    if white_space is not None and len(white_space) > MAX_WHITE_SPACE_CHARS:
        at = f"{param}.whitespace_pattern"
        raise InvalidRequest(f"'{at}' is over {MAX_WHITE_SPACE_CHARS} characters.", param=at)
    found: list[Grammar] = []
    if given.json is not None:
        found.append(json_schema(given.json, param=f"{param}.json", white_space=white_space))
    if given.regex is not None:
        found.append(regex(given.regex, param=f"{param}.regex"))
    if given.choice is not None:
        found.append(choice(given.choice, param=f"{param}.choice"))
    if given.grammar is not None:
        found.append(lark(given.grammar, param=f"{param}.grammar"))
    if given.json_object:
        at = f"{param}.json_object"
        found.append(Grammar(kind="json_object", param=at, white_space=white_space))
    if len(found) != 1:
        raise InvalidRequest(
            f"'{param}' takes exactly one of json, regex, choice, grammar, json_object.",
            param=param,
        )
    return found[0]


def json_schema(
    schema: Mapping[str, Any] | bool | str, *, param: str, white_space: str | None = None
) -> Grammar:
    """A JSON schema, or its text. Raises UnsupportedParameter naming a keyword that is not followed,
    InvalidRequest for one over the bounds."""
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(_bounded(schema, param))
        except (msgspec.DecodeError, RecursionError):
            raise InvalidRequest(f"'{param}' is not a JSON schema.", param=param) from None
    checked = _Checker(param).check(schema, "", MAX_DEPTH)
    _Cost(checked, param).check()
    return Grammar(
        kind="json_schema", text=_encode(checked, param), param=param, white_space=white_space
    )


def regex(expression: Any, *, param: str) -> Grammar:
    """The whole output matches the expression."""
    return Grammar(kind="regex", text=_text(expression, param), param=param)


def lark(grammar: Any, *, param: str) -> Grammar:
    text = _text(grammar, param)
    if text.count("&") > MAX_CONJUNCTION:
        raise InvalidRequest(f"'{param}' has over {MAX_CONJUNCTION} '&'.", param=param)
    return Grammar(kind="lark", text=text, param=param)


def gbnf(grammar: Any, *, param: str) -> Grammar | None:
    """llama.cpp's notation; None for an empty text, which its clients send for none."""
    if grammar == "":
        return None
    try:
        text = to_lark(parse(_text(grammar, param)))
    except BadGrammar as bad:
        raise InvalidRequest(f"'{param}' is no GBNF grammar: {bad}.", param=param) from None
    return Grammar(kind="lark", text=text, param=param)


def choice(choices: Sequence[Any], *, param: str) -> Grammar:
    """The output is one of the choices."""
    if isinstance(choices, str) or not all(isinstance(c, str) and c for c in choices):
        raise InvalidRequest(f"'{param}' must be a list of texts, none empty.", param=param)
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise InvalidRequest(
            f"'{param}' has {len(choices)} choices; from 1 to {MAX_CHOICES}.", param=param
        )
    return Grammar(kind="choice", text=_encode(list(choices), param), param=param)


class _Checker:
    """Walks the places where schemas stand, and drops what asks for nothing."""

    def __init__(self, param: str) -> None:
        self._param = param
        self._members = 0

    def check(self, schema: Any, at: str, depth: int) -> Any:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            raise self._invalid(f"{self._place(at)} must be a schema: an object or a boolean.")
        if depth == 0:
            raise self._invalid(f"the schema is over {MAX_DEPTH} schemas deep.")
        return {
            keyword: self._value(keyword, value, f"{at}/{keyword}", depth - 1)
            for keyword, value in schema.items()
            if self._followed(keyword, value, schema, at)
        }

    def _followed(self, keyword: str, value: Any, schema: Mapping[str, Any], at: str) -> bool:
        """False: it asks for nothing."""
        if not isinstance(keyword, str):
            raise self._invalid(f"{keyword!r} is not a keyword.")
        if keyword in _ANNOTATIONS or keyword.startswith("x-") or keyword in _NEUTRAL:
            if keyword in _NEUTRAL and value is not _NEUTRAL[keyword]:
                raise self._unsupported(keyword, at)
            return keyword in ("$id", "$schema")
        if keyword not in _FOLLOWED:
            raise self._unsupported(keyword, at)
        if keyword == "format" and value in _NUMBER_FORMATS:
            if schema.get("type") not in ("integer", "number"):
                raise self._unsupported(f"format: {value}", at)
            return False
        if keyword.startswith("exclusive") and isinstance(value, bool):
            raise self._unsupported(f"{keyword}: a boolean, of draft 4", at)
        # An object may name a property twice, and reading it keeps one.
        if keyword == "minProperties" and isinstance(value, int):
            required = schema.get("required")
            if value > (len(required) if isinstance(required, Sequence) else 0):
                raise self._unsupported("minProperties (above the number of required ones)", at)
            return False
        return True

    def _value(self, keyword: str, value: Any, at: str, depth: int) -> Any:
        if keyword in _NAMED:
            if not isinstance(value, Mapping):
                raise self._invalid(f"{self._place(at)} must be an object.")
            limit = MAX_PATTERN_PROPERTIES if keyword == "patternProperties" else MAX_PROPERTIES
            if len(value) > limit:
                raise self._invalid(f"{self._place(at)} has over {limit} members.")
            self._members += len(value)
            if self._members > 2 * MAX_PROPERTIES:
                raise self._invalid(f"the schema has over {2 * MAX_PROPERTIES} properties.")
            return {name: self.check(sub, f"{at}/{name}", depth) for name, sub in value.items()}
        if keyword == "required" and isinstance(value, list) and len(value) > MAX_PROPERTIES:
            raise self._invalid(f"{self._place(at)} has over {MAX_PROPERTIES} members.")
        if keyword in _LISTED or (keyword == "items" and isinstance(value, list)):
            if not isinstance(value, list):
                raise self._invalid(f"{self._place(at)} must be a list of schemas.")
            return [self.check(sub, f"{at}/{i}", depth) for i, sub in enumerate(value)]
        if keyword in _SINGLE:
            return self.check(value, at, depth)
        if not _exact(value):
            raise self._invalid(f"{self._place(at)} has an integer beyond 2^53, or is too deep.")
        return value

    def _place(self, at: str) -> str:
        return f"'{at[:100]}'" if at else "it"

    def _invalid(self, what: str) -> InvalidRequest:
        return InvalidRequest(f"'{self._param}': {what}", param=self._param)

    def _unsupported(self, keyword: str, at: str) -> UnsupportedParameter:
        where = f" (at '{at[:100]}')" if at else ""
        return UnsupportedParameter(
            f"'{self._param}': the keyword '{keyword[:64]}'{where} is not supported.",
            param=self._param,
        )


@dataclass(frozen=True, slots=True)
class _Weight:
    alternatives: int = 1
    conjunction: int = 0
    modulus: int = 1

    def beside(self, other: _Weight) -> _Weight:
        """Of two schemas for different values."""
        return _Weight(*map(max, astuple(self), astuple(other)))

    def either(self, other: _Weight) -> _Weight:
        return replace(self.beside(other), alternatives=self.alternatives + other.alternatives)

    def both(self, other: _Weight) -> _Weight:
        """Of two schemas for the same value, whose properties may be the same ones too."""
        return _Weight(
            self.alternatives * other.alternatives,
            self.conjunction + other.conjunction,
            self.modulus * other.modulus,
        )


class _Cost:
    """Refuses what would take long to compile: combinations grow with the product of their parts.
    An upper bound from the schema's shape, where each `$ref` counts as what it names."""

    def __init__(self, schema: Any, param: str) -> None:
        self._root = schema
        self._param = param
        self._known: dict[str, _Weight] = {}

    def check(self) -> None:
        try:
            self._weigh(self._root)
        except RecursionError:
            raise InvalidRequest(
                f"'{self._param}': its $refs lead too deep.", param=self._param
            ) from None

    def _weigh(self, schema: Any) -> _Weight:
        if not isinstance(schema, dict):
            return _Weight()
        weight = self._own(schema)
        for sub in _inner(schema):
            weight = weight.beside(self._weigh(sub))
        for word in ("anyOf", "oneOf"):
            if branches := [self._weigh(sub) for sub in schema.get(word, ())]:
                weight = weight.both(functools.reduce(_Weight.either, branches))
        for sub in schema.get("allOf", ()):
            weight = weight.both(self._weigh(sub))
        if isinstance(ref := schema.get("$ref"), str):
            weight = weight.both(self._named(ref))
        return self._bounded(weight)

    def _own(self, schema: dict[str, Any]) -> _Weight:
        return _Weight(
            conjunction=("pattern" in schema) + ("format" in schema),
            modulus=_modulus(schema["multipleOf"]) if "multipleOf" in schema else 1,
        )

    def _named(self, ref: str) -> _Weight:
        if ref not in self._known:
            self._known[ref] = _Weight()  # where it names itself
            target = self._root
            for part in ref.split("/")[1:]:
                key = part.replace("~1", "/").replace("~0", "~")
                target = target.get(key) if isinstance(target, dict) else None
            self._known[ref] = self._weigh(target)
        return self._known[ref]

    def _bounded(self, weight: _Weight) -> _Weight:
        for value, limit, what in (
            (weight.alternatives, MAX_ALTERNATIVES, "alternatives of anyOf and oneOf"),
            (weight.conjunction, MAX_CONJUNCTION, "patterns and formats for one value"),
            (weight.modulus, MAX_MODULUS, "as multipleOf (less its factors 2 and 5)"),
        ):
            if value > limit:
                raise InvalidRequest(
                    f"'{self._param}': the schema takes too long to compile: over {limit} {what}.",
                    param=self._param,
                )
        return weight


def _inner(schema: dict[str, Any]) -> Iterable[Any]:
    """The schemas of what is in a value: its properties and items."""
    for place in ("properties", "patternProperties"):
        yield from schema.get(place, {}).values()
    for place in ("prefixItems", *_SINGLE):
        sub = schema.get(place)
        yield from sub if isinstance(sub, list) else (sub,)


def _exact(value: Any, depth: int = MAX_DEPTH) -> bool:
    """Whether a float, as which numbers are compiled, holds its integers. False if it is deeper
    than schemas may be."""
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(_exact(v, depth - 1) for v in inner)
    return not isinstance(value, int) or abs(value) <= 2**53


def _modulus(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        return 1
    _, digits, _ = Decimal(repr(value)).as_tuple()
    modulus = int("".join(map(str, digits)))
    for factor in (2, 5):
        while modulus % factor == 0:
            modulus //= factor
    return modulus


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"'{param}' must be a text.", param=param)
    return _bounded(value, param)


def _encode(value: Any, param: str) -> str:
    """As JSON; what JSON cannot say may come from Python only."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"'{param}' is not JSON: {error}.", param=param) from None
    return _bounded(text, param)


def _bounded(text: str, param: str) -> str:
    if len(text) > MAX_CHARS:
        raise InvalidRequest(f"'{param}' is over {MAX_CHARS} characters.", param=param)
    return text


def _convert(value: Any, kind: Any, param: str) -> Any:
    try:
        converted = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"'{param}': {error}.", param=param) from None
    refuse_others(value, kind.__struct_fields__, f"{param}.")
    return converted
