#!/usr/bin/env python3
"""A private Slurm of two nodes on this machine, for tests:  python .ci/slurm/cluster.py start|stop [FOLDER]

Real daemons on loopback under one folder: no systemd, cgroups or database.  Needs root and the packages that
`.ci/slurm/install` installs.  `start` prints a line to eval; `stop` ends all that was started and removes FOLDER.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from string import Template

HERE = Path(__file__).resolve().parent
NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "squeue", "scancel")
START_SECONDS = 40.0


def why_not() -> str | None:
    """What this machine lacks, in words, or None."""
    if os.name != "posix" or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "a private Slurm needs root"
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"{', '.join(missing)} not installed: run .ci/slurm/install"
    return None


class Cluster:
    """The cluster under `base` (a short path without spaces: a socket lives there)."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.config = base / "slurm.conf"
        # The commands of this cluster, and no other's that the caller may live in.
        outer = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        self.environment = outer | {"SLURM_CONF": str(self.config)}

    def start(self, cpus: int = 4, node_seconds: int = 10, requeue_seconds: int = 5) -> None:
        """Start munge, the controller and both nodes, and wait until the nodes are idle.

        Args:
            cpus: that each node promises.
            node_seconds: until a silent node counts as lost.
            requeue_seconds: until a requeued job may start again.
        Raises:
            RuntimeError: something did not come up; what was started is stopped, the message ends with the logs.
        """
        for name in ("munge", "state", *(f"spool-{node}" for node in NODES)):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        for folder in (self.base, self.base / "munge"):
            folder.chmod(0o755)  # munge refuses a socket that others cannot reach
        ctld_port, n1_port, n2_port = _free_ports(3)
        text = Template((HERE / "slurm.conf.in").read_text(encoding="utf-8")).substitute(
            base=self.base,
            host=socket.gethostname().partition(".")[0],
            ctld_port=ctld_port,
            n1_port=n1_port,
            n2_port=n2_port,
            cpus=cpus,
            node_seconds=node_seconds,
            requeue_seconds=requeue_seconds,
        )
        self.config.write_text(text, encoding="utf-8")
        try:
            self._start_munge()
            self._daemon("slurmctld", "-f", str(self.config))
            for node in NODES:
                self.start_node(node)
            self.wait_for_nodes()
        except BaseException:
            self.stop()
            raise

    def _start_munge(self) -> None:
        folder = self.base / "munge"
        key = folder / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        places = {"key-file": key, "socket": folder / "socket", "pid-file": self.base / "munged.pid"}
        places |= {"log-file": folder / "log", "seed-file": folder / "seed"}
        # --force: run by root, in a folder that is not the distribution's.
        self._daemon("munged", "--force", *(f"--{option}={place}" for option, place in places.items()))

    def _daemon(self, *command: str) -> None:
        # A daemon inherits what it is started with: a pipe would stay open for as long as it lives.
        with (self.base / "start.log").open("ab") as log:
            done = subprocess.run(command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        if done.returncode != 0:
            raise RuntimeError(f"{command[0]} did not start: {self.logs()}")

    def start_node(self, node: str) -> None:
        """Start (again) the daemon of one node."""
        self._daemon("slurmd", "-f", str(self.config), "-N", node)

    def wait_for_nodes(self, seconds: float = START_SECONDS) -> None:
        """Return when both nodes take jobs."""
        end = time.monotonic() + seconds
        while len(set(self.call("sinfo", "-h", "-N", "-t", "idle,mixed,allocated", "-o", "%N").split())) < len(NODES):
            if time.monotonic() > end:
                raise RuntimeError(f"the nodes are not ready after {seconds:.0f} s: {self.logs()}")
            time.sleep(0.2)

    def call(self, *command: str, check: bool = False) -> str:
        """Standard output of one of Slurm's commands."""
        try:
            done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=20)
        except subprocess.TimeoutExpired:
            if check:
                raise
            return ""
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def lose_node(self, node: str) -> None:
        """What a power cut does: the node's daemon, its step daemons and their processes are gone at once."""
        victims = [pid for pid in _step_daemons(self.base) if node in _spool_of(pid, self.base)]
        victims = [*_pid_in(self.base / f"slurmd-{node}.pid"), *victims, *(c for pid in victims for c in _below(pid))]
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """Cancel every job, end every daemon and what they started, remove the folder."""
        if _pid_in(self.base / "slurmctld.pid"):
            self.call("scancel", "--user=root")
            end = time.monotonic() + 12
            while self.call("squeue", "-h", "-t", "running,completing", "-o", "%A") and time.monotonic() < end:
                time.sleep(0.2)
        for pid in _step_daemons(self.base):
            for process in [*_below(pid), pid]:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        names = [*(f"slurmd-{node}" for node in NODES), "slurmctld", "munged"]
        for pid in [pid for name in names for pid in _pid_in(self.base / f"{name}.pid")]:
            _end(pid)
        shutil.rmtree(self.base, ignore_errors=True)

    def logs(self) -> str:
        """The last lines of every daemon's log."""
        parts = []
        for path in sorted(self.base.glob("*.log")):
            parts.append("\n".join([f"{path.name}:", *path.read_text(errors="replace").splitlines()[-20:]]))
        return "\n".join(parts)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _pid_in(path: Path) -> list[int]:
    """The living process that a pid file names, as a list of one or none."""
    try:
        pid = int(path.read_text())
        os.kill(pid, 0)
    except (OSError, ValueError):
        return []
    return [pid]


def _step_daemons(base: Path) -> list[int]:
    """Step daemons of this cluster: Slurm names no pid file for them, but each holds a node's log under `base` open."""
    return [
        int(process.name)
        for process in Path("/proc").glob("[0-9]*")
        if _read(process / "comm").strip() == "slurmstepd" and _spool_of(int(process.name), base)
    ]


def _spool_of(pid: int, base: Path) -> str:
    """Names of the files under `base` that a process holds open, joined."""
    found = []
    with suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                found.append(os.readlink(descriptor))
    return " ".join(name.removeprefix(f"{base}/") for name in found if name.startswith(f"{base}/"))


def _below(pid: int) -> list[int]:
    """Every descendant of a process."""
    parents: dict[int, list[int]] = {}
    for process in Path("/proc").glob("[0-9]*"):
        # The name stands in brackets and may hold anything; the parent is the second word after them.
        if rest := _read(process / "stat").rpartition(")")[2].split():
            parents.setdefault(int(rest[1]), []).append(int(process.name))
    found, todo = [], [pid]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # the process has ended
        return ""


def _end(pid: int) -> None:
    for signum, seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 2.0)):
        end = time.monotonic() + seconds
        with suppress(ProcessLookupError):
            os.kill(pid, signum)
            while time.monotonic() < end:
                os.kill(pid, 0)
                time.sleep(0.05)


@contextmanager
def running(**settings: int) -> Iterator[Cluster]:
    """A cluster in a folder of its own, gone at the end whatever happens."""
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="slurm-")))
    # The default would end this process and leave the daemons.
    before = signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        cluster.start(**settings)
        yield cluster
    finally:
        cluster.stop()
        signal.signal(signal.SIGTERM, before)


def main() -> int:
    """Start or stop the cluster that the command line names."""
    words = sys.argv[1:]
    if not 1 <= len(words) <= 2 or words[0] not in ("start", "stop"):
        print(__doc__.partition("\n")[0], file=sys.stderr)
        return 2
    cluster = Cluster(Path(words[1] if len(words) == 2 else Path(tempfile.gettempdir()) / "afterburner-slurm"))
    if words[0] == "stop":
        cluster.stop()
        return 0
    if reason := why_not():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    if not _pid_in(cluster.base / "slurmctld.pid"):
        cluster.start()
    print(f"export SLURM_CONF={cluster.config}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
