"""The examination: real ranks over Gloo, one link of which hangs; and the command itself."""

import os
import signal
import subprocess
import sys

import torch
import torch.distributed as dist

from evenflow.cluster.read import read_cluster
from evenflow.doctor.examine import measure_links
from evenflow.doctor.exchange import Exchange
from evenflow.doctor.worker import Fault, Worker
from evenflow.launcher import launch
from evenflow.runtime.world import ProcessGroupWorld


def with_a_worker_that_hangs():
    dist.init_process_group("gloo")
    world = ProcessGroupWorld(torch.device("cpu"))
    with Worker("cpu", "gloo") as worker:
        if world.rank == 1:
            os.kill(worker.pid, signal.SIGSTOP)
        return measure_links(world, worker, "127.0.0.1", timeout_seconds=10)


def test_a_link_that_hangs_is_named_and_the_others_are_measured():
    for links in launch(with_a_worker_that_hangs, nproc=3):
        assert isinstance(links[0, 1], Fault)
        assert isinstance(links[0, 2], Exchange)
        assert isinstance(links[1, 2], Exchange)


def test_the_command_writes_a_cluster_and_leaves_nothing_running(tmp_path):
    path = tmp_path / "cluster.toml"
    command = [sys.executable, "-m", "evenflow", "doctor", "--device", "cpu", "--ranks", "2", "-o", str(path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "right" in output
    assert not group_is_there(process.pid)
    cluster = read_cluster(path)
    assert cluster.num_ranks == 2
    assert len(cluster.hosts) == 1
    assert 1e6 < cluster.link_between(0, 1).bytes_per_second < 1e12

    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 2
    assert "is there already" in again.stderr


def group_is_there(number):
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True
