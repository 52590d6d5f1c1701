"""The Grafana dashboard, and the alerting rules as a plain file: `python -m deploy.monitoring` writes both anew.

The panels are declared here, a line or two each; a dashboard's JSON is mostly the same words over and over. The rules
are declared in the PrometheusRule; a Prometheus without the operator reads the same groups from compose/rules.yaml.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

DEPLOY = Path(__file__).parent
DASHBOARD = DEPLOY / "components" / "monitoring" / "dashboard.json"
RULE = DEPLOY / "components" / "monitoring" / "prometheusrule.yaml"
RULES = DEPLOY / "compose" / "rules.yaml"

_WIDTH, _HEIGHT = 8, 7
_COLUMNS = 24 // _WIDTH
PODS = 'namespace=~"$namespace", pod=~"$pod"'
RUNS = 'namespace=~"$namespace"'
"""Training runs: their pods are not among those that serve, of which one is chosen."""
RATE = "$__rate_interval"


@dataclass(frozen=True)
class Panel:
    """`queries`: what a line is called, with Grafana's {{label}}, and the expression behind it."""

    title: str
    about: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    kind: Literal["timeseries", "stat"] = "timeseries"
    stacked: bool = False


def _rate(series: str, by: str, more: str = "") -> str:
    return f"sum by ({by}) (rate({series}{{{PODS}{more}}}[{RATE}]))"


def _quantiles(series: str) -> tuple[tuple[str, str], ...]:
    return tuple(
        (f"p{quantile * 100:g}", f"histogram_quantile({quantile}, {_rate(f'{series}_bucket', 'le')})")
        for quantile in (0.5, 0.95, 0.99)
    )


def _by_pod(series: str) -> tuple[tuple[str, str], ...]:
    return (("{{pod}}", f"{series}{{{PODS}}}"),)


_HITS, _MISSES = _rate("adapterd_adapter_hits_total", "pod"), _rate("adapterd_adapter_misses_total", "pod")
_SOUGHT = _rate("adapterd_prefix_query_tokens_total", "pod")

ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "What clients see",
        (
            Panel(
                "Requests",
                "Requests that ended, by outcome: cancelled ones are clients that went away.",
                "reqps",
                (("{{outcome}}", _rate("adapterd_requests_total", "outcome")),),
                stacked=True,
            ),
            Panel(
                "Time to first token",
                "From arrival to the first token, over all adapters.",
                "s",
                _quantiles("adapterd_time_to_first_token_seconds"),
            ),
            Panel(
                "Inter-token latency",
                "Between two tokens of a sequence.",
                "s",
                _quantiles("adapterd_inter_token_seconds"),
            ),
            Panel(
                "Output tokens",
                "Tokens of answers, the ten busiest adapters.",
                "short",
                (("{{adapter}}", f"topk(10, {_rate('adapterd_output_tokens_total', 'adapter')})"),),
                stacked=True,
            ),
            Panel(
                "Slowest adapters",
                "p95 of the time to first token, the five slowest adapters.",
                "s",
                (
                    (
                        "{{adapter}}",
                        "topk(5, histogram_quantile(0.95, "
                        + _rate("adapterd_time_to_first_token_seconds_bucket", "adapter, le")
                        + "))",
                    ),
                ),
            ),
            Panel(
                "Errors",
                "Error answers by code.",
                "reqps",
                (("{{code}}", _rate("adapterd_errors_total", "code")),),
                stacked=True,
            ),
        ),
    ),
    (
        "Adapters",
        (
            Panel(
                "Adapter hit rate",
                "Sequences whose adapter was on the device already. Low: more adapters are in use than fit, or"
                " requests go to pods that do not hold theirs.",
                "percentunit",
                (("{{pod}}", f"{_HITS} / ({_HITS} + {_MISSES})"),),
            ),
            Panel(
                "Adapters moved",
                "Loads into each tier: device, host, disk.",
                "ops",
                (("{{tier}}", _rate("adapterd_adapter_loads_total", "tier")),),
            ),
            Panel(
                "Time of a load",
                "Mean seconds that a load into a tier took.",
                "s",
                (
                    (
                        "{{tier}}",
                        _rate("adapterd_adapter_load_seconds_total", "tier")
                        + " / "
                        + _rate("adapterd_adapter_loads_total", "tier"),
                    ),
                ),
            ),
            Panel(
                "Resident adapters",
                "Adapter versions in device memory.",
                "short",
                _by_pod("adapterd_resident_adapters"),
            ),
            Panel(
                "Adapter memory in use",
                "Part of the device memory for adapters that is occupied.",
                "percentunit",
                (
                    (
                        "{{pod}}",
                        f"adapterd_adapter_resident_bytes{{{PODS}}} / adapterd_adapter_memory_bytes{{{PODS}}}",
                    ),
                ),
            ),
            Panel(
                "Evictions",
                "Adapters that left a tier to make room.",
                "ops",
                (("{{tier}}", _rate("adapterd_adapter_evictions_total", "tier")),),
            ),
        ),
    ),
    (
        "Pods",
        (
            Panel(
                "Waiting",
                "Sequences that wait to run: what autoscaling looks at.",
                "short",
                _by_pod("adapterd_queue_requests"),
            ),
            Panel("Running", "Sequences that run.", "short", _by_pod("vllm:num_requests_running")),
            Panel(
                "KV memory in use",
                "Part of the memory for keys and values that running sequences hold.",
                "percentunit",
                _by_pod("vllm:kv_cache_usage_perc"),
            ),
            Panel(
                "Prefix cache hit rate",
                "Part of the prompts' tokens whose keys and values were there already.",
                "percentunit",
                (("{{pod}}", f"{_rate('adapterd_prefix_hit_tokens_total', 'pod')} / {_SOUGHT}"),),
            ),
            Panel(
                "Tokens computed",
                "Of prompts and answers, by the engine.",
                "short",
                (("{{pod}}", _rate("adapterd_computed_tokens_total", "pod")),),
            ),
            Panel(
                "Preemptions",
                "Sequences set back for want of KV memory: their work is done twice.",
                "ops",
                (("{{pod}}", _rate("adapterd_preemptions_total", "pod")),),
            ),
            Panel(
                "Ready pods",
                "Pods whose /readyz is green.",
                "short",
                (("ready", f"sum(adapterd_ready{{{PODS}}})"),),
                kind="stat",
            ),
            Panel(
                "Adapters that can be asked for",
                "The most of any pod.",
                "short",
                (("adapters", f"max(adapterd_adapters{{{PODS}}})"),),
                kind="stat",
            ),
            Panel(
                "Refused adapters",
                "Those whose newer version was refused too. The most of any pod; GET /v1/adapters says which.",
                "short",
                (
                    (
                        "refused",
                        f"max(adapterd_failed_adapters{{{PODS}}} + adapterd_behind_adapters{{{PODS}}})",
                    ),
                ),
                kind="stat",
            ),
        ),
    ),
    (
        "Training runs",
        (
            Panel(
                "Training loss",
                "Mean loss of each step's rows, and of the rows held back, in nats.",
                "short",
                (
                    ("{{adapter}}", f"adapterd_training_loss{{{RUNS}}}"),
                    ("{{adapter}}, held back", f"adapterd_training_validation_loss{{{RUNS}}}"),
                ),
            ),
            Panel(
                "Training progress",
                "Part of the steps that are done; early stopping makes it jump.",
                "percentunit",
                (
                    (
                        "{{adapter}}",
                        f"adapterd_training_step{{{RUNS}}} / adapterd_training_last_step{{{RUNS}}}",
                    ),
                ),
            ),
            Panel(
                "Training speed",
                "Tokens trained on in a second.",
                "short",
                (
                    (
                        "{{adapter}}",
                        f"sum by (adapter) (rate(adapterd_training_tokens_total{{{RUNS}}}[{RATE}]))",
                    ),
                ),
            ),
            Panel(
                "Accuracy on rows held back",
                "Share of first-ranked tokens at the last evaluation.",
                "percentunit",
                (("{{adapter}}", f"adapterd_training_validation_accuracy{{{RUNS}}}"),),
            ),
            Panel(
                "Work in no checkpoint",
                "What a killed run would lose, in seconds.",
                "s",
                (("{{adapter}}", f"time() - adapterd_training_saved_timestamp_seconds{{{RUNS}}}"),),
            ),
            Panel(
                "Runs",
                "Training runs that are going on.",
                "short",
                (("runs", f"sum(adapterd_training_state{{{RUNS}}})"),),
                kind="stat",
            ),
        ),
    ),
)


def _panel(number: int, panel: Panel, x: int, y: int) -> dict[str, Any]:
    custom = {
        "fillOpacity": 10,
        "showPoints": "never",
        "stacking": {"mode": "normal" if panel.stacked else "none"},
    }
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "gridPos": {"x": x, "y": y, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "min": 0,
                **({"custom": custom} if panel.kind == "timeseries" else {}),
            },
            "overrides": [],
        },
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
        if panel.kind == "timeseries"
        else {"reduceOptions": {"calcs": ["lastNotNull"]}},
        "targets": [
            {"refId": chr(ord("A") + index), "expr": expression, "legendFormat": legend}
            for index, (legend, expression) in enumerate(panel.queries)
        ],
    }


def _variable(label: str, query: str) -> dict[str, Any]:
    return {
        "name": label,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": query,
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def dashboard() -> str:
    """The JSON that Grafana imports."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": 24, "h": 1},
                "panels": [],
            }
        )
        y += 1
        for index, panel in enumerate(row):
            x = index % _COLUMNS * _WIDTH
            panels.append(_panel(len(panels) + 1, panel, x, y + index // _COLUMNS * _HEIGHT))
        y += -(-len(row) // _COLUMNS) * _HEIGHT
    document = {
        "uid": "adapterd",
        "title": "adapterd",
        "tags": ["adapterd"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus"},
                _variable("namespace", "label_values(adapterd_queue_requests, namespace)"),
                _variable("pod", 'label_values(adapterd_queue_requests{namespace=~"$namespace"}, pod)'),
            ]
        },
        "panels": panels,
    }
    return json.dumps(document, indent=1) + "\n"


def rules() -> str:
    """The groups of the PrometheusRule, as Prometheus itself reads them."""
    head = "# Made from ../components/monitoring/prometheusrule.yaml by `python -m deploy.monitoring`.\n"
    spec = yaml.safe_load(RULE.read_text())["spec"]
    return head + yaml.safe_dump(spec, sort_keys=False, width=118)


def main() -> None:
    DASHBOARD.write_text(dashboard())
    RULES.write_text(rules())


if __name__ == "__main__":
    main()
