"""Launchers of several processes are recognised by what they leave in the environment."""

import pytest
from jax._src.clusters import ClusterEnv  # how jax.distributed.initialize() looks; it has no public name

from modicum.parallel.processes import LAUNCHER_VARIABLES, is_lost_process, launched

SLURM = {
    "SLURM_JOB_ID": "4100",
    "SLURM_STEP_NODELIST": "node[003-004],other",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_NODES": "2",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
CLOUD_TPU = {
    "TPU_WORKER_HOSTNAMES": "t1v-w-0,t1v-w-1",
    "TPU_WORKER_ID": "1",
    "TPU_SKIP_MDS_QUERY": "1",
}


@pytest.fixture
def environment(monkeypatch):
    for name in (*LAUNCHER_VARIABLES, *SLURM, *OPEN_MPI, *CLOUD_TPU):
        monkeypatch.delenv(name, raising=False)

    def leave(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return leave


@pytest.mark.parametrize(
    ("variables", "coordinator", "count", "index"),
    [
        (SLURM, "node003:", 8, 5),
        (OPEN_MPI, "10.96.0.1:", 4, 3),
    ],
    ids=["Slurm", "Open MPI"],
)
def test_what_a_launcher_leaves_is_understood(environment, variables, coordinator, count, index):
    assert not launched()
    environment(variables)
    assert launched()
    found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 5)
    assert found[0].startswith(coordinator)
    assert found[1:3] == (count, index)


def test_workers_of_a_cloud_tpu_are_recognised(environment):
    """The rest, addresses and number, comes from libtpu's machines, which are not here."""
    assert not launched()
    environment(CLOUD_TPU)
    assert launched()


def test_a_pod_alone_is_no_launcher(environment, monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert not launched()


def test_errors_of_a_single_process_lose_nobody():
    assert not is_lost_process(RuntimeError("Gloo all-reduce failed: Connection reset by peer"))
