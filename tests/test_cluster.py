"""Which cluster a process belongs to, from the variables that each place sets; none of them needs the place to be there."""

import re

import pytest

from gemma4_jax.errors import UserError
from launch import cluster
from launch.cluster import Cluster, find
from launch.settings import ProcessesSection

SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "node[001-002]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
BATCH = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
MPI4 = {**MPI, "OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp://10.96.0.1:34911"}
POD = {"JOB_COMPLETION_INDEX": "1", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
TOLD = {"JAX_COORDINATOR_ADDRESS": "a-0.a:1234", "JAX_NUM_PROCESSES": "2"}
GKE = {**POD, "TPU_WORKER_HOSTNAMES": "w0,w1,w2,w3", "TPU_WORKER_ID": "2"}
ENDPOINTS = {
    "worker-network-endpoints": "uid:0:10.0.0.2,uid:1:10.0.0.3",
    "tpu-env": "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\n",
}


def look(env, endpoints=None, tpu=False):
    """`find` with this environment, a machine that has a TPU or not, and a metadata server with these attributes."""
    return find(env, metadata=(endpoints or {}).get, has_tpu=lambda: tpu)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        (SRUN, Cluster("Slurm", 16)),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, Cluster("Slurm", 1)),  # `srun --ntasks=1` in a larger job
        (BATCH, None),  # the batch script itself, or a shell of salloc
        (MPI4, Cluster("Open MPI", 4)),
        ({**MPI, "JAX_COORDINATOR_ADDRESS": "h:1"}, Cluster("Open MPI", 4, "h:1", 3, 1, alone=True)),
        ({**POD, **TOLD}, Cluster("the environment", 2, "a-0.a:1234", 1, alone=True)),
        ({**POD, **TOLD, "JAX_PROCESS_ID": "0"}, Cluster("the environment", 2, "a-0.a:1234", 0, alone=True)),
        ({**SRUN, **TOLD, "JAX_PROCESS_ID": "0"}, Cluster("the environment", 2, "a-0.a:1234", 0, alone=True)),
    ],
)
def test_schedulers(env, expected):
    assert look(env) == expected


def test_tpu_slices():
    assert look(GKE, tpu=True) == Cluster("GKE", 4)
    assert look({**GKE, "MEGASCALE_NUM_SLICES": "2"}, tpu=True) == Cluster("GKE", 8)
    assert look({"TPU_PROCESS_ADDRESSES": "w0:8476,w1:8476"}, tpu=True) == Cluster("GKE", 2)
    assert look({"TPU_WORKER_HOSTNAMES": "localhost"}, tpu=True) == Cluster("GKE", 1)  # Colab
    assert look({}, ENDPOINTS, tpu=True) == Cluster("the TPU slice", 4)
    assert look({}, {"worker-network-endpoints": "host-0,host-1"}, tpu=True) == Cluster("the TPU slice", 2)
    assert look({}, tpu=True) is None  # no metadata server


def test_a_slice_is_not_asked_for_without_a_tpu_or_by_a_run_on_the_cpu():
    def unwanted(_):
        raise AssertionError("the metadata server was asked")

    assert find({}, unwanted, lambda: False) is None
    assert find({"JAX_PLATFORMS": "cpu"}, unwanted, lambda: True) is None
    assert find({"TPU_SKIP_MDS_QUERY": "1"}, unwanted, lambda: True) is None


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        (POD, "This is pod 1 of an indexed Kubernetes job"),
        (MPI, "Open MPI 5 started 4 processes, but does not say where process 0 is"),
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS is not"),
        (TOLD, "JAX_PROCESS_ID is not"),
        ({**TOLD, "JAX_PROCESS_ID": "2"}, "lies in 0..1, got '2'"),
        ({**TOLD, "JAX_PROCESS_ID": "0", "JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is a number, got 'two'"),
        ({**TOLD, "JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "h"}, "is HOST:PORT, got 'h'"),
        ({**SRUN, "SLURM_NTASKS": ""}, "SLURM_NTASKS is a number, got ''"),
    ],
)
def test_half_an_answer_is_an_error(env, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        look(env)


def test_settings_come_first(monkeypatch):
    monkeypatch.setattr(cluster, "find", lambda: Cluster("Slurm", 16))
    named = ProcessesSection(coordinator="h:1", count=2, index=1)
    assert cluster.of_run(named) == Cluster("the settings", 2, "h:1", 1)
    assert cluster.of_run(ProcessesSection()) == Cluster("Slurm", 16)
    assert cluster.of_run(ProcessesSection(auto=False)) is None
    with pytest.raises(UserError, match="task=sample is one process, and Slurm has 16"):
        cluster.refuse_several("sample")
    monkeypatch.setattr(cluster, "find", lambda: Cluster("GKE", 1))
    assert cluster.of_run(ProcessesSection(auto=True)) is None
    cluster.refuse_several("sample")
    monkeypatch.setattr(cluster, "find", lambda: None)
    assert cluster.of_run(ProcessesSection()) is None
    with pytest.raises(UserError, match=r"config.processes.auto=true, and nothing here belongs to a cluster"):
        cluster.of_run(ProcessesSection(auto=True))
