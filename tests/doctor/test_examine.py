"""The examination: real ranks over Gloo, one link of which hangs; and the command itself."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from evenflow.cli.main import main
from evenflow.cluster.read import read_cluster
from evenflow.doctor.examine import measure_links
from evenflow.doctor.exchange import Exchange, WrongDataError, _Ends
from evenflow.doctor.worker import Fault, Worker
from evenflow.launcher import launch
from evenflow.runtime.ranks.world import ProcessGroupWorld


def with_a_worker_that_hangs():
    """What is found of the links, and what a rank says that is sent other bytes than it expects."""
    dist.init_process_group("gloo")
    world = ProcessGroupWorld(torch.device("cpu"))
    with Worker("cpu", "gloo") as worker:
        stopped = worker.pid
        if world.rank == 1:
            os.kill(stopped, signal.SIGSTOP)
        links = measure_links(world, worker, "127.0.0.1", timeout_seconds=10)
        if world.rank == 1:
            assert worker.pid != stopped
            with pytest.raises(ProcessLookupError):
                os.kill(stopped, 0)
        return links, sent_wrong(world.rank)


def sent_wrong(rank):
    if rank == 0:
        dist.send(torch.zeros(1000, dtype=torch.uint8), 1)
    if rank == 1:
        with pytest.raises(WrongDataError) as raised:
            _Ends(rank, torch.device("cpu")).check(1000, sender=0)
        return str(raised.value)
    return None


def test_a_link_that_hangs_is_named_the_others_are_measured_and_wrong_data_are_noticed():
    found = launch(with_a_worker_that_hangs, nproc=3)
    for links, _ in found:
        assert isinstance(links[0, 1], Fault)
        assert isinstance(links[0, 2], Exchange)
        assert isinstance(links[1, 2], Exchange)
    assert found[1][1].startswith("of 1000 bytes 99")
    assert found[1][1].endswith("arrived changed")


def test_the_command_writes_a_cluster_and_leaves_nothing_running(tmp_path, capsys):
    path = tmp_path / "cluster.toml"
    arguments = ["doctor", "--device", "cpu", "--ranks", "2", "-o", str(path)]
    command = [sys.executable, "-m", "evenflow", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "right" in output
    deadline = time.monotonic() + 20  # what Python starts beside a process ends a moment after it
    while running_in_group(process.pid):
        assert time.monotonic() < deadline, running_in_group(process.pid)
    cluster = read_cluster(path)
    assert cluster.num_ranks == 2
    assert len(cluster.hosts) == 1
    assert 1e6 < cluster.link_between(0, 1).bytes_per_second < 1e12

    with pytest.raises(SystemExit) as again:
        main(arguments)
    assert again.value.code == 2
    assert "it exists" in capsys.readouterr().err


def running_in_group(group):
    """What still runs of a group of processes; one that has ended may wait for its parent to notice."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(path.parent.name)
    return found
