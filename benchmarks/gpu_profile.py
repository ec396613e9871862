"""Where the time of a visit goes on a CUDA device: its kernels, and the gaps in which it waits for the host."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from lossguide.guidance import Guidance
from lossguide.samplers import Denoiser, Record, sample

STEPS = 8


def busy(spans: Iterable[tuple[float, float]]) -> tuple[float, list[float]]:
    """How long at least one of these `(start, end)` lasts, and the gaps between them, longest first."""
    total, gaps, until = 0.0, [], None
    for start, end in sorted(spans):
        if until is None or start > until:
            gaps += [] if until is None else [start - until]
            total += end - start
            until = end
        elif end > until:
            total += end - until
            until = end
    return total, sorted(gaps, reverse=True)


def summary(events: list[tuple[str, float, float]], visits: int, top: int = 12) -> list[str]:
    """Lines of Markdown on device events `(name, start, end)` in microseconds."""
    if not events:
        return ["The profiler saw no kernel."]
    total, gaps = busy((start, end) for _, start, end in events)
    span = max(end for *_, end in events) - min(start for _, start, _ in events)
    by_name: dict[str, list[float]] = defaultdict(list)
    for name, start, end in events:
        by_name[name].append(end - start)
    lines = [
        f"Per visit: {len(events) / visits:.0f} kernels and copies, {total / visits / 1e3:.2f} ms on the device of "
        f"{span / visits / 1e3:.2f} ms; the device works {total / span:.0%} of the time. "
        f"Gaps of more than 10 us: {sum(gap > 10 for gap in gaps) / visits:.1f}, "
        f"{sum(gap for gap in gaps if gap > 10) / visits / 1e3:.2f} ms; the longest {gaps[0] if gaps else 0:.0f} us.",
        "",
        "| kernel | per visit | ms per visit | share |",
        "|---|---|---|---|",
    ]
    for name, lasted in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:top]:
        shown = name.replace("|", "\\|")[:90]
        ms = sum(lasted) / visits / 1e3
        lines.append(f"| `{shown}` | {len(lasted) / visits:.1f} | {ms:.3f} | {sum(lasted) / total:.0%} |")
    return lines


def profiled(model: Denoiser, guidance: Guidance, batch: int, graphs: bool) -> list[str]:
    """Lines on the visits of a second batch, for which everything is recorded and warm."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    profiler, visits = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]), []
    add = Record.add

    def counted(self: Record, **row) -> None:
        add(self, **row)
        visits.append(row["step"])
        if len(visits) == STEPS + 1:  # the second batch's first visit is done
            torch.cuda.synchronize()
            profiler.start()
        elif len(visits) == 2 * STEPS:
            torch.cuda.synchronize()
            profiler.stop()

    Record.add = counted
    try:
        sample(model, guidance, steps=STEPS, seeds=range(2 * batch), batch_size=batch, graphs=graphs)
    finally:
        Record.add = add
    events = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    return summary(events, STEPS - 1)
