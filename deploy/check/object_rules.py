"""How the objects of one rendering must fit each other: each rule yields a sentence for everything that does not."""

import json
import re
from collections.abc import Iterator, Sequence

import yaml

from adapterd.series import SERIES
from adapterd.training import metrics as training
from deploy.check.manifests import Manifests, Object, Pod
from deploy.check.pod_rules import startup_seconds

_CLUSTER_WIDE = ("Namespace", "ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition")
_METRIC = re.compile(r"\b(?:adapterd_[a-z0-9_]+|vllm:[a-z0-9_]+)\b")
_RECORDED = re.compile(r"\badapterd:[a-z0-9_:]+\b")


def _where(item: Object) -> str:
    return f"{item['kind']}/{item['metadata']['name']}"


def names(manifests: Manifests) -> Iterator[str]:
    """Each object once, all in one namespace."""
    seen: set[str] = set()
    namespaces = set()
    for item in manifests.objects:
        if _where(item) in seen:
            yield f"{_where(item)}: is there twice"
        seen.add(_where(item))
        if item["kind"] not in _CLUSTER_WIDE:
            namespaces.add(item["metadata"].get("namespace"))
    if len(namespaces) > 1:
        yield f"objects lie in several namespaces: {', '.join(sorted(map(str, namespaces)))}"


def selectors(manifests: Manifests) -> Iterator[str]:
    """Whatever selects pods selects some; a workload selects its own."""
    for pod in manifests.pods():
        wanted = pod.owner["spec"].get("selector", {}).get("matchLabels", {})
        if not wanted.items() <= pod.labels.items():
            yield f"{pod.where}: its selector does not take its own pods"
    for item in manifests.of(
        "Service", "PodDisruptionBudget", "PodMonitor", "InferencePool", "NetworkPolicy"
    ):
        spec = item["spec"]
        selector = spec.get("podSelector") or spec.get("selector") or {}
        labels = selector.get("matchLabels", {}) if item["kind"] != "Service" else selector
        if not labels or not manifests.pods_with(labels):
            yield f"{_where(item)}: selects no pod"
    for item in manifests.of("Service", "PodDisruptionBudget", "PodMonitor", "InferencePool"):
        labels = item["spec"]["selector"].get("matchLabels", item["spec"]["selector"])
        kinds = {pod.owner["kind"] for pod in manifests.pods_with(labels)}
        # A monitor may look at training alone.
        if "Job" in kinds and (item["kind"] != "PodMonitor" or len(kinds) > 1):
            yield f"{_where(item)}: takes a training Job for a server"


def ports(manifests: Manifests) -> Iterator[str]:
    """Named ports are declared by the pods that are meant; numbers too."""
    for service in manifests.of("Service"):
        pods = manifests.pods_with(service["spec"]["selector"])
        for port in service["spec"]["ports"]:
            yield from _port(service, pods, port.get("targetPort", port["port"]))
    for monitor in manifests.of("PodMonitor"):
        pods = manifests.pods_with(monitor["spec"]["selector"]["matchLabels"])
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            yield from _port(monitor, pods, endpoint["port"])
    for pool in manifests.of("InferencePool"):
        pods = manifests.pods_with(pool["spec"]["selector"]["matchLabels"])
        for port in pool["spec"]["targetPorts"]:
            yield from _port(pool, pods, port["number"])
    for policy in manifests.of("NetworkPolicy"):
        pods = manifests.pods_with(policy["spec"]["podSelector"].get("matchLabels", {}))
        for rule in policy["spec"].get("ingress", []):
            for port in rule.get("ports", []):
                yield from _port(policy, pods, port["port"])


def _port(item: Object, pods: Sequence[Pod], port: str | int) -> Iterator[str]:
    for pod in pods:
        declared = pod.ports()
        if port not in (declared if isinstance(port, str) else declared.values()):
            yield f"{_where(item)}: {pod.where} declares no port {port!r}"


def scaling(manifests: Manifests) -> Iterator[str]:
    """An autoscaler has a target, alone, whose number of pods it owns; its metric can be asked for."""
    targets = []
    for scaler in manifests.of("HorizontalPodAutoscaler", "ScaledObject"):
        spec, where = scaler["spec"], _where(scaler)
        target = manifests.find(
            spec["scaleTargetRef"].get("kind", "Deployment"), spec["scaleTargetRef"]["name"]
        )
        if target is None:
            yield f"{where}: its target {spec['scaleTargetRef']['name']!r} is not here"
            continue
        targets.append(_where(target))
        if "replicas" in target["spec"]:
            yield f"{where}: {_where(target)} sets replicas itself, so each apply would undo the scaling"
        least = spec.get("minReplicas", spec.get("minReplicaCount", 1))
        if least > spec.get("maxReplicas", spec.get("maxReplicaCount", 1)):
            yield f"{where}: its least is more than its most"
        for metric in spec.get("metrics", []):
            kind = {"Pods": "pods", "Object": "object", "Resource": "resource", "External": "external"}.get(
                metric["type"]
            )
            if kind is None or kind not in metric:
                yield f"{where}: metric type {metric['type']} does not exist or is not given"
                continue
            name = metric[kind].get("metric", {}).get("name", "")
            if ":" in name:
                yield f"{where}: the custom metrics API cannot carry the colon of {name!r}"
            if name.startswith("adapterd") and not _is_known(name):
                yield f"{where}: adapterd has no series {name!r}"
            if metric[kind]["target"]["type"] not in ("AverageValue", "Value", "Utilization"):
                yield f"{where}: target type {metric[kind]['target']['type']} does not exist"
        for trigger in spec.get("triggers", []):
            yield from _expression(where, trigger["metadata"]["query"], recorded=set())
    yield from (
        f"{name}: has two autoscalers" for name in sorted({t for t in targets if targets.count(t) > 1})
    )


def budgets(manifests: Manifests) -> Iterator[str]:
    """A disruption budget lets at least one pod go."""
    for budget in manifests.of("PodDisruptionBudget"):
        spec = budget["spec"]
        for pod in manifests.pods_with(spec["selector"]["matchLabels"]):
            replicas = pod.owner["spec"].get("replicas", 1)
            if spec.get("maxUnavailable") in (0, "0%") or spec.get("minAvailable", 0) in (replicas, "100%"):
                yield f"{_where(budget)}: no pod may ever leave, so a node could not be drained"


def rollout(manifests: Manifests) -> Iterator[str]:
    """A rollout can move, has the time that starts take, and no pod that needs a GPU waits for a second one."""
    for pod in manifests.pods():
        strategy = pod.owner["spec"].get("strategy", {})
        if pod.owner["kind"] != "Deployment":
            continue
        if strategy.get("type", "RollingUpdate") not in ("RollingUpdate", "Recreate"):
            yield f"{pod.where}: strategy {strategy['type']} does not exist"
        rolling = strategy.get("rollingUpdate", {})
        if rolling.get("maxSurge", 1) == 0 and rolling.get("maxUnavailable", 1) == 0:
            yield f"{pod.where}: neither one more nor one less is allowed, so no rollout can begin"
        has_gpu = any(
            "nvidia.com/gpu" in c.get("resources", {}).get("limits", {}) for c in pod.all_containers
        )
        if has_gpu and rolling.get("maxSurge", 1) != 0:
            yield f"{pod.where}: a rollout waits for one GPU more than there are"
        starts = max(startup_seconds(container) for container in pod.containers)
        needed = pod.spec.get("terminationGracePeriodSeconds", 30) + starts
        given = pod.owner["spec"].get("progressDeadlineSeconds", 600)
        if given <= needed:
            yield f"{pod.where}: a rollout has {given} s, and one pod may take {needed} to follow another"


def pools(manifests: Manifests) -> Iterator[str]:
    """The pool has its picker, the route its pool, and the picker knows adapters."""
    for pool in manifests.of("InferencePool"):
        reference = pool["spec"].get("endpointPickerRef")
        if reference is not None:
            service = manifests.find("Service", reference["name"])
            offered = [port["port"] for port in service["spec"]["ports"]] if service else []
            if reference["port"]["number"] not in offered:
                yield f"{_where(pool)}: no Service {reference['name']!r} with port {reference['port']['number']}"
            if service is not None:
                yield from _picker_protocol(manifests, service, reference["port"]["number"])
    for route in manifests.of("HTTPRoute"):
        for rule in route["spec"]["rules"]:
            for backend in rule["backendRefs"]:
                if manifests.find(backend.get("kind", "Service"), backend["name"]) is None:
                    yield f"{_where(route)}: no {backend.get('kind', 'Service')} {backend['name']!r}"
    for config in manifests.of("ConfigMap"):
        for text in config.get("data", {}).values():
            if "kind: EndpointPickerConfig" in text:
                yield from picker_errors(_where(config), yaml.safe_load(text))


def _picker_protocol(manifests: Manifests, service: Object, port: int) -> Iterator[str]:
    """A Service that says cleartext stands before a picker that was told to speak it: its default is TLS."""
    named = [item for item in service["spec"]["ports"] if item["port"] == port]
    if not any(item.get("appProtocol") == "kubernetes.io/h2c" for item in named):
        return
    for pod in manifests.pods_with(service["spec"]["selector"]):
        if not any("--secure-serving=false" in container.get("args", []) for container in pod.containers):
            yield f"{_where(service)}: says h2c, which is cleartext, and {pod.where} serves TLS"


def picker_errors(where: str, config: Object) -> Iterator[str]:
    """Of an EndpointPickerConfig: every reference declared, exactly one picker, adapters and sent requests scored."""
    declared = {plugin.get("name", plugin["type"]): plugin["type"] for plugin in config["plugins"]}
    for profile in config["schedulingProfiles"]:
        used = [plugin["pluginRef"] for plugin in profile["plugins"]]
        yield from (f"{where}: plugin {name!r} is not declared" for name in used if name not in declared)
        kinds = [declared.get(name, "") for name in used]
        if "lora-affinity-scorer" not in kinds:
            yield f"{where}: profile {profile['name']!r} does not score adapters"
        if "active-request-scorer" not in kinds:
            yield f"{where}: profile {profile['name']!r} knows load by scrapes alone, so a burst goes to one pod"
        if sum(kind.endswith("-picker") for kind in kinds) != 1:
            yield f"{where}: profile {profile['name']!r} needs exactly one picker"
        for plugin in profile["plugins"]:
            if declared.get(plugin["pluginRef"], "").endswith("-scorer") and plugin.get("weight", 0) <= 0:
                yield f"{where}: scorer {plugin['pluginRef']!r} has no weight"
    discovery = config.get("dataLayer", {}).get("discovery", {}).get("endpoints", {}).get("pluginRef")
    if discovery is not None and discovery not in declared:
        yield f"{where}: plugin {discovery!r} is not declared"


def rights(manifests: Manifests) -> Iterator[str]:
    """A binding binds a role that is here to an account that is here."""
    for binding in manifests.of("RoleBinding"):
        if manifests.find(binding["roleRef"]["kind"], binding["roleRef"]["name"]) is None:
            yield f"{_where(binding)}: no role {binding['roleRef']['name']!r}"
        for subject in binding["subjects"]:
            if manifests.find(subject["kind"], subject["name"]) is None:
                yield f"{_where(binding)}: no {subject['kind']} {subject['name']!r}"


def series(manifests: Manifests) -> Iterator[str]:
    """Rules and panels ask only for series that a daemon or a training run has, or that another rule records."""
    rules = [
        (item, rule)
        for item in manifests.of("PrometheusRule")
        for group in item["spec"]["groups"]
        for rule in group["rules"]
    ]
    recorded = {rule["record"] for _, rule in rules if "record" in rule}
    for item, rule in rules:
        name = rule.get("alert", rule.get("record"))
        if ("alert" in rule) == ("record" in rule):
            yield f"{_where(item)}: rule {name!r} must either alert or record"
        if "alert" in rule and not {"summary", "description"} <= rule.get("annotations", {}).keys():
            yield f"{_where(item)}: alert {name!r} says neither what nor what to do"
        yield from _expression(f"{_where(item)} {name}", rule["expr"], recorded)
    for config in manifests.of("ConfigMap"):
        if config["metadata"].get("labels", {}).get("grafana_dashboard"):
            for text in config["data"].values():
                for panel in json.loads(text)["panels"]:
                    for target in panel.get("targets", []):
                        where = f"{_where(config)} {panel['title']!r}"
                        yield from _expression(where, target["expr"], recorded)


def _expression(where: str, expression: str, recorded: set[str]) -> Iterator[str]:
    for name in sorted(set(_METRIC.findall(expression))):
        if not _is_known(name):
            yield f"{where}: adapterd has no series {name!r}"
    for name in sorted(set(_RECORDED.findall(expression)) - recorded):
        yield f"{where}: nothing records {name!r}"


def _is_known(name: str) -> bool:
    for entry in (*SERIES, *training.SERIES):
        parts = ("_bucket", "_sum", "_count") if entry.kind == "histogram" else ("",)
        if name in [entry.name + part for part in parts]:
            return True
    return False
