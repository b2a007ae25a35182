"""A request's whole story: admit, route, ensure the model, tokenise, submit, stream.

`Gateway.open()` returns once everything that can be refused has been checked and the sequences
are in the worker's hands; iterating the `Generation` it returns yields text.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import msgspec

from mlx_serving import clock
from mlx_serving.catalog.lifecycle import Failed, ModelSlot, Ready, status_of
from mlx_serving.config import Config
from mlx_serving.content.output import OutputParser
from mlx_serving.content.stream import ChoiceText
from mlx_serving.content.text import TextSide
from mlx_serving.errors import (
    Cancelled,
    ConfigError,
    ContextOverflow,
    InvalidRequest,
    MLXServingError,
    ModelNotFound,
    from_code,
)
from mlx_serving.telemetry.events import EventBus, RequestFinished, RequestStarted
from mlx_serving.telemetry.metrics import Metrics
from mlx_serving.traffic.admission import Admission
from mlx_serving.types import (
    ChatPrompt,
    FinishReason,
    GenerateRequest,
    ModelInfo,
    Prompt,
    SamplingParams,
    ServedModel,
    TokenEvent,
    Usage,
)
from mlx_serving.worker.client import SequenceStream
from mlx_serving.worker.port import WorkerClient
from mlx_serving.worker.wire import TokenRow

_THREAD_TOKENS = 4_096
"""From here on token ids are better decoded off the event loop."""


@dataclass(frozen=True, slots=True)
class Served:
    """A model that can answer: what the worker says of it, and its text side."""

    info: ModelInfo
    text: TextSide


class Gateway:
    def __init__(
        self,
        config: Config,
        slots: Sequence[ModelSlot[Served]],
        worker: WorkerClient,
        metrics: Metrics,
        events: EventBus,
    ) -> None:
        assert slots, "a gateway serves at least one model"
        self._config = config
        self._slots = slots
        self._worker = worker
        self._metrics = metrics
        self._events = events
        self._patterns = _patterns(config.model_aliases, slots)
        self._admission = Admission(config.max_queue)
        self._running: set[Generation] = set()
        self._idle = asyncio.Event()

    async def open(self, request: GenerateRequest) -> Generation:
        """Accept a request and start its sequences. Raises a typed error before any work is done."""
        arrived_s = clock.monotonic()
        slot = self._route(request.model)
        self._admission.enter(arrived_s)
        self._metrics.open_requests.inc()
        try:
            served = await slot.ready()
            token_ids = await self._tokenise(served, request.prompt)
            sampling = _settle(request, served.info, len(token_ids), self._config.max_tokens)
            request = _constrain(request, served.text, token_ids)
            generation = Generation(
                request, slot.model_id, served, token_ids, sampling, arrived_s, self._ended
            )
            generation.start(self._worker)
        except BaseException:
            self._leave()
            raise
        self._running.add(generation)
        self._events.publish(
            RequestStarted(
                request_id=request.request_id,
                model_id=slot.model_id,
                prompt_tokens=len(token_ids),
            )
        )
        return generation

    async def text_side(self, model: str) -> TextSide:
        """The text side of a served model, once it is loaded."""
        return (await self._route(model).ready()).text

    async def tokenise(self, model: str, prompt: Prompt) -> list[int]:
        """A prompt's token ids, as `open` would have them."""
        return await self._tokenise(await self._route(model).ready(), prompt)

    async def detokenise(self, model: str, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included. Raises InvalidRequest for an id too high."""
        served = await self._route(model).ready()
        _check_ids("tokens", token_ids, served.info.vocab_size)
        if len(token_ids) < _THREAD_TOKENS:
            return served.text.decode(token_ids, skip_special_tokens=False)
        return await asyncio.to_thread(served.text.decode, token_ids, skip_special_tokens=False)

    async def load(self, model: str) -> None:
        """Wait until a model can answer; raises why it cannot."""
        await self._route(model).ready()

    def model_info(self, model: str) -> ModelInfo | None:
        """What is known of a loaded model; None while it is not. Raises ModelNotFound."""
        state = self._route(model).state
        return state.loaded.info if isinstance(state, Ready) else None

    def abilities(self, model: str) -> tuple[str, ...]:
        """Of `tools` and `thinking`, those that a loaded model's chat template knows."""
        state = self._route(model).state
        return state.loaded.text.abilities() if isinstance(state, Ready) else ()

    async def wait_ready(self) -> None:
        """Wait until every configured model is loaded; raises the first failure."""
        await asyncio.gather(*(slot.ready() for slot in self._slots))

    def default_model(self) -> str:
        return self._slots[0].model_id

    def models(self) -> list[ServedModel]:
        """Every configured model, the default first, whatever its state."""
        broken = self._worker.broken
        return [_describe(slot, broken.get(slot.model_id)) for slot in self._slots]

    def health(self) -> dict[str, object]:
        workers, models = self._worker.health(), self.models()
        return {
            "status": self._status(
                all(w.state in ("ready", "loading") and w.cause is None for w in workers)
            ),
            "reasons": [
                *(w.cause for w in workers if w.cause),
                *(m.reason for m in models if m.status == "failed" and m.reason),
            ],
            "pid": os.getpid(),
            "workers": [msgspec.to_builtins(w) for w in workers],
            "models": [{"id": m.id, "status": m.status, "reason": m.reason} for m in models],
            "open_requests": self._admission.open_requests,
        }

    def metrics(self) -> bytes:
        return self._metrics.render()

    def cancel(self, request_id: str) -> bool:
        """Cancel a running request; False if there is none by that id."""
        found = [g for g in self._running if g.request_id == request_id]
        for generation in found:
            generation.cancel()
        return bool(found)

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the running ones. True when all of them finished."""
        self._admission.drain(clock.monotonic() + timeout_s)
        if self._admission.open_requests:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), timeout_s)
        return self._admission.open_requests == 0

    def _status(self, workers_live: bool) -> str:
        if self._admission.draining:
            return "draining"
        states = [slot.state for slot in self._slots]
        if self._worker.broken or any(isinstance(state, Failed) for state in states):
            return "degraded"
        if not all(isinstance(state, Ready) for state in states):
            return "starting"
        return "ready" if workers_live else "degraded"

    def _route(self, model: str) -> ModelSlot[Served]:
        for slot in self._slots:
            if slot.answers_to(model):
                return slot
        for pattern, slot in self._patterns:
            if fnmatchcase(model, pattern):
                return slot
        served = ", ".join(f"'{slot.model_id}'" for slot in self._slots)
        raise ModelNotFound(f"Model '{model}' is not served here; served: {served}.", param="model")

    async def _tokenise(self, served: Served, prompt: Prompt) -> list[int]:
        # A long prompt must not hold up the streams that this event loop serves.
        if served.text.prefers_thread(prompt):
            return await asyncio.to_thread(served.text.encode_prompt, prompt)
        return served.text.encode_prompt(prompt)

    def _leave(self) -> float:
        now_s = clock.monotonic()
        self._admission.leave(now_s)
        self._metrics.open_requests.dec()
        if not self._admission.open_requests:
            self._idle.set()
        return now_s

    def _ended(self, generation: Generation, outcome: str) -> None:
        now_s = self._leave()
        self._running.discard(generation)
        usage, model = generation.usage(), generation.model_id
        m = self._metrics
        m.requests.labels(model, outcome).inc()
        m.prompt_tokens.labels(model).inc(usage.prompt_tokens)
        m.cached_tokens.labels(model).inc(usage.cached_tokens)
        m.generated_tokens.labels(model).inc(usage.completion_tokens)
        duration_s = now_s - generation.arrived_s
        m.duration.labels(model).observe(duration_s)
        ttft_s = generation.ttft_s
        if ttft_s is not None:
            m.ttft.labels(model).observe(ttft_s)
            later = usage.completion_tokens - generation.request.n
            if later > 0:
                m.tpot.labels(model).observe((duration_s - ttft_s) * generation.request.n / later)
        self._events.publish(
            RequestFinished(
                request_id=generation.request_id,
                model_id=model,
                outcome=outcome,
                usage=usage,
                ttft_ms=None if ttft_s is None else ttft_s * 1e3,
                duration_ms=duration_s * 1e3,
            )
        )


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
    ) -> None:
        self.request = request
        self.request_id = request.request_id
        self.model_id = model_id
        self.prompt_token_ids = token_ids
        self.prompt_tokens = len(token_ids)
        self.cached_tokens = 0
        self.seed = sampling.seed
        self.arrived_s = arrived_s
        self.ttft_s: float | None = None
        self._served = served
        self._sampling = sampling
        self._on_end: Callable[[Generation, str], None] | None = on_end
        self._choices = [_Choice(i, request, served, token_ids) for i in range(request.n)]

    @property
    def prompt_text(self) -> str:
        return self._served.text.decode(self.prompt_token_ids)

    def start(self, worker: WorkerClient) -> None:
        try:
            self._submit(worker)
        except MLXServingError:
            for choice in self._choices:  # some may run already
                choice.cancel()
            raise

    def _submit(self, worker: WorkerClient) -> None:
        for choice in self._choices:
            choice.stream = worker.submit(
                self._served.info.model_id,
                self.prompt_token_ids,
                msgspec.structs.replace(self._sampling, choice=choice.index),
                priority=self.request.priority,
                grammar=self.request.grammar,
                cache_salt=self.request.cache_salt,
            )

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=sum(choice.tokens for choice in self._choices),
            cached_tokens=self.cached_tokens,
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
                self._observe(row)
                event = choice.accept(row)
                yield [event]
                outcome = event.finish_reason or outcome
            if self._on_end is None:
                raise Cancelled(f"Request {self.request_id} was cancelled.")
        except MLXServingError as error:
            outcome = error.code
            raise
        finally:
            for choice in self._choices:
                choice.cancel()
            self._end(outcome)

    def _observe(self, row: TokenRow) -> None:
        if self.ttft_s is None and row.token_ids:
            self.ttft_s = clock.monotonic() - self.arrived_s
            self.cached_tokens = row.cached_tokens

    def _end(self, outcome: str) -> None:
        if self._on_end is not None:
            on_end, self._on_end = self._on_end, None
            on_end(self, outcome)


class _Choice:
    """One of a request's answers: its sequence in the worker and its text."""

    def __init__(
        self, index: int, request: GenerateRequest, served: Served, token_ids: list[int]
    ) -> None:
        self.index = index
        self.tokens = 0
        self.stream: SequenceStream | None = None
        self.finished = False
        self._parser = served.text.open_parser(request.prompt, token_ids)
        self._text: ChoiceText = served.text.open_stream(
            request.stop,
            include_stop_str=request.include_stop_str,
            min_tokens=request.sampling.min_tokens,
            continues=_continues(request.prompt),
            markup=self._parser.markup if self._parser else frozenset(),
        )

    async def rows(self) -> AsyncIterator[tuple[_Choice, TokenRow]]:
        assert self.stream is not None, "start() comes first"
        async for row in self.stream:
            yield self, row
            if self.finished:
                return

    def cancel(self) -> None:
        if self.stream is not None and not self.finished:
            self.stream.cancel()

    def accept(self, row: TokenRow) -> TokenEvent:
        """Turn one row of tokens into text; the row or a stop string may finish the choice."""
        if row.error is not None:
            self.finished = True
            raise from_code(*row.error, param=row.error_param)
        if self._parser is None or not self._parser.single or len(row.token_ids) < 2:
            return self._accept(row)
        # One by one, so that where the call ends the answer does not depend on how rows came.
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
        event.text = "".join(p.content for p in parsed)
        event.reasoning = "".join(p.reasoning for p in parsed)
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


def _settle(
    request: GenerateRequest, info: ModelInfo, prompt_tokens: int, default_max_tokens: int | None
) -> SamplingParams:
    """The sampling parameters with everything decided that the client left open; raises what the
    model cannot do."""
    room = info.context_length - prompt_tokens
    if room < 1:
        raise ContextOverflow(
            f"The prompt has {prompt_tokens} tokens; the context of '{info.model_id}' is "
            f"{info.context_length} and at least one must be left to generate.",
            param="messages" if isinstance(request.prompt, ChatPrompt) else "prompt",
        )
    sampling = request.sampling
    _check_ids("logit_bias", sampling.logit_bias, info.vocab_size)
    _check_ids("stop_token_ids", sampling.stop_token_ids, info.vocab_size)
    wanted = request.max_tokens if request.max_tokens is not None else default_max_tokens
    return msgspec.structs.replace(
        sampling,
        max_tokens=room if wanted is None else min(wanted, room),
        seed=secrets.randbits(63) if request.seed is None else request.seed,
    )


def _constrain(request: GenerateRequest, text: TextSide, token_ids: list[int]) -> GenerateRequest:
    """The request with the grammar that its `tool_choice` or strict functions mean, or with its own
    after the model's reasoning."""
    prompt, grammar = request.prompt, request.grammar
    if not isinstance(prompt, ChatPrompt):
        return request
    if grammar is not None and not prompt.tools:
        before = text.reasoning_rules(prompt, token_ids)
        grammar = msgspec.structs.replace(grammar, before=before)
        return msgspec.structs.replace(request, grammar=grammar)
    if grammar is not None:
        raise InvalidRequest(
            f"'{grammar.param}' says what the whole answer looks like, so nothing could call 'tools'.",
            param=grammar.param,
        )
    forced = text.forced_calls(prompt, token_ids)
    return request if forced is None else msgspec.structs.replace(request, grammar=forced)


def _patterns(
    aliases: Sequence[str], slots: Sequence[ModelSlot[Served]]
) -> list[tuple[str, ModelSlot[Served]]]:
    """`claude-*` is the default model, `claude-*=name` the one of that name. Raises ConfigError."""
    found: list[tuple[str, ModelSlot[Served]]] = []
    for alias in aliases:
        pattern, _, name = alias.partition("=")
        slot = next((s for s in slots if not name or s.answers_to(name)), None)
        if not pattern or slot is None:
            raise ConfigError(
                f"model_aliases: '{alias}' names no served model", param="model_aliases"
            )
        found.append((pattern, slot))
    return found


def _continues(prompt: Prompt) -> bool:
    """Whether the answer goes on from the prompt's own text."""
    return not isinstance(prompt, ChatPrompt) or prompt.continue_final_message


def _check_ids(param: str, ids: Sequence[int] | dict[int, float], vocab_size: int) -> None:
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"Token id {token_id} is not in the vocabulary of {vocab_size}.", param=param
            )


def _describe(slot: ModelSlot[Served], broken: MLXServingError | None) -> ServedModel:
    """`broken`: why the worker cannot serve it, whatever the slot believes."""
    status, reason = status_of(slot.state) if broken is None else ("failed", broken.message)
    loaded = slot.state.loaded if isinstance(slot.state, Ready) else None
    return ServedModel(
        id=slot.model_id,
        created=slot.created,
        status=status,
        reason=reason,
        aliases=slot.aliases,
        context_length=loaded.info.context_length if loaded else None,
    )
