"""Attention of prefill and training, forward and backward, beside cuDNN's.

* The backward pass is timed alone: a set is the vjp function of one forward call, with what that
  saved, and the gradient of its output.
* Packed rows put the sequences of a batch behind one another in one row, with segment ids, which
  is the same work; what the kernels make of the ids is timed too.
* cuDNN wants keys and values of one width: values are padded with zeros from 128 to 192 before the
  timed call. Its rates count the work that is asked for, not the zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, PRNGKeyArray

from dsjax.bench.ceilings import Device
from dsjax.bench.mla_check import checked_row
from dsjax.bench.mla_shapes import QK, VALUE, Kind, Shape, work
from dsjax.bench.rows import OURS, Row, described
from dsjax.bench.timing import Method, Program, interleaved

CUDNN = "cudnn"
SCALE = QK**-0.5
PADDED = f"cuDNN's values padded from {VALUE} to {QK}, before the timed call"
Implementation = Literal["auto", "reference", "cudnn"]


class Operands(NamedTuple):
    """Of one call; cuDNN's v and gradient of the output are padded ones."""

    q: BFloat16[Array, "b t h 192"]
    k: BFloat16[Array, "b t h 192"]
    v: BFloat16[Array, "b t h v"]
    d_out: BFloat16[Array, "b t h v"]


def measure_prefill(kind: Kind, shape: Shape, device: Device, method: Method) -> Row[Kind, Shape]:
    """Time a row, in turn with cuDNN if it is not packed, and check it."""
    sets = [make(jax.random.key(i), shape) for i in range(device.sets(work(kind, shape)))]
    programs, note = dict[str, Program](), ""
    if not packed(kind):
        programs, note = cudnn_program(kind, [padded(each) for each in sets])
    programs[OURS] = program(kind, "auto", sets, segment_ids(kind, shape))
    timings = interleaved(programs, method)

    def reference() -> Any:
        return call(kind, "reference")(None, sets[0])

    row = Row(kind, shape, timings, note=note)
    return checked_row(row, programs[OURS].outputs()[0], reference, device)


def packed(kind: Kind) -> bool:
    return kind.startswith("packed")


def backward(kind: Kind) -> bool:
    return kind.endswith("backward")


@functools.partial(jax.jit, static_argnames="shape")
def make(key: PRNGKeyArray, shape: Shape) -> Operands:
    widths = (QK, QK, VALUE, VALUE)
    keys = jax.random.split(key, len(widths))
    front = (shape.b, shape.t, shape.h)
    draw = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
    return Operands(*(draw(key, (*front, width)) for key, width in zip(keys, widths, strict=True)))


@jax.jit
def padded(x: Operands) -> Operands:
    ends = ((0, 0), (0, 0), (0, 0), (0, QK - VALUE))
    return x._replace(v=jnp.pad(x.v, ends), d_out=jnp.pad(x.d_out, ends))


def segment_ids(kind: Kind, shape: Shape) -> jax.Array | None:
    """Of all sequences in one row."""
    return jnp.repeat(jnp.arange(shape.b), shape.t)[None] if packed(kind) else None


def attend(
    implementation: Implementation, ids: Any, q: jax.Array, k: jax.Array, v: jax.Array
) -> jax.Array:
    """Causal attention within each sequence of q [b, t, h, 192]; in one packed row with ids."""
    from pallas_kernels.mla_attention import mla_attention

    if implementation == "cudnn":
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, scale=SCALE, implementation="cudnn"
        )
    rows = (q, k, v) if ids is None else [x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v)]
    out, _ = mla_attention(*rows, scale=SCALE, segment_ids=ids, backend=implementation)
    return out.reshape(v.shape)


@functools.cache
def saved(implementation: Implementation) -> Callable[[Any, Operands], Any]:
    """The vjp function at operands: a pytree with what the forward call saved."""

    def vjp(ids: Any, x: Operands) -> Any:
        return jax.vjp(functools.partial(attend, implementation, ids), x.q, x.k, x.v)[1]

    return jax.jit(vjp)


@functools.cache
def call(kind: Kind, implementation: Implementation) -> Callable[[Any, Operands], Any]:
    """What a row computes: the output, or the gradients of q, k and v."""

    def forward(ids: Any, x: Operands) -> jax.Array:
        return attend(implementation, ids, x.q, x.k, x.v)

    def gradients(ids: Any, x: Operands) -> Any:
        return saved(implementation)(ids, x)(x.d_out)

    return jax.jit(gradients if backward(kind) else forward)


def program(
    kind: Kind, implementation: Implementation, sets: list[Operands], ids: Any = None
) -> Program:
    if not backward(kind):
        return Program(call(kind, implementation), sets, (ids,))
    vjps = [saved(implementation)(ids, each) for each in sets]
    pairs = [(vjp, each.d_out) for vjp, each in zip(vjps, sets, strict=True)]
    return Program(lambda pair: pair[0](pair[1]), pairs)


def cudnn_program(kind: Kind, sets: list[Operands]) -> tuple[dict[str, Program], str]:
    """cuDNN's call, or none and why it cannot be made; the note of the row."""
    try:
        found = program(kind, "cudnn", sets)
        found.outputs()
    except Exception as problem:  # whatever XLA says of a shape or device it does not take
        return {}, f"without cuDNN: {described(problem)}"
    return {CUDNN: found}, PADDED
