"""Where the instructions of a compiled program come from, read from its text."""

from __future__ import annotations

import re

_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r" +(ROOT )?%?([\w.-]+) = ")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLS = re.compile(r"calls=%?([\w.-]+)")


def op_names(hlo: str) -> dict[str, str]:
    """XLA's op_name of every instruction that has one, by the instruction's name.

    A fusion has that of a matmul within it ("dot" if that has none), else its own, else that of its
    root: some fusions have none of their own.
    """
    own, calls, roots, matmuls, computation = {}, {}, {}, {}, ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header[1]
        if not (instruction := _INSTRUCTION.match(line)):
            continue
        root, name = instruction.groups()
        if told := _OP_NAME.search(line):
            own[name] = told[1]
            if root:
                roots[computation] = told[1]
        if " dot(" in line:
            matmuls[computation] = told[1] if told else "dot"
        if called := _CALLS.search(line):
            calls[name] = called[1]
    through = {name: matmuls[called] for name, called in calls.items() if called in matmuls}
    by_root = {name: roots[called] for name, called in calls.items() if called in roots}
    return by_root | own | through
