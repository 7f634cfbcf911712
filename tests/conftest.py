"""Fixtures that several test files share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen

import pytest

from tests.hub_client import Client, client_process
from tests.hub_server import HubServer


@pytest.fixture(params=["pixart", "dit"])
def kind(request: pytest.FixtureRequest) -> str:
    """A tiny pipeline of `tests.tiny`."""
    return request.param


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a test file keeps its backbones."""
    return tmp_path_factory.mktemp("backbones")


@pytest.fixture
def name(kind: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The saved pipeline, as recipes name it."""
    from tests.tiny_ilf import save_tiny  # not above: most tests need no pipeline, and importing one takes seconds

    return save_tiny(kind, saved, monkeypatch)


@pytest.fixture(scope="session")
def hub_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubServer, Popen[str], Path]]:
    home = tmp_path_factory.mktemp("hub_home")
    with HubServer() as server, client_process(server.url, home) as process:
        yield server, process, home


@pytest.fixture
def hub(hub_session: tuple[HubServer, Popen[str], Path]) -> HubServer:
    """An empty hub."""
    server, _, home = hub_session
    server.reset()
    shutil.rmtree(home, ignore_errors=True)
    return server


@pytest.fixture
def client(hub: HubServer, hub_session: tuple[HubServer, Popen[str], Path], tmp_path: Path) -> Client:
    """Somebody who may write as `you`, with an empty cache."""
    _, process, home = hub_session
    return Client(process, tmp_path, home)
