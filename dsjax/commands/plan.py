"""run.py plan."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.table import Table

from dsjax.commands.terminal import console, say


@dataclass(frozen=True)
class PlanCommand:
    """Place a run's experts, with copies of heavily loaded ones, on GPUs by the loads of its last
    evaluation (EPLB)."""

    run: Annotated[Path, tyro.conf.Positional]
    gpus: int = 4
    nodes: int = 1
    """Hosts that the GPUs are in."""
    replicas: int | None = None
    """Places of all GPUs together; by default one more on each GPU than experts need."""
    out: Path | None = None
    """Folder of plan.json and plan.png; by default that of the run."""


def run(arguments: list[str]) -> int:
    """Print loads before and after, write plan and picture; ValueError for what has no plan."""
    from dsjax.parallel import gpu_loads, imbalance, rebalance_experts
    from dsjax.parallel.balance_picture import draw_balance

    command = tyro.cli(PlanCommand, args=arguments, prog="run.py plan")
    load, groups = _measured(command.run)
    experts = load.shape[1]
    if command.gpus < 1 or experts % command.gpus:
        raise ValueError(f"gpus is {command.gpus}: it does not divide {experts} experts")
    replicas = experts + command.gpus if command.replicas is None else command.replicas
    plan = rebalance_experts(load, replicas, groups, command.nodes, command.gpus)
    in_order = np.tile(np.arange(experts), (len(load), 1)), np.ones_like(load)
    before = gpu_loads(load, *in_order, command.gpus)
    after = gpu_loads(load, plan.physical_to_logical, plan.logical_count, command.gpus)
    _show(imbalance(before), imbalance(after))
    out = command.out or command.run
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({name: part.tolist() for name, part in plan._asdict().items()})
    (out / "plan.json").write_text(text)
    say(f"wrote {out / 'plan.json'}, {draw_balance(before, after, out / 'plan.png')}")
    return 0


def _measured(folder: Path) -> tuple[np.ndarray, int]:
    """Tokens of each expert [l, e] in the run's last evaluation, and the groups of experts."""
    from dsjax.checkpoint import CheckpointStore
    from dsjax.train import CHECKPOINTS
    from dsjax.train.metrics import JSONL, read_lines
    from dsjax.train.notes import from_notes

    if not (folder / JSONL).is_file() or not (folder / CHECKPOINTS).is_dir():
        raise ValueError(f"{folder} holds no run: name a folder that run.py train has written")
    found = [line["load"] for line in read_lines(folder / JSONL) if line.get("load")]
    if not found:
        raise ValueError(f"{folder} has no evaluation yet, in which experts are counted")
    with CheckpointStore(folder / CHECKPOINTS) as store:
        model = from_notes(store.read_meta()[1]["run"]).model
    return np.array(found[-1]), model.groups


def _show(before: np.ndarray, after: np.ndarray) -> None:
    table = Table("MoE layer", "heaviest GPU before", "after", title="loads, in means of the layer")
    for layer, pair in enumerate(zip(before, after, strict=True)):
        table.add_row(str(layer), *(f"{value:.3f}" for value in pair))
    console.print(table)
