"""Whatever fails between here and the hub: one sentence, no half-published branch, and a second try that works."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.hub_client import Client, Done
from tests.hub_repository import File
from tests.hub_server import HubServer
from tests.published import PUBLISH, contents, make_measured

COMMIT, UPLOAD = "POST .*/commit/", "PUT /storage/"


@pytest.fixture
def adapter(client: Client) -> Path:
    make_measured(client.folder / "adapter")
    return client.folder / "adapter"


def state(hub: HubServer) -> dict[str, dict[str, str]]:
    """Every branch of every repository."""
    return {name: dict(repo.branches) for name, repo in hub.repos.items()}


def failed(done: Done, sentence: str) -> None:
    """One sentence, with these words."""
    assert done.code == 1 and done.out.count("published as") == 0, done.out
    assert sentence in done.sentence and done.sentence.count(" was not published: ") == 1, done.sentence


CASES = {
    "upload dropped": ((UPLOAD, "drop"), "the connection to", "main is what it was"),
    "upload dropped after all": ((UPLOAD, "drop_after"), "the connection to", "main is what it was"),
    "upload refused": ((UPLOAD, 403), "has no right", "main is what it was"),
    "upload store down": ((UPLOAD, 500), "the server failed (500)", "main is what it was"),
    "commit dropped": ((COMMIT, "drop"), "the connection to", "main is what it was"),
    "commit in maintenance": ((COMMIT, 503), "the server failed (503)", "main is what it was"),
    "commit refused": ((COMMIT, 403), "has no right to do that in you/fast (403)", "main is what it was"),
    "conflict": ((COMMIT, 409), "somebody else changed you/fast meanwhile (409)", "main is what it was"),
    "rate limit": (("POST .*/preupload/", 429), "asked less often (429)", "main is what it was"),
    "gateway": (("POST /api/validate-yaml", 502), "the server failed (502)", ""),
    "no hub": (("GET /api/models", 200), "is no Hub", ""),
    "listing down": (("GET .*/tree/", 500), "the server failed (500)", "main is what it was"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_failing_server_leaves_the_branch_as_it_was(name: str, client: Client, hub: HubServer, adapter: Path) -> None:
    (pattern, kind), sentence, note = CASES[name]
    hub.create("you/fast")
    before = state(hub)
    hub.fail(pattern, kind, body=b"<html>" if name == "no hub" else None)
    done = client.run(*PUBLISH)
    failed(done, sentence)
    assert note in done.sentence and state(hub) == before
    hub.faults.clear()
    assert client.run(*PUBLISH).code == 0
    assert contents(adapter).items() <= hub.tree("you/fast").items()


@pytest.mark.parametrize("kind", ["drop", 500, 503])
def test_what_passes_within_the_clients_own_attempts_is_not_even_told(kind, client, hub, adapter) -> None:
    hub.create("you/fast")
    hub.fail(UPLOAD, kind, times=3)
    done = client.run(*PUBLISH)
    assert done.code == 0 and "error" not in done.out and hub.tree("you/fast").keys() > contents(adapter).keys()


def test_attempts_are_bounded(client: Client, hub: HubServer, adapter: Path) -> None:
    (adapter / "report.png").unlink()  # the only other file that is stored as large
    hub.fail(UPLOAD, 503)
    failed(client.run(*PUBLISH), "the server failed (503)")
    assert sum(request.startswith("PUT") for request in hub.requests) == 6


def test_a_wrong_token(client: Client, hub: HubServer, adapter: Path) -> None:
    failed(client.run(*PUBLISH, HF_TOKEN="hf_wrong"), "does not take this token (401")
    failed(client.run(*PUBLISH, HF_TOKEN=""), "nobody is logged in")
    assert not hub.repos


@pytest.mark.parametrize("token", ["hf_reader", "hf_other"])
def test_no_right_to_write(token: str, client: Client, hub: HubServer, adapter: Path) -> None:
    failed(client.run(*PUBLISH, HF_TOKEN=token), "has no right to do that in you/fast (403")  # nor to make one
    assert not hub.repos
    hub.create("you/fast")
    before = state(hub)
    failed(client.run(*PUBLISH, HF_TOKEN=token), "has no right to do that in you/fast (403")
    failed(client.run(*PUBLISH, "revision=next", HF_TOKEN=token), "has no right")
    assert state(hub) == before


def test_no_such_namespace_and_a_private_repository_of_somebody_else(client, hub, adapter) -> None:
    failed(client.run(*PUBLISH, "repo=nowhere/fast"), "there is no nowhere/fast, or not for this token (404")
    hub.create("other/fast", private=True)
    failed(client.run(*PUBLISH, "repo=other/fast"), "has no right")
    assert not hub.tree("other/fast")


def test_a_card_that_the_server_refuses(client: Client, hub: HubServer, adapter: Path) -> None:
    done = client.run(*PUBLISH, "license=mine")
    failed(done, '"license" must be one of the known licences')
    assert "another license= may help" in done.sentence and not hub.repos


def test_nobody_listens(client: Client, hub: HubServer, adapter: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    failed(client.run(*PUBLISH, HF_ENDPOINT=f"http://127.0.0.1:{port}"), f"127.0.0.1:{port} cannot be reached")
    failed(client.run(*PUBLISH, HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set")


def test_a_server_that_says_nothing(client: Client, hub: HubServer, adapter: Path) -> None:
    hub.create("you/fast")
    hub.fail(COMMIT, "hang")
    words = ", ".join(map(repr, PUBLISH[1:]))
    code = f"import sys, checkpoints.push as p, trainers.publish as t; p._SILENCE_S = 0.5; sys.exit(t.main([{words}]))"
    failed(client.run("-c", code), "does not answer in time")
    assert not hub.tree("you/fast")


def test_somebody_else_commits_between(client: Client, hub: HubServer, adapter: Path) -> None:
    repo = hub.create("you/fast")
    other = {**repo.commits[repo.branches["main"]], "theirs.txt": File(b"x", False)}

    def commit(request: str, take=hub.take_fault):
        if "/commit/" in request and "theirs.txt" not in hub.tree("you/fast"):
            repo.commit("main", other, "theirs")
        return take(request)

    hub.take_fault = commit
    done = client.run(*PUBLISH)
    failed(done, "somebody else changed you/fast meanwhile (412")
    assert "is what it was" not in done.sentence and hub.tree("you/fast").keys() == {"theirs.txt"}
    assert client.run(*PUBLISH).code == 0 and "theirs.txt" in hub.tree("you/fast")


def test_a_commit_whose_answer_is_lost_is_known_to_have_happened(client, hub, adapter) -> None:
    hub.create("you/fast")
    hub.fail(COMMIT, "drop_after")
    done = client.run(*PUBLISH)
    assert done.code == 0 and "the connection was lost after the commit, which did take place" in done.out, done.err
    assert hub.repos["you/fast"].branches["main"] in done.out
    assert contents(adapter).items() <= hub.tree("you/fast").items()


def test_a_server_that_goes_for_good_is_not_claimed_to_be_unchanged(client, hub, adapter) -> None:
    hub.create("you/fast")

    def vanish(request: str, take=hub.take_fault):
        if "/commit/" in request:
            hub.fail(".", "drop")
        return take(request)

    hub.take_fault = vanish
    failed(client.run(*PUBLISH), "does not say whether it arrived all the same; repeating the command is safe")
    assert not hub.tree("you/fast")


def test_a_server_without_xet_is_sent_large_files_by_lfs(client: Client, hub: HubServer, adapter: Path) -> None:
    done = client.run(*PUBLISH, HF_HUB_DISABLE_XET="0")
    failed(done, "no xet storage; leave HF_HUB_DISABLE_XET unset, or set it to 1")
    assert client.run(*PUBLISH, HF_ENDPOINT=hub.url).code == 0  # with the library imported after the choice
    assert not [request for request in hub.requests if "xet-" in request][1:]


@pytest.mark.parametrize("pattern", [UPLOAD, COMMIT, "GET .*/tree/"])
def test_a_branch_made_for_a_commit_that_fails_goes_again(pattern: str, client, hub, adapter) -> None:
    hub.create("you/fast")
    before = state(hub)
    hub.fail(pattern, 500)
    done = client.run(*PUBLISH, "revision=next")
    failed(done, "the server failed (500)")
    assert state(hub) == before and "next" not in done.sentence
    hub.faults.clear()
    assert client.run(*PUBLISH, "revision=next").code == 0 and hub.tree("you/fast", "next") and not hub.tree("you/fast")


def test_an_interrupt_is_told_and_leaves_nothing(client: Client, hub: HubServer, adapter: Path) -> None:
    hub.create("you/fast")
    before = state(hub)
    words = ", ".join(map(repr, [*PUBLISH[1:], "revision=next"]))
    code = f"""
import signal, sys, trainers.publish as t, huggingface_hub as h
commit = h.HfApi.create_commit
def interrupted(*args, **kwargs):
    signal.raise_signal(signal.SIGINT)
    return commit(*args, **kwargs)
h.HfApi.create_commit = interrupted
sys.exit(t.main([{words}]))
"""
    failed(client.run("-c", code), "it was interrupted")
    assert state(hub) == before


def test_a_repository_made_for_a_commit_that_fails_stays_and_is_told(client, hub, adapter) -> None:
    hub.fail(COMMIT, 500)
    done = client.run(*PUBLISH)
    failed(done, "the public repository was created")
    assert not hub.tree("you/fast")
    hub.faults.clear()
    stored = sum(request.startswith("PUT") for request in hub.requests)
    assert client.run(*PUBLISH).code == 0
    assert sum(request.startswith("PUT") for request in hub.requests) == stored  # what had arrived is not sent again
