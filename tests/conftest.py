"""Fixtures that several test files share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen

import pytest

from tests.hub_client import Client, client_process
from tests.hub_server import HubServer


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
