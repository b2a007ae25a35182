"""Templates that were written to do harm: each ends with a 400, in bounded time and memory."""

from __future__ import annotations

import itertools
import tracemalloc

import pytest

from mlx_serving.content.template import MAX_SOURCE_CHARS, ChatTemplate
from mlx_serving.errors import InvalidRequest, ModelBroken
from mlx_serving.types import ChatPrompt, Message

PROMPT = ChatPrompt(messages=(Message(role="user", content="Hi\nthere"),))
LOOP = "{% for i in range(99999) %}"
END = "{% endfor %}"


def render(source: str) -> str:
    """With a clock that goes on by a second each time it is looked at, and 10,000 seconds."""
    ticks = itertools.count()
    template = ChatTemplate(
        {"default": source}, clock=lambda: float(next(ticks)), max_render_s=10_000
    )
    return template.render(PROMPT)


@pytest.mark.parametrize(
    "source",
    [
        LOOP + LOOP + END + END,
        "{% set x %}" + LOOP + "x" + LOOP + "x" + END + END + "{% endset %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f(n) %}{% if n %}{% set a = f(n - 1) %}{% set b = f(n - 1) %}{% endif %}"
        "{% endmacro %}{% set x = f(60) %}",
        "{% for i in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    ],
)
def test_what_takes_too_long_is_ended(source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        render(source)
    assert caught.value.param == "messages"


BOMBS = [
    "{{ 'x' * 10 ** 10 }}",
    "{{ 10 ** 10 * 'x' }}",
    "{{ [0] * 10 ** 10 }}",
    "{{ 10 ** (10 ** 10) }}",
    "{% set ns = namespace(x=7) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set x = 'x' * 100000 %}{{ x | replace('x', x) }}",
    "{% set x = 'x' * 100000 %}{{ x | replace('', x) }}",
    "{% set x = 'x' * 100000 %}{{ x.replace('x', x) }}",
    "{% set x = 'x' * 100000 %}{{ range(9999) | map('string') | list | join(x) }}",
    "{% set x = 'x' * 100000 %}{{ x.join(['a'] * 9999) }}",
    "{{ 'x' | center(10 ** 10) }}",
    "{{ 'x'.ljust(10 ** 10) }}",
    "{{ 'x'.zfill(10 ** 10) }}",
    "{{ 'x' | indent(10 ** 10) }}",
    "{{ '\n\n\n' * 9999 | indent(999999) }}",
    "{{ ('\t' * 9999).expandtabs(999999) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (10 ** 10, 1) }}",
    "{{ '%9999999999d' | format(1) }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ '{:>{}}'.format(1, 10 ** 10) }}",
    "{{ '{x:>9999999999}'.format_map({'x': 1}) }}",
    "{{ [[1]] | tojson(indent=10 ** 10) }}",
    "{{ 'x' * 99999999 }}",
    LOOP + "{{ 'x' * 9999 }}" + END,
]


@pytest.mark.parametrize("source", BOMBS)
def test_what_grows_is_stopped_before_it_does(source: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest) as caught:
            render(source)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.param == "messages"
    # Four bounds: a text, its double, the parts of an answer and their sum.
    assert peak < 300 * 1024 * 1024


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ 'a' ~ 1 ~ none ~ missing }}", "a1None"),
        (
            "{{ 'ab' * 3 + 'c' }}{{ 2 ** 10 }}{{ '%03d' % 7 }}{{ 7 % 4 }}{{ 2 * 3.5 }}",
            "abababc102400737.0",
        ),
        (
            "{{ 'a-b' | replace('-', '+') }}{{ ['a', 'b'] | join(', ') }}{{ 'x' | center(3) }}",
            "a+ba, b x ",
        ),
        ("{{ messages[0].content | indent(2) }}{{ '%s!' | format('x') }}", "Hi\n  therex!"),
        ("{% for i in range(3) %}{{ loop.index }}{% endfor %}", "123"),
        ("{% macro f(a, b=2) %}{{ a }}{{ b }}{% endmacro %}{{ f(1) }}{{ f(3, b=4) }}", "1234"),
        ("{% macro m() %}[{{ caller() }}]{% endmacro %}{% call m() %}x{% endcall %}", "[x]"),
        (
            "{% set x %}{% for i in 'ab' %}{{ i }}{% else %}none{% endfor %}{% endset %}{{ x | upper }}",
            "AB",
        ),
        ("{% for i in [] %}{% else %}none{% endfor %}", "none"),
        ("{{ 'a,b'.split(',') | map('upper') | join }}{{ 'x'.replace('x', 'y') }}", "ABy"),
    ],
)
def test_what_stays_within_is_rendered_as_ever(source: str, text: str) -> None:
    assert render(source) == text


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
        "x" * (MAX_SOURCE_CHARS + 1),
    ],
)
def test_a_template_that_cannot_be_compiled_breaks_its_model_alone(source: str) -> None:
    with pytest.raises(ModelBroken):
        ChatTemplate({"default": source})


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''|attr('__class__') }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ namespace.__init__ }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ '{x.__class__}'.format_map({'x': messages}) }}",
    "{{ strftime_now.__closure__[0] }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_nothing_of_the_interpreter_is_reached(source: str) -> None:
    """An attribute that the sandbox hides is undefined: nothing, or a 400."""
    try:
        text = ChatTemplate({"default": source}).render(PROMPT)
    except InvalidRequest:
        return
    assert not any(word in text for word in ("class", "object", "root:", "uid=", "module", "built"))
