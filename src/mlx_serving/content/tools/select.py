"""Which family's calls a model writes, read off its chat template."""

from __future__ import annotations

from collections.abc import Mapping

from mlx_serving.content.tools import (
    deepseek,
    gemma,
    glm,
    harmony,
    hermes,
    kimi,
    llama,
    minimax,
    mistral,
    pythonic,
    qwen3_coder,
)
from mlx_serving.content.tools.family import Family

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        hermes.FAMILY,
        qwen3_coder.FAMILY,
        llama.FAMILY,
        pythonic.LLAMA,
        pythonic.LFM,
        mistral.FAMILY,
        gemma.GEMMA4,
        gemma.FUNCTION_GEMMA,
        glm.FAMILY,
        kimi.FAMILY,
        minimax.FAMILY,
        deepseek.FAMILY,
        deepseek.DSML,
        harmony.FAMILY,
    )
}

_IN_TEMPLATES = (
    # (all of these texts in the template, the family); the first that fits
    (("<|channel|>", "commentary"), "harmony"),
    (("<minimax:tool_call>",), "minimax"),
    (("<|tool_call>", "<tool_call|>"), "gemma4"),
    (("<start_function_call>",), "function_gemma"),
    (("｜DSML｜",), "deepseek_v32"),
    (("<｜tool▁call▁begin｜>",), "deepseek"),
    (("<|tool_call_begin|>",), "kimi"),
    (("<arg_key>",), "glm"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<tool_call>", "<function="), "qwen3_coder"),
    (("<|tool_call_start|>",), "lfm_pythonic"),
    (("<|tool_list_start|>",), "lfm_pythonic"),
    (("<|python_start|>",), "llama_pythonic"),
    (("func_name1(",), "llama_pythonic"),
    (("function_name1(",), "llama_pythonic"),
    (("<tool_call>",), "hermes"),
    (("<|python_tag|>",), "llama3_json"),
    (('"parameters": dictionary',), "llama3_json"),
    (('{"name": function name, "parameters"',), "llama3_json"),
    (("<|start_header_id|>", "tool_call", '"parameters"'), "llama3_json"),
)


def family_in(template: str) -> Family | None:
    """The family whose calls a chat template writes; None: it knows of none."""
    for texts, name in _IN_TEMPLATES:
        if all(text in template for text in texts):
            return FAMILIES[name]
    return None
