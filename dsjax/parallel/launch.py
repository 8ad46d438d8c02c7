"""Which of several processes this is, as the environment tells: nothing is started here.

Sources, the first that speaks: plain variables, a SLURM step, an indexed Kubernetes Job. What jax
detects is asked of jax (jax 0.11.2, `jax/_src/clusters`): it has no public name for it.
"""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass

from jax._src.clusters import K8sCluster, SlurmCluster

COORDINATOR, JAX_COORDINATOR = "DSJAX_COORDINATOR", "JAX_COORDINATOR_ADDRESS"
PROCESSES, PROCESS, TIMEOUT = "DSJAX_PROCESSES", "DSJAX_PROCESS", "DSJAX_START_TIMEOUT"
JOB_INDEX = "JOB_COMPLETION_INDEX"
DEFAULT_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Launch:
    """This process among those that train together; ValueError where that cannot be."""

    index: int = 0
    count: int = 1
    coordinator: str | None = None
    """host:port where process 0 listens for the others."""
    source: str = "nothing in the environment"
    """Where this was read from."""
    devices: tuple[int, ...] | None = None
    """The GPUs of this host that are this process's; None for all it sees."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"{self.source}: {self.count} processes: it must be at least 1")
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"{self.source}: process {self.index} of {self.count}: they count from 0 to "
                f"{self.count - 1}"
            )

    def __str__(self) -> str:
        if self.count == 1:
            return "one process"
        return (
            f"process {self.index} of {self.count}, coordinator {self.coordinator} "
            f"(from {self.source})"
        )


def read_launch() -> Launch:
    """What the environment says; ValueError for variables that are half-set or contradict."""
    coordinator = _read_coordinator()
    if PROCESSES in os.environ or PROCESS in os.environ:
        return _from_variables(coordinator)
    found = _from_slurm(coordinator) or _from_kubernetes(coordinator)
    if coordinator and not found:
        name = COORDINATOR if COORDINATOR in os.environ else JAX_COORDINATOR
        raise ValueError(
            f"{name} is {coordinator!r} and neither SLURM nor Kubernetes tells how many processes "
            f"there are: set {PROCESSES} and {PROCESS} too, or unset it"
        )
    return found or Launch()


def read_timeout() -> float:
    """Seconds to wait for the other processes; ValueError if it is not a number above 0."""
    text = os.environ.get(TIMEOUT)
    if text is None:
        return DEFAULT_TIMEOUT_S
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise ValueError(f"{TIMEOUT} is {text!r}: give seconds, a number greater than 0")
    return seconds


def _from_variables(coordinator: str | None) -> Launch:
    if PROCESSES not in os.environ:
        raise ValueError(f"{PROCESS} is {os.environ[PROCESS]!r} and {PROCESSES} is not set")
    count, source = _whole(PROCESSES), f"{PROCESSES}={os.environ[PROCESSES]}"
    if count == 1 and PROCESS not in os.environ:
        return Launch(source=source)
    name = PROCESS if PROCESS in os.environ else JOB_INDEX
    if name not in os.environ:
        raise ValueError(
            f"{source} and {PROCESS} is not set: give each process its own, from 0 to {count - 1}"
        )
    source = f"{source}, {name}={os.environ[name]}"
    if count > 1 and coordinator is None:
        raise ValueError(
            f"{source} and {COORDINATOR} is not set: give all processes the HOST:PORT where "
            "process 0 is to listen"
        )
    return Launch(_whole(name), count, coordinator if count > 1 else None, source)


def _from_slurm(coordinator: str | None) -> Launch | None:
    """A task of an `srun` step; outside of one (a batch script, a shell) this is no such task."""
    if "SLURM_JOB_ID" not in os.environ or "SLURM_STEP_NODELIST" not in os.environ:
        return None
    if os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS")) in (None, "1"):
        return None
    numbers = ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    _, count, index, local = (_whole(name) for name in numbers)
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", str(count))
    if tasks != str(count):
        raise ValueError(
            f"SLURM_STEP_NUM_TASKS is {tasks!r} and SLURM_NTASKS is '{count}': they must be equal; "
            "start with srun"
        )
    address = coordinator or _slurm_coordinator()
    return Launch(index, count, address, "SLURM", _slurm_devices(count, local))


def _slurm_coordinator() -> str:
    nodes = os.environ["SLURM_STEP_NODELIST"]
    if not re.fullmatch(r"[^,\[\]]+(\[[^\[\]]+\])?(,.*)?", nodes):
        raise ValueError(
            f"SLURM_STEP_NODELIST is {nodes!r}, of which the first host cannot be told: set "
            f"{COORDINATOR} to HOST:PORT of the first task"
        )
    return SlurmCluster.get_coordinator_address(None, os.environ.get("JAX_COORDINATOR_PORT"))


def _slurm_devices(count: int, local: int) -> tuple[int, ...] | None:
    """One GPU a task, as jax has it, where tasks share hosts; all GPUs where they do not.

    A step has at least one task on each of its hosts, so equal numbers mean one each.
    """
    hosts = os.environ.get("SLURM_STEP_NUM_NODES", os.environ.get("SLURM_NNODES"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    divided_already = len(visible) == 1 and visible[0] != ""
    told = "JAX_LOCAL_DEVICE_IDS" in os.environ
    return None if told or divided_already or hosts == str(count) else (local,)


def _from_kubernetes(coordinator: str | None) -> Launch | None:
    if "KUBERNETES_SERVICE_HOST" not in os.environ or JOB_INDEX not in os.environ:
        return None
    index = _whole(JOB_INDEX)
    if importlib.util.find_spec("kubernetes") is None:
        raise ValueError(
            f"{JOB_INDEX} is '{index}', so this is a pod of an indexed Kubernetes Job: set "
            f"{PROCESSES} to its number of pods ({PROCESSES}=1 to train alone) and {COORDINATOR} "
            "to HOST:PORT of pod 0, or install jax[k8s] and let the pods read their Job"
        )
    K8sCluster.is_env_present()
    count = K8sCluster.get_process_count()
    if count > 1 and coordinator is None:
        port = os.environ.get("JAX_COORDINATOR_PORT")
        coordinator = K8sCluster.get_coordinator_address(int(read_timeout()), port)
    return Launch(index, count, coordinator, "Kubernetes")


def _read_coordinator() -> str | None:
    names = [name for name in (COORDINATOR, JAX_COORDINATOR) if os.environ.get(name)]
    values = {os.environ[name] for name in names}
    if len(values) > 1:
        both = " and ".join(f"{name} is {os.environ[name]!r}" for name in names)
        raise ValueError(f"{both}: unset one of them")
    if not names:
        return None
    (address,) = values
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ValueError(f"{names[0]} is {address!r}: give HOST:PORT, with a port from 1 to 65535")
    return address


def _whole(name: str) -> int:
    """A variable's whole number; ValueError if there is none."""
    text = os.environ.get(name)
    if text is None:
        raise ValueError(f"{name} is not set: start with srun, which sets it for every task")
    if not text.isdecimal():
        raise ValueError(f"{name} is {text!r}: it must be a whole number, 0 or more")
    return int(text)
