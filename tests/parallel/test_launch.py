"""What an environment says of several processes, what it is refused for, and who does not come."""

import os
import re
import socket
import time

import jax
import pytest

from dsjax.parallel import launch, multihost
from dsjax.parallel.launch import Launch, read_launch, read_timeout
from dsjax.parallel.multihost import start

PLAIN = {"DSJAX_COORDINATOR": "one:1234", "DSJAX_PROCESSES": "4", "DSJAX_PROCESS": "2"}
STEP = {
    "SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "gpu[007-008,011]", "SLURM_NTASKS": "3",
    "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NUM_TASKS": "3",
}  # fmt: skip
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}


@pytest.fixture
def environment(monkeypatch):
    """Sets variables in an environment that names no other process."""
    for name in os.environ:
        if re.match("DSJAX_|SLURM_|JAX_COORD|JAX_LOCAL|JOB_|KUBERNETES_|CUDA_VISIBLE", name):
            monkeypatch.delenv(name)

    def put(variables: dict[str, str], **more: str) -> None:
        for name, value in (variables | more).items():
            monkeypatch.setenv(name, value)

    return put


def test_an_environment_that_says_nothing_starts_nothing(environment):
    environment({})
    assert start() == Launch() == Launch(0, 1, None)
    assert not jax.distributed.is_initialized()
    assert str(start()) == "one process"


def test_plain_variables(environment):
    environment(PLAIN)
    found = read_launch()
    assert (found.index, found.count, found.coordinator, found.devices) == (2, 4, "one:1234", None)
    assert str(found) == (
        "process 2 of 4, coordinator one:1234 (from DSJAX_PROCESSES=4, DSJAX_PROCESS=2)"
    )


def test_jax_has_a_name_for_the_coordinator_too(environment):
    environment(PLAIN, JAX_COORDINATOR_ADDRESS="one:1234")
    assert read_launch().coordinator == "one:1234"
    os.environ.pop("DSJAX_COORDINATOR")
    assert read_launch().coordinator == "one:1234"


def test_plain_variables_come_before_slurm_and_kubernetes(environment):
    environment(PLAIN | STEP | POD)
    assert read_launch().index == 2


@pytest.mark.parametrize("coordinator", [{}, {"DSJAX_COORDINATOR": "one:1234"}])
def test_one_process_is_alone(environment, coordinator):
    environment(coordinator, DSJAX_PROCESSES="1")
    assert (read_launch().count, read_launch().coordinator) == (1, None)
    environment({}, DSJAX_PROCESS="0")
    assert start().count == 1


def test_slurm_with_a_task_on_each_host_takes_all_gpus(environment):
    environment(STEP)
    assert read_launch() == Launch(1, 3, "gpu007:61441", "SLURM", None)


def test_slurm_with_several_tasks_on_a_host_takes_a_gpu_each(environment):
    environment(STEP, SLURM_NTASKS="6", SLURM_STEP_NUM_TASKS="6", SLURM_LOCALID="1")
    assert read_launch().devices == (1,)
    environment({}, CUDA_VISIBLE_DEVICES="0,1")
    assert read_launch().devices == (1,)
    environment({}, CUDA_VISIBLE_DEVICES="1")  # SLURM itself gave the task one
    assert read_launch().devices is None
    environment({}, CUDA_VISIBLE_DEVICES="0,1", JAX_LOCAL_DEVICE_IDS="0")
    assert read_launch().devices is None


@pytest.mark.parametrize(
    ("nodes", "first"), [("a1", "a1"), ("a1,b[2-3]", "a1"), ("a[3,5-7],b1", "a3")]
)
def test_slurm_coordinator_is_the_first_host(environment, nodes, first):
    environment(STEP, SLURM_STEP_NODELIST=nodes, JAX_COORDINATOR_PORT="999")
    assert read_launch().coordinator == f"{first}:999"
    environment({}, DSJAX_COORDINATOR="other:1")
    assert read_launch().coordinator == "other:1"


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_STEP_NUM_TASKS": "1"},  # a shell of an allocation for more tasks
        {"SLURM_STEP_NODELIST": None},  # a batch script outside of srun
    ],
)
def test_one_task_of_slurm_is_alone(environment, change):
    environment({name: change.get(name, value) for name, value in STEP.items()
                 if change.get(name, value) is not None})  # fmt: skip
    assert start() == Launch()


def test_pod_with_plain_variables_takes_its_index_from_its_job(environment):
    environment(POD, DSJAX_COORDINATOR="run-0.pods:1234", DSJAX_PROCESSES="2")
    found = read_launch()
    assert (found.index, found.count, found.coordinator) == (1, 2, "run-0.pods:1234")


def test_pod_without_them_asks_jax(environment, monkeypatch):
    environment(POD)
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: name == "kubernetes")
    cluster = launch.K8sCluster
    monkeypatch.setattr(cluster, "is_env_present", lambda: True)
    monkeypatch.setattr(cluster, "get_process_count", lambda: 2)
    monkeypatch.setattr(cluster, "get_coordinator_address", lambda timeout, port: "run-0.pods:55")
    assert read_launch() == Launch(1, 2, "run-0.pods:55", "Kubernetes")


REFUSED = {
    "count without index": ({"DSJAX_PROCESS": None}, "DSJAX_PROCESSES=4 and DSJAX_PROCESS is not"),
    "index without count": ({"DSJAX_PROCESSES": None}, "DSJAX_PROCESS is '2' and DSJAX_PROCESSES"),
    "no coordinator": ({"DSJAX_COORDINATOR": None}, "DSJAX_COORDINATOR is not set: .* HOST:PORT"),
    "coordinator alone": (
        {"DSJAX_PROCESS": None, "DSJAX_PROCESSES": None}, "is 'one:1234' and neither .* set DSJAX_"
    ),
    "index too large": ({"DSJAX_PROCESS": "4"}, "DSJAX_PROCESS=4: process 4 of 4: .* from 0 to 3"),
    "index below 0": ({"DSJAX_PROCESS": "-1"}, "DSJAX_PROCESS is '-1': it must be a whole number"),
    "index no number": ({"DSJAX_PROCESS": "one"}, "DSJAX_PROCESS is 'one'"),
    "no processes": ({"DSJAX_PROCESSES": "0"}, "0 processes: it must be at least 1"),
    "no port": ({"DSJAX_COORDINATOR": "one"}, "DSJAX_COORDINATOR is 'one': give HOST:PORT"),
    "no host": ({"DSJAX_COORDINATOR": ":12"}, "DSJAX_COORDINATOR is ':12': give HOST:PORT"),
    "bad port": ({"DSJAX_COORDINATOR": "one:70000"}, "'one:70000': .* from 1 to 65535"),
    "two coordinators": (
        {"JAX_COORDINATOR_ADDRESS": "two:1"},
        "DSJAX_COORDINATOR is 'one:1234' and JAX_COORDINATOR_ADDRESS is 'two:1'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_half_set_and_contradicting_variables_are_refused(environment, name):
    change, message = REFUSED[name]
    environment({key: value for key, value in (PLAIN | change).items() if value is not None})
    with pytest.raises(ValueError, match=message):
        read_launch()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SLURM_PROCID": "3"}, "SLURM: process 3 of 3"),
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID is 'x'"),
        ({"SLURM_NTASKS": "2"}, "SLURM_STEP_NUM_TASKS is '3' and SLURM_NTASKS is '2'"),
        ({"SLURM_STEP_NODELIST": "r[1-2]n[1-4]"}, "'r.1-2.n.1-4.', .* set DSJAX_COORDINATOR"),
    ],
)
def test_contradicting_variables_of_slurm_are_refused(environment, change, message):
    environment(STEP | change)
    with pytest.raises(ValueError, match=message):
        read_launch()


def test_missing_variable_of_slurm_is_named(environment):
    environment({name: value for name, value in STEP.items() if name != "SLURM_LOCALID"})
    with pytest.raises(ValueError, match="SLURM_LOCALID is not set: start with srun"):
        read_launch()


def test_pod_that_says_nothing_else_is_told_what_to_set(environment, monkeypatch):
    environment(POD)
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"INDEX is '1'.* \(DSJAX_PROCESSES=1 to "):
        read_launch()


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan", "inf"])
def test_time_limit_must_be_a_number_above_zero(environment, text):
    environment({}, DSJAX_START_TIMEOUT=text)
    with pytest.raises(ValueError, match=f"DSJAX_START_TIMEOUT is '{text}'"):
        start()


def test_time_limit_is_read(environment):
    environment({})
    assert read_timeout() == 300
    environment({}, DSJAX_START_TIMEOUT="1.5")
    assert read_timeout() == 1.5


def test_coordinator_that_nobody_runs_is_named(environment):
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = f"127.0.0.1:{server.getsockname()[1]}"
    environment(PLAIN, DSJAX_COORDINATOR=where, DSJAX_START_TIMEOUT="0.3")
    with pytest.raises(RuntimeError, match=f"{where} .*no coordinator answers after 0 s"):
        start()
    assert not jax.distributed.is_initialized()


def test_port_that_is_taken_is_named(environment):
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = f"127.0.0.1:{server.getsockname()[1]}"
        environment(PLAIN, DSJAX_COORDINATOR=where, DSJAX_PROCESS="0",
                    JAX_COORDINATOR_BIND_ADDRESS=where)  # fmt: skip
        with pytest.raises(RuntimeError, match=r"cannot listen at port .* in use.*choose"):
            start()


def test_error_of_one_process_among_several_ends_it(monkeypatch):
    ended = []
    monkeypatch.setattr(multihost, "GRACE_S", 0.01)
    monkeypatch.setattr(multihost, "_end", ended.append)
    with pytest.raises(OSError, match="disk full"), multihost.failing_fast():
        raise OSError("disk full")
    time.sleep(0.05)
    assert ended == []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    with pytest.raises(OSError, match="disk full"), multihost.failing_fast():
        raise OSError("disk full")
    time.sleep(0.2)
    assert ended == ["ending without the other processes after OSError: disk full"]
