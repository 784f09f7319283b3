"""One cluster, one workplace and one undisturbed run for all tests here."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import Workplace
from tests.slurm.cluster import Cluster, why_not
from tests.slurm.jobs import Jobs


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running cluster, or a skip that says why there is none; where it is required, a failure."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="vac-slurm-", dir="/tmp"))  # socket paths must be short
    made = Cluster(folder)
    try:
        made.script("start")
        yield made
    finally:
        try:
            made.script("stop")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            folder.with_name(f"{folder.name}.log").unlink(missing_ok=True)


@pytest.fixture(scope="session")
def jobs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Videos and tiny settings where jobs are submitted, with the undisturbed run `whole` of two ranks on two nodes."""
    made = Jobs(cluster, Workplace(tmp_path_factory.mktemp("slurm")))
    made.whole = made.train("whole", nodes=2)
    assert cluster.wait(made.whole)["JobState"] == "COMPLETED", made.log(made.whole)
    made.start_what_waits()
    return made
