"""What becomes of every field of vLLM's /tokenize and /detokenize."""

from __future__ import annotations

from collections.abc import Mapping

from mlx_serving.api.disposition import Table, table

TOKENIZE: Table = table(
    (
        "honoured",
        {
            "model": "a served model's id or alias; default: the first served model",
            "prompt": "a text; or else messages",
            "messages": "a chat, as /v1/chat/completions takes it; or else a prompt",
            "add_special_tokens": "default true for a prompt; a chat's template adds them itself",
            "add_generation_prompt": "only with messages; default true",
            "continue_final_message": "only with messages",
            "chat_template_kwargs": "only with messages",
            "tools": "only with messages",
        },
    ),
    (
        "refused",
        {
            "return_token_strs": ("use /detokenize", (False,)),
            "chat_template": "the server's setting, not a request's",
            "mm_processor_kwargs": "text only",
        },
    ),
)

DETOKENIZE: Table = table(
    (
        "honoured",
        {
            "model": "a served model's id or alias; default: the first served model",
            "tokens": "token ids, up to 1,048,576",
        },
    ),
)

ROUTES: Mapping[str, Table] = {"/tokenize": TOKENIZE, "/detokenize": DETOKENIZE}
