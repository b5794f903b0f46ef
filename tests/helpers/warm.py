"""Processes that start with torch, megatron-core and ModelOpt imported: forks of one warm process.

Importing them takes five seconds of a core, most stages on tiny models one. :func:`command` wraps
the line of a Python script so that it runs in a fork of a server that has imported everything and
done nothing else: a process of its own, with its own arguments, environment, folder, output, exit
code and signals. Tests of what happens before or while packages are imported use plain Python.

As a program, this is the small process that a test starts: it hands its arguments, environment and
standard streams to the server, forwards signals to the fork and exits with its code.
"""

from __future__ import annotations

import array
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_ENDINGS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def command(script: str | Path, *words: str, processes: int = 1) -> list[str]:
    """The line that runs a script of this repository in a fork, or in several under torchrun."""
    client = [sys.executable, "-S", str(Path(__file__).resolve()), start()]
    line = [*client, str(script), *words]
    if processes == 1:
        return line
    elastic = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*client, *elastic, "--no-python", *line]


def is_possible() -> bool:
    """Not where there is a GPU: CUDA does not survive a fork."""
    return not Path("/dev/nvidiactl").exists()


# The client: imports nothing slow.


def main() -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(sys.argv[1])
        request = {"argv": sys.argv[2:], "environment": dict(os.environ), "folder": str(Path.cwd())}
        text = json.dumps(request).encode()
        streams = array.array("i", [0, 1, 2])
        server.sendmsg(
            [len(text).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)]
        )
        server.sendall(text)
        answers = server.makefile("r")
        fork = int(answers.readline())
        for number in _ENDINGS:
            signal.signal(number, lambda number, frame: os.kill(fork, number))
        code = int(answers.readline())
    if code < 0:  # ended by a signal: so must this process be
        if -code != signal.SIGKILL:  # which has no handler to reset
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


# The server.


@functools.cache
def start() -> str:
    """The socket of a server for this process, which ends with it."""
    path = str(Path(tempfile.mkdtemp(prefix="warm-")) / "socket")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; sys.path.insert(0, sys.argv[1]); import warm; warm.serve(sys.argv[2])",
            str(Path(__file__).parent),
            path,
        ],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,  # its end is this process's end
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return path


def serve(path: str) -> None:
    """Import everything, then fork for each client until the starter is gone."""
    import runpy  # noqa: F401  # before the forks

    _import_all()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    threading.Thread(target=_end_with_starter, daemon=True).start()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies of the answering forks
    print("ready", flush=True)
    while True:
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _answer(client)
        client.close()


def _end_with_starter() -> None:
    os.read(0, 1)  # not through sys.stdin, whose lock the forks would inherit
    os._exit(0)


def _import_all() -> None:
    import torch.distributed.run  # noqa: F401

    from post_training.distributed import session

    session._import_packages()
    import datasets  # noqa: F401
    import megatron.core.optimizer  # noqa: F401
    import modelopt.torch.export.plugins.megatron_importer
    import modelopt.torch.quantization  # noqa: F401


def _answer(client: socket.socket) -> None:
    """In a fork: fork the script's process, tell the client its number and then its code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, ancillary, _, _ = client.recvmsg(8, socket.CMSG_SPACE(3 * array.array("i").itemsize))
    streams = array.array("i")
    streams.frombytes(ancillary[0][2])
    size = int.from_bytes(head, "big")
    with client.makefile("rb") as stream:
        request = json.loads(stream.read(size))
    script = os.fork()
    if script == 0:
        client.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        _become(request)
    for each in streams:
        os.close(each)
    client.sendall(f"{script}\n".encode())
    threading.Thread(target=_end_with_client, args=(client, script), daemon=True).start()
    _, status = os.waitpid(script, 0)
    with contextlib.suppress(OSError):  # the client may be gone
        client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _end_with_client(client: socket.socket, script: int) -> None:
    """A client that is killed, by a test's time limit say, takes the script's process with it."""
    client.recv(1)
    with contextlib.suppress(ProcessLookupError):
        os.kill(script, signal.SIGKILL)


def _become(request: dict) -> None:
    """Run the script as ``python script`` or ``python -m module`` would, and end the process."""
    import atexit
    import runpy
    import traceback

    code = 1
    try:
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        first, *words = request["argv"]
        if first == "-m":
            sys.argv = words
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [first, *words]
            sys.path[0] = str(Path(first).resolve().parent)
            runpy.run_path(first, run_name="__main__")
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        if not isinstance(ending.code, int | None):
            print(ending.code, file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
        traceback.print_exc()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()
            atexit._run_exitfuncs()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
