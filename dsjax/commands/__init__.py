"""The sub-commands of run.py: each file parses its options, calls a room and prints.

A command is a module of the command's name with a function `run` of the arguments after that name,
which returns the exit code and raises ValueError for bad input.
"""

FAILED, BAD_INPUT = 1, 2
"""Exit codes."""
COMMANDS = (
    "train", "generate", "convert", "info", "tokenize", "compare", "precision", "bench", "profile",
    "plan",
)  # fmt: skip
