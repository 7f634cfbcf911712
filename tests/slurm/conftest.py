"""One private Slurm of two nodes for all tests of this folder, and a run on it that nothing disturbs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.slurm.jobs import ROOT, SHAPE, Jobs
from tests.tiny_ilf import save_tiny


def _cluster_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("slurm_cluster", ROOT / ".ci/slurm/cluster.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """Submits jobs from a folder whose name has a blank; the cluster is gone at the end, whatever happens."""
    module = _cluster_module()
    if reason := module.why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm runs")
    with module.running() as cluster:
        yield Jobs(cluster, folder, save_tiny("dit", folder))


@pytest.fixture(scope="session", params=["ddp"])
def strategy(request: pytest.FixtureRequest) -> str:
    """How two nodes train together."""
    return request.param


@pytest.fixture(scope="session")
def undisturbed(jobs: Jobs, strategy: str) -> bytes:
    """The adapter of a run on two nodes that nothing disturbs."""
    job = jobs.submit(*SHAPE, f"trainer.strategy={strategy}")
    jobs.wait_for_state(job, "COMPLETED")
    return jobs.adapter(job)


@pytest.fixture(autouse=True)
def nothing_left_running(jobs: Jobs) -> Iterator[None]:
    """A test that fails leaves the next one the whole cluster."""
    yield
    jobs.cancel_all()


@pytest.fixture
def outputs(jobs: Jobs) -> Path:
    """Folder of the runs."""
    return jobs.outputs
