"""Fixtures that several test files share."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_client import Client, client_process
from tests.hub_server import HubServer


@pytest.fixture(scope="session")
def hub_process() -> Iterator[subprocess.Popen[str]]:
    with client_process() as process:
        yield process


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def client(hub: HubServer, hub_process: subprocess.Popen[str], tmp_path: Path) -> Client:
    """Somebody who may write as `you`, with a cache of their own."""
    return Client(hub_process, tmp_path, {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_writer"})
