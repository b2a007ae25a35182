"""All that one sequence has said, kept once; its readers cut their rows from it."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from mlx_serving.types import FinishReason, TokenLogprob
from mlx_serving.worker.wire import TokenRow


class Transcript(msgspec.Struct):
    """`ends` says where each row that came ended, in tokens, so that a replay has the same pieces."""

    token_ids: list[int] = []
    logprobs: list[TokenLogprob] | None = None
    ends: list[int] = []
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    cached_tokens: int = 0
    cache_write_tokens: int = 0

    def add(self, row: TokenRow) -> None:
        if not self.ends:
            self.cached_tokens = row.cached_tokens
            self.cache_write_tokens = row.cache_write_tokens
        self.token_ids += row.token_ids
        if row.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs += row.logprobs
        self.ends.append(len(self.token_ids))
        self.finish_reason, self.stop_token_id = row.finish_reason, row.stop_token_id

    def row(
        self, start: int, end: int, cached_tokens: int, cache_write_tokens: int = 0
    ) -> TokenRow:
        """The tokens from `start` to `end` as one row; with the end of the sequence if they reach it."""
        last = end == len(self.token_ids)
        return TokenRow(
            seq_id=0,
            token_ids=self.token_ids[start:end],
            logprobs=None if self.logprobs is None else self.logprobs[start:end],
            finish_reason=self.finish_reason if last else None,
            stop_token_id=self.stop_token_id if last else None,
            cached_tokens=cached_tokens if start == 0 else 0,
            cache_write_tokens=cache_write_tokens if start == 0 else 0,
        )

    def rows(self, cached_tokens: int) -> Iterator[TokenRow]:
        """The rows as they came. One without tokens only ends the sequence, and goes with the row
        before it."""
        start = 0
        for end in self.ends:
            if end > start or end == 0:
                yield self.row(start, end, cached_tokens)
                start = end
