"""Checks of what callers hand to the GEMMs: a refusal names the value and what would fit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

E4M3 = jnp.float8_e4m3fn
BLOCK = 128  # columns that share a scale; of a weight the rows too
ROW_BYTES = 16  # TMA's unit: rows of the operands and of the output are whole multiples
N_STEP = 8
FRACTION_BITS = 23  # of float32


def ceil_div[Size: (int, jax.Array, np.ndarray)](size: Size, step: int) -> Size:
    return -(-size // step)


def array(name: str, x: jax.Array, form: str, *dtypes: jax.typing.DTypeLike) -> None:
    """x must have the dimensions that `form` lists ("[M, K]", "[..., K]") and one of the dtypes."""
    open_ended = "..." in form
    named = form.count(",") + (not open_ended)
    ranked = x.ndim >= named if open_ended else x.ndim == named
    if not ranked or x.dtype not in [jnp.dtype(dtype) for dtype in dtypes]:
        wanted = " or ".join(jnp.dtype(dtype).name for dtype in dtypes)
        raise ValueError(f"{name} is {_described(x)}: expected {wanted} {form}")


def exact(
    name: str, x: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike = jnp.float32
) -> None:
    if x.shape != shape or x.dtype != dtype:
        raise ValueError(f"{name} is {_described(x)}: expected {jnp.dtype(dtype).name} {shape}")


def fp8(name: str, q: jax.Array, scale: jax.Array, form: str, *, rows: int = 1) -> None:
    """q must be e4m3 of that form, with a float32 scale for every `rows` x 128 of it."""
    array(name, q, form, E4M3)
    *groups, height, width = q.shape
    exact(f"{name}_scale", scale, (*groups, ceil_div(height, rows), ceil_div(width, BLOCK)))


def product(a: jax.Array, b: jax.Array) -> None:
    """a [..., M, K] and b [..., N, K] must agree in K, in lengths that the kernels take."""
    same("K", -1, a=a, b=b)
    multiple("K", a.shape[-1], ROW_BYTES // a.dtype.itemsize)
    multiple("N", b.shape[-2], N_STEP)


def multiple(letter: str, size: int, step: int) -> None:
    if size % step:
        raise ValueError(f"{letter} is {size}: expected a multiple of {step}")


def same(letter: str, axis: int, **arrays: jax.Array) -> None:
    """The arrays must be equally long along that axis."""
    if len({x.shape[axis] for x in arrays.values()}) > 1:
        found = " and ".join(f"{x.shape[axis]} in {name} {x.shape}" for name, x in arrays.items())
        raise ValueError(f"{letter} is {found}: expected the same")


def out_dtype(dtype: jax.typing.DTypeLike) -> None:
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"out_dtype is {jnp.dtype(dtype).name}: expected bfloat16 or float32")


def sum_bits(bits: int | None) -> None:
    if bits is not None and not 1 <= bits <= FRACTION_BITS:
        raise ValueError(f"sum_bits is {bits}: expected 1 to {FRACTION_BITS}, or None for them all")


def group_sizes(
    sizes: jax.Array, groups: int | None, total: int, letter: str = "M", *, unit: int = 1
) -> None:
    """int32 [groups], of any length for None.

    Known values are 0 or more and, each rounded up to `unit`, add up to `total` at most.
    """
    array("group_sizes", sizes, "[G]", jnp.int32)
    exact("group_sizes", sizes, sizes.shape if groups is None else (groups,), jnp.int32)
    known = _known(sizes)
    _within("group_sizes", known, 0, None, "0 or more")
    if (used := unit * int(ceil_div(known, unit).sum())) > total:
        whole = f" in whole blocks of {unit}" if unit > 1 else ""
        raise ValueError(
            f"group_sizes {known.tolist()} add up to {used}{whole}: "
            f"expected at most {letter} = {total}"
        )


def counts(counts: jax.Array, groups: int, most: int) -> None:
    """int32 [G]; where known, each 0 to `most`."""
    exact("counts", counts, (groups,), jnp.int32)
    _within("counts", _known(counts), 0, most, f"0 to M_max = {most}")


def _within(name: str, known: np.ndarray, least: int, most: int | None, wanted: str) -> None:
    wrong = (known < least) | (known > (np.inf if most is None else most))
    if wrong.any():
        first = int(np.argmax(wrong))
        raise ValueError(f"{name}[{first}] is {known[first]}: expected {wanted}")


def _known(x: jax.Array) -> np.ndarray:
    """The values, none of them while they are being traced."""
    return np.asarray([] if isinstance(x, Tracer) else x, np.int64)


def _described(x: jax.Array) -> str:
    return f"{x.dtype} {x.shape}"
