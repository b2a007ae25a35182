"""What is told of a worker's state, and to clients when there is no worker for them."""

from __future__ import annotations

from mlx_serving.errors import Overloaded
from mlx_serving.worker import port
from mlx_serving.worker.breaker import Breaker, Closed, HalfOpen, Open

DOWN_RETRY_S = 30.0


def unavailable(state: port.WorkerState, now_s: float) -> Overloaded:
    """503 with the cause, and when to come again."""
    match state:
        case port.Failed(cause):
            return Overloaded(f"the worker is down: {brief(cause)}", retry_after_s=DOWN_RETRY_S)
        case port.CircuitOpen(_, cause):
            message = f"the worker keeps dying: {brief(cause)}"
            return Overloaded(message, retry_after_s=max(1.0, retry_in_s(state, now_s) or 0.0))
        case port.Restarting(_, in_s, cause):
            message = f"the worker is restarting: {brief(cause)}"
            return Overloaded(message, retry_after_s=max(1.0, in_s))
    return Overloaded("the worker is starting", retry_after_s=1.0)


def retry_in_s(state: port.WorkerState, now_s: float) -> float | None:
    """Until an open circuit is tried again; None when it is not open."""
    return max(0.0, state.until_s - now_s) if isinstance(state, port.CircuitOpen) else None


def brief(cause: str) -> str:
    """How a worker ended, and the telling line of its last words; the log has them all."""
    how, *words = cause.splitlines() or [""]
    telling = words[-1:] if words and words[0].startswith("Traceback") else words[:1]
    return "\n".join((how, *telling))


def tag(state: port.WorkerState) -> str:
    """As /health has it."""
    return str(state.__struct_config__.tag)


def breaker_name(breaker: Breaker) -> str:
    match breaker:
        case Closed():
            return "closed"
        case Open():
            return "open"
        case HalfOpen():
            return "half_open"
