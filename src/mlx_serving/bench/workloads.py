"""Prompts for load: different from one another from the first word, so that no cache can help."""

from __future__ import annotations

import random
from typing import Any

_SUBJECTS = (
    "a lighthouse keeper", "the rings of Saturn", "sourdough bread", "a chess endgame", "tide pools",
    "the first printing press", "a mountain railway", "honey bees", "volcanic islands", "old maps",
    "a violin maker", "desert rain", "glass blowing", "a night market", "migrating cranes", "cast iron",
)  # fmt: skip
_OPENINGS = ("Describe", "Explain", "Tell a story about", "List facts about", "Ask questions about")


def token_ids(rng: random.Random, count: int) -> list[int]:
    """A prompt of any model's ordinary tokens."""
    return [rng.randrange(100, 40_000) for _ in range(count)]


def chat_requests(count: int, max_tokens: int, seed: int = 0) -> list[dict[str, Any]]:
    """Greedy chat bodies of 15 to 60 words of prompt that generate exactly `max_tokens` tokens."""
    rng = random.Random(seed)
    bodies = []
    for i in range(count):
        subject = _SUBJECTS[i % len(_SUBJECTS)]
        aside = " ".join(rng.sample([w for s in _SUBJECTS for w in s.split()], rng.randint(5, 30)))
        text = f"{rng.randint(10, 9999)} {rng.choice(_OPENINGS)} {subject}. Mention these words: {aside}."
        bodies.append(
            {
                "messages": [{"role": "user", "content": text}],
                "max_tokens": max_tokens,
                "temperature": 0.0,
            }
        )
    return bodies
