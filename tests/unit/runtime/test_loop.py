from __future__ import annotations

import gc
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec
import pytest

from mlx_serving import errors
from mlx_serving.runtime.backend.model import LoadedModel
from mlx_serving.runtime.collector import Collector, NoCollector
from mlx_serving.runtime.core.plan import Forced, Limits, Sampled, StepPlan, StepResult
from mlx_serving.runtime.link import Link
from mlx_serving.runtime.loads import Loader
from mlx_serving.runtime.loop import Loop
from mlx_serving.types import Grammar, ModelInfo, SamplingParams, Turn
from mlx_serving.worker import wire

FAIL_LAUNCH, FAIL_WAIT, GIVES_UP, FORCED = 901, 902, 903, 904


@dataclass
class Pending:
    runner: Runner
    result: StepResult
    error: Exception | None = None

    def wait(self) -> StepResult:
        if self.runner.gate is not None:
            assert self.runner.gate.wait(30)
        self.runner.in_flight -= 1
        self.runner.log.append(f"wait {self.result.step_id}")
        if self.error is not None:
            raise self.error
        return self.result


@dataclass
class Runner:
    """The next token is the last one plus one."""

    last: dict[int, int] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    gate: threading.Event | None = None
    """Steps wait for it."""
    foreseen: list[Forced] = field(default_factory=list)

    def launch(self, plan: StepPlan) -> Pending:
        self.log.append(f"launch {plan.step_id}")
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        pending = Pending(self, StepResult(plan.step_id))
        for start in plan.starts:
            self.last[start.seq_id] = start.token_ids[-1]
            if start.token_ids[0] == FAIL_LAUNCH:
                raise errors.ModelBroken("the kernels are not there")
            if start.token_ids[0] == FORCED:
                self.foreseen.append(Forced(start.seq_id, 1, (905, 906, 907, 908)))
            if start.token_ids[0] == FAIL_WAIT:
                pending.error = MemoryError("no room")
        sampling = [c.seq_id for c in plan.prefill if c.samples] + [r.seq_id for r in plan.decode]
        for seq_id in sampling:
            self.last[seq_id] += 1
            sampled = Sampled(seq_id, [self.last[seq_id]])
            if sampled.token_ids == [GIVES_UP + 1]:
                sampled.error = errors.InvalidRequest("too much", param="guided_regex")
            pending.result.sampled.append(sampled)
        return pending

    def foresee(self) -> list[Forced]:
        foreseen, self.foreseen = self.foreseen, []
        return foreseen

    def reset(self) -> None:
        self.log.append("reset")
        self.in_flight = 0
        self.last.clear()


def loaded(model_id: str, max_num_seqs: int = 16) -> LoadedModel:
    info = ModelInfo(
        model_id=model_id,
        path="",
        architecture="counting",
        context_length=10_000,
        vocab_size=100_000,
        eos_token_ids=(),
    )
    limits = Limits(
        max_num_seqs=max_num_seqs,
        prefill_step_size=64,
        context_length=10_000,
        kv_capacity_tokens=10_000_000,
    )
    return LoadedModel(info, Runner(), limits)


def at_once(*_):
    yield
    return loaded("m")


class Parent:
    """The other end of the socket of a loop, and the thread that it runs on."""

    def __init__(self, sock: socket.socket, thread: threading.Thread) -> None:
        self.sock = sock
        self.thread = thread
        self.runners: dict[str, Runner] = {}
        self._splitter = wire.FrameSplitter()
        self._received: list[wire.FromWorker] = []

    def send(self, *messages: wire.ToWorker) -> None:
        """In one write, so that the loop sees them together."""
        self.sock.sendall(b"".join(wire.encode(message) for message in messages))

    def receive(self) -> wire.FromWorker:
        while not self._received:
            data = self.sock.recv(65536)
            assert data, "the loop has gone"
            self._received += map(wire.decode_from_worker, self._splitter.feed(data))
        return self._received.pop(0)

    def expect(self, kind: type, when: Callable[[object], bool] = lambda _: True):
        """The next message of that kind; others are passed over."""
        while not (isinstance(message := self.receive(), kind) and when(message)):
            pass
        return message

    def rows(self, count: int) -> dict[int, wire.TokenRow]:
        """Merged rows of `count` sequences, until each has its finish reason."""
        tokens: dict[int, list[int]] = {}
        ended: dict[int, wire.TokenRow] = {}
        while len(ended) < count:
            for row in self.expect(wire.Step).rows:
                tokens.setdefault(row.seq_id, []).extend(row.token_ids)
                if row.finish_reason is not None:
                    ended[row.seq_id] = msgspec.structs.replace(row, token_ids=tokens[row.seq_id])
        return ended


@contextmanager
def serving(begin: Loader, **timing: float) -> Iterator[Parent]:
    """A loop that loads by `begin`, until its socket is closed."""
    ours, theirs = socket.socketpair()
    ours.settimeout(120)  # a guard against hangs
    loop = Loop(Link(theirs), begin, collector=NoCollector(), **timing)
    thread = threading.Thread(target=loop.run, daemon=True)
    with ours, theirs:
        thread.start()
        yield Parent(ours, thread)
        ours.close()
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture
def parent() -> Iterator[Parent]:
    runners: dict[str, Runner] = {}

    def begin(model_id, path, options, on_phase):
        yield
        if path.name == "broken":
            raise RuntimeError("a shard is short")
        model = loaded(model_id, options.max_num_seqs)
        runners[model_id] = model.runner
        return model

    with serving(begin, pulse_s=0.05) as parent:
        parent.runners = runners
        yield parent


def load(model_id: str = "m", path: str = "any", **options) -> wire.LoadModel:
    return wire.LoadModel(model_id, path, wire.ModelOptions(**options))


def submit(seq_id: int, *tokens: int, model_id: str = "m", max_tokens: int = 4) -> wire.Submit:
    return wire.Submit(
        seq_id=seq_id,
        model_id=model_id,
        token_ids=list(tokens),
        prompt_len=len(tokens),
        sampling=SamplingParams(max_tokens=max_tokens),
    )


def test_it_says_hello_then_that_it_is_idle(parent):
    assert parent.receive() == wire.Hello()
    assert parent.receive() == wire.Phase("idle")


def test_it_leaves_when_it_is_told(parent):
    parent.send(wire.Shutdown())
    parent.thread.join(30)
    assert not parent.thread.is_alive()


def test_one_frame_a_step_carries_every_row(parent):
    parent.send(load(), submit(1, 10), submit(2, 20), submit(3, 5, 6, 7))
    steps = [parent.expect(wire.Step) for _ in range(2)]
    assert {row.seq_id for step in steps for row in step.rows} == {1, 2, 3}
    assert any(len(step.rows) >= 2 for step in steps)
    assert steps[-1].stats.running == 3
    assert steps[-1].stats.model_id == "m"
    assert steps[-1].stats.kv_tokens > 0


def test_tokens_follow_the_prompt(parent):
    parent.send(load(), submit(1, 10), submit(2, *range(100, 300), max_tokens=3))
    rows = parent.rows(2)
    assert rows[1].token_ids == [11, 12, 13, 14]
    assert rows[2].token_ids == [300, 301, 302]
    assert rows[2].finish_reason == "length"


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_pipeline_is_as_deep_as_asked(parent, depth):
    parent.send(load(pipeline_depth=depth), submit(1, 10, max_tokens=30))
    assert parent.rows(1)[1].token_ids == list(range(11, 41))
    assert parent.runners["m"].most_in_flight == depth


def test_the_next_step_is_launched_before_the_last_is_waited_for(parent):
    parent.send(load(pipeline_depth=2), submit(1, 10, max_tokens=4))
    parent.rows(1)
    log = parent.runners["m"].log
    assert log[:5] == ["launch 0", "launch 1", "wait 0", "launch 2", "wait 1"]


def test_models_take_turns(parent):
    parent.send(load("a"), load("b"))
    parent.expect(wire.ModelLoaded, lambda m: m.info.model_id == "b")
    parent.send(
        submit(1, 10, model_id="a", max_tokens=20), submit(2, 20, model_id="b", max_tokens=20)
    )
    order = [parent.expect(wire.Step).stats.model_id for _ in range(20)]
    assert order == ["a", "b"] * 10


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        (FAIL_LAUNCH, ("model_unavailable", "the kernels are not there")),
        (FAIL_WAIT, ("step_failed", "MemoryError: no room")),
    ],
)
def test_a_failed_step_ends_those_who_began_and_spares_those_who_wait(parent, token, reason):
    parent.send(load(max_num_seqs=2), submit(1, token), submit(2, 20), submit(3, 30))
    rows = parent.rows(3)
    assert rows[1].error == rows[2].error == reason
    assert rows[1].finish_reason == "error"
    assert rows[3].token_ids == [31, 32, 33, 34]
    assert parent.runners["m"].log.count("reset") == 1


def test_what_was_known_before_a_step_failed_is_told(parent):
    parent.send(load(), submit(1, FORCED), submit(2, FAIL_WAIT))
    rows = parent.rows(2)
    assert rows[1].token_ids == [905, 906, 907, 908] and rows[1].finish_reason == "length"
    assert rows[2].error is not None


def test_a_failed_model_leaves_the_others_alone(parent):
    parent.send(load("a"), load("b"), submit(1, FAIL_WAIT, model_id="a"))
    parent.send(submit(2, 20, model_id="b"))
    rows = parent.rows(2)
    assert rows[1].error is not None
    assert rows[2].token_ids == [21, 22, 23, 24]


def test_a_cancelled_sequence_is_heard_of_no_more(parent):
    parent.send(load(max_num_seqs=1), submit(1, 10, max_tokens=9000), submit(2, 20))
    parent.expect(wire.Step)
    parent.send(wire.Cancel(1), wire.Cancel(1), wire.Cancel(99))
    assert parent.rows(1)[2].token_ids == [21, 22, 23, 24]
    assert parent.expect(wire.Phase, lambda phase: phase.phase == "idle")


def test_a_paused_sequence_waits_and_the_loop_sleeps(parent):
    parent.send(load(), submit(1, 10, max_tokens=9000))
    parent.expect(wire.Step)
    parent.send(wire.Pause(1))
    parent.expect(wire.Phase, lambda phase: phase.phase == "idle")
    parent.send(wire.Resume(1))
    assert parent.expect(wire.Step).rows[0].seq_id == 1


def test_a_tuned_model_takes_on_less_from_the_next_step_on_and_drops_nobody(parent):
    parent.send(load())
    parent.expect(wire.ModelLoaded)
    gate = parent.runners["m"].gate = threading.Event()
    parent.send(*(submit(i, 10 * i, max_tokens=9000) for i in (1, 2, 3)))
    parent.send(wire.Tune(model_id="other"), wire.Tune(model_id="m", max_num_seqs=1))
    parent.send(submit(4, 40, max_tokens=2), wire.Cancel(1), wire.Cancel(2))
    gate.set()
    parent.expect(wire.Step, lambda step: (step.stats.running, step.stats.waiting) == (1, 1))
    parent.send(wire.Tune(model_id="m"))
    parent.expect(wire.Step, lambda step: any(row.seq_id == 4 for row in step.rows))


def test_whose_turn_it_is_may_change(parent):
    parent.send(load())
    parent.expect(wire.ModelLoaded)
    one_row = wire.Tune(model_id="m", max_num_seqs=1)
    long, short = Turn(arrived_s=5.0, expected_tokens=900), Turn(arrived_s=6.0, expected_tokens=9)
    shorter = wire.Turns(model_id="m", short_jobs_first=True)
    parent.send(one_row, wire.Turns(model_id="other"), shorter, ask(1, long), ask(2, short))
    assert [parent.expect(wire.Started).seq_ids for _ in range(2)] == [[2], [1]]
    parent.send(wire.Turns(model_id="m"), ask(3, long), ask(4, short))
    assert [parent.expect(wire.Started).seq_ids for _ in range(2)] == [[3], [4]]


def ask(seq_id: int, turn: Turn) -> wire.Submit:
    return msgspec.structs.replace(submit(seq_id, 10 * seq_id, max_tokens=2), turn=turn)


def test_errors_of_a_load_and_of_a_submission(parent):
    parent.send(load("x", "broken"), submit(1, 10, model_id="x"), load(), submit(2, *[1] * 10_000))
    failed = parent.expect(wire.ModelFailed)
    assert (failed.code, failed.message) == ("model_unavailable", "RuntimeError: a shard is short")
    rows = parent.rows(1)
    assert rows[1].error is not None
    assert rows[1].error == ("model_unavailable", "RuntimeError: a shard is short")
    rows = parent.rows(1)
    assert rows[2].error is not None
    assert rows[2].error[0] == errors.ContextOverflow.code


def test_a_grammar_for_a_model_without_them_is_refused(parent):
    grammar = Grammar(kind="json_object", param="guided_json")
    parent.send(load(), msgspec.structs.replace(submit(1, 10), grammar=grammar), submit(2, 20))
    rows = parent.rows(2)
    assert rows[1].error is not None
    assert rows[1].error[0] == errors.UnsupportedParameter.code
    assert rows[1].error_param == "guided_json"
    assert rows[2].token_ids == [21, 22, 23, 24]


def test_a_sequence_that_cannot_go_on_ends_alone(parent):
    parent.send(load(), submit(1, GIVES_UP), submit(2, 20))
    rows = parent.rows(2)
    assert rows[1].error == (errors.InvalidRequest.code, "too much")
    assert rows[1].error_param == "guided_regex" and rows[1].token_ids == []
    assert rows[2].token_ids == [21, 22, 23, 24]


def test_a_load_in_slices_lets_others_step_and_keeps_who_came_early():
    """The second model's load goes on for as long as the first one's stream does."""
    enough = threading.Event()

    def slow(model_id, path, options, on_phase):
        while model_id == "b" and not enough.is_set():
            yield
        return loaded(model_id)
        yield

    with serving(slow) as parent:
        parent.send(load("a"))
        parent.expect(wire.ModelLoaded)
        early, gone = submit(2, 20, model_id="b"), submit(3, 30, model_id="b")
        parent.send(load("b"), early, gone, wire.Cancel(3))
        parent.send(submit(1, 10, model_id="a", max_tokens=50))
        assert parent.rows(1)[1].token_ids == list(range(11, 61))
        enough.set()
        assert parent.expect(wire.ModelLoaded).info.model_id == "b"
        assert parent.rows(1)[2].token_ids == [21, 22, 23, 24]
        enough.clear()
        parent.send(wire.UnloadModel("b"), load("b"), submit(4, 40, model_id="b"))
        parent.expect(wire.ModelUnloaded)
        parent.send(wire.UnloadModel("b"))
        assert parent.expect(wire.ModelFailed).code == errors.ModelNotFound.code
        assert parent.rows(1)[4].error == (errors.ModelNotFound.code, "model 'b' was unloaded")


def test_loading_twice_is_loading_once(parent):
    parent.send(load())
    parent.expect(wire.ModelLoaded)
    first = parent.runners["m"]
    parent.send(load())
    parent.expect(wire.ModelLoaded)
    assert parent.runners["m"] is first


def test_unloading_ends_its_sequences(parent):
    parent.send(load(), submit(1, 10, max_tokens=9000))
    parent.expect(wire.Step)
    parent.send(wire.UnloadModel("m"), wire.UnloadModel("m"))
    assert parent.rows(1)[1].error == (errors.ModelNotFound.code, "model 'm' was unloaded")
    assert parent.expect(wire.ModelUnloaded).model_id == "m"
    assert parent.expect(wire.ModelUnloaded).model_id == "m"


def test_a_long_load_keeps_saying_so():
    enough = threading.Event()

    def slow(model_id, path, options, on_phase):
        on_phase("compiling", "weights")
        assert enough.wait(30)
        yield
        return loaded(model_id)

    with serving(slow, pulse_s=0.01) as parent:
        parent.send(load())
        told = [
            parent.expect(wire.Phase, lambda phase: phase.detail == "weights") for _ in range(4)
        ]
        enough.set()
        parent.expect(wire.ModelLoaded)
        assert {phase.phase for phase in told} == {"compiling"}
        elapsed = [phase.elapsed_s for phase in told]
        assert elapsed == sorted(elapsed)
        assert elapsed[-1] > elapsed[0]


def test_a_long_step_keeps_saying_so(parent):
    """While a step computes, no `Step` frame says that the process lives."""
    parent.send(load())
    parent.expect(wire.ModelLoaded)
    parent.runners["m"].gate = threading.Event()
    parent.send(submit(1, 10))
    assert parent.expect(wire.Started).seq_ids == [1]
    told = [parent.expect(wire.Phase, lambda phase: phase.phase == "stepping") for _ in range(3)]
    parent.runners["m"].gate.set()
    assert told[-1].elapsed_s > told[0].elapsed_s
    parent.rows(1)
    parent.expect(wire.Phase, lambda phase: phase.phase == "idle")


def test_an_idle_loop_says_that_it_lives():
    with serving(at_once, heartbeat_s=0.01) as parent:
        assert [parent.expect(wire.Phase).phase for _ in range(4)] == ["idle"] * 4


def test_a_frame_that_is_not_ours_is_our_mistake():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall((3).to_bytes(4, "little") + b"\xc1\xc1\xc1")
        with pytest.raises(msgspec.DecodeError):
            Loop(Link(theirs), at_once, collector=NoCollector()).run()


def test_the_collector_collects_only_when_told():
    was_enabled, was_frozen = gc.isenabled(), gc.get_freeze_count()
    collections = []
    gc.callbacks.append(lambda phase, info: collections.append(info["generation"]))
    try:
        collector = Collector()
        assert not gc.isenabled()
        collector.loaded()
        assert gc.get_freeze_count() > was_frozen
        collections.clear()
        for _ in range(1000):
            collector.stepped()
        assert collections == []
        collector.idle()
        assert set(collections) == {2}
        collections.clear()
        collector.idle()
        assert collections == []
        for _ in range(2000):
            collector.stepped()
        assert set(collections) == {1}
    finally:
        gc.callbacks.pop()
        gc.unfreeze()
        if was_enabled:
            gc.enable()
