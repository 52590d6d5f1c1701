"""What a pod must be, beyond what its schema says: each rule yields a sentence for everything it finds wrong."""

from collections.abc import Iterator
from pathlib import Path

from adapterd.cli import build_parser
from adapterd.config import COMMANDS, ServeSettings, Settings, TrainSettings, load_settings
from adapterd.errors import AdapterdError
from adapterd.server.auth import check_exposure, is_loopback
from deploy.check.manifests import Manifests, Object

EXIT_SECONDS = 10
"""What a daemon may take from the end of its drain to its exit, and the kubelet to notice."""
MIN_STARTUP_SECONDS = 120
REPOSITORY = Path(__file__).parents[2]
SHARED_IN_IMAGE = "/opt/adapterd/share"
"""Where the image holds what of the repository it carries beside the package."""
DEFAULT_CACHE = Path("/tmp/.cache/adapterd")
"""Where a daemon of the image keeps downloads unless it is told otherwise: its HOME is /tmp."""

_PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def enums(manifests: Manifests) -> Iterator[str]:
    """Kubernetes' published schemas leave the values of most enumerations open; its servers do not."""
    for pod in manifests.pods():
        is_job = pod.owner["kind"] == "Job"
        policy = pod.spec.get("restartPolicy", "Always")
        if policy not in (("Never", "OnFailure") if is_job else ("Always",)):
            yield f"{pod.where}: restartPolicy {policy} is not allowed here"
        for container in pod.all_containers:
            name = f"{pod.where} {container['name']}"
            pull = container.get("imagePullPolicy", "Always")
            if pull not in ("Always", "IfNotPresent", "Never"):
                yield f"{name}: imagePullPolicy {pull} does not exist"
            restart = container.get("restartPolicy")
            if restart not in (None, "Always") or (restart and container in pod.spec["containers"]):
                yield f"{name}: restartPolicy {restart} is only Always, and only for an init container"
            for port in container.get("ports", []):
                if port.get("protocol", "TCP") not in ("TCP", "UDP", "SCTP"):
                    yield f"{name}: protocol {port['protocol']} does not exist"
        for toleration in pod.spec.get("tolerations", []):
            if toleration.get("operator", "Equal") not in ("Exists", "Equal"):
                yield f"{pod.where}: toleration operator {toleration['operator']} does not exist"
        for spread in pod.spec.get("topologySpreadConstraints", []):
            if spread["whenUnsatisfiable"] not in ("DoNotSchedule", "ScheduleAnyway"):
                yield f"{pod.where}: whenUnsatisfiable {spread['whenUnsatisfiable']} does not exist"


def restricted(manifests: Manifests) -> Iterator[str]:
    """Pod Security Standards, "restricted", on every pod, the training Job's too."""
    for pod in manifests.pods():
        context = pod.spec.get("securityContext", {})
        for flag in ("hostNetwork", "hostPID", "hostIPC"):
            if pod.spec.get(flag):
                yield f"{pod.where}: {flag} is set"
        for volume in pod.spec.get("volumes", []):
            if "hostPath" in volume:
                yield f"{pod.where}: volume {volume['name']} is a hostPath"
        for container in pod.all_containers:
            name, own = f"{pod.where} {container['name']}", container.get("securityContext", {})
            if not own.get("runAsNonRoot", context.get("runAsNonRoot")):
                yield f"{name}: runAsNonRoot is not set"
            if own.get("runAsUser", context.get("runAsUser")) == 0:
                yield f"{name}: runs as user 0"
            if own.get("seccompProfile", context.get("seccompProfile", {})).get("type") != "RuntimeDefault":
                yield f"{name}: no seccomp profile"
            if own.get("allowPrivilegeEscalation") is not False:
                yield f"{name}: may gain privileges"
            if own.get("privileged"):
                yield f"{name}: is privileged"
            if "ALL" not in own.get("capabilities", {}).get("drop", []):
                yield f"{name}: keeps capabilities"
            if own.get("capabilities", {}).get("add"):
                yield f"{name}: adds capabilities"
            if any("hostPort" in port for port in container.get("ports", [])):
                yield f"{name}: takes a port of the host"


def read_only_root(manifests: Manifests) -> Iterator[str]:
    """A root that cannot be written, and a /tmp that can, for the libraries that need one."""
    for pod, container in manifests.settings_containers():
        if not container.get("securityContext", {}).get("readOnlyRootFilesystem"):
            yield f"{pod.where} {container['name']}: its root can be written"
        writable = {m["mountPath"] for m in container.get("volumeMounts", []) if not m.get("readOnly")}
        if "/tmp" not in writable:
            yield f"{pod.where} {container['name']}: has no writable /tmp"


def volumes(manifests: Manifests) -> Iterator[str]:
    """Every mount has its volume, every volume its mount and what it is made from."""
    for pod in manifests.pods():
        known = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
        used = {m["name"] for c in pod.all_containers for m in c.get("volumeMounts", [])}
        yield from (f"{pod.where}: no volume {name!r} to mount" for name in sorted(used - known.keys()))
        yield from (
            f"{pod.where}: volume {name!r} is mounted nowhere" for name in sorted(known.keys() - used)
        )
        for volume in known.values():
            config, claim = volume.get("configMap"), volume.get("persistentVolumeClaim")
            if config and manifests.find("ConfigMap", config["name"]) is None:
                yield f"{pod.where}: no ConfigMap {config['name']!r} for volume {volume['name']!r}"
            if claim and manifests.find("PersistentVolumeClaim", claim["claimName"]) is None:
                yield f"{pod.where}: no PersistentVolumeClaim {claim['claimName']!r}"
        for container in pod.all_containers:
            for mount in container.get("volumeMounts", []):
                if "subPath" in mount and "configMap" in known.get(mount["name"], {}):
                    yield f"{pod.where}: {mount['mountPath']} is a subPath of a ConfigMap and would never change"


def probes(manifests: Manifests) -> Iterator[str]:
    """Ports resolve; a server has all three; none restarts a pod for being busy or kills one that still loads."""
    for pod in manifests.pods():
        for container in pod.containers:
            name, declared = f"{pod.where} {container['name']}", pod.ports()
            for kind in _PROBES:
                action = container.get(kind, {}).get("httpGet") or container.get(kind, {}).get("grpc") or {}
                port = action.get("port")
                if isinstance(port, str) and port not in declared:
                    yield f"{name}: {kind} names port {port!r}, which is not declared"
                if isinstance(port, int) and port not in declared.values():
                    yield f"{name}: {kind} asks port {port}, which is not declared"
            if not _is_server(container):
                continue
            if missing := [kind for kind in _PROBES if kind not in container]:
                yield f"{name}: has no {', '.join(missing)}"
                continue
            paths = {kind: container[kind]["httpGet"]["path"] for kind in _PROBES}
            if paths["livenessProbe"] != "/livez":
                yield f"{name}: the liveness probe asks {paths['livenessProbe']}: a pod that is busy would be killed"
            if {paths["startupProbe"], paths["readinessProbe"]} != {"/readyz"}:
                yield f"{name}: the startup and readiness probes must ask /readyz"
            budget = startup_seconds(container)
            if budget < MIN_STARTUP_SECONDS:
                yield f"{name}: has {budget} s to start; {MIN_STARTUP_SECONDS} are the least"


def startup_seconds(container: Object) -> int:
    """How long its startup probe lets a container start; 0 without one."""
    if "startupProbe" not in container:
        return 0
    probe = container["startupProbe"]
    seconds: int = probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3)
    return seconds


def grace(manifests: Manifests) -> Iterator[str]:
    """terminationGracePeriodSeconds >= preStop + drain + 10, with the daemon's own settings."""
    for pod, container in manifests.settings_containers():
        found = _settings_or_none(container)
        if not isinstance(found, ServeSettings):
            continue
        needed = pre_stop_seconds(container) + drain_seconds(found) + EXIT_SECONDS
        given = pod.spec.get("terminationGracePeriodSeconds", 30)
        if given < needed:
            yield f"{pod.where}: {given} s of grace, and preStop, drain and exit may take {needed:g}"
        if pre_stop_seconds(container) < 5:
            yield f"{pod.where}: no preStop sleep of 5 s, so requests still come when the daemon has begun to drain"


def pre_stop_seconds(container: Object) -> int:
    seconds: int = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    return seconds


def drain_seconds(settings: ServeSettings) -> float:
    """From SIGTERM to the end of the last request, at most."""
    return settings.drain_delay + settings.drain_timeout


def settings(manifests: Manifests) -> Iterator[str]:
    """The daemon itself accepts its arguments and variables; files they name are mounted."""
    for pod, container in manifests.settings_containers():
        name = f"{pod.where} {container['name']}"
        try:
            found = _settings(container)
            if isinstance(found, ServeSettings):
                check_exposure(
                    found.host,
                    has_keys=(found.api_key_file or found.admin_key_file) is not None,
                    # What a Secret holds is not known here, so an admin's keys have to have a file of their own.
                    has_admin_keys=found.admin_key_file is not None,
                    insecure_no_auth=found.insecure_no_auth,
                    allow_runtime_adapters=found.allow_runtime_adapters,
                )
        except (AdapterdError, SystemExit) as error:
            yield f"{name}: {error}"
            continue
        ports = [port["containerPort"] for port in container.get("ports", [])]
        if isinstance(found, TrainSettings) and found.metrics_port is not None:
            if found.metrics_port not in ports:
                yield f"{name}: serves metrics on {found.metrics_port}, and declares {ports}"
            if found.metrics_host is None or is_loopback(found.metrics_host):
                yield f"{name}: serves metrics where nobody outside the pod can ask"
        if isinstance(found, ServeSettings):
            mounts = [Path(mount["mountPath"]) for mount in container.get("volumeMounts", [])]
            keys = [path for path in (found.api_key_file, found.admin_key_file) if path is not None]
            for path in (*found.adapters, *(module.path for module in found.lora_modules), *keys):
                in_volume = any(path.is_relative_to(mount) or mount.is_relative_to(path) for mount in mounts)
                if not in_volume and not path.is_relative_to(SHARED_IN_IMAGE):
                    yield f"{name}: {path} lies in no volume and is not in the image"
            if found.port not in ports:
                yield f"{name}: listens on {found.port}, and declares {ports}"


def memory(manifests: Manifests) -> Iterator[str]:
    """Requests and a memory limit everywhere; what the daemon is told to take fits below the limit."""
    for pod in manifests.pods():
        for container in pod.all_containers:
            name, resources = f"{pod.where} {container['name']}", container.get("resources", {})
            if missing := {"cpu", "memory"} - resources.get("requests", {}).keys():
                yield f"{name}: requests no {', '.join(sorted(missing))}"
            if "memory" not in resources.get("limits", {}):
                yield f"{name}: has no memory limit"
    for pod, container in manifests.settings_containers():
        limits, found = container.get("resources", {}).get("limits", {}), _settings_or_none(container)
        if not isinstance(found, ServeSettings) or "memory" not in limits:
            continue
        on_device = "nvidia.com/gpu" in limits
        sizes = (found.host_memory, *(() if on_device else (found.kv_memory, found.adapter_memory)))
        if None in sizes:
            yield f"{pod.where}: a memory size is left to the node's free memory, which is not the container's"
        elif sum(size or 0 for size in sizes) > 0.75 * quantity(limits["memory"]):
            yield f"{pod.where}: is told to take more than three quarters of its {limits['memory']}"


def quantity(text: str) -> float:
    unit = text[-2:]
    return float(text[:-2]) * _UNITS[unit] if unit in _UNITS else float(text)


def downloads(manifests: Manifests) -> Iterator[str]:
    """Adapters that the daemon fetches itself are kept in a volume that holds as many bytes as it may keep."""
    for pod, container in manifests.settings_containers():
        found = _settings_or_none(container)
        if not isinstance(found, ServeSettings):
            continue
        patterns = (*found.allow_source, *found.resolve)
        if not any("://" in pattern and not pattern.startswith("file:") for pattern in patterns):
            continue
        cache, mounts = found.cache or DEFAULT_CACHE, container.get("volumeMounts", [])
        holding = [mount for mount in mounts if cache.is_relative_to(mount["mountPath"])]
        if not holding:
            yield f"{pod.where}: keeps downloads in {cache}, which lies in no volume"
            continue
        name = max(holding, key=lambda mount: len(mount["mountPath"]))["name"]
        (volume,) = [volume for volume in pod.spec["volumes"] if volume["name"] == name]
        limit = volume.get("emptyDir", {}).get("sizeLimit")
        if limit is not None and quantity(limit) < found.cache_size:
            yield (
                f"{pod.where}: may keep {found.cache_size} bytes of downloads in volume {name!r}, which holds {limit};"
                " set ADAPTERD_CACHE to a volume of their own, and ADAPTERD_CACHE_SIZE"
            )


def images(manifests: Manifests) -> Iterator[str]:
    """A tag or a digest, and never one that moves."""
    for pod in manifests.pods():
        references = [container["image"] for container in pod.all_containers]
        references += [v["image"]["reference"] for v in pod.spec.get("volumes", []) if "image" in v]
        for reference in references:
            if "@sha256:" in reference:
                continue
            _, separator, tag = reference.rpartition("/")[2].partition(":")
            if not separator or tag in ("latest", "main", "dev"):
                yield f"{pod.where}: image {reference} has no fixed version"
    for pod, container in manifests.settings_containers():
        has_gpu = "nvidia.com/gpu" in container.get("resources", {}).get("limits", {})
        if has_gpu != container["image"].endswith("-cuda"):
            device = "a GPU" if has_gpu else "a CPU"
            yield f"{pod.where} {container['name']}: image {container['image']} does not suit {device}"


def isolation(manifests: Manifests) -> Iterator[str]:
    """No token that nobody uses, and no variables of Services, which adapterd would take for settings."""
    for pod in manifests.pods():
        account = pod.spec.get("serviceAccountName")
        if account is None or manifests.find("ServiceAccount", account) is None:
            yield f"{pod.where}: its service account {account!r} is not here"
        bound = {s["name"] for b in manifests.of("RoleBinding") for s in b["subjects"]}
        if account not in bound and pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.where}: is given a token that has no rights"
        if pod.spec.get("enableServiceLinks") is not False:
            yield f"{pod.where}: enableServiceLinks is on; a Service 'adapterd' would set ADAPTERD_PORT=tcp://..."


def jobs(manifests: Manifests) -> Iterator[str]:
    """A Job that ends, is cleaned up, goes on after a pre-emption and gives up on a mistake."""
    for job in manifests.of("Job"):
        where, spec = f"Job/{job['metadata']['name']}", job["spec"]
        for field in ("backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished"):
            if field not in spec:
                yield f"{where}: has no {field}"
        rules = spec.get("podFailurePolicy", {}).get("rules", [])
        names = {container["name"] for container in spec["template"]["spec"]["containers"]}
        conditions = [
            c["type"] for r in rules if r["action"] == "Ignore" for c in r.get("onPodConditions", [])
        ]
        if "DisruptionTarget" not in conditions:
            yield f"{where}: counts a pre-empted pod as a failure"
        for rule in rules:
            on_exit = rule.get("onExitCodes", {})
            if on_exit and on_exit.get("containerName", next(iter(names))) not in names:
                yield f"{where}: podFailurePolicy names container {on_exit['containerName']!r}"
        if rules and spec["template"]["spec"].get("restartPolicy") != "Never":
            yield f"{where}: podFailurePolicy needs restartPolicy Never"


def _is_server(container: Object) -> bool:
    return container.get("args", [None])[0] == "serve"


def _settings(container: Object) -> Settings | None:
    """What the daemon would understand; None for a command without settings. Raises ConfigError or SystemExit."""
    environ = {variable["name"]: variable.get("value", "") for variable in container.get("env", [])}
    arguments = [argument.replace(SHARED_IN_IMAGE, str(REPOSITORY)) for argument in container.get("args", [])]
    flags = vars(build_parser().parse_args(arguments))
    flags.pop("run")
    (kind,) = [kind for kind in COMMANDS if kind.command == arguments[0]]
    return load_settings(kind, flags, environ, flags.pop("config", None))


def _settings_or_none(container: Object) -> Settings | None:
    try:
        return _settings(container)
    except (AdapterdError, SystemExit):
        return None  # the rule `settings` says so
