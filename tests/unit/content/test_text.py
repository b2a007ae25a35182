"""The text side's facade, over a folder made here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers as hf

from mlx_serving.content.text import THREAD_CHARS, Reading, TextSide
from mlx_serving.errors import ConfigError, InvalidRequest
from mlx_serving.types import ChatPrompt, Message, Prompt, TextPrompt, TokenPrompt

USER = Message(role="user", content="What is the capital of France?")


@pytest.fixture
def folder(backends: dict[str, hf.Tokenizer], write_folder: Callable[..., Path]) -> Path:
    config = {"bos_token": "<s>", "eos_token": "<|im_end|>", "add_bos_token": True}
    return write_folder(backends["byte_level"], config)


@pytest.fixture
def side(folder: Path) -> TextSide:
    return TextSide.load(folder)


def test_a_chat_is_encoded_without_further_special_tokens(side: TextSide) -> None:
    ids = side.encode_prompt(ChatPrompt(messages=(USER,)))
    assert side.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids[0] == side.tokenizer.token_id("<|im_start|>")


def test_a_text_gets_them_unless_told(side: TextSide) -> None:
    bos = side.tokenizer.bos_token_id
    assert side.encode_prompt(TextPrompt(text="a"))[0] == bos
    assert bos not in side.encode_prompt(TextPrompt(text="a", add_special_tokens=False))


def test_token_ids_are_taken_as_they_are(side: TextSide) -> None:
    assert side.encode_prompt(TokenPrompt(token_ids=(5, 0, 5))) == [5, 0, 5]


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (ChatPrompt(messages=()), "messages"),
        (ChatPrompt(messages=(Message(role="user", content="\ud800"),)), "messages"),
        (TextPrompt(text="", add_special_tokens=False), "prompt"),
        (TextPrompt(text="\udfff"), "prompt"),
        (TokenPrompt(token_ids=()), "prompt"),
        (TokenPrompt(token_ids=(1, -1)), "prompt[1]"),
        (TokenPrompt(token_ids=(10**9,)), "prompt[0]"),
    ],
)
def test_a_prompt_that_cannot_be_encoded_names_its_field(
    side: TextSide, prompt: Prompt, param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        side.encode_prompt(prompt)
    assert (caught.value.param, caught.value.status) == (param, 400)


def test_a_template_file_replaces_the_models_own(folder: Path) -> None:
    path = folder / "mine.jinja"
    path.write_text("{{ bos_token }}{{ messages[0].content }}")
    side = TextSide.load(folder, Reading(str(path)))
    assert side.render(ChatPrompt(messages=(USER,))) == f"<s>{USER.content}"
    with pytest.raises(ConfigError) as caught:
        TextSide.load(folder, Reading(str(folder / "none.jinja")))
    assert caught.value.param == "chat_template"


def test_a_model_without_a_template_says_what_to_do(
    backends: dict[str, hf.Tokenizer], write_folder: Callable[..., Path]
) -> None:
    side = TextSide.load(write_folder(backends["word_piece"]))
    with pytest.raises(InvalidRequest, match="chat-template") as caught:
        side.encode_prompt(ChatPrompt(messages=(USER,)))
    assert (caught.value.code, caught.value.param) == ("no_chat_template", "messages")


def test_a_stream_of_text(side: TextSide) -> None:
    ids = side.encode_prompt(TextPrompt(text="The fox. END of it", add_special_tokens=False))
    stream = side.open_stream(("END",))
    assert "".join(stream.push([i]).text for i in ids) == "The fox. "
    assert stream.stop == "END"


def test_long_prompts_prefer_a_thread(side: TextSide, folder: Path) -> None:
    long = "x" * THREAD_CHARS
    without = TextSide.load(folder, Reading(threads=False))
    assert not without.prefers_thread(TextPrompt(text=long))
    assert not side.prefers_thread(TextPrompt(text="x"))
    assert side.prefers_thread(TextPrompt(text=long))
    assert not side.prefers_thread(ChatPrompt(messages=(USER,)))
    assert side.prefers_thread(ChatPrompt(messages=(USER, Message(role="user", content=long))))
    assert side.prefers_thread(ChatPrompt(messages=(USER,), tools=({},) * 8))
    assert not side.prefers_thread(TokenPrompt(token_ids=(1,) * 100_000))


def test_the_gateways_process_stays_light(folder: Path) -> None:
    """Loading a model's text side brings in neither MLX nor transformers, nor what they need."""
    script = (
        "import sys; from pathlib import Path; from mlx_serving.content.text import TextSide;"
        "assert not {'tokenizers', 'jinja2'} & sys.modules.keys(), 'not lazy';"
        f"TextSide.load(Path({str(folder)!r})).open_stream();"
        "heavy = {'mlx', 'transformers', 'numpy', 'torch', 'huggingface_hub'} & sys.modules.keys();"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_tools_need_a_place_in_the_template(
    backends: dict[str, hf.Tokenizer], write_folder: Callable[..., Path]
) -> None:
    prompt = ChatPrompt(messages=(USER,), tools=({"function": {"name": "f"}},))
    folder = write_folder(backends["byte_level"], {"chat_template": "x"})
    assert '"name": "f"' in TextSide.load(folder).render(prompt), "ChatML's vocabulary has one"
    folder = write_folder(backends["word_piece"], {"chat_template": "x"})
    with pytest.raises(InvalidRequest) as error:
        TextSide.load(folder).encode_prompt(prompt)
    assert error.value.param == "tools"
