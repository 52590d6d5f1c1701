"""Rules and dashboard: made from one declaration, syntactically right, and proven by Prometheus' own tools."""

import json
import subprocess
from pathlib import Path

import pytest

from deploy import monitoring
from tests.deploy.conftest import require

HERE = Path(__file__).parent


def test_what_is_committed_is_what_is_declared() -> None:
    assert monitoring.DASHBOARD.read_text() == monitoring.dashboard(), "run python -m deploy.monitoring"
    assert monitoring.RULES.read_text() == monitoring.rules(), "run python -m deploy.monitoring"


def test_panels_have_a_place_and_a_word_of_explanation() -> None:
    panels = json.loads(monitoring.dashboard())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(places)
    for panel in panels:
        if panel["type"] != "row":
            assert panel["description"].endswith((".", "which.", "at."))
            assert panel["targets"]


@pytest.mark.deploy
def test_promtool_accepts_the_rules_and_their_unit_tests() -> None:
    require("promtool")
    for command in (
        ["check", "rules", str(monitoring.RULES)],
        ["test", "rules", str(HERE / "rules.test.yaml")],
    ):
        done = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.deploy
def test_every_alert_has_a_unit_test_in_which_it_fires() -> None:
    alerts = {line.split()[-1] for line in monitoring.RULES.read_text().splitlines() if "- alert:" in line}
    tested = (HERE / "rules.test.yaml").read_text()
    assert {alert for alert in alerts if f"alertname: {alert}\n        exp_alerts:\n" in tested} == alerts


@pytest.mark.deploy
def test_promtool_accepts_the_configuration_for_one_host(tmp_path: Path) -> None:
    require("promtool")
    for name in ("prometheus.yaml", "rules.yaml"):
        (tmp_path / name).write_text((monitoring.DEPLOY / "compose" / name).read_text())
    command = ["promtool", "check", "config", str(tmp_path / "prometheus.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
