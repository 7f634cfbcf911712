"""Commands and code that talk to a hub, each in a process of its own.

The library reads HF_ENDPOINT, HF_HOME and others when it is imported.  One process imports everything once, for the
hub of the session, and forks for every call; a call that changes one of these variables has the library imported anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_SERVER = """
import json, os, runpy, sys, time, traceback
import hydra, torch, checkpoints.card, checkpoints.load, checkpoints.push, trainers.recipes, trainers.verdict
import huggingface_hub.hf_api, huggingface_hub._commit_api, huggingface_hub.repocard

def work(job):
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    if job["anew"]:
        os.environ.pop("HF_HUB_DISABLE_XET") if "HF_HUB_DISABLE_XET" not in job["env"] else None
        for name in [name for name in sys.modules if name.startswith("huggingface_hub")]:
            del sys.modules[name]
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
    """Runs commands in `folder`."""

    process: subprocess.Popen[str]
    folder: Path
    home: Path

    def run(self, *words: str, **env: str) -> Done:
        """`module key=value ...`, or `-c code`."""
        out, err = self.folder / "stdout.txt", self.folder / "stderr.txt"
        anew = any(name != "HF_TOKEN" for name in env)
        places = {"cwd": str(self.folder), "out": str(out), "err": str(err)}
        job = {"words": words, "env": {"HF_TOKEN": "hf_writer", **env}, "anew": anew, **places}
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return Done(int(self.process.stdout.readline()), out.read_text(), err.read_text())


@contextmanager
def client_process(url: str, home: Path) -> Iterator[subprocess.Popen[str]]:
    """The process that forks, for the hub at `url` and with its cache in `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    ours = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment = kept | ours | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_PROXY": "*"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=pipe, stdout=pipe, text=True, env=environment
    ) as process:
        yield process
        assert process.stdin
        process.stdin.close()
