"""Every base, component and overlay renders, is valid in three versions of Kubernetes, and breaks no rule of ours;
and each rule finds what it is there to find."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterd.config import ServeSettings
from adapterd.manifest import read_manifest
from deploy.check.__main__ import findings, main
from deploy.check.lint import RULES
from deploy.check.manifests import DEPLOY, Manifests, Object, kustomizations, parse, render_parts
from deploy.check.pod_rules import REPOSITORY, SHARED_IN_IMAGE, drain_seconds, pre_stop_seconds
from deploy.check.schemas import VERSIONS, schema_errors

ALL = kustomizations()


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifests]:
    return {name: render_parts(parts, tmp_path_factory.mktemp("render")) for name, parts in ALL.items()}


@pytest.mark.parametrize("name", ALL)
def test_it_renders_and_nothing_is_found(rendered: dict[str, Manifests], name: str) -> None:
    assert findings(rendered[name]) == []


def test_the_issue_s_components_are_there() -> None:
    wanted = "gpu adapters-pvc adapters-oci adapters-sync autoscaling/hpa autoscaling/keda monitoring network-policy"
    wanted += " inference-pool train-job train-job-monitoring"
    assert {f"components/{name}" for name in wanted.split()} <= ALL.keys()


def test_the_declared_adapters_are_read_as_the_sidecar_reads_them() -> None:
    manifest = read_manifest(DEPLOY / "components/adapters-sync/adapters.yaml")
    assert manifest.adapters.keys() == {"support", "moderation", "medical"}
    for name, adapter in manifest.adapters.items():
        assert str(adapter.current.source) == f"{SHARED_IN_IMAGE}/adapters/{name}"
        assert (REPOSITORY / "adapters" / name / "adapter_config.json").exists()


def test_grace_outlasts_the_drain_on_what_is_rendered(rendered: dict[str, Manifests]) -> None:
    """The sum itself, beside the rule that everything passes."""
    for name, manifests in rendered.items():
        pod = next(pod for pod in manifests.pods() if pod.where == "Deployment/adapterd")
        (container,) = pod.spec["containers"]
        values = {variable["name"]: variable.get("value") for variable in container["env"]}
        drain = float(values["ADAPTERD_DRAIN_DELAY"]) + float(values["ADAPTERD_DRAIN_TIMEOUT"])
        needed = pre_stop_seconds(container) + drain + 10
        assert pod.spec["terminationGracePeriodSeconds"] >= needed >= 70, name


def test_the_readme_says_how_a_namespace_gets_past_the_policy(rendered: dict[str, Manifests]) -> None:
    policy = rendered["overlays/gpu"].find("NetworkPolicy", "adapterd")
    assert policy is not None
    ((label, value),) = policy["spec"]["ingress"][0]["from"][0]["namespaceSelector"]["matchLabels"].items()
    said = re.findall(r"^kubectl label namespace .* (\S+)$", (DEPLOY / "README.md").read_text(), re.MULTILINE)
    assert said == [f"{label}={value}"]


def test_the_drain_is_what_the_settings_say() -> None:
    assert drain_seconds(ServeSettings(drain_delay=2, drain_timeout=7)) == 9


# Every rule, with a rendering that breaks it: (rule, what is rendered, how it is broken, what is said).
Break = Callable[[Manifests], None]


def pod(manifests: Manifests, kind: str = "Deployment") -> Object:
    found = manifests.find(kind, "adapterd-train" if kind == "Job" else "adapterd")
    assert found is not None
    spec: Object = found["spec"]["template"]["spec"]
    return spec


def put(kind: str, path: str, value: Any, name: str | None = None) -> Break:
    """Set the field at a dotted path of the first object of a kind; None removes it."""

    def change(manifests: Manifests) -> None:
        target: Any = next(o for o in manifests.of(kind) if name in (None, o["metadata"]["name"]))
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for part in parents:
            target = target[part]
        if value is None:
            del target[last]
        else:
            target[last] = value

    return change


def env(variable: str, value: str | None) -> Break:
    def change(manifests: Manifests) -> None:
        container = pod(manifests)["containers"][0]
        kept = [entry for entry in container["env"] if entry["name"] != variable]
        container["env"] = kept if value is None else [*kept, {"name": variable, "value": value}]

    return change


def fetching(**environ: str) -> Break:
    """The daemon fetches adapters of the Hub itself, with these variables."""

    def change(manifests: Manifests) -> None:
        for variable, value in {"ADAPTERD_ALLOW_SOURCE": "hf://acme/*", **environ}.items():
            env(variable, value)(manifests)

    return change


def picker(old: str, new: str) -> Break:
    def change(manifests: Manifests) -> None:
        config = next(o for o in manifests.of("ConfigMap") if "picker" in o["metadata"]["name"])
        (key,) = config["data"]
        assert old in config["data"][key]
        config["data"][key] = config["data"][key].replace(old, new)

    return change


def add_init_container(manifests: Manifests) -> None:
    """What the Inference Extension shipped: valid by the schema, refused by every API server."""
    spec = pod(manifests)
    sidecar = {**copy.deepcopy(spec["containers"][0]), "name": "syncer", "restartPolicy": "IfNotPresent"}
    spec["initContainers"] = [sidecar]


def second_autoscaler(manifests: Manifests) -> None:
    hpa = copy.deepcopy(manifests.of("HorizontalPodAutoscaler")[0])
    hpa["metadata"]["name"] = "another"
    manifests.objects = (*manifests.objects, hpa)


def twice(manifests: Manifests) -> None:
    manifests.objects = (*manifests.objects, copy.deepcopy(manifests.of("Service")[0]))


TEMPLATE = "spec.template.spec"
FIRST = f"{TEMPLATE}.containers.0"
BROKEN: list[tuple[str, str, Break, str]] = [
    ("enums", "base", add_init_container, "restartPolicy IfNotPresent is only Always"),
    ("enums", "base", put("Deployment", f"{TEMPLATE}.restartPolicy", "Never"), "not allowed here"),
    ("enums", "base", put("Deployment", f"{FIRST}.imagePullPolicy", "IfAbsent"), "does not exist"),
    ("enums", "components/train-job", put("Job", f"{TEMPLATE}.restartPolicy", "Always"), "not allowed here"),
    (
        "restricted",
        "base",
        put("Deployment", f"{TEMPLATE}.securityContext.runAsNonRoot", None),
        "runAsNonRoot",
    ),
    ("restricted", "base", put("Deployment", f"{TEMPLATE}.securityContext.runAsUser", 0), "user 0"),
    ("restricted", "base", put("Deployment", f"{TEMPLATE}.securityContext.seccompProfile", None), "seccomp"),
    (
        "restricted",
        "base",
        put("Deployment", f"{FIRST}.securityContext.capabilities.drop", []),
        "capabilities",
    ),
    (
        "restricted",
        "components/train-job",
        put("Job", f"{FIRST}.securityContext", None),
        "may gain privileges",
    ),
    ("restricted", "base", put("Deployment", f"{TEMPLATE}.hostNetwork", True), "hostNetwork"),
    (
        "restricted",
        "base",
        put("Deployment", f"{TEMPLATE}.volumes.0", {"name": "keys", "hostPath": {"path": "/"}}),
        "hostPath",
    ),
    (
        "read_only_root",
        "base",
        put("Deployment", f"{FIRST}.securityContext.readOnlyRootFilesystem", None),
        "written",
    ),
    ("read_only_root", "components/train-job", put("Job", f"{FIRST}.volumeMounts.1.readOnly", True), "/tmp"),
    ("volumes", "base", put("Deployment", f"{FIRST}.volumeMounts.0.name", "typo"), "no volume 'typo'"),
    ("volumes", "base", put("Deployment", f"{FIRST}.volumeMounts", []), "mounted nowhere"),
    (
        "volumes",
        "components/adapters-sync",
        put("ConfigMap", "metadata.name", "other"),
        "no ConfigMap 'adapterd-manifest'",
    ),
    (
        "volumes",
        "components/adapters-pvc",
        put("PersistentVolumeClaim", "metadata.name", "x"),
        "no PersistentVolumeClaim",
    ),
    (
        "probes",
        "base",
        put("Deployment", f"{FIRST}.readinessProbe.httpGet.port", "web"),
        "'web', which is not declared",
    ),
    ("probes", "base", put("Deployment", f"{FIRST}.livenessProbe", None), "has no livenessProbe"),
    (
        "probes",
        "base",
        put("Deployment", f"{FIRST}.livenessProbe.httpGet.path", "/readyz"),
        "would be killed",
    ),
    (
        "probes",
        "base",
        put("Deployment", f"{FIRST}.readinessProbe.httpGet.path", "/livez"),
        "must ask /readyz",
    ),
    ("probes", "base", put("Deployment", f"{FIRST}.startupProbe.failureThreshold", 3), "to start"),
    ("grace", "base", put("Deployment", f"{TEMPLATE}.terminationGracePeriodSeconds", 30), "30 s of grace"),
    ("grace", "base", env("ADAPTERD_DRAIN_TIMEOUT", "300"), "90 s of grace"),
    ("grace", "base", put("Deployment", f"{FIRST}.lifecycle", None), "no preStop"),
    ("settings", "base", env("ADAPTERD_MAX_SEQS", "8"), "unknown variable ADAPTERD_MAX_SEQS"),
    ("settings", "base", env("ADAPTERD_API_KEY_FILE", None), "no API key is set"),
    ("settings", "base", env("ADAPTERD_API_KEY_FILE", "/run/keys"), "lies in no volume"),
    ("settings", "base", env("ADAPTERD_ADAPTERS", "/adapters"), "lies in no volume"),
    ("settings", "base", env("ADAPTERD_PORT", "9000"), "listens on 9000"),
    ("settings", "base", put("Deployment", f"{FIRST}.args", ["serve", "--prot", "1"]), "2"),
    (
        "settings",
        "components/train-job",
        put("Job", f"{FIRST}.args.1", "/opt/adapterd/share/none.toml"),
        "cannot read",
    ),
    ("memory", "base", put("Deployment", f"{FIRST}.resources.requests.cpu", None), "requests no cpu"),
    ("memory", "base", put("Deployment", f"{FIRST}.resources.limits", {}), "no memory limit"),
    ("memory", "base", env("ADAPTERD_HOST_MEMORY", None), "left to the node's free memory"),
    ("memory", "base", env("ADAPTERD_KV_MEMORY", "4GiB"), "more than three quarters"),
    ("downloads", "base", fetching(), "'scratch', which holds 1Gi"),
    ("downloads", "base", fetching(ADAPTERD_CACHE="/cache"), "lies in no volume"),
    (
        "images",
        "base",
        put("Deployment", f"{FIRST}.image", "ghcr.io/adapterd/adapterd:latest"),
        "no fixed version",
    ),
    ("images", "base", put("Deployment", f"{FIRST}.image", "localhost:5000/adapterd"), "no fixed version"),
    (
        "images",
        "components/gpu",
        put("Deployment", f"{FIRST}.image", "ghcr.io/adapterd/adapterd:1"),
        "not suit a GPU",
    ),
    (
        "isolation",
        "base",
        put("Deployment", f"{TEMPLATE}.serviceAccountName", "other"),
        "'other' is not here",
    ),
    ("isolation", "base", put("Deployment", f"{TEMPLATE}.automountServiceAccountToken", True), "a token"),
    ("isolation", "base", put("Deployment", f"{TEMPLATE}.enableServiceLinks", None), "ADAPTERD_PORT"),
    ("jobs", "components/train-job", put("Job", "spec.ttlSecondsAfterFinished", None), "has no ttlSeconds"),
    (
        "jobs",
        "components/train-job",
        put("Job", "spec.podFailurePolicy", None),
        "pre-empted pod as a failure",
    ),
    ("jobs", "components/train-job", put("Job", f"{FIRST}.name", "trainer"), "names container 'train'"),
    (
        "jobs",
        "components/train-job",
        put("Job", f"{TEMPLATE}.restartPolicy", "OnFailure"),
        "restartPolicy Never",
    ),
    ("names", "base", twice, "is there twice"),
    (
        "names",
        "base",
        put("Service", "metadata.namespace", "default"),
        "several namespaces: adapterd, default",
    ),
    (
        "selectors",
        "base",
        put("Deployment", "spec.selector.matchLabels", {"a": "b"}),
        "does not take its own",
    ),
    ("selectors", "base", put("Service", "spec.selector", {"app": "adapterd"}), "selects no pod"),
    (
        "selectors",
        "components/monitoring",
        put("PodMonitor", "spec.selector.matchLabels", {"a": "b"}),
        "selects no pod",
    ),
    (
        "selectors",
        "components/train-job",
        put("Service", "spec.selector", {"app.kubernetes.io/name": "adapterd"}),
        "for a server",
    ),
    ("ports", "base", put("Service", "spec.ports.0.targetPort", "web"), "declares no port 'web'"),
    (
        "selectors",
        "components/train-job-monitoring",
        put("PodMonitor", "spec.selector.matchLabels", {"app.kubernetes.io/name": "adapterd"}),
        "for a server",
    ),
    (
        "settings",
        "components/train-job-monitoring",
        put("Job", f"{FIRST}.ports.0.containerPort", 9000),
        "serves metrics on 9100, and declares [9000]",
    ),
    (
        "settings",
        "components/train-job-monitoring",
        put("Job", f"{FIRST}.env.0.value", "127.0.0.1"),
        "nobody outside the pod",
    ),
    (
        "ports",
        "components/train-job-monitoring",
        put("PodMonitor", "spec.podMetricsEndpoints.0.port", "http"),
        "no port 'http'",
    ),
    (
        "ports",
        "components/monitoring",
        put("PodMonitor", "spec.podMetricsEndpoints.0.port", "metrics"),
        "no port 'metrics'",
    ),
    (
        "ports",
        "components/inference-pool",
        put("InferencePool", "spec.targetPorts.0.number", 80),
        "no port 80",
    ),
    (
        "ports",
        "components/network-policy",
        put("NetworkPolicy", "spec.ingress.0.ports.0.port", "web"),
        "no port 'web'",
    ),
    (
        "scaling",
        "components/autoscaling/hpa",
        put("HorizontalPodAutoscaler", "spec.scaleTargetRef.name", "x"),
        "not here",
    ),
    ("scaling", "components/autoscaling/hpa", put("Deployment", "spec.replicas", 2), "sets replicas itself"),
    (
        "scaling",
        "components/autoscaling/hpa",
        put("HorizontalPodAutoscaler", "spec.minReplicas", 9),
        "least is more",
    ),
    (
        "scaling",
        "components/autoscaling/hpa",
        put("HorizontalPodAutoscaler", "spec.metrics.0.pods.metric.name", "vllm:num_requests_waiting"),
        "cannot carry the colon",
    ),
    (
        "scaling",
        "components/autoscaling/hpa",
        put("HorizontalPodAutoscaler", "spec.metrics.0.pods.metric.name", "adapterd_queue_length"),
        "has no series",
    ),
    (
        "scaling",
        "components/autoscaling/hpa",
        put("HorizontalPodAutoscaler", "spec.metrics.0.type", "Pod"),
        "metric type Pod",
    ),
    ("scaling", "components/autoscaling/hpa", second_autoscaler, "has two autoscalers"),
    (
        "scaling",
        "components/autoscaling/keda",
        put("ScaledObject", "spec.triggers.0.metadata.query", "sum(adapterd_waiting)"),
        "has no series",
    ),
    ("budgets", "base", put("PodDisruptionBudget", "spec.maxUnavailable", 0), "no pod may ever leave"),
    ("rollout", "base", put("Deployment", "spec.strategy.rollingUpdate.maxSurge", 0), "no rollout can begin"),
    (
        "rollout",
        "components/gpu",
        put("Deployment", "spec.strategy.rollingUpdate.maxSurge", 1),
        "one GPU more",
    ),
    (
        "rollout",
        "components/gpu",
        put("Deployment", "spec.progressDeadlineSeconds", None),
        "has 600 s, and one pod may take 1890",
    ),
    (
        "pools",
        "components/inference-pool",
        put("Service", "metadata.name", "x", "adapterd-endpoint-picker"),
        "no Service",
    ),
    ("pools", "components/inference-pool", put("InferencePool", "metadata.name", "x"), "no InferencePool"),
    (
        "pools",
        "components/inference-pool",
        put("Service", "spec.ports.0.appProtocol", "kubernetes.io/h2c", "adapterd-endpoint-picker"),
        "serves TLS",
    ),
    (
        "pools",
        "components/inference-pool",
        picker("pluginRef: lora-affinity-scorer", "pluginRef: kv-cache-utilization-scorer"),
        "does not score",
    ),
    (
        "pools",
        "components/inference-pool",
        picker("pluginRef: active-request-scorer", "pluginRef: kv-cache-utilization-scorer"),
        "knows load by scrapes alone",
    ),
    (
        "pools",
        "components/inference-pool",
        picker("pluginRef: kv-cache-utilization-scorer", "pluginRef: kv"),
        "is not declared",
    ),
    ("pools", "components/inference-pool", picker("weight: 4", "weight: 0"), "has no weight"),
    ("pools", "components/inference-pool", picker("- pluginRef: max-score-picker", ""), "exactly one picker"),
    ("rights", "components/inference-pool", put("Role", "metadata.name", "x"), "no role"),
    ("rights", "components/inference-pool", put("RoleBinding", "subjects.0.name", "x"), "no ServiceAccount"),
    (
        "series",
        "components/monitoring",
        put("PrometheusRule", "spec.groups.1.rules.1.expr", "avg(adapterd_waiting) > 1"),
        "no series 'adapterd_waiting'",
    ),
    (
        "series",
        "components/monitoring",
        put("PrometheusRule", "spec.groups.1.rules.1.expr", "adapterd:queue:rate5m > 1"),
        "nothing records",
    ),
    (
        "series",
        "components/monitoring",
        put("PrometheusRule", "spec.groups.1.rules.1.annotations", None),
        "says neither",
    ),
]


@pytest.mark.parametrize(("rule", "name", "break_it", "said"), BROKEN, ids=[f"{b[0]}-{b[3]}" for b in BROKEN])
def test_the_rule_finds_it(
    rendered: dict[str, Manifests], rule: str, name: str, break_it: Break, said: str
) -> None:
    broken = copy.deepcopy(rendered[name])
    break_it(broken)
    found = list(RULES[rule](broken))
    assert any(said in sentence for sentence in found), found


def test_downloads_that_their_volume_holds_are_let_be(rendered: dict[str, Manifests]) -> None:
    fine = copy.deepcopy(rendered["base"])
    fetching(ADAPTERD_CACHE_SIZE="512MiB")(fine)
    assert list(RULES["downloads"](fine)) == []


def test_every_rule_has_a_failing_case() -> None:
    assert {rule for rule, *_ in BROKEN} == RULES.keys()


@pytest.mark.parametrize(
    ("name", "break_it", "said"),
    [
        ("base", put("Deployment", f"{FIRST}.livenessProbe.periodSecond", 5), "periodSecond"),
        ("base", put("Service", "spec.ports.0.port", "http"), "not of type 'integer'"),
        (
            "components/inference-pool",
            put("InferencePool", "spec.targetPorts.0.number", 0),
            "less than the minimum",
        ),
        ("components/inference-pool", put("InferencePool", "spec.endpointPickerRef.port", None), "required"),
        ("components/autoscaling/keda", put("ScaledObject", "spec.minReplicas", 1), "minReplicas"),
        (
            "components/monitoring",
            put("PodMonitor", "spec.podMetricsEndpoints.0.targetport", 1),
            "targetport",
        ),
        (
            "components/monitoring",
            put("PrometheusRule", "spec.groups.0.rules.0.expression", "1"),
            "expression",
        ),
        (
            "components/inference-pool",
            put("HTTPRoute", "spec.rules.0.matches.0.path.type", "Prefix"),
            "Prefix",
        ),
    ],
)
def test_schemas_refuse_what_is_misspelt(
    rendered: dict[str, Manifests], name: str, break_it: Break, said: str
) -> None:
    broken = copy.deepcopy(rendered[name])
    break_it(broken)
    assert any(said in sentence for sentence in schema_errors(broken, VERSIONS[-1]))


def test_an_object_that_kubernetes_does_not_know_is_found() -> None:
    unknown = parse("{apiVersion: policy/v1beta1, kind: PodSecurityPolicy, metadata: {name: x}, spec: {}}")
    assert list(schema_errors(unknown, VERSIONS[0])) == [
        f"PodSecurityPolicy/x: Kubernetes {VERSIONS[0]} has no policy/v1beta1 PodSecurityPolicy"
    ]


def test_the_command_says_what_it_found_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: [pod.yaml]\n")
    (tmp_path / "pod.yaml").write_text(
        "{apiVersion: v1, kind: Service, metadata: {name: x}, spec: {selector: {a: b}, ports: [{port: 1}]}}"
    )
    assert main([str(tmp_path)]) == 1
    assert "selectors: Service/x: selects no pod" in capsys.readouterr().out
    assert main([str(tmp_path / "missing")]) == 1
    assert "does not render" in capsys.readouterr().out
