"""Every honoured field of OpenAI's routes changes the answer as it should, and the other dialects'
fields change it alike: through HTTP, with SmolLM2 (and models that say their prompt, for templates)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from contract.served import serving
from mlx_serving.api import fields
from model import adapters

pytestmark = pytest.mark.model

TEMPLATE = (
    "{{ tools }}|{{ reasoning_effort }}|{{ enable_thinking }}|"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}{# <tool_call> #}"
)
CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
USER = [{"role": "user", "content": "Tell me a story about a small dog and a big cat, please."}]
KIND = {"type": "object", "properties": {"kind": {"enum": ["cat", "dog"]}}, "required": ["kind"], "additionalProperties": False}  # fmt: skip
FORMAT = {"type": "json_schema", "json_schema": {"name": "k", "schema": KIND}}
EOS = 2
"""SmolLM2's <|im_end|>."""


class Client:
    """Asks the served models; `say` is the first choice's text."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http

    async def post(self, path: str, **body: Any) -> Any:
        response = await self.http.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    async def chat(self, **body: Any) -> Any:
        base = {"model": "real", "messages": USER, "seed": 5, "max_tokens": 10}
        return await self.post("/v1/chat/completions", **base | body)

    async def complete(self, **body: Any) -> Any:
        base = {"model": "real", "prompt": "Once upon a time", "seed": 5, "max_tokens": 10}
        return await self.post("/v1/completions", **base | body)

    async def say(self, **body: Any) -> str:
        return str((await self.chat(**body))["choices"][0]["message"]["content"])

    async def echo(self, **body: Any) -> str:
        """What the template made of a chat."""
        return await self.say(**{"model": "echo", "max_tokens": 400, "messages": [{"role": "user", "content": "Hi"}]} | body)  # fmt: skip

    async def counted(self, **body: Any) -> int:
        return int((await self.chat(**body))["usage"]["completion_tokens"])

    async def token(self, text: str) -> int:
        return int((await self.post("/tokenize", model="real", prompt=text))["tokens"][0])


@pytest.fixture(scope="module")
def url(
    model_dir: Path, scripted_once: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    models = [
        model_dir,
        scripted_once("echo", mode="echo", context=4096, chat_template=TEMPLATE),
        scripted_once("agent", text=CALL + "\n" + CALL, context=4096, chat_template=TEMPLATE),
    ]
    names = [flag for name in ("real", "echo", "agent") for flag in ("--served-model-name", name)]
    adapter = adapters.write(tmp_path_factory.mktemp("adapters") / "terse", model_dir, 0, size=1.0)
    beside = ("--adapter", f"real+terse={adapter}")
    with serving(models, *names, "--model-aliases", "gpt-*", *beside) as url:
        yield url


@pytest.fixture
async def client(url: str) -> AsyncIterator[Client]:
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        yield Client(http)


Check = Callable[[Client], Any]
CHECKS: dict[str, Check] = {}
"""By field: an assertion about answers with it and without."""


def check(*names: str) -> Callable[[Check], Check]:
    def register(function: Check) -> Check:
        CHECKS.update(dict.fromkeys(names, function))
        return function

    return register


@check("model", "messages", "priority")
async def _the_request_itself(c: Client) -> None:
    base = await c.chat()
    named = await c.chat(model="gpt-9", priority="high")
    assert named["model"] == "gpt-9"
    assert named["choices"] == base["choices"], "a priority changes who is served, not with what"
    assert await c.say(messages=[{"role": "user", "content": "Count to nine."}]) != await c.say()
    assert (await c.http.post("/v1/chat/completions", json={"model": "x", "messages": USER})).status_code == 404  # fmt: skip


@check("adapters")
async def _adapters(c: Client) -> None:
    adapted = await c.say(adapters="terse")
    assert adapted != await c.say()
    assert adapted == await c.say(model="real+terse")


@check("timeout")
async def _deadlines(c: Client) -> None:
    assert await c.say(timeout=600) == await c.say()
    body = {"model": "real", "messages": USER, "max_tokens": 200, "ignore_eos": True}
    late = await c.http.post("/v1/chat/completions", json={**body, "timeout": 0.001})
    assert late.status_code == 504 and late.json()["error"]["code"] == "deadline_exceeded"


@check("stream", "stream_options")
async def _streams(c: Client) -> None:
    body = {"model": "real", "messages": USER, "seed": 5, "max_tokens": 10, "stream": True}
    for more, usages in (({}, 0), ({"stream_options": {"include_usage": True}}, 1)):
        response = await c.http.post("/v1/chat/completions", json=body | more)
        lines = response.text.strip().split("\n\n")
        assert lines[-1] == "data: [DONE]"
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        pieces = [ch["delta"].get("content", "") for x in chunks for ch in x["choices"]]
        assert "".join(pieces) == await c.say()
        assert sum(x.get("usage") is not None for x in chunks) == usages


@check("n", "seed")
async def _draws(c: Client) -> None:
    texts = [x["message"]["content"] for x in (await c.chat(n=3))["choices"]]
    assert len(set(texts)) == 3 and texts[0] == await c.say()
    assert await c.say(seed=6) != await c.say(seed=5) == await c.say(seed=5)


@check("temperature", "top_p", "top_k", "min_p")
async def _filters(c: Client) -> None:
    greedy = await c.say(temperature=0)
    assert greedy != await c.say() and greedy == await c.say(temperature=0, seed=6)
    for narrow in ({"top_p": 1e-6}, {"top_k": 1}, {"min_p": 1}):
        assert await c.say(temperature=2, **narrow) == greedy, narrow
    assert len({await c.say(temperature=2, top_k=2, seed=s) for s in range(4)}) > 1


@check("repetition_penalty", "presence_penalty", "frequency_penalty")
async def _penalties(c: Client) -> None:
    favoured = {"logit_bias": {str(await c.token(" dog")): 14}, "temperature": 0, "max_tokens": 16}

    async def most(**body: Any) -> int:
        told = (await c.complete(logprobs=0, **favoured, **body))["choices"][0]["logprobs"]
        return max(Counter(told["tokens"]).values())

    base = await most()
    assert base > 8
    assert await most(frequency_penalty=2) < base
    assert await most(repetition_penalty=99) < 4
    greedy = {"prompt": "no no no no no", "temperature": 0, "max_tokens": 24}
    with_and_without = [await c.complete(**greedy, presence_penalty=p) for p in (0, 2)]
    assert len({answer["choices"][0]["text"] for answer in with_and_without}) == 2


@check("logit_bias", "stop_token_ids")
async def _tokens(c: Client) -> None:
    dog = await c.token(" dog")
    bias = {"logit_bias": {str(dog): 100}, "temperature": 0}
    assert await c.say(**bias, max_tokens=3) == " dog dog dog"
    stopped = (await c.chat(**bias, stop_token_ids=[dog]))["choices"][0]
    assert (stopped["message"]["content"], stopped["stop_reason"]) == ("", dog)


@check("min_tokens", "ignore_eos")
async def _ends(c: Client) -> None:
    ends = {"logit_bias": {str(EOS): 100}, "temperature": 0}
    assert await c.counted(**ends) == 1
    assert await c.counted(**ends, min_tokens=4) == 5
    assert await c.counted(**ends, ignore_eos=True) == 10


@check("stop", "include_stop_str_in_output", "max_tokens", "max_completion_tokens")
async def _stops(c: Client) -> None:
    whole = await c.say(temperature=0, max_tokens=20)
    word = whole.split()[3]
    cut = whole[: whole.index(word)]
    assert await c.say(temperature=0, max_tokens=20, stop=word) == cut
    kept = await c.say(temperature=0, max_tokens=20, stop=[word], include_stop_str_in_output=True)
    assert kept == cut + word
    assert await c.counted(max_tokens=3) == 3 == await c.counted(max_tokens=None, max_completion_tokens=3)  # fmt: skip


@check("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "grammar")  # fmt: skip
async def _structure(c: Client) -> None:
    for body in (
        {"response_format": FORMAT},
        {"structured_outputs": {"json": KIND}},
        {"guided_json": KIND},
    ):
        assert json.loads(await c.say(**body, max_tokens=60))["kind"] in ("cat", "dog"), body
    assert re.fullmatch("[A-F]{3}", await c.say(guided_regex="[A-F]{3}"))
    assert await c.say(guided_choice=["rot", "blau"]) in ("rot", "blau")
    assert await c.say(guided_grammar='start: "a" | "b" start', max_tokens=60) in "bbbbbbbbbbba"
    told = await c.say(grammar='root ::= "(" root ")" | [0-9]+', max_tokens=9)
    assert re.fullmatch(r"\(*[0-9]*\)*", told) and told


@check("cache_salt")
async def _salts(c: Client) -> None:
    async def cached(salt: str) -> bool:
        usage = (await c.chat(cache_salt=salt))["usage"]
        return bool(usage["prompt_tokens_details"]["cached_tokens"])

    assert [await cached(s) for s in ("s1", "s1", "s2")] == [False, True, False]
    assert await c.say(cache_salt="s1") == await c.say(), "the tokens are the same"


@check("logprobs", "top_logprobs")
async def _logprobs(c: Client) -> None:
    assert (await c.chat())["choices"][0]["logprobs"] is None
    for body, alternatives in (({}, 0), ({"top_logprobs": 3}, 3)):
        told = (await c.chat(logprobs=True, **body))["choices"][0]["logprobs"]["content"]
        assert len(told) == 10 and all(len(t["top_logprobs"]) == alternatives for t in told)
        assert all(t["logprob"] <= 0 for t in told)
    told = (await c.complete(logprobs=2))["choices"][0]["logprobs"]
    assert len(told["tokens"]) == 10 and {len(t) for t in told["top_logprobs"]} <= {2, 3}


@check("tools", "tool_choice", "parallel_tool_calls")
async def _tools(c: Client) -> None:
    assert '"name": "add"' in (await c.echo(tools=[TOOL])).replace("'", '"')
    assert "add" not in await c.echo(tools=[TOOL], tool_choice="none")
    for more, calls in (({}, 2), ({"parallel_tool_calls": False}, 1)):
        message = (await c.chat(model="agent", tools=[TOOL], max_tokens=400, **more))["choices"][0]["message"]  # fmt: skip
        assert len(message["tool_calls"]) == calls
    forced = {"type": "function", "function": {"name": "add"}}
    asked = {"model": "agent", "tools": [TOOL], "max_tokens": 400, "tool_choice": forced}
    assert (await c.chat(**asked))["choices"][0]["finish_reason"] == "tool_calls"


@check("chat_template_kwargs", "reasoning_effort", "add_generation_prompt", "continue_final_message")  # fmt: skip
async def _template(c: Client) -> None:
    assert await c.echo() == "None|||user: Hi\nassistant: "
    assert "||True|" in await c.echo(chat_template_kwargs={"enable_thinking": True})
    assert "|high|" in await c.echo(reasoning_effort="high")
    assert await c.echo(add_generation_prompt=False) == "None|||user: Hi\n"
    assert await c.echo(continue_final_message=True) == "None|||user: Hi"


@check("prompt", "echo", "add_special_tokens")
async def _completions(c: Client) -> None:
    base = (await c.complete())["choices"][0]["text"]
    ids = (await c.post("/tokenize", model="real", prompt="Once upon a time"))["tokens"]
    several = (await c.complete(prompt=[ids, ids], echo=True, add_special_tokens=False))["choices"]
    assert [x["text"] for x in several] == ["Once upon a time" + base] * 2
    assert (await c.complete(prompt="The sky is"))["choices"][0]["text"] != base


def honoured() -> set[str]:
    tables = (fields.CHAT, fields.COMPLETIONS)
    return {f.name for t in tables for f in t.values() if f.disposition == "honoured"}


def test_every_honoured_field_has_a_check() -> None:
    assert CHECKS.keys() == honoured()


@pytest.mark.parametrize("function", dict.fromkeys(CHECKS.values()), ids=lambda f: f.__name__)
async def test_honoured_fields_change_the_answer(client: Client, function: Check) -> None:
    await function(client)


PLAIN: dict[str, Any] = {"temperature": 1, "top_p": 1, "top_k": 0, "seed": 5}
ALIKE: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    # (field of SamplingParams and the like by OpenAI's names, Anthropic's, Ollama's options)
    ("temperature", {"temperature": 0}, {"temperature": 0}),
    ("top_p", {"top_p": 0.5}, {"top_p": 0.5}),
    ("top_k", {"top_k": 3}, {"top_k": 3}),
    ("seed", {"seed": 77}, {"seed": 77}),
    ("max_tokens", {"max_tokens": 4}, {"num_predict": 4}),
    ("stop", {"stop_sequences": ["a"]}, {"stop": ["a"]}),
    ("min_p", {}, {"min_p": 0.5}),
    ("repetition_penalty", {}, {"repeat_penalty": 1.8}),
    ("presence_penalty", {}, {"presence_penalty": 2}),
    ("frequency_penalty", {}, {"frequency_penalty": 2}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "anthropics", "ollamas"), ALIKE, ids=[a[0] for a in ALIKE])
async def test_the_dialects_fields_do_the_same(
    client: Client, name: str, anthropics: dict[str, Any], ollamas: dict[str, Any]
) -> None:
    (value,) = ollamas.values()
    wanted = await client.say(**PLAIN | {"max_tokens": 16} | {name: value})
    options = PLAIN | {"num_predict": 16} | ollamas
    for path, body in (("chat", {"messages": USER}), ("generate", {"prompt": USER[0]["content"]})):
        told = await client.post(
            f"/api/{path}", model="real", stream=False, options=options, **body
        )
        assert (told["message"]["content"] if path == "chat" else told["response"]) == wanted
    if anthropics:
        body = {"model": "real", "messages": USER, "max_tokens": 16} | PLAIN | anthropics
        content = (await client.post("/v1/messages", **body))["content"]
        assert "".join(block["text"] for block in content) == wanted
    responses = {"max_tokens": "max_output_tokens"}.get(name, name)
    if responses in fields.ROUTES["/v1/responses"]:
        body = {"model": "real", "input": USER, "max_output_tokens": 16, "seed": 5} | {responses: value}  # fmt: skip
        output = (await client.post("/v1/responses", **body))["output"]
        assert output[0]["content"][0]["text"] == wanted


@pytest.mark.slow
async def test_schemas_do_the_same(client: Client) -> None:
    wanted = await client.say(response_format=FORMAT, max_tokens=40)
    base = {"model": "real", "messages": USER}
    told = await client.post("/v1/messages", **base, seed=5, max_tokens=40, output_config={"format": {"type": "json_schema", "schema": KIND}})  # fmt: skip
    assert told["content"][0]["text"] == wanted
    told = await client.post("/api/chat", **base, stream=False, format=KIND, options=PLAIN)
    assert told["message"]["content"] == wanted
    text = {"format": {"type": "json_schema", "name": "k", "schema": KIND}}
    told = await client.post("/v1/responses", model="real", input=USER, seed=5, text=text)
    assert told["output"][0]["content"][0]["text"] == wanted
