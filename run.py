"""dsjax from the command line: train, generate, convert, info, tokenize, compare, precision, bench,
profile, plan.

Each sub-command parses, calls and prints; the work is done in the rooms of `dsjax/`. Bad input ends
with one line on stderr and exit code 2 (DSJAX_TRACEBACK=1 shows where it came from).
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import jax

from dsjax.commands import BAD_INPUT, COMMANDS, FAILED


def main(arguments: list[str]) -> int:
    """Run the sub-command that comes first; returns the exit code."""
    if not arguments or arguments[0] not in COMMANDS:
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        usage = f"usage: run.py {{{','.join(COMMANDS)}}} ... (-h after one for its options)"
        print(f"{__doc__}\n{usage}", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else BAD_INPUT
    keep_compiled_programs()
    take_memory()
    try:
        command = importlib.import_module(f"dsjax.commands.{arguments[0]}")
        return command.run(arguments[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return FAILED
    except (ValueError, OSError, RuntimeError) as problem:
        if os.environ.get("DSJAX_TRACEBACK"):
            raise
        print(f"error: {problem}", file=sys.stderr)
        return BAD_INPUT if isinstance(problem, ValueError | OSError) else FAILED


def take_memory() -> None:
    """Most of a GPU's memory for jax, which takes three quarters unless it is told."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")


def keep_compiled_programs() -> None:
    """Compile each program once a machine, unless the environment says where or not to."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "dsjax" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
