"""A real Prometheus scrapes a daemon under load and a training run beside it: every panel's query returns data, and
the panels are drawn.

The picture is written to build/deploy/dashboard.svg and .png, to be looked at.
"""

import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from deploy import monitoring, picture
from tests.deploy.conftest import require
from tests.serving import served
from tests.training.runs import measured_run

pytestmark = pytest.mark.deploy

REPOSITORY = Path(__file__).parents[2]
OUT = REPOSITORY / "build" / "deploy"
LOAD_SECONDS = 60.0
DATA_SECONDS = 300.0
"""Until every panel has data, at the latest: a machine that does much else is slow to make hits, misses and errors."""
COLON = "metric names should not contain ':'"


@contextmanager
def prometheus(daemon: str, training: str, directory: Path) -> Iterator[str]:
    """The url of a Prometheus that scrapes both every second, with the rules and labels of compose."""
    config = yaml.safe_load((monitoring.DEPLOY / "compose" / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    for scrape, target in zip(config["scrape_configs"], (daemon, training), strict=True):
        scrape["static_configs"][0]["targets"] = [target]
    (directory / "prometheus.yaml").write_text(yaml.safe_dump(config))
    (directory / "rules.yaml").write_text(monitoring.RULES.read_text())
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [
        "prometheus",
        f"--config.file={directory / 'prometheus.yaml'}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                if httpx.get(f"{url}/-/ready").status_code == 200:
                    break
            except httpx.HTTPError:
                assert time.monotonic() < deadline, "prometheus does not start"
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def keep_asking(url: str, stop: threading.Event, number: int) -> None:
    """Chats for each adapter in turn, the base and one that is not there, until told to stop.

    Every seventh is a stream that the client leaves at its first line.
    """
    models = ["mini:support", "mini:moderation", "mini:medical", "mini", "mini:support", "mini:nobody"]
    with httpx.Client(base_url=url, timeout=60) as client:
        for turn in range(10_000):
            if stop.is_set():
                return
            question = {"role": "user", "content": f"Where is my parcel, please? It is order {number}{turn}."}
            body = {"model": models[(turn + number) % len(models)], "messages": [question], "max_tokens": 24}
            if turn % 7 == 6:
                with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
                    next(response.iter_lines())
            else:
                client.post("/v1/chat/completions", json=body)


def panels_without_data(at: str) -> set[str]:
    """Titles and expressions of those whose query returns nothing now."""
    return {
        f"{panel.title}: {expression}"
        for _, row in monitoring.ROWS
        for panel in row
        for _, expression in panel.queries
        if not httpx.get(f"{at}/api/v1/query", params={"query": picture.filled_in(expression)}).json()[
            "data"
        ]["result"]
    }


def test_every_panel_has_data_under_load(tmp_path: Path) -> None:
    require("prometheus", "promtool", "rsvg-convert")
    # Room for two of the three adapters: they are moved, and one is always missing. Room for some 400 tokens.
    memory = ("--adapter-memory", "4000KiB", "--kv-memory", "1536KiB")
    recipe = (str(REPOSITORY / "adapters/moderation/recipe.toml"), "--out", str(tmp_path / "trained"))
    with (
        served("--adapters", str(REPOSITORY / "adapters"), *memory) as url,
        measured_run(*recipe, "--epochs", "1000", "--patience", "1000", log=tmp_path / "train.log") as page,
    ):
        stop = threading.Event()
        clients = [threading.Thread(target=keep_asking, args=(url, stop, number)) for number in range(4)]
        training = page.removeprefix("http://").removesuffix("/metrics")
        with prometheus(url.removeprefix("http://"), training, tmp_path) as at:
            began = time.monotonic()
            for client in clients:
                client.start()
            time.sleep(LOAD_SECONDS)
            while (empty := panels_without_data(at)) and time.monotonic() < began + DATA_SECONDS:
                time.sleep(1)
            exposition = httpx.get(f"{url}/metrics").text
            of_training = httpx.get(page).text
            rules = httpx.get(f"{at}/api/v1/rules").json()["data"]["groups"]
            drawn = picture.svg(at, (time.monotonic() - began) / 60)
            stop.set()
        for client in clients:
            client.join()

    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "dashboard.svg").write_text(drawn)
    (OUT / "metrics.txt").write_text(exposition)
    subprocess.run(["rsvg-convert", "-o", OUT / "dashboard.png", OUT / "dashboard.svg"], check=True)
    assert empty == set()
    assert "no data" not in drawn
    assert {rule["health"] for group in rules for rule in group["rules"]} == {"ok"}
    for text in (exposition, of_training):
        checked = subprocess.run(
            ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
        )
        # vLLM's names have a colon, which promtool minds; it may mind nothing else.
        complaints = [line for line in checked.stderr.splitlines() if line and COLON not in line]
        assert complaints == []
    assert re.search(r'vllm:lora_requests_info\{.*running_lora_adapters="[^"]+', exposition)
    print(json.dumps({"series": sum(not line.startswith("#") for line in exposition.splitlines())}))
