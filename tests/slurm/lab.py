"""A real Slurm on one machine: a controller, and nodes that each have a slurmd of their own on the loopback device.

::

    with Lab() as lab:
        job = lab.submit("--nodes=2", "--requeue", "--wrap=srun sleep 60")
        lab.wait_state(job, "RUNNING")
        lab.kill_node("n1")

It takes root and Debian's slurmctld, slurmd, slurm-client and munge; :func:`missing` says what isn't there. Nodes are named
n1, n2, … and have 8 GPUs of type h100 each, which are links to /dev/null. Jobs of the partition ``high`` preempt those of
``main``.
"""

import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from slurm.lab_guard import descendants, kill

CONFIGURATION = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=1
ReturnToService=2
SlurmdTimeout=5
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=n[1-{num_nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] Gres=gpu:h100:8 {sizes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=10
PartitionName=high Nodes=ALL PriorityTier=10
"""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def missing() -> str | None:
    """Why no lab can be started here, in words for whoever could change it."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
    return None if os.geteuid() == 0 else "the daemons of Slurm need root: run the tests as root"


class Lab:
    """A cluster of ``num_nodes`` nodes, up when the ``with`` block begins and gone when it ends, however it ends.

    Nodes are cheap: 32 are up in 1.3 s and take 220 MiB.
    """

    def __init__(self, num_nodes: int = 4) -> None:
        self.nodes = [f"n{i}" for i in range(1, num_nodes + 1)]
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-lab-"))
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        self.env = {**clean, "PATH": PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> "Lab":
        guard = [sys.executable, str(Path(__file__).with_name("lab_guard.py")), str(self.folder)]
        self._guard = subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True)
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        self._guard.wait(timeout=120)

    def _start(self) -> None:
        folder, num_nodes = self.folder, len(self.nodes)
        folder.chmod(0o755)
        port = free_ports(num_nodes + 1)
        configuration = CONFIGURATION.format(
            host=socket.gethostname().partition(".")[0],
            folder=folder,
            num_nodes=num_nodes,
            sizes="CPUs=128 RealMemory=2000000",
            port=port,
            first=port + 1,
            last=port + num_nodes,
        )
        (folder / "slurm.conf").write_text(configuration)
        (folder / "gres.conf").write_text(f"NodeName=n[1-{num_nodes}] Name=gpu Type=h100 File={folder}/gpu[0-7]\n")
        for i in range(8):
            (folder / f"gpu{i}").symlink_to("/dev/null")
        (folder / "state").mkdir()
        (folder / "munge.key").touch(mode=0o600)
        (folder / "munge.key").write_bytes(os.urandom(128))
        options = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._begin("munged", "--foreground", "--force", *(f"--{o}={folder}/munge.{name}" for o, name in options.items()))
        self._wait("munged has opened no socket", 120, lambda: (folder / "munge.socket").exists())
        self._begin("slurmctld", "-D")
        for node in self.nodes:
            self._begin("slurmd", "-D", "-N", node, node=node)
        self._wait("some node did not come up", 120, lambda: set(self._states().values()) == {"idle"})

    def _begin(self, *command: str, node: str = "") -> None:
        assert self._guard.stdin is not None
        log = self.folder / f"{command[0]}{node}.out"
        path = shutil.which(command[0], path=PATH)  # the guard's own PATH may lack /usr/sbin
        order = {"command": (path, *command[1:]), "env": {**self.env, "LAB_NODE": node}, "log": str(log)}
        self._guard.stdin.write(json.dumps(order).encode() + b"\n")
        self._guard.stdin.flush()

    def _wait(self, problem: str, seconds: float, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + seconds
        while not is_so():
            if time.monotonic() > deadline:
                logs = "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in sorted(self.folder.glob("*.log")))
                raise TimeoutError(f"{problem}, {seconds:g} s\n{logs}")
            time.sleep(0.05)

    def _states(self) -> dict[str, str]:
        rows = self.run("sinfo", "-hN", "-p", "main", "-o", "%N %t", check=False).stdout.split("\n")
        return dict(row.split() for row in rows if row)

    def run(
        self, *command: object, check: bool = True, timeout: float = 120.0, **settings: object
    ) -> subprocess.CompletedProcess:
        """``command`` with the lab's Slurm, its output as text. A failure raises with what it wrote."""
        arguments = [str(argument) for argument in command]
        settings = {"env": self.env, "text": True, "capture_output": True, **settings}
        done = subprocess.run(arguments, timeout=timeout, **settings)  # type: ignore[call-overload]
        assert not check or done.returncode == 0, f"{arguments} → {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def submit(self, *arguments: object) -> str:
        """``sbatch`` with ``arguments`` in the lab's folder: the number of the job."""
        return self.run("sbatch", "--parsable", *arguments, cwd=self.folder).stdout.strip()

    def job(self, job: object) -> dict[str, str]:
        """What ``scontrol show job`` tells of it, by field: ``JobState``, ``Restarts``, ``NodeList``, ``BatchHost``, …"""
        return fields(self.run("scontrol", "show", "job", "-o", job).stdout)

    def node(self, node: str) -> dict[str, str]:
        """What ``scontrol show node`` tells of it, by field."""
        return fields(self.run("scontrol", "show", "node", "-o", node).stdout)

    def wait_state(self, job: object, states: str | tuple[str, ...], seconds: float = 240.0) -> dict[str, str]:
        """:meth:`job` as soon as its ``JobState`` is one of ``states``.

        Raises TimeoutError with the state it is in after ``seconds``.
        """
        wanted = (states,) if isinstance(states, str) else states
        deadline = time.monotonic() + seconds
        while (now := self.job(job))["JobState"] not in wanted:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} is {now['JobState']} ({now['Reason']}) after {seconds:g} s, not {wanted}: {now}")
            time.sleep(0.05)
        return now

    def kill_node(self, node: str) -> None:
        """Power loss: its slurmd, its slurmstepds and then their tasks are gone, and nothing has reported anything."""
        guarded = descendants(self._guard.pid)
        daemons = {process for process in guarded if variable(process, "LAB_NODE") == node}
        tasks = {process for process in guarded - daemons if variable(process, "SLURMD_NODENAME") == node}
        tasks |= {process for daemon in daemons for process in descendants(daemon)} - daemons
        slurmds = {process for process in daemons if program(process) == "slurmd"}
        assert slurmds, f"{node} has no slurmd"
        for group in (slurmds, daemons - slurmds, tasks):
            kill(group)
        self._wait(f"{node} is not dead", 120, lambda: not (daemons | tasks) & descendants(self._guard.pid))

    def restore_node(self, node: str) -> None:
        """Back from :meth:`kill_node` or :meth:`drain`, and idle or busy again when this returns."""
        if not any(program(p) == "slurmd" and variable(p, "LAB_NODE") == node for p in descendants(self._guard.pid)):
            self._begin("slurmd", "-D", "-N", node, node=node)
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)  # fails where it is not needed
        self._wait(f"{node} did not come back", 120, lambda: self._states()[node] in ("idle", "alloc", "mix"))

    def drain(self, node: str, reason: str = "test") -> None:
        """No new job on ``node``; what runs there continues."""
        self.run("scontrol", "update", f"NodeName={node}", "State=DRAIN", f"Reason={reason}")

    def clear(self) -> None:
        """Cancels every job and brings every node back, for the next test."""
        self.run("scancel", "--user=root")
        self.run("scancel", "--user=root", "--signal=KILL", "--full", check=False)
        for node in self.nodes:
            self.restore_node(node)
        self._wait("some job does not end", 120, lambda: set(self._states().values()) == {"idle"})


def fields(line: str) -> dict[str, str]:
    """Of one line of ``scontrol show … -o``.

    >>> fields("JobId=7 JobName=a b TRES=cpu=2,node=1 Reason=None")
    {'JobId': '7', 'JobName': 'a b', 'TRES': 'cpu=2,node=1', 'Reason': 'None'}
    """
    return dict(re.findall(r"(?:^|\s)([A-Za-z:/]+)=(.*?)(?=\s+[A-Za-z:/]+=|\s*$)", line))


def free_ports(count: int) -> int:
    """The first of ``count`` neighbouring ports that nobody listens on, below those that the kernel gives to clients."""
    while True:
        first = random.SystemRandom().randrange(10000, 32000)
        sockets = [socket.socket() for _ in range(count)]
        try:
            for i, listener in enumerate(sockets):
                listener.bind(("", first + i))
            return first
        except OSError:
            continue
        finally:
            for listener in sockets:
                listener.close()


def program(process: int) -> str:
    """The name of a process, empty when it has ended."""
    try:
        return Path(f"/proc/{process}/comm").read_text().strip()
    except OSError:
        return ""


def variable(process: int, name: str) -> str | None:
    """A variable of the environment that a process began with."""
    try:
        environment = Path(f"/proc/{process}/environ").read_bytes()
    except OSError:
        return None
    pairs = (pair.partition(b"=") for pair in environment.split(b"\0"))
    return next((value.decode() for key, _, value in pairs if key.decode() == name), None)
