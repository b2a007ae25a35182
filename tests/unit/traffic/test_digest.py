"""Which requests are the same one."""

from __future__ import annotations

import msgspec
import pytest

from mlx_serving.traffic.source import digest
from mlx_serving.types import Grammar, Priority, Turn


def test_the_same_request_has_the_same_digest(ask) -> None:
    assert digest(ask()) == digest(ask())
    assert len(digest(ask())) == 32


def test_what_cannot_change_the_tokens_does_not_part_two_requests(ask) -> None:
    same = digest(ask())
    assert digest(ask(sampling={"seed": 7, "choice": 2})) == same, "greedy needs no seed"
    assert digest(ask(priority=Priority.LOW)) == same
    assert digest(ask(turn=Turn(client="a", deadline_s=3.0))) == same
    assert digest(ask(caching="refresh")) == same
    one = ask(sampling={"logit_bias": {1: 2.0, 3: 4.0}})
    other = ask(sampling={"logit_bias": {3: 4.0, 1: 2.0}})
    assert digest(one) == digest(other)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_id": "n"},
        {"fingerprint": "f"},
        {"token_ids": [1, 2]},
        {"token_ids": [1, 2, 4]},
        {"grammar": Grammar(kind="json_object")},
        {"stop": ("x",)},
        {"one_call": True},
        {"cache_salt": "s"},
        *(
            {"sampling": {name: value}}
            for name, value in {
                "temperature": 0.5,
                "top_p": 0.5,
                "top_k": 3,
                "min_p": 0.1,
                "repetition_penalty": 1.5,
                "presence_penalty": 1.0,
                "frequency_penalty": 1.0,
                "penalty_window": 7,
                "logit_bias": {1: 1.0},
                "logprobs": 0,
                "max_tokens": 17,
                "min_tokens": 1,
                "ignore_eos": True,
                "stop_token_ids": (3,),
            }.items()
        ),
    ],
    ids=str,
)
def test_what_changes_the_tokens_parts_them(ask, fields) -> None:
    assert digest(ask(**fields)) != digest(ask())


def test_every_field_was_considered(ask) -> None:
    """A field that is added has to be put into a test above."""
    assert set(ask().__struct_fields__) == {
        "model_id", "fingerprint", "token_ids", "sampling", "grammar", "stop", "one_call",
        "cache_salt", "seeded", "priority", "turn", "caching",
    }  # fmt: skip
    assert {f.name for f in msgspec.structs.fields(type(ask().sampling))} == {
        "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
        "frequency_penalty", "penalty_window", "logit_bias", "seed", "choice", "logprobs", "max_tokens",
        "min_tokens", "ignore_eos", "stop_token_ids",
    }  # fmt: skip


def test_seeded_requests_are_told_apart_by_seed_and_choice(ask) -> None:
    def key(**sampling) -> bytes:
        return digest(ask(seeded=True, sampling={"temperature": 1.0, **sampling}))

    assert key(seed=1) == key(seed=1)
    assert len({key(seed=1), key(seed=2), key(seed=1, choice=1)}) == 3


def test_drawn_seeds_do_not_part_requests(ask) -> None:
    warm = {"temperature": 1.0}
    assert digest(ask(sampling={**warm, "seed": 1})) == digest(ask(sampling={**warm, "seed": 2}))
    assert not ask(sampling=warm).deterministic
    assert ask(sampling=warm, seeded=True).deterministic and ask().deterministic
