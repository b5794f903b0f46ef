"""A rank that dies, or a machine that falls silent, ends all ranks and is named."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import speed
import tools

from post_training.distributed import liveness

# Two ranks without torch: rank 0 listens on PORT of ADDRESS, rank 1 connects.
PROGRAM = """
import socket, sys, threading, time
from post_training.distributed import liveness
rank, address, port = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
watch = liveness.Watch(rank, sys.argv[4].split(","))
if rank == 0:
    listener = socket.create_server((address, port))
    threading.Thread(target=watch.serve, args=(listener, "token"), daemon=True).start()
else:
    connection = liveness.connect((address, port), "token", rank)
    threading.Thread(target=watch.follow, args=(0, connection), daemon=True).start()
print("ready", flush=True)
said = sys.stdin.readline()
if said == "leave\\n":
    watch.leave()
elif said == "fail\\n":
    watch.leave("what\\n  cause: why")
else:
    time.sleep(600)
"""


def start(
    rank: int,
    port: int,
    address: str = "127.0.0.1",
    prefix: tuple[str, ...] = (),
    hosts: str = "first,second,third",
):
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", PROGRAM, str(rank), address, str(port), hosts],
        cwd=tools.ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.fixture
def port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def ended():
    """Processes that are killed after a test, whatever happened."""
    started: list[subprocess.Popen] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("dies", "host"), [(1, "second"), (0, "first")])
def test_a_dead_rank_is_named_by_all_and_they_end(dies, host, port, ended):
    ended += [start(rank, port) for rank in range(3)]
    ended[dies].send_signal(signal.SIGKILL)
    for rank, process in enumerate(ended):
        if rank != dies:
            process.wait(timeout=speed.scaled(liveness.GRACE + 10))
            said = process.stderr.read()
            assert process.returncode == liveness.EXIT_CODE
            assert f"error: rank {dies} on host {host} is lost" in said
            assert "cause:" in said and "remedy:" in said


@pytest.mark.parametrize(("dies", "speaks"), [(0, 1), (2, 0)])
def test_of_one_machine_the_first_rank_left_names_the_loss(dies, speaks, port, ended):
    ended += [start(rank, port, hosts="node,node,node") for rank in range(3)]
    ended[dies].send_signal(signal.SIGKILL)
    for rank, process in enumerate(ended):
        if rank != dies:
            process.wait(timeout=speed.scaled(liveness.GRACE + 10))
            named = f"error: rank {dies} on host node is lost" in process.stderr.read()
            assert named == (rank == speaks)


def test_a_rank_that_leaves_is_not_missed(port, ended):
    ended += [start(rank, port) for rank in range(3)]
    for rank in (1, 0, 2):
        said = ended[rank].communicate("leave\n", timeout=speed.scaled(10))
        assert (ended[rank].returncode, said[1]) == (0, "")


@pytest.mark.parametrize("fails", [0, 2])
def test_a_rank_that_fails_alone_ends_the_others_with_its_message(fails, port, ended):
    ended += [start(rank, port) for rank in range(3)]
    ended[fails].communicate("fail\n", timeout=speed.scaled(10))
    for rank, process in enumerate(ended):
        if rank != fails:
            process.wait(timeout=speed.scaled(2 * liveness.GRACE + 10))
            assert process.returncode == 2
            shown = process.stderr.read()
            assert shown == ("error: what\n  cause: why\n" if rank == 0 else "")


def test_ranks_that_fail_together_end_by_themselves(port, ended):
    ended += [start(rank, port) for rank in range(3)]
    for process in ended:
        process.stdin.write("fail\n")
        process.stdin.flush()
    for process in ended:
        assert process.wait(timeout=speed.scaled(10)) == 0
        assert process.stderr.read() == ""


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip"), reason="NOT TESTED: needs root and iproute2"
)
def test_a_machine_that_falls_silent_is_lost_within_a_minute(port, ended):
    """Rank 1 in a network of its own, whose cable is cut: no packet says that it is gone."""
    name = f"liveness{os.getpid()}"
    near, far = f"a{os.getpid()}", f"b{os.getpid()}"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    ip("netns", "add", name)
    try:
        ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
        ip("address", "add", "198.51.100.1/30", "dev", near)
        ip("link", "set", near, "up")
        ip("-n", name, "address", "add", "198.51.100.2/30", "dev", far)
        ip("-n", name, "link", "set", far, "up")
        ended.append(start(0, port, "198.51.100.1"))
        ended.append(start(1, port, "198.51.100.1", ("ip", "netns", "exec", name)))
        ip("-n", name, "link", "set", far, "down")
        began = time.monotonic()
        ended[0].wait(timeout=speed.scaled(60))
        assert time.monotonic() - began > liveness.GRACE
        assert "error: rank 1 on host second is lost" in ended[0].stderr.read()
    finally:
        ip("netns", "delete", name)
