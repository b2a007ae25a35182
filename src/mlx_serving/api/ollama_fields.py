"""What becomes of every field of Ollama's routes."""

from __future__ import annotations

from collections.abc import Mapping

from mlx_serving.api.disposition import Row, Table, table

_KEEP_ALIVE: dict[str, Row] = {
    "keep_alive": "how long the model then stays in memory: seconds or 5m; 0 unloads it, below 0 keeps it; with API keys, the admin key's only; default: --keep-alive-s",
}
_HONOURED: dict[str, Row] = {
    "model": "a served model's id or alias; :latest may follow; default: the first served model",
    "stream": "default true: lines of JSON",
    "format": "json, or a JSON schema that the answer follows",
    "options": "see options below",
    "think": "true, false: the chat template's enable_thinking, if it has one; low, medium, high: its reasoning_effort too; all but false: a 400 where the model cannot think",
    "logprobs": "true: the chosen tokens' log-probabilities",
    "top_logprobs": "0 to 20; only with logprobs",
    **_KEEP_ALIVE,
}
_REFUSED: dict[str, Row] = {
    "truncate": ("a prompt over the context is a 400 in any case", (False, True)),
    "shift": ("an answer ends where the context does", (False,)),
    "_debug_render_only": ("POST /tokenize, and /detokenize what it gives", (False,)),
}

CHAT: Table = table(
    (
        "honoured",
        {
            **_HONOURED,
            "messages": "roles system, user, assistant, tool; without any, the model is loaded",
            "tools": "function tools, given to the chat template; inside them as OpenAI has them",
        },
    ),
    ("refused", dict(_REFUSED)),
)

GENERATE: Table = table(
    (
        "honoured",
        {
            **_HONOURED,
            "prompt": "the user's message; without any, the model is loaded",
            "system": "the system message",
            "raw": "true: the prompt goes to the model without a template",
        },
    ),
    (
        "refused",
        {
            **_REFUSED,
            "suffix": ("filling in the middle is not built", ("",)),
            "template": ("the server's setting, not a request's", ("",)),
            "context": ("send the conversation to /api/chat", ([],)),
            "images": ("text only", ([],)),
            "width": ("text only", (0,)),
            "height": ("text only", (0,)),
            "steps": ("text only", (0,)),
        },
    ),
)

OPTIONS: Table = table(
    (
        "honoured",
        {
            "num_predict": "tokens to generate; -1 and -2: what the context leaves",
            "temperature": "0 to 2, default 0.8; 0 is greedy",
            "top_k": "default 40; 0: the whole vocabulary",
            "top_p": "above 0, to 1, default 0.9",
            "min_p": "0 to 1",
            "seed": "-1: drawn, and said in x-mlx-serving-seed",
            "stop": "a string or up to 16",
            "repeat_penalty": "above 0, to 100, default 1: off",
            "repeat_last_n": "the last tokens of prompt and output that penalties look at, to 32,768, default 64; 0: none, -1: all",
            "presence_penalty": "-2 to 2",
            "frequency_penalty": "-2 to 2",
        },
    ),
    (
        "advisory",
        {
            "num_ctx": "the context is the model's, or --context-length",
            "num_keep": "nothing is dropped from a prompt",
            "num_batch": "the server's to set",
            "num_gpu": "the server's to set",
            "main_gpu": "the server's to set",
            "num_thread": "the server's to set",
            "numa": "the server's to set",
            "low_vram": "the server's to set",
            "use_mmap": "the server's to set",
            "use_mlock": "the server's to set",
            "mirostat_tau": "only for mirostat",
            "mirostat_eta": "only for mirostat",
        },
    ),
    (
        "refused",
        {
            "typical_p": ("not implemented", (1, 1.0)),
            "tfs_z": ("not implemented", (1, 1.0)),
            "mirostat": ("not implemented", (0,)),
            "penalize_newline": ("every token is penalised alike", (True,)),
            "draft_num_predict": ("speculation is not built yet", (0,)),
            "f16_kv": ("the cache has the model's type", (True,)),
            "logits_all": ("not implemented", (False,)),
            "vocab_only": ("not implemented", (False,)),
            "embedding_only": ("not implemented", (False,)),
        },
    ),
)

MESSAGE: Table = table(
    (
        "honoured",
        {
            "role": "system, user, assistant or tool",
            "content": "text",
            "thinking": "an assistant's earlier reasoning, given to the chat template",
            "tool_calls": "an assistant's earlier calls, given to the chat template",
            "tool_name": "the tool that a tool message is from",
            "tool_call_id": "the call that a tool message answers; default: the first unanswered of its name",
        },
    ),
    ("refused", {"images": ("text only", ([],))}),
)

CALL: Table = table(
    (
        "honoured",
        {
            "function": "name and arguments, for the chat template",
            "id": "the call's name, which its answer gives; default: one is made up",
        },
    ),
    ("advisory", {"type": "function"}),
)

CALL_FUNCTION: Table = table(
    ("honoured", {"name": "given to the chat template", "arguments": "an object"}),
    ("advisory", {"index": "calls are in order"}),
)

EMBED_OPTIONS: Table = table(
    ("advisory", dict.fromkeys(OPTIONS, "no option changes a vector")),
)

_EMBED_ADVISORY: dict[str, Row] = {"options": "no option changes a vector"}
_EMBED: dict[str, Row] = {
    "model": "a served model's id or alias; :latest may follow; default: the first served model",
    **_KEEP_ALIVE,
}

EMBED: Table = table(
    (
        "honoured",
        {
            **_EMBED,
            "input": "a text, or up to 2,048 texts; without any, the model is loaded",
            "truncate": "default true: a text that is too long is cut at its end; false: it is a 400",
            "dimensions": "that many numbers of each vector, scaled to length 1 again",
        },
    ),
    ("advisory", dict(_EMBED_ADVISORY)),
)

EMBEDDINGS: Table = table(
    (
        "honoured",
        {**_EMBED, "prompt": "a text, cut at its end if it is too long; the vector is not scaled"},
    ),
    ("advisory", dict(_EMBED_ADVISORY)),
)

ROUTES: Mapping[str, Table] = {
    "/api/chat": CHAT,
    "/api/generate": GENERATE,
    "/api/embed": EMBED,
    "/api/embeddings": EMBEDDINGS,
    "/api/embed and /api/embeddings options": EMBED_OPTIONS,
    "/api/chat and /api/generate options": OPTIONS,
    "/api/chat messages[]": MESSAGE,
    "/api/chat messages[].tool_calls[]": CALL,
    "/api/chat messages[].tool_calls[].function": CALL_FUNCTION,
}
