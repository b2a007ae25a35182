"""A step plan on one line, for the simulation's log."""

from __future__ import annotations

from mlx_serving.runtime.core.plan import StepPlan


def brief(plan: StepPlan) -> str:
    parts = [f"#{plan.step_id}"]
    if plan.frees:
        parts.append(f"free {list(plan.frees)}")
    if plan.moves:
        parts.append("move " + " ".join(f"{a}>{b}" for a, b in plan.moves))
    if plan.starts:
        copied = {s.seq_id: f"+{s.reused}" if s.reused else "" for s in plan.starts}
        parts.append(
            "start " + " ".join(f"{s.seq_id}@{s.row}{copied[s.seq_id]}" for s in plan.starts)
        )
    if plan.prefill:
        parts.append(
            "prefill "
            + " ".join(f"{c.seq_id}[{c.start}:+{len(c.token_ids)}]" for c in plan.prefill)
        )
    if plan.decode:
        parts.append(
            "decode "
            + " ".join(f"{d.seq_id}[{d.position}:+{1 + len(d.forced)}]" for d in plan.decode)
        )
    if plan.publish:
        parts.append(
            "publish " + " ".join(f"{p.seq_id}[{p.start}:]>{list(p.blocks)}" for p in plan.publish)
        )
    return " ".join(parts)
