"""Loading from the hub: what was published, from the cache where nobody answers, and never anything damaged."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from checkpoints.load import read_tensors
from tests.hub_client import Client, Done
from tests.hub_repository import File
from tests.hub_server import HubServer
from tests.published import PUBLISH, make_measured

LOAD = """
import sys
from checkpoints.load import local_folder, read_tensors
from checkpoints.manifest import AdapterError
try:
    folder = local_folder({repo!r}, {revision!r})
    print(folder, float(read_tensors(folder)["weight"].double().sum()))
except AdapterError as error:
    print(f"error: {{error}}", file=sys.stderr)
    sys.exit(1)
"""


def load(client: Client, repo: str = "you/fast", revision: str | None = None, **env: str) -> Done:
    """Fetch and read an adapter in a process of its own."""
    return client.run("-c", LOAD.format(repo=repo, revision=revision), **env)


@pytest.fixture
def total(client: Client, hub: HubServer) -> float:
    """Something is published; the sum of its weights tells which."""
    return publish(client)


def publish(client: Client, seed: int = 0, *words: str) -> float:
    folder = client.folder / "adapter"
    shutil.rmtree(folder, ignore_errors=True)
    make_measured(folder, seed)
    done = client.run(*PUBLISH, *words)
    assert done.code == 0, done.err
    return float(read_tensors(folder)["weight"].double().sum())


def loaded(done: Done) -> float:
    """The sum of the weights that were read."""
    assert done.code == 0, done.err
    return float(done.out.split()[1])


def nowhere() -> str:
    """An address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_a_branch_moves_and_a_commit_stays(client: Client, hub: HubServer, total: float) -> None:
    repo = hub.repos["you/fast"]
    first = repo.branches["main"]
    repo.tags["v1"] = first
    assert loaded(load(client)) == total
    second = publish(client, 1)
    third = publish(client, 2, "revision=next")
    assert len({total, second, third}) == 3
    for revision, want in {None: second, "main": second, "next": third, first: total, "v1": total}.items():
        assert loaded(load(client, revision=revision)) == want
    hub.requests.clear()
    assert loaded(load(client, revision=first)) == total  # without asking for it
    assert not [request for request in hub.requests if "you/fast" in request]
    assert "it has no such revision (404)" in load(client, revision="v9").sentence


def test_only_the_four_files_are_fetched(client: Client, hub: HubServer, total: float) -> None:
    repo = hub.repos["you/fast"]
    more = {name: File(b"x", False) for name in ("modeling.py", "pytorch_model.bin", "sub/adapter_config.json")}
    repo.commit("main", repo.commits[repo.branches["main"]] | more, "more")
    done = load(client)
    assert loaded(done) == total
    names = {path.name for path in Path(done.out.split()[0]).rglob("*")}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md", "report.json"}


def test_offline_and_unreachable_take_the_cached_copy(client: Client, hub: HubServer, total: float) -> None:
    home = {"HF_HOME": str(client.home)}
    assert "nothing of the Hub's you/fast is cached" in load(client, HF_HUB_OFFLINE="1", **home).sentence
    told = load(client, HF_ENDPOINT=nowhere(), **home).sentence
    assert "nothing of the Hub's you/fast is cached" in told and "cannot be reached" in told
    assert loaded(load(client)) == total

    offline = load(client, HF_HUB_OFFLINE="1", **home)
    assert loaded(offline) == total and "warn" not in offline.err.lower()
    away = load(client, HF_ENDPOINT=nowhere(), **home)
    assert loaded(away) == total and "the cached you/fast at commit" in away.err and "cannot be reached" in away.err
    for kind in (503, 429, "drop"):
        hub.fail("GET /api/models", kind)
        down = load(client)
        assert loaded(down) == total and "the cached you/fast at commit" in down.err, down.err
        hub.faults.clear()


def test_a_silent_server_is_left_after_seconds(client: Client, hub: HubServer, total: float) -> None:
    assert loaded(load(client)) == total
    hub.fail("GET /api/models", "hang")
    code = "import checkpoints.hub as h; h.ANSWER_S = 0.3\n" + LOAD.format(repo="you/fast", revision=None)
    done = client.run("-c", code)
    assert loaded(done) == total and "does not answer in time" in done.err


def test_what_the_server_refuses_is_refused_though_it_is_cached(client: Client, hub: HubServer, total: float) -> None:
    assert loaded(load(client)) == total
    hub.repos["you/fast"].private = True
    assert loaded(load(client)) == total
    assert "there is no you/fast, or not for this token (404" in load(client, HF_TOKEN="hf_other").sentence
    assert "does not take this token (401" in load(client, HF_TOKEN="hf_wrong").sentence
    assert "nobody is logged in (401)" in load(client, HF_TOKEN="").sentence
    del hub.repos["you/fast"]
    assert "there is no you/fast" in load(client).sentence


def test_an_incomplete_snapshot_is_refused_and_completed(client: Client, hub: HubServer, total: float) -> None:
    hub.fail("GET /storage/", "drop")
    assert "the connection to" in load(client).sentence
    told = load(client, HF_HUB_OFFLINE="1", HF_HOME=str(client.home)).sentence
    assert "only a part of the Hub's you/fast is cached" in told and "load it once with a connection" in told
    hub.faults.clear()
    folder = Path(load(client).out.split()[0])
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink()
        assert load(client, HF_HUB_OFFLINE="1", HF_HOME=str(client.home)).sentence
        assert loaded(load(client)) == total


def test_a_download_that_breaks_off_goes_on_or_ends_in_a_sentence(client: Client, hub: HubServer, total: float) -> None:
    hub.fail("GET /storage/", "short", times=2)
    assert loaded(load(client)) == total
    assert sum(request.startswith("GET /storage/") for request in hub.requests) == 3
    shutil.rmtree(client.home)
    hub.fail("GET /storage/", "short")
    assert load(client).code == 1
    hub.faults.clear()
    assert loaded(load(client)) == total


@pytest.mark.parametrize("pattern", ["GET /storage/", "GET .*/resolve/.*/adapter_config.json"])
def test_a_download_with_another_hash_is_refused_until_it_is_removed(pattern, client, hub, total) -> None:
    hub.fail(pattern, "flip", times=1)
    told = load(client).sentence
    assert "the download is damaged" in told and "hf cache rm model/you/fast" in told
    assert "the download is damaged" in load(client).sentence
    shutil.rmtree(client.home / "hub" / "models--you--fast")  # what that command does
    assert loaded(load(client)) == total


def test_what_is_no_adapter_or_not_the_manifests_file_is_refused(client: Client, hub: HubServer, total: float) -> None:
    repo = hub.repos["you/fast"]
    tree = repo.commits[repo.branches["main"]]
    content = tree["adapter_model.safetensors"].content
    other = File(content[:-1] + bytes([content[-1] ^ 1]), True)
    hub.store[other.sha256] = other.content
    repo.commit("main", tree | {"adapter_model.safetensors": other}, "other tensors")
    assert "is not the file that adapter_config.json was written with" in load(client).sentence
    hub.create("you/empty").commit("main", {"README.md": File(b"# nothing\n", False)}, "card")
    assert "no adapter_config.json" in load(client, "you/empty").sentence
