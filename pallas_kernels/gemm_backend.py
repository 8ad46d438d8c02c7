"""Which module multiplies, and what its products say to differentiation."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Literal, NoReturn

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.device import is_hopper, require_hopper

Backend = Literal["auto", "mosaic_gpu", "reference"]
BACKENDS = ("auto", "mosaic_gpu", "reference")


def check(backend: Backend) -> None:
    """ValueError unless there is such a backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}: use one of {', '.join(BACKENDS)}")


def takes_kernels(backend: Backend) -> bool:
    """Whether kernels for Hopper run; ValueError where they are asked for and cannot."""
    check(backend)
    if backend == "mosaic_gpu":
        require_hopper(backend)
    return backend != "reference" and is_hopper()


def products(backend: Backend) -> ModuleType:
    """`sm90_gemm` or `gemm_reference`: they hold functions of the same names and arguments."""
    if takes_kernels(backend):
        from pallas_kernels import sm90_gemm as module
    else:
        from pallas_kernels import gemm_reference as module
    return module


def multiply(
    name: str,
    instead: str,
    product: Callable[..., jax.Array],
    *operands: jax.Array | None,
    shape: tuple[int, ...],
    out_dtype: DTypeLike | None = None,
    sum_bits: int | None = None,
) -> jax.Array:
    """`product(*operands, out_dtype, sum_bits)`, zeros of that shape where an operand is empty.

    TypeError where JAX would differentiate it: else the reference had gradients that the kernels
    lack. A product without an `out_dtype` gives float32; sum_bits of None is left out.
    """
    if not all(x.size for x in operands if x is not None):
        return jnp.zeros(shape, out_dtype or jnp.float32)
    static = tuple(given for given in (out_dtype, sum_bits) if given is not None)

    @jax.custom_jvp
    def guarded(*operands: jax.Array | None) -> jax.Array:
        return product(*operands, *static)

    @guarded.defjvp
    def refuse(primals: tuple, tangents: tuple) -> NoReturn:
        raise TypeError(f"{name} is not differentiable: use {instead}")

    return guarded(*operands)
