"""Fuzzers for everything that reads bytes from elsewhere: `make fuzz MINUTES=10`, or in the tests.

A target is a strategy and what must hold of each thing it makes; the errors that a reader is meant to
raise are caught inside. Seeds are valid inputs, and are damaged in the ways that find most: bits, cuts,
repetitions, and numbers at the edges of their types.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_serving.api.body import read_object
from mlx_serving.api.connection import Connection, Limits
from mlx_serving.api.openai_request import parse_chat, parse_completion
from mlx_serving.api.openai_response import Chunks
from mlx_serving.catalog.tensors import NotWhole, read_header
from mlx_serving.content.output import OutputParser, choose_format
from mlx_serving.content.tokenizer import Tokenizer
from mlx_serving.content.tools.select import FAMILIES
from mlx_serving.errors import InvalidRequest, ModelBroken
from mlx_serving.runtime.backend.loader import check_weights
from mlx_serving.runtime.convert.gguf_file import read_gguf
from mlx_serving.types import ModelInfo, SamplingParams, TokenEvent
from mlx_serving.worker import wire

EDGES = [
    0,
    1,
    2,
    7,
    0x7F,
    0x80,
    0xFF,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63,
    2**64 - 1,
]


@dataclass(frozen=True)
class Target:
    inputs: st.SearchStrategy[Any]
    check: Callable[[Any], None]


@st.composite
def damaged(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A seed with a few faults, or bytes of any kind."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["flip", "cut", "insert", "repeat", "number", "end"])):
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at : at + draw(st.integers(1, 64))]
            case "insert":
                data[at:at] = draw(st.binary(max_size=16))
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 64))]
            case "number":
                width = draw(st.sampled_from([1, 2, 4, 8]))
                number = draw(st.sampled_from(EDGES)) % 2 ** (8 * width)
                data[at : at + width] = number.to_bytes(
                    width, draw(st.sampled_from(["little", "big"]))
                )
            case "end":
                del data[at:]
    return bytes(data)


def pieces(data: bytes, places: list[int]) -> list[bytes]:
    marks = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in itertools.pairwise(marks)]


PLACES = st.lists(st.integers(0, 2**16), max_size=8)


# ------------------------------------------------------------------- the worker's wire

INFO = ModelInfo(
    model_id="m",
    path="/m",
    architecture="llama",
    context_length=9,
    vocab_size=9,
    eos_token_ids=(1,),
)
TO_WORKER: list[wire.ToWorker] = [
    wire.LoadModel("m", "/m", wire.ModelOptions()),
    wire.Submit(
        seq_id=1,
        model_id="m",
        token_ids=[1, 2, 3],
        prompt_len=3,
        sampling=SamplingParams(logit_bias={1: 2.0}),
    ),
    wire.Cancel(1),
    wire.Shutdown(),
]
FROM_WORKER: list[wire.FromWorker] = [
    wire.ModelLoaded(INFO),
    wire.ModelFailed("m", "model_unavailable", "why"),
    wire.Started([1, 2]),
    wire.Step([wire.TokenRow(seq_id=1, token_ids=[1, 2]), wire.TokenRow(seq_id=2, token_ids=[])]),
]


def _wire(decode: Callable[[bytes], Any]) -> Callable[[tuple[bytes, list[int]]], None]:
    def check(given: tuple[bytes, list[int]]) -> None:
        data, places = given
        splitter = wire.FrameSplitter()
        try:
            for piece in pieces(data, places):
                for body in splitter.feed(piece):
                    message = decode(body)
                    again = decode(bytes(wire.encode(message))[wire.HEADER_BYTES :])
                    assert repr(again) == repr(message)  # NaN is not itself
        except (msgspec.DecodeError, UnicodeDecodeError):
            pass
        except InvalidRequest:  # sampling parameters check themselves
            pass
        except ValueError as error:
            assert "exceeds" in str(error)

    return check


# ------------------------------------------------------------------- files


def _gguf_seed() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seed.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(1)
        writer.add_token_list(["a", "b"])
        writer.add_array("x.scores", [0.5, 1.5])
        writer.add_tensor("t", np.arange(64, dtype=np.float32).reshape(2, 32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def _safetensors_seed() -> bytes:
    header = {
        "__metadata__": {"format": "mlx"},
        "a.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "U32", "shape": [1], "data_offsets": [16, 20]},
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(20)


def _on_file(
    name: str, read: Callable[[Path], object], *meant: type[Exception]
) -> Callable[[bytes], None]:
    def check(data: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(data)
            with contextlib.suppress(meant):
                read(path)

    return check


def _tokenizer_seed() -> bytes:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>"])
    return str(backend.to_str()).encode()


def _use_tokenizer(path: Path) -> None:
    tokenizer = Tokenizer.load(path.parent)
    ids = tokenizer.encode("ab<s>ba", add_special_tokens=True)
    tokenizer.decode(ids)


# ------------------------------------------------------------------- text from models

FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>",
    "<function=f>", "</function>", "<parameter=a>", "</parameter>", "<|channel|>", "<|message|>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<start_function_call>", "call:f{", '{"name": "f", ',
    '"arguments": {', "}}", "[f(a=", ")]", '"', "\\", "\\u", "{", "[", ",", ":", "1e999", "null", "é\U0001f600", " ", "\n",
]  # fmt: skip
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}},
    }
]


def _tools(given: tuple[str, list[str]]) -> None:
    family, texts = given
    parser = OutputParser(choose_format("", family, "think"), TOOLS, new_id=lambda: "id")
    arguments: dict[int, str] = {}
    for parsed in (*map(parser.push, texts), parser.finish()):
        for delta in parsed.tool_calls:
            arguments[delta.index] = arguments.get(delta.index, "") + delta.arguments
    assert parser.calls == len(arguments)


EVENTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=6)


def _sse(texts: list[str]) -> None:
    """Each event is one line of JSON between `data: ` and an empty line, as line-splitting clients
    read it, and the texts come back."""
    chunks = Chunks("chat", call_id="c", created=1, model="m", echoes=[""])
    events = [TokenEvent(choice=0, text=text, token_ids=[1]) for text in texts]
    events.append(TokenEvent(choice=0, text="", token_ids=[], finish_reason="stop"))
    stream = b"".join(map(chunks.write, events)).decode()
    said = ""
    for event in stream.removesuffix("\n\n").split("\n\n"):
        assert len(event.splitlines()) == 1 and event.startswith("data: "), event
        for choice in json.loads(event.removeprefix("data: "))["choices"]:
            said += choice["delta"].get("content") or ""
    assert said == "".join(texts)


# ------------------------------------------------------------------- bodies and HTTP


def _body(data: bytes) -> None:
    for parse in (
        read_object,
        lambda d: parse_chat(d, default_model="m"),
        lambda d: parse_completion(d, default_model="m", default_max_tokens=None),
    ):
        try:
            parse(data)
        except InvalidRequest as error:
            assert error.message


class _Transport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0


LIMITS = Limits(
    max_connections=10,
    max_header_bytes=4096,
    header_timeout_s=60,
    body_timeout_s=60,
    write_timeout_s=60,
)


async def _handed_on(parts: list[bytes]) -> tuple[list[Any], bytes]:
    """The requests that reach an application, and what the client is told."""
    import uvicorn
    from uvicorn.server import ServerState

    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message["body"]
            if not message["more_body"]:
                break
        seen.append((scope["method"], scope["raw_path"], scope["headers"], body))
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]}
        )
        await send({"type": "http.response.body"})

    config = uvicorn.Config(app, loop="none", http="httptools", lifespan="off", log_config=None)
    config.load()
    state, transport = ServerState(), _Transport()
    connection = Connection(config=config, server_state=state, app_state={}, limits=LIMITS)
    connection.connection_made(transport)
    for part in parts:
        if not transport.closed:
            connection.data_received(part)
        for _ in range(40):
            await asyncio.sleep(0)
    connection.connection_lost(None)
    await asyncio.gather(*state.tasks)
    return seen, transport.written


def _http(given: tuple[bytes, list[int]]) -> None:
    """However it is cut, the same requests are handed on, and nobody is left without an answer."""
    data, places = given

    async def both() -> None:
        whole, said = await _handed_on([data])
        cut, also = await _handed_on(pieces(data, places))
        assert cut == whole
        for answers in (said, also):
            assert not answers or answers.startswith(b"HTTP/1.1 ")
        assert said.count(b"HTTP/1.1 200 ") == len(whole)

    asyncio.run(both())


HTTP = [
    b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /v1/x?a=%41 HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello",
    b"POST /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3;e=f\r\nabc\r\n0\r\nT: 1\r\n\r\n",
    b"GET /a HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\nGET /b HTTP/1.0\r\n\r\n",
    b"PUT /x HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nhi" * 2,
    b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n" * 2 + b"no request",
]
JSON = [
    b'{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "stop": ["a"], "seed": 1}',
    b'{"prompt": ["a", [1, 2]], "temperature": 0.5, "logit_bias": {"1": 2}, "n": 2}',
    b'{"messages": [{"role": "assistant", "tool_calls": [{"id": "i", "type": "function", "function": '
    b'{"name": "f", "arguments": "{}"}}]}], "tools": [{"type": "function", "function": {"name": "f"}}]}',
    b'{"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}}',
]

TARGETS: dict[str, Target] = {
    "wire_to_worker": Target(
        st.tuples(
            damaged(
                [b"".join(map(wire.encode, TO_WORKER)), *map(bytes, map(wire.encode, TO_WORKER))]
            ),
            PLACES,
        ),
        _wire(wire.decode_to_worker),
    ),
    "wire_from_worker": Target(
        st.tuples(
            damaged(
                [
                    b"".join(map(wire.encode, FROM_WORKER)),
                    *map(bytes, map(wire.encode, FROM_WORKER)),
                ]
            ),
            PLACES,
        ),
        _wire(wire.decode_from_worker),
    ),
    "gguf": Target(damaged([_gguf_seed()]), _on_file("m.gguf", read_gguf, ModelBroken)),
    "safetensors": Target(
        damaged([_safetensors_seed()]), _on_file("model.safetensors", read_header, NotWhole)
    ),
    "weights": Target(
        damaged([_safetensors_seed()]),
        _on_file("model.safetensors", lambda path: check_weights(path.parent), ModelBroken),
    ),
    "tokenizer": Target(
        damaged([_tokenizer_seed()]),
        _on_file("tokenizer.json", _use_tokenizer, ModelBroken, InvalidRequest),
    ),
    "tools": Target(
        st.tuples(
            st.sampled_from(sorted(FAMILIES)),
            st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=6), max_size=16),
        ),
        _tools,
    ),
    "sse": Target(EVENTS, _sse),
    "body": Target(damaged(JSON) | st.binary(max_size=64), _body),
    "http": Target(st.tuples(damaged(HTTP) | st.binary(max_size=64), PLACES), _http),
}


def fuzz(name: str, examples: int) -> None:
    """Raises what the target's check raises, for the smallest input that makes it."""
    target = TARGETS[name]

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(target.inputs)
    def run(data: Any) -> None:
        target.check(data)

    run()


def main(minutes: float, names: list[str]) -> None:
    """Each target for its share of the time, in turns."""
    end_s, turn = time.monotonic() + minutes * 60, 0
    while time.monotonic() < end_s:
        name = names[turn % len(names)]
        fuzz(name, 1000)
        turn += 1
        print(f"{name}: 1000 more, {max(0, end_s - time.monotonic()):.0f} s left", flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:] or list(TARGETS))
