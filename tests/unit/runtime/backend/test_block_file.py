from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load

from mlx_serving.runtime.backend import block_file
from mlx_serving.runtime.backend.block_file import Array, BadBlock

KEY = bytes(range(16))
LAYOUT = (Array(0, 0, "F32", (2, 3)), Array(0, 1, "F16", (4,)), Array(7, 0, "U8", (5,)))


def make(key: bytes = KEY) -> bytes:
    data = memoryview(np.arange(block_file.data_bytes(LAYOUT), dtype=np.uint8))
    return block_file.header(key, LAYOUT, data) + bytes(data)


def read(whole: bytes, key: bytes = KEY) -> block_file.Layout:
    file = io.BytesIO(whole)
    fields, size = block_file.read_header(file)
    data = file.read()
    if len(data) != size:
        raise BadBlock("of another size")
    return block_file.check(key, fields, memoryview(data))


def test_it_comes_back_and_is_a_safetensors_file() -> None:
    assert read(make()) == LAYOUT
    arrays = load(make())
    assert {name: array.shape for name, array in arrays.items()} == {
        "0.0": (2, 3),
        "0.1": (4,),
        "7.0": (5,),
    }


def test_another_blocks_file_is_refused() -> None:
    with pytest.raises(BadBlock, match="another block"):
        read(make(bytes(16)))


@given(st.data())
def test_no_flipped_bit_is_taken_for_the_block(data: st.DataObject) -> None:
    whole = bytearray(make())
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    whole[bit // 8] ^= 1 << bit % 8
    try:
        layout = read(bytes(whole))
    except BadBlock:
        return
    # Only the header's padding may change without harm.
    assert layout == LAYOUT
    assert make()[bit // 8] == ord(" ")


@given(st.integers(0, len(make()) - 1))
def test_no_beginning_of_a_file_is_taken_for_it(length: int) -> None:
    with pytest.raises(BadBlock):
        read(make()[:length])


@given(st.binary(max_size=300))
def test_junk_is_refused(junk: bytes) -> None:
    with pytest.raises(BadBlock):
        read(junk)
