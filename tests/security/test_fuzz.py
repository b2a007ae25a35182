"""A few seconds of each fuzzer; `make fuzz MINUTES=10` runs them for longer."""

from __future__ import annotations

import logging

import pytest

from security.fuzz import TARGETS, fuzz


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_breaks(name: str) -> None:
    logging.disable(logging.CRITICAL)
    try:
        fuzz(name, 50)
    finally:
        logging.disable(logging.NOTSET)
