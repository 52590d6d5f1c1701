"""Custom resources against the models that their projects' definitions were turned into, from npm."""

import copy
import json
import subprocess
from pathlib import Path

import pytest

from deploy.check.manifests import Object, kustomizations, render_parts
from tests.deploy.conftest import require

PACKAGES = ("prometheus-operator@6.0.0", "keda@2.0.0", "gateway-api@2.0.0")
HERE = Path(__file__).parent

pytestmark = pytest.mark.deploy


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script and what it imports."""
    require("npm")
    directory = tmp_path_factory.mktemp("models")
    (directory / "package.json").write_text("{}")
    packages = [f"@kubernetes-models/{package}" for package in PACKAGES]
    subprocess.run(["npm", "install", "--silent", "--no-audit", *packages], cwd=directory, check=True)
    (directory / "crds.mjs").write_text((HERE / "crds.mjs").read_text())
    return directory


def ask(models: Path, objects: list[Object]) -> list[str]:
    done = subprocess.run(
        ["node", "crds.mjs"],
        cwd=models,
        input=json.dumps(objects),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_the_projects_own_models_accept_what_is_rendered(models: Path, tmp_path: Path) -> None:
    names = [
        "components/monitoring",
        "components/autoscaling/keda",
        "components/inference-pool",
        "overlays/fleet",
    ]
    for name in names:
        objects = render_parts(kustomizations()[name], tmp_path).objects
        *refused, asked = ask(models, list(objects))
        assert refused == []
        assert asked != "asked 0"


def test_they_refuse_what_is_wrong(models: Path, tmp_path: Path) -> None:
    (monitor,) = render_parts(kustomizations()["components/monitoring"], tmp_path).of("PodMonitor")
    broken = copy.deepcopy(monitor)
    broken["spec"]["podMetricsEndpoints"][0]["interval"] = "often"
    refused, _ = ask(models, [broken])
    assert refused.startswith("PodMonitor/adapterd:")
