"""--model-aliases: more names for served models, through a real gateway."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_serving import Engine, errors
from mlx_serving.types import TextPrompt


async def test_patterns_name_models(scripted: Any) -> None:
    models = [str(scripted("one", mode="echo")), str(scripted("two", mode="echo"))]
    aliases = ("claude-*=two", "gpt-?", "one=two")
    async with Engine(models, supervise=False, model_aliases=aliases) as engine:
        for name, wanted in (("claude-opus-9", "two"), ("gpt-5", "one"), ("one", "one")):
            await engine.gateway.load(name)
            info = engine.gateway.model_info(name)
            assert info is not None and info.model_id == wanted
        assert await engine.gateway.tokenise("claude-x", TextPrompt(text="ab")) == [97, 98]
        for name in ("gpt-55", "Claude-x", ""):
            with pytest.raises(errors.ModelNotFound):
                await engine.gateway.tokenise(name, TextPrompt(text="ab"))
        long = [97] * 5000
        assert await engine.gateway.detokenise("one", long) == "a" * 5000
        assert await engine.gateway.detokenise("one", [257, 97]) == "<|im_start|>a"
        assert engine.gateway.abilities("one") == ("tools",)


@pytest.mark.parametrize("alias", ["claude-*=three", "=one", "="])
def test_an_alias_of_nothing_is_a_mistake(scripted: Any, alias: str) -> None:
    model = str(scripted("one", text="x"))
    with pytest.raises(errors.ConfigError) as error:
        Engine(model, supervise=False, model_aliases=(alias,))
    assert error.value.param == "model_aliases"
