"""run.py info."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from dsjax.commands.recipes import take_recipe
from dsjax.commands.terminal import console
from dsjax.config import Model


def run(arguments: list[str]) -> int:
    """Print sizes, cache and work of a model; ValueError unless one recipe or folder is named."""
    from dsjax.model.sizes import measure, training_work

    if len(arguments) > 1 or (arguments and arguments[0].startswith("-")):
        raise ValueError(f"info takes one recipe or checkpoint folder, not {' '.join(arguments)}")
    if arguments and Path(arguments[0]).is_dir():
        from dsjax.hf import read_config

        name, model, seq_len = arguments[0], read_config(Path(arguments[0])), 4096
    else:
        recipe, _ = take_recipe(arguments)
        name, model, seq_len = recipe.name, recipe.model, recipe.data.seq_len
    sizes, work = measure(model), training_work(model, seq_len)
    table = Table(title=name, show_header=False)
    rows = [
        ("parameters", _billions(sizes.total)),
        ("active a token", f"{_billions(sizes.active)} (the embedding is a look-up)"),
        ("MTP, its own", f"{_billions(sizes.mtp)} ({_billions(sizes.mtp - sizes.mtp_projection)} "
                         "without the projection, as the report counts)"),
        ("MTP, active", f"{_billions(sizes.mtp_active - sizes.mtp_projection)} with the shared "
                        "embedding and head"),
        ("latent cache, bf16", f"{sizes.cache_bytes:,} bytes a token"),
        ("training work", f"{work.causal / 1e9:,.2f} GFLOP a token at {seq_len} tokens (causal; "
                          f"{work.full / 1e9:,.2f} with full attention)"),
        ("layers", f"{model.layers}, {model.dense_layers} of them dense"),
        ("experts", _experts(model)),
    ]  # fmt: skip
    for row in rows:
        if model.mtp_depth or not row[0].startswith("MTP"):
            table.add_row(*row)
    console.print(table)
    return 0


def _experts(model: Model) -> str:
    groups = f"; {model.top_groups} of {model.groups} groups" if model.groups > 1 else ""
    return f"{model.top_k} of {model.experts} routed, {model.shared_experts} shared{groups}"


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e8 else f"{count / 1e6:.2f}M"
