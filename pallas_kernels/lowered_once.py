"""Kernels that a program lowers and compiles once, however many calls of them it holds.

Pallas lowers a kernel wherever it is called, which takes Mosaic 0.3 to 3 s, and XLA compiles each
of the results: two calls from different lines count as different kernels. Calls of one jitted
function with equal shapes share what is lowered.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax


def lowered_once(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel under `jax.jit`; arguments that are given by keyword alone are static."""
    parameters = inspect.signature(kernel).parameters.values()
    static = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return jax.jit(kernel, static_argnames=static)
