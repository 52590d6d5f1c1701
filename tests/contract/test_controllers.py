"""The calls of the controllers that load adapters, replayed against the daemon as they send them.

Sources: AIBrix' ModelAdapter controller (lora_client.go), production-stack's LoraAdapter operator
(loraadapter_controller.go), the sidecar of the inference extension up to v1.4.0 (sidecar.py). What each counts as a
success is written as its own code has it. KServe calls nothing; it starts the daemon with vLLM's flags, and so does
this.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.contract.router import lora_affinity, read
from tests.serving import served

QUALIFIED = "publishers/team/models/kserve-sql"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def volume(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapters' volume as a pod sees it: folders that no name is watched for."""
    volume = tmp_path_factory.mktemp("volume")
    adapters = tiny_base.parent / "adapters"
    for folder, name in (("sql/v1", "support"), ("sql/v2", "medical"), ("org--repo/main", "medical")):
        shutil.copytree(adapters / name, volume / folder)
    return volume


@pytest.fixture(scope="module")
def arguments(tiny_base: Path, volume: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("daemon")
    (folder / "admins").write_text("the-operators-key\n")
    modules = [
        json.dumps({"name": name, "path": str(volume / "sql/v2")}) for name in ("kserve-sql", QUALIFIED)
    ]
    return (
        *("--enable-lora", "--max-lora-rank=16", "--max-loras=4", "--max-cpu-loras=8"),
        *("--lora-modules", modules[0], f"'{modules[1]}'"),
        *("--base", str(tiny_base), "--adapters", str(volume), "--state", str(folder / "state")),
        *("--kv-memory", "4MiB", "--allow-runtime-adapters"),
        *("--admin-key-file", str(folder / "admins"), "--insecure-no-auth"),
    )


@pytest.fixture
def loopback(server_url: str) -> str:
    """A daemon that only its own machine, or its own pod, reaches: no keys."""
    return server_url


@dataclass(frozen=True)
class Operator:
    """Someone with the admin's key."""

    url: str

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, headers=self._key, timeout=30)

    def post(self, path: str, body: dict[str, str]) -> httpx.Response:
        return httpx.post(self.url + path, json=body, headers=self._key, timeout=30)

    @property
    def _key(self) -> dict[str, str]:
        return {"Authorization": "Bearer the-operators-key"}


class AIBrix:
    """Reconciles one ModelAdapter against one pod, as often as asked."""

    def __init__(self, url: str, name: str, artifact: str) -> None:
        self.pod = Operator(url)
        self.name = name
        self.artifact = artifact
        self.num_loads = 0

    def reconcile(self) -> bool:
        if self.is_loaded():
            return True
        self.num_loads += 1
        body = {"lora_name": self.name, "lora_path": self.artifact.removeprefix("huggingface://")}
        return self.pod.post(LOAD, body).status_code in (200, 201)

    def is_loaded(self) -> bool:
        models = self.pod.get("/v1/models").json()
        return any(model["id"] == self.name for model in models["data"])

    def delete(self) -> None:
        """Whatever it answers."""
        self.pod.post(UNLOAD, {"lora_name": self.name})


class ProductionStack:
    """The operator's load: a 400 is a success where its top-level type and message say "already"."""

    def __init__(self, url: str) -> None:
        self.pod = Operator(url)

    def load(self, name: str, path: str) -> bool:
        response = self.pod.post(LOAD, {"lora_name": name, "lora_path": path})
        if response.status_code == 400:
            error = response.json()
            return error["type"] == "InvalidUserInput" and "has already been loaded" in error["message"]
        return response.status_code == 200

    def loaded(self) -> set[str]:
        return {model["id"] for model in self.pod.get("/v1/models").json()["data"] if model["parent"]}

    def unload(self, name: str) -> bool:
        return self.pod.post(UNLOAD, {"lora_name": name}).status_code == 200


def test_adapters_loaded_by_controllers_survive_a_restart(arguments: tuple[str, ...], volume: Path) -> None:
    with served(*arguments) as url:
        adapter = AIBrix(url, "sql-assistant", str(volume / "sql/v1"))
        assert adapter.reconcile()
        assert adapter.reconcile()
        assert adapter.num_loads == 1
        assert answers(url, "sql-assistant")
        assert answers(url, "tiny:sql-assistant")

        operator = ProductionStack(url)
        assert operator.load("reports", str(volume / "sql/v1"))
        assert operator.load("reports", str(volume / "sql/v1")), "the same once more is a success"
        assert operator.load("reports", str(volume / "sql/v2")), "it takes this 400 for a success"
        assert not operator.load("absent", str(volume / "nowhere"))
        assert operator.loaded() >= {"reports", "tiny:reports", "sql-assistant", "tiny:sql-assistant"}

        anonymous = httpx.post(f"{url}{LOAD}", json={"lora_name": "x", "lora_path": "sql/v1"})
        assert anonymous.status_code == 403

    with served(*arguments) as url:
        assert answers(url, "kserve-sql")
        assert answers(url, QUALIFIED)
        assert lora_affinity(read(httpx.get(f"{url}/metrics").text), QUALIFIED) == 1.0

        adapter = AIBrix(url, "sql-assistant", str(volume / "sql/v1"))
        assert adapter.is_loaded(), "nobody has to notice that the pod was replaced"
        assert answers(url, "sql-assistant")
        operator = ProductionStack(url)
        assert operator.unload("reports")
        assert not answers(url, "reports")
        adapter.delete()
        adapter.delete()
        assert not adapter.is_loaded()
        hub = AIBrix(url, "from-the-hub", "huggingface://org--repo/main")
        assert hub.reconcile(), "a path below the volume, as the operator's downloader leaves it"


def test_the_sidecar_reconciles_without_a_key(loopback: str, tiny_base: Path) -> None:
    path = str(tiny_base.parent / "adapters" / "medical")
    with httpx.Client(base_url=loopback, timeout=30) as sidecar:
        assert sidecar.get("/health").status_code == 200
        for _ in range(2):  # every five seconds, whatever there is
            registered = {model["id"] for model in sidecar.get("/v1/models").json()["data"]}
            if "triage" not in registered:
                body = {"lora_name": "triage", "lora_path": path, "base_model_name": "tiny"}
                assert sidecar.post(LOAD, json=body).is_success
        assert answers(loopback, "triage")
        assert sidecar.post(UNLOAD, json={"lora_name": "triage"}).is_success
        assert not answers(loopback, "triage")


def answers(url: str, model: str) -> bool:
    body = {"model": model, "prompt": "Hello", "max_tokens": 2}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=30)
    assert response.status_code in (200, 404), response.text
    return response.status_code == 200
