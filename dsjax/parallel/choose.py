"""Which exchange a run's experts get on its mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jax.sharding import Mesh

from dsjax.parallel.across_hosts import AcrossHosts
from dsjax.parallel.exchange import Spread, SpreadBy, Transport
from dsjax.parallel.nvlink import NvLink, missing_for_nvlink
from dsjax.parallel.transports import Dense, Ragged
from pallas_kernels.device import is_gpu
from pallas_kernels.token_order import HERE, Exchange

if TYPE_CHECKING:
    from dsjax import config


def choose_exchange(wanted: config.Exchange, mesh: Mesh) -> Exchange:
    """The exchange over a mesh's `host` and `expert` axes that a run's configuration asks for.

    Raises ValueError for a transport that this mesh cannot have, naming one that it can.
    """
    hosts, ranks = mesh.shape["host"], mesh.shape["expert"]
    if hosts * ranks == 1:
        return HERE
    if hosts == 1:
        return _on_host(wanted, mesh, 1, wanted.fp8)
    # Tokens that have crossed between hosts in e4m3 go on as they are.
    inner = _on_host(wanted, mesh, hosts, False)
    return AcrossHosts("host", hosts, _between(wanted), inner, wanted.fp8)


def _on_host(wanted: config.Exchange, mesh: Mesh, hosts: int, fp8: bool) -> Spread:
    ranks, missing = mesh.shape["expert"], missing_for_nvlink(mesh)
    if wanted.transport == "nvlink" and missing:
        raise ValueError(
            f"exchange transport is 'nvlink': {missing}; use 'dense', which runs anywhere"
        )
    settings = "expert", ranks, fp8, wanted.room, hosts
    if wanted.transport == "nvlink" or (wanted.transport == "auto" and not missing):
        return NvLink(*settings)
    return SpreadBy(*settings, transport=_between(wanted))


def _between(wanted: config.Exchange) -> Transport:
    if wanted.transport != "ragged":
        return Dense()
    if not is_gpu():
        raise ValueError(
            "exchange transport is 'ragged': XLA compiles it for GPUs only; use 'dense' here"
        )
    return Ragged()
