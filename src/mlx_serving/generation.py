"""A running request: its sequences in the worker, and their rows as text.

`Gateway.open` makes it once everything that can be refused has been checked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

import msgspec

from mlx_serving import clock
from mlx_serving.content.output import OutputParser
from mlx_serving.content.stream import ChoiceText
from mlx_serving.content.text import TextSide
from mlx_serving.errors import Cancelled, MLXServingError, from_code
from mlx_serving.telemetry.events import RequestFinished
from mlx_serving.traffic.company import Meeting
from mlx_serving.traffic.deadlines import TimeLimits, overdue
from mlx_serving.traffic.rollouts import Arm
from mlx_serving.traffic.source import Reused, RowSource
from mlx_serving.types import (
    ChatPrompt,
    FinishReason,
    GenerateRequest,
    ModelInfo,
    Prompt,
    SamplingParams,
    TokenEvent,
    Usage,
)
from mlx_serving.worker.wire import TokenRow

OpenRows = Callable[[SamplingParams], Awaitable[RowSource]]
"""Starts one choice's sequence, or finds one."""


@dataclass(frozen=True, slots=True)
class Served:
    """A model that can answer: what the worker says of it, and its text side."""

    info: ModelInfo
    text: TextSide
    fingerprint: str = ""
    """Of what its answers depend on: files, and how they are computed."""


class Generation:
    """A running request. Iterate it for batches of events; it ends when every choice has.

    `cancel()` frees its rows at the worker's next step; who leaves the iteration early owes it.
    """

    def __init__(
        self,
        request: GenerateRequest,
        model_id: str,
        served: Served,
        token_ids: list[int],
        sampling: SamplingParams,
        arrived_s: float,
        on_end: Callable[[Generation, str], None],
        limits: TimeLimits = TimeLimits(),  # noqa: B008
    ) -> None:
        self.request = request
        self.request_id = request.request_id
        self.model_id = model_id
        self.prompt_token_ids = token_ids
        self.prompt_tokens = len(token_ids)
        self.cached_tokens = self.cache_write_tokens = 0
        self.seed = sampling.seed
        self.arrived_s = arrived_s
        self.ttft_s: float | None = None
        self._at_first = 1
        """Tokens that came with the first: rows that nobody has taken are merged."""
        self.arm: Arm | None = None
        """Its place in a rollout, if it has one."""
        self.meeting: Meeting | None = None
        """What it meets in its worker; None: nobody counts that."""
        self.flags: tuple[str, ...] = ()
        """The feature flags in whose share it is."""
        self.asked = model_id
        """The model that it was for."""
        self.ended = asyncio.Event()
        self.tokens: list[int] | None = None
        """The first choice's tokens, where they are to be compared with another model's."""
        self.empty = True
        """Nothing has been said or called yet."""
        self._served = served
        self._sampling = sampling
        self._on_end: Callable[[Generation, str], None] | None = on_end
        self._limits = limits
        self._timer: asyncio.TimerHandle | None = None
        self._overdue: MLXServingError | None = None
        self._choices = [_Choice(i, request, served, token_ids) for i in range(request.n)]

    @property
    def prompt_text(self) -> str:
        return self._served.text.decode(self.prompt_token_ids)

    @property
    def sources(self) -> list[RowSource]:
        """Where each choice's rows come from."""
        return [choice.source for choice in self._choices if choice.source is not None]

    @property
    def reused(self) -> Reused | None:
        """What every choice is; "miss" where they differ; None: nobody looked."""
        kinds = {source.reused for source in self.sources}
        return kinds.pop() if len(kinds) == 1 else "miss"

    @property
    def variant(self) -> str | None:
        """The model that answers in place of the one asked for, because of a rollout or a flag."""
        return None if self.model_id == self.asked else self.model_id

    @property
    def malformed(self) -> bool:
        """Something in an answer began like a tool call and was not one."""
        return any(choice.malformed for choice in self._choices)

    @property
    def broken_off(self) -> bool | None:
        """An answer ended before its schema or grammar allowed it; None: there is none."""
        if self.request.grammar is None:
            return None
        return not all(choice.whole for choice in self._choices)

    @property
    def logprob(self) -> float | None:
        """Mean log-probability of all answers' tokens; None: they were not asked for."""
        count = sum(choice.logprobs for choice in self._choices)
        return sum(choice.logprob_sum for choice in self._choices) / count if count else None

    async def start(self, open_rows: OpenRows) -> None:
        """Start every choice's sequence, or none."""
        try:
            for choice in self._choices:
                sampling = msgspec.structs.replace(self._sampling, choice=choice.index)
                choice.source = await open_rows(sampling)
        except BaseException:
            for choice in self._choices:  # some may run already
                choice.cancel()
            raise
        self.seed = self.sources[0].seed
        self._look_again()

    @property
    def queue_ms(self) -> float | None:
        """Until its last sequence was begun; None: one was not."""
        begun_s = [source.begun_s for source in self.sources]
        if not begun_s or None in begun_s:
            return None
        return 1e3 * max(0.0, max(s for s in begun_s if s is not None) - self.arrived_s)

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=sum(choice.tokens for choice in self._choices),
            cached_tokens=self.cached_tokens,
            cache_write_tokens=self.cache_write_tokens,
            shared_tokens=sum(c.tokens for c in self._choices if c.is_shared),
        )

    def finished(self, outcome: str, duration_s: float) -> RequestFinished:
        """What is told of it at its end."""
        usage, ttft_s, tpot_ms = self.usage(), self.ttft_s, None
        later = usage.completion_tokens - (self.request.n - 1) - self._at_first
        if ttft_s is not None and later > 0:
            tpot_ms = 1e3 * (duration_s - ttft_s) * self.request.n / later
        return RequestFinished(
            request_id=self.request_id,
            model_id=self.model_id,
            outcome=outcome,
            usage=usage,
            ttft_ms=None if ttft_s is None else 1e3 * ttft_s,
            duration_ms=1e3 * duration_s,
            tpot_ms=tpot_ms,
            queue_ms=self.queue_ms,
            priority=self.request.priority,
            client=self.request.client,
            reused=self.reused,
            empty=self.empty,
            malformed=self.malformed,
            broken_off=self.broken_off,
            logprob=self.logprob,
            company=self.meeting.company() if self.meeting else None,
            shadow=self.request.shadow,
        )

    def cancel(self) -> None:
        for choice in self._choices:
            choice.cancel()
        self._end("cancelled")

    async def __aiter__(self) -> AsyncIterator[list[TokenEvent]]:
        outcome = "cancelled"
        try:
            rows = self._choices[0].rows() if len(self._choices) == 1 else _merge(self._choices)
            async for choice, row in rows:
                self._observe(choice, row)
                event = choice.accept(row)
                if event.text or event.tool_calls or event.reasoning:
                    self.empty = False
                yield [event]
                outcome = event.finish_reason or outcome
            if self._overdue is not None:
                raise self._overdue
            if self._on_end is None:
                raise Cancelled(f"Request {self.request_id} was cancelled.")
        except MLXServingError as error:
            outcome = error.code
            raise
        finally:
            for choice in self._choices:
                choice.cancel()
            self._end(outcome)

    def _observe(self, choice: _Choice, row: TokenRow) -> None:
        if self.tokens is not None and choice.index == 0:
            self.tokens += row.token_ids
        if self.ttft_s is None and row.token_ids:
            self.ttft_s = clock.monotonic() - self.arrived_s
            self._at_first = len(row.token_ids)
            if self.meeting is not None:
                self.meeting.answered()
            self.cached_tokens = row.cached_tokens
            self.cache_write_tokens = row.cache_write_tokens

    def _check_time(self) -> None:
        begun = all(source.begun for source in self.sources)
        age_s = clock.monotonic() - self.arrived_s
        self._overdue = overdue(self._limits, age_s, begun=begun, answered=self.ttft_s is not None)
        if self._overdue is None:
            self._look_again()
            return
        for choice in self._choices:  # which ends the iteration, and that raises
            choice.cancel()

    def _look_again(self) -> None:
        age_s = clock.monotonic() - self.arrived_s
        next_s = self._limits.next_s(age_s)
        if next_s is not None and self._on_end is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(next_s - age_s, self._check_time)

    def _end(self, outcome: str) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._on_end is not None:
            on_end, self._on_end = self._on_end, None
            on_end(self, outcome)
            self.ended.set()


class _Choice:
    """One of a request's answers: its sequence in the worker and its text."""

    def __init__(
        self, index: int, request: GenerateRequest, served: Served, token_ids: list[int]
    ) -> None:
        self.index = index
        self.tokens = 0
        self.source: RowSource | None = None
        self.finished = False
        self.whole = False
        """It ended where the model, or its tool call, did."""
        self.logprob_sum = 0.0
        self.logprobs = 0
        """How many have been added up."""
        self._eos = served.info.eos_token_ids
        self._parser = served.text.open_parser(request.prompt, token_ids)
        self._text: ChoiceText = served.text.open_stream(
            request.stop,
            include_stop_str=request.include_stop_str,
            min_tokens=request.sampling.min_tokens,
            continues=_continues(request.prompt),
            markup=self._parser.markup if self._parser else frozenset(),
        )

    @property
    def is_shared(self) -> bool:
        """Its tokens were computed for another request."""
        return self.source is not None and self.source.reused in ("hit", "shared")

    @property
    def malformed(self) -> bool:
        return self._parser is not None and self._parser.malformed

    async def rows(self) -> AsyncIterator[tuple[_Choice, TokenRow]]:
        assert self.source is not None, "start() comes first"
        async for row in self.source:
            yield self, row
            if self.finished:
                return

    def cancel(self) -> None:
        if self.source is not None and not self.finished:
            self.source.cancel()

    def accept(self, row: TokenRow) -> TokenEvent:
        """Turn one row of tokens into text; the row or a stop string may finish the choice."""
        if row.error is not None:
            self.finished = True
            raise from_code(*row.error, param=row.error_param)
        if self._parser is None or not self._parser.each_token or len(row.token_ids) < 2:
            return self._accept(row)
        # So that where a call ends the answer, and which tokens were reasoning, does not depend on
        # how rows came.
        event = TokenEvent(choice=self.index, text="", token_ids=[])
        for token_row in _split(row):
            _append(event, self._accept(token_row))
            if self.finished:
                break
        return event

    def _accept(self, row: TokenRow) -> TokenEvent:
        delta = self._text.push(row.token_ids, row.logprobs, stop_token_id=row.stop_token_id)
        self.tokens += len(delta.token_ids)
        text = delta.text
        finish: FinishReason | None = None
        stop_reason: str | int | None = None
        if delta.stop is not None:
            self.cancel()
            finish, stop_reason = "stop", delta.stop
        elif row.finish_reason is not None:
            text += self._text.finish()
            finish, stop_reason = row.finish_reason, row.stop_token_id
            self.whole = row.stop_token_id in self._eos
        if delta.logprobs is not None:
            self.logprobs += len(delta.logprobs)
            self.logprob_sum += sum(entry.logprob for entry in delta.logprobs)
        event = TokenEvent(
            choice=self.index,
            text=text,
            token_ids=delta.token_ids,
            logprobs=delta.logprobs,
            finish_reason=finish,
            stop_reason=stop_reason,
        )
        if self._parser is not None:
            self._part(self._parser, event)
        self.finished = event.finish_reason is not None
        return event

    def _part(self, parser: OutputParser, event: TokenEvent) -> None:
        """Part the event's text into content, reasoning and calls; a call may end the choice."""
        parsed = [parser.push(event.text)]
        if event.finish_reason is not None:
            parsed.append(parser.finish())
        elif parser.done:
            self.cancel()
            event.finish_reason = "stop"
            self.whole = True
        event.text = "".join(p.content for p in parsed)
        event.reasoning = "".join(p.reasoning for p in parsed)
        event.reasoning_tokens = len(event.token_ids) if event.reasoning else 0
        event.tool_calls = [call for p in parsed for call in p.tool_calls] or None
        if event.finish_reason == "stop" and parser.calls:
            event.finish_reason = "tool_calls"


def _split(row: TokenRow) -> list[TokenRow]:
    """A row for each of its tokens; the last one has the end."""
    last = len(row.token_ids) - 1
    return [
        TokenRow(
            seq_id=row.seq_id,
            token_ids=[token_id],
            logprobs=None if row.logprobs is None else row.logprobs[i : i + 1],
            finish_reason=row.finish_reason if i == last else None,
            stop_token_id=row.stop_token_id if i == last else None,
        )
        for i, token_id in enumerate(row.token_ids)
    ]


def _append(event: TokenEvent, more: TokenEvent) -> None:
    event.text += more.text
    event.token_ids += more.token_ids
    event.reasoning += more.reasoning
    event.reasoning_tokens += more.reasoning_tokens
    if more.logprobs is not None:
        event.logprobs = (event.logprobs or []) + more.logprobs
    if more.tool_calls is not None:
        event.tool_calls = (event.tool_calls or []) + more.tool_calls
    event.finish_reason, event.stop_reason = more.finish_reason, more.stop_reason


async def _merge(choices: Sequence[_Choice]) -> AsyncIterator[tuple[_Choice, TokenRow]]:
    """Rows of several sequences in the order of arrival; one sequence's error ends them all."""
    queue: asyncio.Queue[tuple[_Choice, TokenRow] | BaseException | None] = asyncio.Queue(64)

    async def feed(choice: _Choice) -> None:
        try:
            async for item in choice.rows():
                await queue.put(item)
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    tasks = [asyncio.create_task(feed(choice)) for choice in choices]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if item is None:
                left -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _continues(prompt: Prompt) -> bool:
    """Whether the answer goes on from the prompt's own text."""
    return not isinstance(prompt, ChatPrompt) or prompt.continue_final_message
