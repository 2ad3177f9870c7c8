"""A real SLURM on this machine: munged, slurmctld and two slurmd, as root, on loopback, with ports and directories of their own.

What it takes in a container without cgroups or systemd: `proctrack/linuxproc` and `task/none`; `slurmd -N` for several nodes on one
host, each with its own port; `SlurmdParameters=config_overrides`, so that two nodes may each claim this machine's cores; a
munged of our own, whose socket is named in AuthInfo (`--force`: its checks of the directories above are meant for a system service);
`SLURM_CONF` for every command. Nothing of it touches a SLURM that may be configured on the machine.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

NODES = ("n1", "n2")
NODE_TIMEOUT_SECONDS = 10
"""After this long without a word from its slurmd a node is down and its jobs are requeued."""

_CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout={timeout}
SlurmctldTimeout=30
InactiveLimit=0
KillWait=20
MinJobAge=3600
SchedulerParameters=sched_interval=2,bf_interval=2,defer_batch
MpiDefault=none
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=1000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10
"""


def missing() -> str | None:
    """Why no SLURM can be started here, None where one can."""
    absent = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name, path=_path()) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: apt install slurm-wlm munge)"
    return None if os.getuid() == 0 else "slurmd runs jobs only as root"


def _path() -> str:
    return os.environ["PATH"] + os.pathsep + "/usr/sbin"


@dataclass
class Slurm:
    """Running daemons. `environment` is what makes the client commands talk to them."""

    root: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    waiting: dict[str, float] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PATH": _path(), "SLURM_CONF": str(self.root / "slurm.conf")}

    def start(self, name: str, *command: str) -> None:
        with open(self.root / f"{name}.out", "ab") as log:
            self.processes[name] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def start_node(self, node: str) -> None:
        self.start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """As if the node had lost power, but for what slurmd started, which lives on until slurmd is back."""
        self.processes[node].kill()
        self.processes[node].wait()

    def command(self, *words: str, check: bool = True) -> str:
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False, timeout=60)
        assert not check or done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        """RUNNING, PENDING, COMPLETED, ...; of an array job the states of its tasks, joined."""
        lines = self.command("squeue", "--noheader", "--states=all", "--format=%T", "--job", job).split()
        return ",".join(sorted(set(lines)))

    def wake(self, job: str) -> str:
        """The job's state; where it has waited a while for its start time after a requeue, it is let go.

        Not at once: within the same second slurmd would take the new start for the old one ("Job credential revoked"), which is why SLURM waits.
        """
        state = self.state(job)
        if state != "PENDING":
            self.waiting.pop(job, None)
        elif time.monotonic() - self.waiting.setdefault(job, time.monotonic()) > 5:
            self.command("scontrol", "update", f"jobid={job}", "StartTime=now", check=False)
        return state

    def wait(self, job: str, *states: str, seconds: float = 120) -> str:
        """Wait until the job is in one of the states; returns it."""
        deadline = time.monotonic() + seconds
        while (state := self.wake(job)) not in states:
            if time.monotonic() > deadline:
                raise AssertionError(f"job {job} is {state}, not {states}:\n{self.command('scontrol', 'show', 'job', job)}")
            time.sleep(0.3)
        return state

    def stop(self) -> None:
        """End jobs and daemons."""
        self.command("scancel", "--user=root", check=False)
        deadline = time.monotonic() + 30
        while self.command("squeue", "--noheader", check=False).strip() and time.monotonic() < deadline:
            time.sleep(0.2)
        for name in reversed(self.processes):
            self.processes[name].terminate()
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            process.kill()


def _free_ports(num: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def running(root: Path) -> Iterator[Slurm]:
    """Start everything below `root`, wait until both nodes are idle, and end everything afterwards."""
    slurm = Slurm(root)
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (root / name).mkdir()
    key = root / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    (root / "slurm.conf").write_text(_CONF.format(root=root, host=socket.gethostname(), ports=_free_ports(3), timeout=NODE_TIMEOUT_SECONDS))
    files = [f"--{name}-file={root}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    try:
        slurm.start("munged", "munged", "--foreground", "--force", f"--socket={root}/munge.socket", *files)
        slurm.start("slurmctld", "slurmctld", "-D", "-c")
        for node in NODES:
            slurm.start_node(node)
        _wait_for_nodes(slurm)
        yield slurm
    finally:
        slurm.stop()


def _wait_for_nodes(slurm: Slurm) -> None:
    deadline = time.monotonic() + 60
    while slurm.command("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T", check=False).split() != ["idle", "idle"]:
        assert time.monotonic() < deadline, (slurm.root / "slurmctld.log").read_text()[-3000:]
        time.sleep(0.3)
