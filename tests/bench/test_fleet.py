"""The picker's rules, the proxy that follows them, and the simulated fleet."""

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
import yaml

from bench.fleet import Setup, make_models, pod_target
from bench.fleet_picker import (
    NO_LORA_SCORER,
    Signals,
    Weights,
    choose,
    lora_affinity,
    read_signals,
    scores,
    zipf_shares,
)
from bench.fleet_plot import svg
from bench.fleet_proxy import weights_of
from bench.fleet_sim import Costs, Fleet, Traffic, capacity

PICKER_CONFIG = (
    Path(__file__).parents[2] / "deploy" / "components" / "inference-pool" / "endpoint-picker-config.yaml"
)
FIRST = """\
# HELP vllm:num_requests_waiting Sequences that wait to run.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{model_name="base"} 3.0
vllm:num_requests_waiting{model_name="other"} 99
vllm:kv_cache_usage_perc{model_name="base"} 0.25
vllm:lora_requests_info{max_lora="8",running_lora_adapters="old",waiting_lora_adapters=""} 100
vllm:lora_requests_info{max_lora="8",running_lora_adapters="base:a, a,,b",waiting_lora_adapters="c"} 1.7e+09
adapterd_queue_requests{model_name="base"} 3
"""


def pod(*resident: str, waiting: int = 0, kv: float = 0.0, max_lora: int = 2) -> Signals:
    return Signals(waiting, kv, max_lora, frozenset(resident))


def test_the_first_series_of_a_gauge_counts_and_the_latest_of_the_adapters() -> None:
    assert read_signals(FIRST) == Signals(3, 0.25, 8, frozenset({"base:a", "a", "b"}), frozenset({"c"}))


def test_without_adapters_there_is_no_room_and_without_a_queue_it_is_an_error() -> None:
    text = "vllm:num_requests_waiting 0\nvllm:kv_cache_usage_perc 0\n"
    assert read_signals(text) == Signals()
    with pytest.raises(KeyError, match="kv_cache_usage_perc"):
        read_signals("vllm:num_requests_waiting 0\n")


def test_an_adapter_scores_by_where_it_is() -> None:
    assert lora_affinity("a", pod("a", "b")) == 1.0
    assert lora_affinity("c", pod("a")) == 0.8
    assert lora_affinity("c", Signals(max_lora=1, waiting=frozenset({"c"}))) == 0.6
    assert lora_affinity("c", pod("a", "b")) == 0.0


def test_a_resident_idle_adapter_scores_highest() -> None:
    found = scores("a", [pod("b", "c"), pod("a", "b"), pod()], [0, 0, 0], Weights())
    assert max(found) == found[1]


def test_queues_count_from_the_shortest_to_the_longest() -> None:
    pods = [pod(waiting=0), pod(waiting=5), pod(waiting=10)]
    assert scores("a", pods, [0, 0, 0], Weights(0, 2, 0, 0)) == [2, 1, 0]
    assert scores("a", [pod(waiting=7)] * 2, [0, 0], Weights(0, 2, 0, 0)) == [2, 2]
    assert scores("a", [pod(kv=0.25)], [0], Weights(0, 0, 4, 0)) == [3]


def test_active_requests_count_from_none_to_the_most() -> None:
    weights = Weights(0, 0, 0, active_requests=4)
    assert scores("a", [pod()] * 3, [0, 1, 4], weights) == [4, 3, 0]
    assert scores("a", [pod()] * 2, [0, 0], weights) == [4, 4]


def test_what_was_just_sent_counts_before_any_scrape_shows_it() -> None:
    """With signals alone all of a burst goes to one pod; what the picker has sent itself spreads it."""
    signals, draw = [pod("a"), pod("a", kv=0.1)], random.Random(0)
    for active_requests, expected in ((0, {0}), (4, {0, 1})):
        active = [0, 0]
        for _ in range(8):
            active[choose("a", signals, active, Weights(4, 2, 2, active_requests), draw)] += 1
        assert {index for index, count in enumerate(active) if count} == expected


def test_ties_are_shared_out() -> None:
    draw = random.Random(0)
    pods = [pod(), pod(), pod(waiting=1)]
    assert {choose("a", pods, [0, 0, 0], NO_LORA_SCORER, draw) for _ in range(50)} == {0, 1}


def test_zipf_s_law_falls_and_sums_to_one() -> None:
    shares = zipf_shares(1000, 1.0)
    assert sum(shares) == pytest.approx(1)
    assert shares[0] == pytest.approx(10 * shares[9])


def test_models_are_made_once_and_their_size_is_known(tmp_path: Path) -> None:
    setup = Setup(
        work=tmp_path,
        num_pods=1,
        num_adapters=2,
        rank=2,
        alpha=1.0,
        rate=1.0,
        num_requests=1,
        prompt_tokens=1,
        output_tokens=1,
        device_adapters=1,
        host_adapters=2,
    )
    num_bytes = make_models(setup)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(files) == 3
    assert num_bytes == (setup.adapters / "a0001" / "adapter_model.safetensors").stat().st_size
    assert make_models(setup) == num_bytes
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == files
    target = pod_target(setup, 0, num_bytes)
    assert target.start is not None
    assert f"--adapter-memory={2 * int(1.5 * num_bytes)}" in target.start


def test_policies_are_named_or_refused() -> None:
    assert weights_of("round-robin") is None
    assert weights_of("affinity") == Weights()
    assert weights_of("affinity:1,2,3,4") == Weights(1, 2, 3, 4)
    for unknown in ("random", "affinity:1,2,3", "round-robin:1"):
        with pytest.raises(ValueError, match="allowed are"):
            weights_of(unknown)


def test_the_default_weights_are_those_that_are_deployed() -> None:
    (profile,) = yaml.safe_load(PICKER_CONFIG.read_text())["schedulingProfiles"]
    deployed = {plugin["pluginRef"]: plugin["weight"] for plugin in profile["plugins"] if "weight" in plugin}
    assert deployed.pop("prefix-cache-scorer") > 0  # not simulated: every prompt of the benches is new
    assert deployed == {
        "lora-affinity-scorer": Weights().lora_affinity,
        "active-request-scorer": Weights().active_requests,
        "kv-cache-utilization-scorer": Weights().kv_cache,
    }
    assert Weights().queue == 0


@contextmanager
def fake_pod(name: str, resident: str) -> Iterator[str]:
    """Answers every POST with its own name in two chunks, and says which adapters it holds."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = FIRST.replace("base:a, a,,b", resident).replace(" 3.0", " 0")
            self._answer(text.encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._answer(f"{name} {body['model']}".encode())

        def _answer(self, data: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(policy: str, pods: list[str], models: list[str]) -> tuple[list[str], dict[str, Any]]:
    """What a proxy in front of the pods answers, and what it says at its end."""
    command = [sys.executable, "-m", "bench.fleet_proxy", "--pods", ",".join(pods), "--policy", policy]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()

        async def all_of_them() -> list[str]:
            await asyncio.sleep(0.5)  # until the first scrape
            async with httpx.AsyncClient(base_url=url) as client:
                return [(await client.post("/v1/completions", json={"model": m})).text for m in models]

        answers = asyncio.run(all_of_them())
        process.terminate()
        return answers, json.loads(process.stdout.read())


def test_the_proxy_sends_requests_where_their_adapter_is() -> None:
    with fake_pod("one", "base:a") as one, fake_pod("two", "base:b") as two:
        answers, said = ask("affinity", [one, two], ["base:a", "base:b", "base:a", "base:a"])
        assert answers == ["one base:a", "two base:b", "one base:a", "one base:a"]
        assert said == {"num_chosen": [3, 1]}
        answers, _ = ask("round-robin", [one, two], ["base:a"] * 4)
        assert answers == ["one base:a", "two base:a"] * 2


COSTS = Costs(0.01, 0.0001, 0.02, 0.01, 0.02, 16, 8, 16, 10_000_000)


def simulate(
    weights: Weights | None, num_adapters: int = 100, load: float = 0.3, pods: int = 4
) -> dict[str, Any]:
    rate = load * pods * capacity(COSTS, 32)
    return Fleet(pods, COSTS, Traffic(num_adapters, 1.0, rate, 3000, 32), weights).run()


def test_one_adapter_is_moved_once_to_each_pod_and_always_found_then() -> None:
    figures = simulate(None, num_adapters=1)
    assert figures["hit_rate"] == 1
    assert figures["uploads_per_1000_requests"] == 0
    assert figures["ttft_seconds"]["p50"] == pytest.approx(0.03, rel=0.2)
    assert figures["num_unanswered"] <= 16 * 4


def test_affinity_finds_more_and_moves_less_than_round_robin() -> None:
    by_turns, by_affinity = simulate(None), simulate(Weights())
    assert by_affinity["hit_rate"] > 1.3 * by_turns["hit_rate"]
    assert by_affinity["uploads_per_1000_requests"] < 0.7 * by_turns["uploads_per_1000_requests"]


def test_the_same_seed_is_the_same_run() -> None:
    assert simulate(Weights()) == simulate(Weights())


def test_the_picture_shows_each_policy() -> None:
    figures = simulate(None)
    fleet = {
        "setup": {"num_pods": 4, "num_adapters": 100},
        "policies": {"round-robin": {"measured": figures, "simulated": figures}},
    }
    sim = {"pods": 100, "traffic": {"num_adapters": 10_000}, "policies": {"affinity <4>": figures}}
    drawn = svg(fleet, sim)
    assert "round-robin, measured" in drawn
    assert "affinity &lt;4&gt;" in drawn
