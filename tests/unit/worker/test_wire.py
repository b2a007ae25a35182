from __future__ import annotations

import itertools
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_serving.types import SamplingParams, TokenLogprob
from mlx_serving.worker import wire

TO_WORKER = [
    wire.LoadModel("m", "/path", wire.ModelOptions(pipeline_depth=3)),
    wire.Submit(
        seq_id=7,
        model_id="m",
        token_ids=[1, 2, 3],
        prompt_len=2,
        sampling=SamplingParams(temperature=0.5, seed=2**64 - 1, logit_bias={5: -1.0}),
    ),
    wire.Pause(7),
    wire.Tune(model_id="m", max_num_seqs=3, prefill_tokens=64),
    wire.Turns(model_id="m", max_wait_s=math.inf, short_jobs_first=True),
    wire.Cancel(7),
    wire.Shutdown(),
]
FROM_WORKER = [
    wire.Phase("loading", "weights", 1.5),
    wire.ModelFailed("m", "model_unavailable", "why"),
    wire.Started([7, 8]),
    wire.Step(
        [wire.TokenRow(7, [1], [TokenLogprob(-0.5, (1, 2), (-0.5, -1.0))], "stop", 1)],
        wire.StepStats("m", decode_rows=1, step_ms=0.25),
    ),
]


def test_messages_survive_the_wire():
    for message in TO_WORKER:
        assert wire.decode_to_worker(bytes(wire.encode(message))[wire.HEADER_BYTES :]) == message
    for message in FROM_WORKER:
        assert wire.decode_from_worker(bytes(wire.encode(message))[wire.HEADER_BYTES :]) == message


@given(st.lists(st.binary(max_size=40)), st.lists(st.integers(0, 400)))
def test_frames_come_out_whole_however_they_are_cut(bodies, cuts):
    data = b"".join(len(body).to_bytes(4, "little") + body for body in bodies)
    edges = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    splitter = wire.FrameSplitter()
    out = []
    for start, end in itertools.pairwise(edges):
        out += splitter.feed(data[start:end])
    assert out == bodies


def test_an_absurd_length_is_refused_before_it_is_waited_for():
    with pytest.raises(ValueError, match="exceeds"):
        wire.FrameSplitter().feed((wire.MAX_FRAME_BYTES + 1).to_bytes(4, "little"))


def test_the_other_side_s_messages_are_not_understood():
    with pytest.raises(msgspec.DecodeError):
        wire.decode_to_worker(bytes(wire.encode(FROM_WORKER[0]))[wire.HEADER_BYTES :])
