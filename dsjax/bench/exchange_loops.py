"""Sustained time of a call between several devices, from loops that run on them.

* A call from Python costs about 200 us for four devices and a program's start about 1 ms. So the
  call is repeated inside one jitted program, on the same buffers, and what counts is the slope: two
  loops of different lengths, the difference of their times over the difference of their calls.
  XLA is kept from moving the call, which is the same every time, out of the loop.
* Before each pass the devices work for 200 ms or more. A pass is the median of seven slopes, of
  fewer where a loop is long; functions that are compared are timed in turn over three passes, and
  the median of the passes counts.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dsjax.bench.timing import Method, Timing

AXIS = "expert"
SHORT, MORE, MOST = 10, 4, 4096  # calls of the short loop; more calls of the long one, at most
STAY = "while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion"
LONG_PASS = 10  # stretches after which a pass takes no further slope


@dataclass(frozen=True)
class Cards:
    """The devices of this process in the order of their ids, as a mesh of one axis."""

    mesh: Mesh

    @classmethod
    def present(cls) -> Cards:
        """ValueError for less than two devices and in a program of several processes."""
        if (processes := jax.process_count()) > 1:
            raise ValueError(f"there are {processes} processes: expected one that has all devices")
        devices = sorted(jax.devices(), key=lambda device: device.id)
        if len(devices) < 2:
            raise ValueError(
                f"there is one device, {devices[0].device_kind}: an exchange needs 2 or more in "
                "one process (JAX_NUM_CPU_DEVICES=8 makes as many of a CPU)"
            )
        return cls(Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,)))

    @property
    def count(self) -> int:
        return self.mesh.size

    def program(self, function: Callable[..., Any], without: str = "") -> Callable[..., Any]:
        """Jitted, of arrays whose first axis holds the devices' parts behind one another.

        XLA leaves out the passes that `without` names.
        """
        spec = PartitionSpec(AXIS)
        mapped = jax.shard_map(
            function, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False
        )
        options = {"xla_disable_hlo_passes": without} if without else None
        return jax.jit(mapped, compiler_options=options)

    def divided(self, x: jax.typing.ArrayLike) -> jax.Array:
        """An array of that kind."""
        return jax.device_put(x, NamedSharding(self.mesh, PartitionSpec(AXIS)))


def begun(
    function: Callable[..., Any], state: Callable[..., Any] | None, operands: Sequence[Any]
) -> Callable[..., Any]:
    """The function, given what `state`, if any, makes of the operands in the program traced."""
    return function if state is None else functools.partial(function, state(*operands))


class Loop:
    """A function of a device's arrays, called again and again on the same ones.

    Where there is a `state`, it is made of the arrays before the first call, and given to all.
    """

    def __init__(
        self, cards: Cards, function: Callable[..., Any], operands: Sequence[Any], method: Method,
        state: Callable[..., Any] | None = None,
    ):  # fmt: skip
        self._cards, self._operands = cards, tuple(operands)
        self._function, self._state = function, state
        self._calls = SHORT if method.on_card else 1
        self._short = self._program(self._calls)
        self._run(self._short)  # compiles
        each = self._run(self._short) / (self._calls + 1)
        wanted = min(max(method.stretch / each, MORE), MOST)
        self._more = 1 << (round(wanted) - 1).bit_length()  # the same program in another run
        self._long = self._program(self._calls + self._more)
        self._run(self._long)

    def outputs(self) -> Any:
        """What the last call of the timed loop gave."""
        return jax.block_until_ready(self._long(*self._operands))

    def warm(self, seconds: float) -> None:
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            self._run(self._short)

    def slope(self) -> float:
        """Seconds a call; where noise is longer than all calls, as on a CPU, an upper bound."""
        short, long = self._run(self._short), self._run(self._long)
        found = (long - short) / self._more
        return found if found > 0 else long / (self._calls + self._more + 1)

    def read(self, method: Method) -> float:
        """The median of several slopes."""
        found, start = [], time.perf_counter()
        while len(found) < method.stretches:
            found.append(self.slope())
            if time.perf_counter() - start > LONG_PASS * method.stretch * method.stretches:
                break
        return statistics.median(found)

    def _program(self, calls: int) -> Callable[..., Any]:
        def loop(*operands: Any) -> Any:
            function = begun(self._function, self._state, operands)

            def again(i: jax.Array, _: Any) -> Any:  # the barrier: enough for a GPU, not a CPU
                held, _ = lax.optimization_barrier((operands, i))
                return function(*held)

            return lax.fori_loop(0, calls, again, function(*operands))

        return self._cards.program(loop, STAY)

    def _run(self, program: Callable[..., Any]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(program(*self._operands))
        return time.perf_counter() - start


def in_turn(loops: dict[str, Loop], method: Method) -> dict[str, Timing]:
    """Time them beside each other, in that order in every pass."""
    readings: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(method.passes):
        for name, loop in loops.items():
            loop.warm(method.warm)
            readings[name].append(loop.read(method))
    return {
        name: Timing(statistics.median(found), tuple(found), "wall")
        for name, found in readings.items()
    }
