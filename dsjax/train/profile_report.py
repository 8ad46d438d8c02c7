"""A profile for people and for programs: tables on the screen, and profile.json."""

from __future__ import annotations

import datetime
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from dsjax.train.memory import readable
from dsjax.train.notes import as_notes
from dsjax.train.peak import device_peak
from dsjax.train.profile import Profile
from dsjax.train.trace import Operation
from dsjax.train.work import KindTime

JSON = "profile.json"
TABLE_WIDTH = 144
NAME_WIDTH, SCOPE_WIDTH = 44, 34
NO_TRACE = (
    "where the time goes is not known: on this platform the profiler shows no operations of the "
    "step; everything else was measured"
)


def print_report(console: Console, found: Profile, top: int) -> None:
    """Speed, memory, kinds of operations and the `top` longest operations, on the screen."""
    wide = Console(file=console.file, width=max(TABLE_WIDTH, console.width),
                   force_terminal=console.is_terminal)  # fmt: skip
    for line in headlines(found):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    wide.print(_memory_table(found))
    if not found.timeline.operations:
        console.print(NO_TRACE, soft_wrap=True)
        return
    wide.print(_kind_table(found))
    console.print(_about_rates(), highlight=False, soft_wrap=True)
    wide.print(_operation_table(found, top))


def headlines(found: Profile) -> list[str]:
    """Speed in words."""
    rate, device = found.utilisation, jax.devices()[0].device_kind
    lines = [
        f"{found.run.name} on {jax.device_count()} x {device}: {found.tokens_per_second:,.0f} "
        f"tokens/s, {_ms(found.seconds)} ms a step of {found.tokens:,} tokens (mean of "
        f"{found.steps})"
    ]
    if "mfu" in rate:
        lines.append(
            f"MFU {rate['mfu']:.1%} with attention to all keys, as DeepSeek counts; "
            f"{rate['mfu_causal']:.1%} causal"
        )
    else:
        tera = rate["model_flops_per_second"] / 1e12
        lines.append(f"{tera:.3g} model TFLOP/s, causal; no MFU: the peak of {device} is not known")
    if found.timeline.operations:
        lines.append(
            f"traced: {_ms(found.timeline.seconds)} ms a step, {_ms(found.timeline.busy)} ms of "
            "them at work"
        )
    return lines


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", no_wrap=True)
    return table


def _memory_table(found: Profile) -> Table:
    table = _table("memory of one device", "for", "bytes", "known from")
    for what, count, source in found.memory.rows():
        table.add_row(what, "" if count is None else readable(count), source)
    table.columns[2].justify = "left"
    return table


def _kind_table(found: Profile) -> Table:
    table = _table("where a traced step goes", "kind", "calls", "ms", "share", "TFLOP/s", "of peak")
    for row in found.kinds:
        rate, share = row.rate, row.share_of_peak
        table.add_row(row.kind, f"{row.calls:,.0f}", _ms(row.seconds), f"{row.share:.1%}",
                      f"{rate / 1e12:.3g}" if rate else "",
                      f"{share:.0%}" if share else "")  # fmt: skip
    idle = found.timeline.seconds - found.timeline.busy
    table.add_row("nothing runs", "", _ms(idle), f"{idle / found.timeline.seconds:.1%}", "", "")
    return table


def _about_rates() -> str:
    about = (
        "TFLOP/s: the model's FLOPs by formula, attention causal; what is computed again adds none"
    )
    if peak := device_peak():
        fp8 = f", {peak.fp8 / 1e12:,.0f} in FP8" if peak.fp8 else ""
        about += f". Peak: {peak.bf16 / 1e12:,.0f} in bf16{fp8}, by the maker's data sheet"
    return about


def _operation_table(found: Profile, top: int) -> Table:
    operations = found.timeline.operations[:top]
    told = any(operation.bytes for operation in operations)
    table = _table(f"the {len(operations)} longest operations", "operation", "kind", "scope",
                   "calls", "ms", "share", *(["GB/s"] if told else []), left=3)  # fmt: skip
    for operation in operations:
        share, speed = operation.seconds / found.timeline.seconds, _gbytes_per_s(operation)
        cells = [
            _short(operation.name, NAME_WIDTH), operation.kind,
            _short(operation.scope, SCOPE_WIDTH), f"{operation.calls:,.0f}",
            _ms(operation.seconds), f"{share:.1%}", "" if speed is None else f"{speed:,.0f}",
        ]  # fmt: skip
        table.add_row(*cells[: len(table.columns)])
    return table


def _ms(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:,.0f}" if ms >= 1000 else f"{ms:.3g}" if ms >= 0.001 else "0"


def _short(name: str, width: int) -> str:
    return name if len(name) <= width else f"{name[: width - 3]}..."


def _gbytes_per_s(operation: Operation) -> float | None:
    if operation.bytes is None or not operation.seconds:
        return None
    return operation.bytes / operation.seconds / 1e9


def write_json(path: Path, found: Profile) -> Path:
    """All of it; times and counts are of a step on one device, None stands for "not known"."""
    peak, line = device_peak(), found.timeline
    content = {
        "run": as_notes(found.run),
        "environment": {
            "device": jax.devices()[0].device_kind, "devices": jax.device_count(),
            "jax": jax.__version__, "platform": jax.devices()[0].client.platform_version,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        },
        "peak_tflops": {
            "bf16": peak.bf16 / 1e12 if peak else None,
            "fp8": peak.fp8 / 1e12 if peak and peak.fp8 else None,
        },
        "steps": found.steps, "tokens": found.tokens, "step_ms": found.seconds * 1e3,
        "tokens_per_second": found.tokens_per_second,
        "mfu": None, "mfu_causal": None, **found.utilisation,
        "memory": {**asdict(found.memory), "planned": found.memory.planned},
        "traced": {"step_ms": line.seconds * 1e3, "busy_ms": line.busy * 1e3},
        "kinds": [_kind(row) for row in found.kinds],
        "operations": [_operation(each, line.seconds) for each in line.operations],
    }  # fmt: skip
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def _kind(row: KindTime) -> dict[str, Any]:
    return {
        "kind": row.kind, "calls": row.calls, "ms": row.seconds * 1e3, "share": row.share,
        "tflops": row.rate / 1e12 if row.rate else None, "share_of_peak": row.share_of_peak,
    }  # fmt: skip


def _operation(operation: Operation, step: float) -> dict[str, Any]:
    return {
        "name": operation.name, "kind": operation.kind, "scope": operation.scope,
        "calls": operation.calls, "ms": operation.seconds * 1e3,
        "share": operation.seconds / step, "gbytes_per_s": _gbytes_per_s(operation),
    }  # fmt: skip
