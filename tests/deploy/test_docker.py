"""The images are built with the versions that the tests passed with."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PINNED = dict(
    line.split("==")
    for line in (ROOT / "docker/constraints.txt").read_text().splitlines()
    if not line.startswith("#")
)


def test_every_dependency_has_a_tested_version_that_the_project_allows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in project["dependencies"]:
        wanted = Requirement(line)
        assert PINNED[wanted.name.lower().replace("_", "-")] in wanted.specifier
    assert not [name for name in PINNED if name.startswith(("nvidia-", "cuda-", "ray"))]


def test_the_command_that_renews_the_versions_names_the_same_distributions():
    written = subprocess.run(
        [sys.executable, ROOT / "docker/constraints.py"], capture_output=True, text=True, check=True
    )
    lines = [line for line in written.stdout.splitlines() if not line.startswith("#")]
    assert {line.split("==")[0] for line in lines} == PINNED.keys()


def test_both_installations_of_the_image_are_held_to_them():
    text = (ROOT / "docker/Dockerfile").read_text()
    assert text.count("pip install") == 3  # torch, the rest, and this package without dependencies
    assert text.count("--constraint constraints.txt") == 2


@pytest.mark.parametrize("name", ["compose.yaml", "compose.node.yaml", "compose.server.yaml"])
def test_no_container_can_write_to_its_root(name):
    found = yaml.safe_load((ROOT / "docker" / name).read_text())
    assert found["services"]
    for service in found["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]


def test_a_demo_that_is_there_is_refused_by_its_path_on_this_machine(tmp_path):
    """Nothing is built and nothing started."""
    (tmp_path / "runs/digits").mkdir(parents=True)
    done = subprocess.run(
        ["make", "docker-demo", f"DEMO={tmp_path}"],
        cwd=ROOT,
        env=os.environ | {"DOCKER_HOST": "tcp://127.0.0.1:1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert f"{tmp_path}/runs/digits is there already: make docker-demo RUN=" in done.stderr
