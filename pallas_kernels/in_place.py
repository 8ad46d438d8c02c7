"""Arrays that a kernel changes in place.

XLA may fuse a custom call with a slice that it reads or an update that it feeds, and then forgets
that operand and result are one buffer: what the kernel does not write is lost. Barriers prevent it.
A kernel's semaphores are such arrays, too, zeros that it is given: it would start with others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def borrow(x: jax.Array) -> Any:
    """A ref for a kernel to write to; a copy of x only where x is used afterwards."""
    return jax.new_ref(lax.optimization_barrier(x))


def give_back(ref: Any) -> jax.Array:
    """The array, with what the kernel wrote."""
    return lax.optimization_barrier(jax.freeze(ref))


def unfused(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that has semaphores in memory, for XLA to leave alone."""
    return lambda *operands: lax.optimization_barrier(kernel(*lax.optimization_barrier(operands)))
