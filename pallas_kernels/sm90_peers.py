"""How a kernel reaches the other ranks of a mesh axis, over NVLink and within one process.

A kernel is written once for two forms of its ranks. `Peers` are the devices along an axis of the
mesh that `jax.shard_map` runs over: remote references, one semaphore a CTA, no multicast. `OneCard`
stacks the arrays of all ranks on one device and gives the grid an axis for them, for tests in
interpret mode, which knows no remote references, and on a single GPU.

Before a kernel that names peers XLA lets all devices of the mesh wait for one another, so that what
ran before is complete everywhere; `finish` is the same at the kernel's end. Where a kernel does
without, ranks tell each other of what they have stored by counters in memory that only grow:
`count_up` and `wait_for`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import sm90_threads as t

LOGICAL = pl.DeviceIdType.LOGICAL
Scalar = Any
Axis = str | tuple[str, ...]


class Ranks(Protocol):
    """What kernels ask of either form."""

    @property
    def count(self) -> int: ...

    @property
    def stacked(self) -> tuple[int, ...]:
        """Leading dimensions that every operand and output has besides its own."""
        ...

    def grid(self, ctas: int) -> dict[str, Any]:
        """`ctas` CTAs a rank, axis "cta"."""
        ...

    def cta(self) -> Scalar:
        """Which of these CTAs this is."""
        ...

    def ctas(self) -> int:
        """How many of them there are."""
        ...

    def semaphores(self) -> dict[str, Any]:
        """Scratch of the kernel: `done`, where there is anybody to wait for."""
        ...

    def rank(self) -> Scalar: ...

    def own(self, ref: Any) -> Any:
        """This rank's part of an operand or output."""
        ...

    def of(self, ref: Any, rank: Scalar) -> Any:
        """That rank's part."""
        ...

    def arrive(self, done: Any) -> None:
        """Tell all ranks that this CTA's traffic is complete."""
        ...

    def wait(self, done: Any, times: int = 1) -> None:
        """Until the same CTA of every rank has told so that often."""
        ...

    def finish(self, done: Any, threads: int = 1) -> None:
        """Both, for so many warpgroups of a CTA."""
        ...


class Slots(NamedTuple):
    """The last clusters of a grid whose others do something else: `sm90_beside`."""

    first: int
    count: int
    cluster: tuple[tuple[str, int], ...]
    """Axes of a cluster and their sizes."""


@dataclasses.dataclass(frozen=True)
class Peers:
    """The devices along `axis`, one name or several, of a mesh with those sizes, in its order.

    Devices are known to a kernel by their place in the mesh: jax wants it to list them in the order
    of their ids (NotImplementedError when lowering), and all of them to belong to one process.
    `slots`: the CTAs that are meant, where they are not the whole grid.
    """

    axis: tuple[str, ...]
    mesh: tuple[tuple[str, int], ...]
    slots: Slots | None = None

    @classmethod
    def along(cls, axis: Axis) -> Peers:
        """Those of the `jax.shard_map` that is being traced.

        Raises ValueError for axes that it does not map and where it leaves other axes to XLA: a
        kernel has to know its place on all of them.
        """
        names = (axis,) if isinstance(axis, str) else tuple(axis)
        mesh = jax.sharding.get_abstract_mesh()
        sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
        if not names or not set(names) <= set(mesh.manual_axes):
            mapped = ", ".join(map(repr, mesh.manual_axes)) or "none"
            raise ValueError(f"axis is {axis!r}: expected one that jax.shard_map maps ({mapped})")
        left = [name for name, size in sizes.items() if size > 1 and name not in mesh.manual_axes]
        if left:
            raise ValueError(
                f"jax.shard_map leaves {left} of the mesh {sizes} to XLA: map them too"
            )
        return cls(names, tuple((name, size) for name, size in sizes.items()))

    @property
    def count(self) -> int:
        return math.prod(size for name, size in self.mesh if name in self.axis)

    @property
    def stacked(self) -> tuple[int, ...]:
        return ()

    def grid(self, ctas: int) -> dict[str, Any]:
        return dict(grid=(ctas,), grid_names=("cta",))

    def cta(self) -> Scalar:
        if self.slots is None:
            return lax.axis_index("cta")
        place = lax.axis_index("slot") - self.slots.first
        for name, size in self.slots.cluster:
            place = place * size + lax.axis_index(name)
        return place

    def ctas(self) -> int:
        if self.slots is None:
            return lax.axis_size("cta")
        return self.slots.count * math.prod(size for _, size in self.slots.cluster)

    def semaphores(self) -> dict[str, Any]:
        return dict(done=plgpu.SemaphoreType.REGULAR) if self.count > 1 else {}

    def rank(self) -> Scalar:
        place, sizes = jnp.int32(0), dict(self.mesh)
        for name in self.axis:
            if sizes[name] > 1:
                place = place * sizes[name] + lax.axis_index(name)
        return place

    def own(self, ref: Any) -> Any:
        return ref

    def of(self, ref: Any, rank: Scalar) -> Any:
        return plgpu.remote_ref(ref, self._place(rank), LOGICAL) if self.count > 1 else ref

    def arrive(self, done: Any) -> None:
        me = self.rank()
        for step in range(1, self.count):
            place = self._place(lax.rem(me + step, jnp.int32(self.count)))
            pl.semaphore_signal(done, device_id=place, device_id_type=LOGICAL)

    def wait(self, done: Any, times: int = 1) -> None:
        if self.count > 1:
            pl.semaphore_wait(done, (self.count - 1) * times, decrement=False)

    def finish(self, done: Any, threads: int = 1) -> None:
        self.arrive(done)
        self.wait(done, threads)

    def _place(self, rank: Scalar) -> Scalar:
        """Which device of the mesh has that rank, of those that share this one's other axes."""
        sizes, coordinates = dict(self.mesh), {}
        for name in reversed(self.axis):
            coordinates[name] = lax.rem(rank, jnp.int32(sizes[name]))
            rank = lax.div(rank, jnp.int32(sizes[name]))
        place = jnp.int32(0)
        for name, size in self.mesh:
            if size > 1:
                own = coordinates[name] if name in coordinates else lax.axis_index(name)
                place = place * size + own
        return place


ALONE = Peers((), ())  # one rank


@dataclasses.dataclass(frozen=True)
class OneCard:
    """All ranks on one device: their arrays lie behind one another on a leading axis."""

    count: int

    @property
    def stacked(self) -> tuple[int, ...]:
        return (self.count,)

    def grid(self, ctas: int) -> dict[str, Any]:
        return dict(grid=(self.count, ctas), grid_names=("rank", "cta"))

    def cta(self) -> Scalar:
        return lax.axis_index("cta")

    def ctas(self) -> int:
        return lax.axis_size("cta")

    def semaphores(self) -> dict[str, Any]:
        return {}

    def rank(self) -> Scalar:
        return lax.axis_index("rank")

    def own(self, ref: Any) -> Any:
        return ref.at[self.rank()]

    def of(self, ref: Any, rank: Scalar) -> Any:
        return ref.at[rank]

    def arrive(self, done: Any) -> None:
        """The end of a kernel is the barrier."""

    def wait(self, done: Any, times: int = 1) -> None:
        """No less."""

    finish = wait


def count_up(*counters: Any) -> None:
    """Add 1 to counters of any ranks, after all this warp has stored, which is complete."""
    one = len(counters) == 1
    fence, order = ("", "release") if one else ("@p fence.release.sys;", "relaxed")
    each = [f" @p red.{order}.sys.global.add.u32 [${i}], 1;" for i in range(len(counters))]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(counters))
    def run(_: Any, *counters: Any) -> None:
        t.ptx(
            "{ .reg .pred p; fence.proxy.async.global; elect.sync _|p, 0xffffffff;"
            f" {fence}{''.join(each)} }}",
            ",".join("l" * len(counters)), *map(t.memory, counters),
        )  # fmt: skip

    run(*counters)


def wait_for(counter: Any, least: Scalar) -> None:
    """Until this rank's counter has come to `least`, for a warpgroup; both may wrap around.

    What was stored before it was counted can then be read, by bulk copies too.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def run(_: Any, counter: Any, least: Any) -> None:
        with utils.single_thread(scope=utils.ThreadSubset.WARPGROUP):
            t.ptx(
                "{ .reg .pred p; .reg .b32 n; again: ld.acquire.sys.global.b32 n, [$0];"
                " sub.s32 n, n, $1; setp.lt.s32 p, n, 0; @p bra again; }",
                "l,r", t.memory(counter), t.registers(least)[0],
            )  # fmt: skip
        utils.warpgroup_barrier()
        t.ptx("fence.proxy.async.global;")

    run(counter, least)
