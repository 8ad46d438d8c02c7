"""What the device itself can do: XLA's matmuls and a copy, and sizes that suit the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from dsjax.bench.products import Operands, make, xla
from dsjax.bench.shapes import Kind, Shape, Work, work
from dsjax.bench.timing import Method, Program, interleaved
from pallas_kernels.device import is_gpu

XLA_FP8, XLA_BF16 = "xla_fp8", "xla_bf16"


@dataclass(frozen=True)
class Device:
    """Sizes that suit the device: a card's, or ones that a CPU finishes too."""

    side: int
    copied: int
    rotated: int  # bytes of buffer sets at least: more than fit in L2
    held: int  # bytes of buffer sets at most
    most_sets: int
    checked: int  # flops of the largest product that is checked

    @classmethod
    def present(cls) -> Device:
        if is_gpu():
            return cls(8192, 1 << 30, 200_000_000, 4 << 30, 60, 20 * 10**12)
        return cls(256, 1 << 22, 0, 1 << 28, 2, 10**10)

    def sets(self, each: Work) -> int:
        """Buffer sets of one program: past L2, and about 2 ms of a fast card's work."""
        nominal = max(each.flops / 1e15, each.bytes / 4e12)
        wanted = max(math.ceil(self.rotated / each.bytes), math.ceil(2e-3 / nominal))
        return max(2, min(wanted, self.held // each.bytes, self.most_sets))


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s of XLA's matmuls and bytes/s of a copy."""

    fp8: float
    bf16: float
    bandwidth: float

    def flops(self, kind: Kind) -> float:
        return self.bf16 if kind == "bf16" else self.fp8

    def least_seconds(self, kind: Kind, each: Work) -> float:
        """The roofline's bound."""
        return max(each.flops / self.flops(kind), each.bytes / self.bandwidth)


def measure_ceilings(device: Device, method: Method) -> Ceilings:
    side = Shape(device.side, device.side, device.side)
    flops = work("dense", side).flops
    programs = {
        XLA_FP8: Program(xla, buffers("dense", side, device)),
        XLA_BF16: Program(xla, buffers("bf16", side, device)),
    }
    matmuls = interleaved(programs, method)
    blank = [jnp.full(device.copied // 4, i, jnp.float32) for i in range(2)]
    copy = interleaved({"copy": Program(jnp.negative, blank)}, method)["copy"]
    return Ceilings(
        fp8=flops / matmuls[XLA_FP8].seconds,
        bf16=flops / matmuls[XLA_BF16].seconds,
        bandwidth=2 * device.copied / copy.seconds,
    )


def buffers(kind: Kind, shape: Shape, device: Device) -> list[Operands]:
    """Different operands, enough sets of them that none is left in L2 from its last turn."""
    count = device.sets(work(kind, shape))
    return [make(jax.random.key(seed), kind, shape) for seed in range(count)]
