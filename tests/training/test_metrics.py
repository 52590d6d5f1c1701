"""What a run tells Prometheus: asked over HTTP while a real one lasts, and each series by itself."""

import re
import socket
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

import adapterd
from adapterd.cli import main
from adapterd.config import TrainSettings
from adapterd.errors import ConfigError
from adapterd.series import markdown
from adapterd.training.history import StepRecord
from adapterd.training.metrics import SERIES, TrainingMetrics
from adapterd.training.metrics_server import metrics_served
from adapterd.training.train import train
from tests.training.runs import but, history, measured_run

Samples = dict[tuple[str, tuple[str, ...]], float]
PREFIX = "adapterd_training_"


def samples(text: str) -> Samples:
    return {
        (sample.name.removeprefix(PREFIX), tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def ask_until(url: str, holds: Callable[[Samples], bool]) -> Samples:
    """What is served once that holds."""
    deadline = time.monotonic() + 300
    while not holds(seen := samples(httpx.get(url).text)):
        assert time.monotonic() < deadline, seen
        time.sleep(0.05)
    return seen


def test_a_run_is_followed_over_http_stopped_and_followed_again(told: TrainSettings, tmp_path: Path) -> None:
    who = ("support",)
    recipe = {"base": told.base, "data": told.data, "name": told.name, "out": told.out, "rank": 4}
    flags = [f"--{name}={value}" for name, value in recipe.items()]
    flags += ["--epochs=500", "--patience=9999", "--batch-size=4", "--learning-rate=0.001", "--device=cpu"]
    began = time.time()
    with measured_run(*flags, "--checkpoint-seconds=0.001", log=tmp_path / "first.log") as url:
        first = ask_until(url, lambda seen: seen.get(("step", who), 0) >= 3)
        later = ask_until(url, lambda seen: seen["step", who] > first["step", who])
    assert first["info", ("support", told.base, adapterd.__version__)] == 1
    assert [first["state", ("support", s)] for s in ("preparing", "training", "proving")] == [0, 1, 0]
    assert first["last_step", who] > first["step", who]
    assert 0 < first["loss", who] < 20
    assert 0 < first["validation_loss", who] < 20
    assert 0 <= first["accuracy", who] <= 1
    assert later["tokens_total", who] > first["tokens_total", who] > 0
    assert (
        began < first["saved_timestamp_seconds", who] <= later["saved_timestamp_seconds", who] < time.time()
    )
    assert first["checkpoint_interval_seconds", who] == 0.001

    with measured_run(*flags, log=tmp_path / "again.log") as url:
        resumed = ask_until(url, lambda seen: ("step", who) in seen)
    assert resumed["step", who] >= later["step", who]
    assert resumed["tokens_total", who] < later["tokens_total", who]


def test_a_whole_run_serves_what_its_result_file_says(
    told: TrainSettings, caplog: pytest.LogCaptureFixture
) -> None:
    """The run is asked by its own log lines: there is one when a fresh engine has answered, after the last step."""
    seen: list[Samples] = []
    caplog.set_level("INFO")

    def ask(record: object) -> bool:
        message = str(getattr(record, "msg", ""))
        if message.startswith("round trip"):
            url = re.search(r"http://\S+/metrics", caplog.text)
            assert url is not None
            seen.append(samples(httpx.get(url[0]).text))
        return True

    caplog.handler.addFilter(ask)
    target = train(but(told, metrics_port=0))
    caplog.handler.removeFilter(ask)
    (last,) = seen
    rows = history(target)
    assert last["state", ("support", "proving")] == 1
    assert last["step", ("support",)] == float(rows[-1]["step"])
    assert last["loss", ("support",)] == pytest.approx(float(rows[-1]["train_loss"]), abs=1e-6)
    evaluated = [row for row in rows if row["valid_loss"]]
    assert last["validation_loss", ("support",)] == pytest.approx(
        float(evaluated[-1]["valid_loss"]), abs=1e-6
    )
    url = re.search(r"http://\S+/metrics", caplog.text)
    assert url is not None
    with pytest.raises(httpx.ConnectError):
        httpx.get(url[0])


@pytest.fixture
def metrics() -> TrainingMetrics:
    return TrainingMetrics("support", "mini", checkpoint_seconds=30.0, unix_time=lambda: 1000.0)


def test_before_the_first_step_there_is_no_loss_and_every_family_is_declared(
    metrics: TrainingMetrics,
) -> None:
    text = metrics.render("plain").decode()
    assert all(f"# TYPE {series.name} {series.kind}\n" in text for series in SERIES)
    seen = samples(text)
    assert seen["state", ("support", "preparing")] == 1
    assert ("loss", ("support",)) not in seen


def test_a_step_without_an_evaluation_leaves_the_validation_loss_as_it_was(metrics: TrainingMetrics) -> None:
    metrics.begin([StepRecord(0, valid_loss=2.5, valid_accuracy=0.25)], last_step=9)
    metrics.step(StepRecord(1, 1.5, 0.5), learning_rate=0.1, num_tokens=7, last_step=8)
    seen = samples(metrics.render("plain").decode())
    assert seen["step", ("support",)] == 1
    assert (seen["loss", ("support",)], seen["accuracy", ("support",)]) == (1.5, 0.5)
    assert (seen["validation_loss", ("support",)], seen["validation_accuracy", ("support",)]) == (2.5, 0.25)
    assert (seen["tokens_total", ("support",)], seen["last_step", ("support",)]) == (7, 8)
    assert seen["saved_timestamp_seconds", ("support",)] == 1000


def test_openmetrics_plain_text_head_and_other_pages(metrics: TrainingMetrics) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (
        metrics_served(metrics, "127.0.0.1", port),
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        plain = client.get("/metrics?x=1")
        assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert plain.content == metrics.render("plain")
        open = client.get("/metrics", headers={"accept": "application/openmetrics-text"})
        assert list(openmetrics.text_string_to_metric_families(open.text))
        head = client.head("/metrics")
        assert (head.content, head.headers["content-length"]) == (b"", str(len(plain.content)))
        assert client.get("/").status_code == 404
        assert client.post("/metrics").status_code == 501
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/metrics")


def test_without_a_port_nothing_listens(metrics: TrainingMetrics, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with metrics_served(metrics, "127.0.0.1", None):
        assert caplog.text == ""


def test_a_port_that_is_taken_ends_the_run_before_it_begins(told: TrainSettings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port}: .*--metrics-port"):
            train(but(told, metrics_port=port))
    assert told.out is not None
    assert not told.out.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--metrics-port=70000"], "--metrics-port: '70000' should be less than or equal to 65535"),
        (["--metrics-port=here"], "--metrics-port: 'here' should be a valid integer"),
        (["--metrics-host=0.0.0.0"], "--metrics-host says where --metrics-port listens; set that as well"),
    ],
)
def test_what_cannot_be_is_refused(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--data", "rows.jsonl", "--name", "x", *flags]) == 2
    assert message in capsys.readouterr().err


def test_the_documented_table_is_the_one_that_is_served() -> None:
    """`python -m adapterd.training.metrics` prints it anew."""
    assert markdown(SERIES) in (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
