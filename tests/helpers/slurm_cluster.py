"""A real SLURM cluster of two nodes on this machine, from Debian's packages, for tests.

One ``slurmctld``, two ``slurmd`` (node1 and node2) and one ``munged``, all with folders, ports, key
and socket of their own: nothing of a cluster that the machine may belong to is read or touched.
Needs root and Debian's ``slurm-wlm`` and ``munge``; :func:`install` gets them.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import speed

ATTEMPTS = 5
BUSY = re.compile("Unable to contact|Socket timed out|connect failure|Connection (refused|reset)")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "scontrol")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
SchedulerType=sched/builtin
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=60
MessageTimeout=60
KillWait=5
MinJobAge=3600
JobRequeue=1
UnkillableStepTimeout=30
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={node1} CPUs=16 RealMemory=1000
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={node2} CPUs=16 RealMemory=1000
PartitionName=batch Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


def missing() -> list[str]:
    """Programs of SLURM and munge that are not installed."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


def install() -> None:
    """Install Debian's packages unless they are there; needs root."""
    if not missing():
        return
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    # A package's own services are not wanted, and where there is no systemd they only fail.
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        subprocess.run(["apt-get", "update", "-qq"], check=True, env=quiet)
        subprocess.run(
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "slurm-wlm", "munge"],
            check=True,
            env=quiet,
            stdout=subprocess.DEVNULL,
        )
    finally:
        if ours:
            policy.unlink()


class Cluster:
    """The running cluster; ``environment`` makes SLURM's commands talk to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": os.pathsep.join((os.environ["PATH"], "/usr/sbin")),
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        with ExitStack() as undo:
            undo.callback(self.stop)
            self._start()
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        for name in ("state", "spool/node1", "spool/node2"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        controller, node1, node2 = _free_ports(3)
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                folder=self.folder,
                host=socket.gethostname(),
                controller=controller,
                node1=node1,
                node2=node2,
            )
        )
        files = {
            "socket": "munge.socket",
            "key-file": "munge.key",
            "log-file": "munged.log",
            "pid-file": "munged.pid",
            "seed-file": "munge.seed",
        }
        options = [f"--{name}={self.folder / file}" for name, file in files.items()]
        # --force: the folder of a test lies below /tmp, which everybody may write to.
        self._daemon("munged", "--foreground", "--force", *options)
        speed.wait(lambda: (self.folder / "munge.socket").exists(), 20, "munged")
        self._daemon("slurmctld", "-D")
        for node in ("node1", "node2"):
            self.start_node(node)
        speed.wait(self._nodes_are_idle, 60, "two idle nodes")

    def start_node(self, node: str) -> None:
        self._daemon(node, "-D", "-N", node, program="slurmd")

    def restart_node(self, node: str) -> None:
        """Bring a node back that was killed and given up."""
        self.start_node(node)
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
        speed.wait(self._nodes_are_idle, 60, "two idle nodes")

    def kill_node(self, node: str) -> None:
        """The node's daemon and everything it started end at once, as when a machine fails."""
        daemon = self._daemons.pop(node)
        doomed = [daemon.pid, *self.processes_on(node)]
        for pid in doomed:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        daemon.wait()

    def processes_on(self, node: str) -> list[int]:
        """Processes of job steps on ``node``: what SLURM started there, and its step daemons."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with suppress(OSError):
                    variables = (entry / "environ").read_bytes().split(b"\0")
                    conf = f"SLURM_CONF={self.folder / 'slurm.conf'}".encode()
                    name = f"SLURMD_NODENAME={node}".encode()
                    if conf in variables and (name in variables or self._logs_for(entry, node)):
                        found.append(int(entry.name))
        return found

    def _logs_for(self, entry: Path, node: str) -> bool:
        """Whether this is a step daemon of the node: its environment does not say so, its log does.

        The node's own daemon has the same log open, and is no step's.
        """
        if not (entry / "cmdline").read_bytes().startswith(b"slurmstepd"):
            return False
        log = self.folder / f"slurmd.{node}.log"
        return any(each.readlink() == log for each in (entry / "fd").iterdir())

    def _daemon(self, name: str, *options: str, program: str | None = None) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                [program or name, *options],
                env={**os.environ, **self.environment},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def _nodes_are_idle(self) -> bool:
        done = self.run("sinfo", "--noheader", "--format=%D %T", check=False)
        return done.stdout.strip() == "2 idle"

    def run(self, *words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one of SLURM's commands; again if it died of a signal or met a busy controller."""
        environment = {**os.environ, **self.environment}
        for _ in range(ATTEMPTS):
            done = speed.run(words, 60, env=environment)
            if done.returncode >= 0 and not (done.returncode and BUSY.search(done.stderr)):
                break
            time.sleep(1)
        if check:
            done.check_returncode()
        return done

    def job(self, number: int | str) -> dict[str, str]:
        """What SLURM knows about a job: JobState, ExitCode, Reason, Restarts, ..."""
        text = self.run("scontrol", "--oneliner", "show", "job", number).stdout
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait(self, number: int | str, seconds: float = 120) -> dict[str, str]:
        """Wait until a job has ended; returns what SLURM knows about it."""
        running = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")
        speed.wait(lambda: self.job(number)["JobState"] not in running, seconds, f"job {number}")
        return self.job(number)

    def stop(self) -> None:
        """Cancel everything and end the daemons, the step daemons included."""
        with suppress(subprocess.SubprocessError, OSError):
            self.run("scancel", "--full", "--user=root", check=False)
            speed.wait(
                lambda: not self.run("squeue", "--noheader", check=False).stdout, 20, "no jobs"
            )
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
            daemon.wait()
        self._daemons.clear()
        for node in ("node1", "node2"):
            for pid in self.processes_on(node):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in found:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in found]
