"""A real Slurm cluster on this one machine: munged, slurmctld and a slurmd for each node, in a network of their own.

The private network (and process) namespace lets every cluster use the same ports, keeps the rendezvous stores of
torchrun, which listen on every address, away from the outside, and takes all processes of all jobs with it at the end.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[3]
NODES = ("n0", "n1")
GPUS = 4
CONTROLLER_PORT, FIRST_NODE_PORT = 17000, 17001
BINARIES = ("slurmctld", "slurmd", "munged", "sbatch", "unshare", "nsenter", "ip")
# 127.0.0.1 alone is not enough: getaddrinfo ignores loopback addresses when it asks which families are in use.
NETWORK = "ip link set lo up && ip addr add 10.99.0.1/32 dev lo && echo ready && cat >/dev/null; :"

Fields = dict[str, str]


def why_not() -> str | None:
    """Why no cluster can run here; None if one can."""
    missing = [name for name in BINARIES if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (apt-get install slurm-wlm munge iproute2)"
    if os.geteuid() != 0:
        return "a private network namespace needs root"
    probe = subprocess.run(
        ["unshare", "-n", "-p", "-f", "--mount-proc", "bash", "-c", NETWORK],
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    if probe.returncode != 0 or b"ready" not in probe.stdout:
        return f"no private network namespace: {probe.stderr.decode().strip()}"
    return None


class Cluster:
    """Two nodes of 4 CPUs and 4 pretended GPUs; partitions `low` (default) and `high`, whose jobs preempt those of `low`."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm_"))
        self.env = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if hasattr(self, "space"):
            with suppress(ProcessLookupError):
                os.kill(self.init, 9)  # the namespace's first process: everything inside dies with it
            self.space.communicate()
        for daemon in self.daemons.values():
            daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: str | Path, timeout: float = 60, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command inside the cluster, from the repository's root, to its end."""
        return subprocess.run(
            [*self._enter, *map(str, command)],
            cwd=ROOT,
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def sbatch(self, *arguments: str | Path, **env: str) -> int:
        """Submit a job; its id."""
        done = self.run("sbatch", "--parsable", *arguments, **env)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split(";")[0])

    def job(self, number: int) -> Fields:
        """What scontrol knows about a job, by field."""
        return _fields(self.run("scontrol", "--oneliner", "show", "job", str(number)).stdout)

    def wait_for(self, number: int, *states: str, timeout: float = 400) -> Fields:
        """Wait until the job is in one of the states; its fields."""
        return self.wait_until(number, lambda job: job["JobState"] in states, timeout)

    def wait_until(self, number: int, ready: Callable[[Fields], bool], timeout: float = 400) -> Fields:
        """Wait until `ready` holds for the job's fields; fails with the job's output if it ends before."""
        deadline = time.monotonic() + timeout
        while not ready(job := self.job(number)):
            ended = job["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "PREEMPTED")
            assert not ended and time.monotonic() < deadline, self.report(job)
            time.sleep(0.2)
        return job

    def report(self, job: Fields) -> str:
        """A job's fields and all that is known of it, for the message of a failed test."""
        output = Path(job.get("StdOut", "/nowhere"))
        text = output.read_text()[-6000:] if output.is_file() else "(no output)"
        return f"{job}\n--- {output}\n{text}\n--- nodes\n{self.run('sinfo', '-N', '-l').stdout}"

    def start_node(self, name: str) -> None:
        """Start the node's slurmd."""
        self._daemon(name, "slurmd", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """SIGKILL to the node's slurmd and to every process of every job on it, as if its power had gone."""
        mine = {f"SLURMD_NODENAME={name}".encode(), f"SLURM_CONF={self.env['SLURM_CONF']}".encode()}
        victims = [pid for pid, env in _environments().items() if mine <= env]
        assert victims
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
        self.daemons[name].wait()

    def wait_for_nodes(self, timeout: float = 60) -> None:
        """Wait until every node is idle."""
        deadline = time.monotonic() + timeout
        while (seen := self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%N %t")).stdout.split("\n")[:-1] != [
            f"{name} idle" for name in NODES
        ]:
            assert time.monotonic() < deadline, f"{seen.stdout}{seen.stderr}{self._logs()}"
            time.sleep(0.1)

    def _start(self) -> None:
        self._write_config()
        self.space = subprocess.Popen(
            ["unshare", "-n", "-p", "-f", "--mount-proc", "bash", "-c", NETWORK],
            stdin=subprocess.PIPE,  # closed when this process dies, however it dies: then the first process inside ends
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self.space.stdout is not None and self.space.stdout.readline() == b"ready\n"
        self.init = _child_of(self.space.pid)
        self._enter = ["nsenter", f"--target={self.init}", "--net", "--pid", "--mount", f"--wdns={ROOT}"]
        run = self.folder / "run"
        paths = {"socket": "munge.sock", "key-file": "munge.key", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        options = [f"--{option}={run / name}" for option, name in paths.items()]
        self._daemon("munged", "munged", "-F", "--force", *options, f"--log-file={self.folder / 'munged.own.log'}")
        self._daemon("slurmctld", "slurmctld", "-D", "-c")
        for name in NODES:
            self.start_node(name)
        self.wait_for_nodes()

    def _daemon(self, name: str, *command: str) -> None:
        log = (self.folder / f"{name}.log").open("ab")
        env = self.env | ({"SLURMD_NODENAME": name} if name in NODES else {})
        self.daemons[name] = subprocess.Popen(
            [*self._enter, *command], stdout=log, stderr=log, env=env, cwd=self.folder
        )
        log.close()

    def _logs(self) -> str:
        tails = (f"--- {path.name}\n{path.read_text()[-2000:]}\n" for path in sorted(self.folder.glob("*.log")))
        return "\n" + "".join(tails)

    def _write_config(self) -> None:
        run = self.folder / "run"
        for folder in (run, self.folder / "state", *(self.folder / "spool" / name for name in NODES)):
            folder.mkdir(parents=True)
        (run / "munge.key").touch(mode=0o600)
        (run / "munge.key").write_bytes(secrets.token_bytes(1024))
        for gpu in range(GPUS):
            (run / f"gpu{gpu}").touch()
        text = CONFIG.format(folder=self.folder, host=socket.gethostname().split(".")[0], port=CONTROLLER_PORT)
        for i, name in enumerate(NODES):
            text += NODE.format(name=name, host=socket.gethostname().split(".")[0], port=FIRST_NODE_PORT + i, gpus=GPUS)
        (self.folder / "slurm.conf").write_text(text)
        files = f"{run}/gpu[0-{GPUS - 1}]"
        gres = (f"NodeName={name} Name=gpu File={files}\n" for name in NODES)
        (self.folder / "gres.conf").write_text("".join(gres))


CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdTimeout=300
KillWait=10
GresTypes=gpu
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=8000 Gres=gpu:{gpus}\n"


def _fields(text: str) -> Fields:
    """`A=1 B=x y C=2`: values may hold spaces, names hold none."""
    fields: Fields = {}
    last = None
    for word in text.split():
        name, equal, value = word.partition("=")
        if equal and name.replace("/", "").replace(":", "").isalnum():
            last = name
            fields[name] = value
        elif last is not None:
            fields[last] += f" {word}"
    return fields


def _environments() -> dict[int, set[bytes]]:
    """The environment of every process on this machine that may be read."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                found[int(folder.name)] = set((folder / "environ").read_bytes().split(b"\0"))
    return found


def _child_of(pid: int) -> int:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for folder in Path("/proc").iterdir():
            with suppress(OSError):
                if folder.name.isdigit() and f"\nPPid:\t{pid}\n" in (folder / "status").read_text():
                    return int(folder.name)
    raise TimeoutError(f"process {pid} has no child")
