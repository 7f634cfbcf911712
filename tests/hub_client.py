"""Commands and code that talk to a hub, each in a process of its own.

The client reads HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE when it is imported.  One process imports torch and our
code once, and forks for every call, with an environment of its own, before huggingface_hub is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_SERVER = """
import json, os, runpy, sys, time, traceback
import hydra, torch, checkpoints.card, checkpoints.load, checkpoints.push, trainers.recipes, trainers.verdict
import huggingface_hub.hf_api
for name in [name for name in sys.modules if name.startswith("huggingface_hub")]:
    del sys.modules[name]  # what it needs stays imported

def work(job):
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.001))  # the client waits up to a minute between its attempts
    try:
        if job["words"][0] == "-c":
            exec(compile(job["words"][1], "<code>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = list(job["words"])
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)

for line in sys.stdin:
    if not (child := os.fork()):
        work(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass
class Done:
    """How a call ended."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The one line that an error is told in; the client's own remarks on its attempts stand before it."""
        assert "Traceback" not in self.err, self.err
        (line,) = [line for line in self.err.splitlines() if line.startswith("error: ")]
        text = line.removeprefix("error: ")
        assert not text.endswith(".") and ". " not in text.replace("...", ""), text
        return text


@dataclass
class Client:
    """Runs in `folder`, with `folder/home` as HF_HOME."""

    process: subprocess.Popen[str]
    folder: Path
    env: dict[str, str] = field(default_factory=dict)

    def run(self, *words: str, **env: str) -> Done:
        """`module key=value ...`, or `-c code`."""
        out, err = self.folder / "stdout.txt", self.folder / "stderr.txt"
        environment = {"HF_HOME": str(self.folder / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **self.env, **env}
        job = {"words": words, "env": environment, "cwd": str(self.folder), "out": str(out), "err": str(err)}
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return Done(int(self.process.stdout.readline()), out.read_text(), err.read_text())


@contextmanager
def client_process() -> Iterator[subprocess.Popen[str]]:
    """The process that forks."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment = kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_PROXY": "*"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=pipe, stdout=pipe, text=True, env=environment
    ) as process:
        yield process
        assert process.stdin
        process.stdin.close()
