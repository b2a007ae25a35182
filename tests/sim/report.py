"""What a simulation has seen."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Report:
    """What happened, for a glance and for tests that the injections do happen."""

    seed: int
    steps: int = 0
    tokens: int = 0
    preemptions: int = 0
    """Rows taken away because memory did not suffice."""
    outranked: int = 0
    """Rows that a higher class took."""
    promoted: int = 0
    """Rows given to those who had waited too long."""
    refused: int = 0
    compiled: int = 0
    """Grammars that a waiting sequence waited for."""
    malformed: int = 0
    """Those that were none."""
    evictions: int = 0
    """Rows that paused sequences had to give up."""
    discarded: int = 0
    """Tokens computed past an end or a cancel."""
    deaths: int = 0
    pressures: int = 0
    """Times that memory was taken away for a while."""
    cancelled: int = 0
    rejected: int = 0
    reused: int = 0
    """Tokens copied from prefix blocks."""
    published: int = 0
    dropped: int = 0
    """Prefix blocks evicted."""
    foreseen: int = 0
    """Tokens told before they were sampled."""
    forced: int = 0
    """Tokens computed beside others of their row."""
    awaited: int = 0
    """Steps in which a sequence waited for a prefix that another computed."""
    work: int = 0
    """Steps the requests would take one after another, alone and undisturbed."""
    disturbances: int = 0
    """Deaths, failures and pauses that cost somebody a row's contents."""
    deepest: int = 0
    disk_read: int = 0
    disk_written: int = 0
    disk_lost: int = 0
    disk_not_written: int = 0
    disk_evicted: int = 0
    disk_late: int = 0
