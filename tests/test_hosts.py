"""Several hosts: namespaces of this machine (benchmarks/namespaces.py), 1 Gbit/s and 2 ms apart."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import namespaces
import pytest

from evenflow.cluster.read import read_cluster
from preloaded import python_on
from train_on_hosts import NUM_STAGES, train

BYTES_PER_SECOND, DELAY_SECONDS = 1e9 / 8, 2e-3
SCRIPT = str(Path(__file__).with_name("train_on_hosts.py"))


@pytest.fixture(autouse=True, scope="module")
def _where_they_can_be_made():
    if (reason := namespaces.why_not()) is not None:
        pytest.skip(reason)


def torchrun_on(hosts, meeting, ranks_on_each, *command):
    """Run a command as torchrun's on every host; what each host's ranks printed."""
    place = (f"--nproc-per-node={ranks_on_each}", f"--master-addr={meeting}", "--master-port=29500")
    with ExitStack() as stack:
        pythons, running = stack.enter_context(python_on(hosts)), []
        for number, (host, python) in enumerate(zip(hosts, pythons, strict=True)):
            line = [*python, "-m", "torch.distributed.run", f"--nnodes={len(hosts)}", *place]
            line += [f"--node-rank={number}", *command]
            running.append(host.start(line, os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        said = [process.communicate(timeout=150) for process in running]
    assert [process.returncode for process in running] == [0] * len(hosts), said
    return [output for output, _ in said]


@pytest.mark.parametrize("kind", ["machines", "containers"])
def test_training_on_two_hosts_gives_the_bits_of_one_process(kind):
    """Machines booted apart, that meet at a name; containers of one machine, all of one name."""
    apart = kind == "machines"
    alone = train()
    with namespaces.hosts(
        ["first", "second"] if apart else ["node", "node"],
        bytes_per_second=BYTES_PER_SECOND,
        delay_seconds=DELAY_SECONDS,
        own_identity=apart,
    ) as hosts:
        meeting = "first" if apart else hosts[0].address
        said = torchrun_on(hosts, meeting, NUM_STAGES // 2, SCRIPT)
    found = sorted(
        (json.loads(line) for output in said for line in output.splitlines()), key=lambda each: each["rank"]
    )
    assert [each["rank"] for each in found] == list(range(NUM_STAGES))
    for each in found:
        assert each["losses"] == alone["losses"]
        assert each["interface"] == "wire0"
        here = each["rank"] // 2
        others = [rank for rank in range(NUM_STAGES) if rank != each["rank"]]
        kinds = {True: "SharedMemoryLink", False: "ProcessGroupLink"}
        assert [each["links"][rank] for rank in others] == [kinds[rank // 2 == here] for rank in others]


def test_the_doctor_finds_hosts_of_one_name_and_the_link_between_them(tmp_path):
    path = tmp_path / "cluster.toml"
    with namespaces.hosts(
        ["node", "node"], bytes_per_second=4 * BYTES_PER_SECOND, delay_seconds=DELAY_SECONDS
    ) as hosts:
        command = ("-m", "evenflow", "doctor", "--device", "cpu", "-o", str(path))
        said = torchrun_on(hosts, hosts[0].address, 1, *command)
    assert "node#2" in said[0]
    cluster = read_cluster(path)
    assert len(cluster.hosts) == 2
    link = cluster.link_between(0, 1)
    assert link.latency_seconds >= DELAY_SECONDS
    assert link.bytes_per_second <= 4 * BYTES_PER_SECOND


def is_gone(process):
    """Whether a process has ended, or does so soon."""
    deadline = time.monotonic() + 20
    while Path(f"/proc/{process}").exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_hosts_are_gone_after_a_failure_with_all_that_ran_on_them():
    seen = []

    def fail():
        with namespaces.hosts(["first", "second"]) as hosts:
            seen.extend((hosts, hosts[1].start(["sleep", "1000"], os.environ)))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    hosts, running = seen
    assert running.wait(timeout=20) != 0
    assert all(is_gone(host.process) for host in hosts)


OWNER = """
import time, namespaces
with namespaces.hosts(["first", "second"]) as hosts:
    print(*(host.process for host in hosts), flush=True)
    time.sleep(1000)
"""


def test_hosts_are_gone_when_their_owner_is_killed():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", OWNER],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as owner:
        processes = owner.stdout.readline().split()
        owner.send_signal(signal.SIGKILL)
    assert len(processes) == 2
    assert all(map(is_gone, processes))
