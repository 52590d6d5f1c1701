"""Strict schemas: Kubernetes' own for three minor versions, and small ones of ours for the custom resources.

Ours hold only the fields that deploy/ uses, and refuse all others: a misspelt field is found, a rare one has to be
added here. `make test-deploy` holds the same objects against the projects' own schemas as well.
"""

from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes_validate

from deploy.check.manifests import Manifests

VERSIONS = ("1.31", "1.34", "1.37")
"""The oldest that knows image volumes, one between, the newest that the validator has."""


def _object(required: str = "", /, **properties: Any) -> dict[str, Any]:
    """`required` names fields, with blanks between; a field that is a keyword of Python is written with `_` behind."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required.split(),
        "properties": {name.removesuffix("_"): schema for name, schema in properties.items()},
    }


def _array(items: Any, least: int = 1, most: int | None = None) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least} | ({"maxItems": most} if most else {})


_TEXT = {"type": "string", "minLength": 1}
_COUNT = {"type": "integer", "minimum": 0}
_PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
_DURATION = {"type": "string", "pattern": r"^([0-9]+(ms|s|m|h))+$"}
_LABELS = {"type": "object", "additionalProperties": {"type": "string"}}
_LABEL_SELECTOR = _object("matchLabels", matchLabels=_LABELS)
_POLICIES = _array(
    _object(
        "type value periodSeconds", type={"enum": ["Pods", "Percent"]}, value=_COUNT, periodSeconds=_COUNT
    )
)
_SCALING = _object("policies", stabilizationWindowSeconds=_COUNT, policies=_POLICIES)

CUSTOM: dict[tuple[str, str], dict[str, Any]] = {
    ("inference.networking.k8s.io/v1", "InferencePool"): _object(
        "selector targetPorts",
        selector=_LABEL_SELECTOR,
        targetPorts=_array(_object("number", number=_PORT), most=8) | {"uniqueItems": True},
        appProtocol={"enum": ["http", "kubernetes.io/h2c"]},
        endpointPickerRef=_object(
            "name port",
            group={"type": "string"},
            kind=_TEXT,
            name=_TEXT,
            port=_object("number", number=_PORT),
            failureMode={"enum": ["FailOpen", "FailClose"]},
        ),
    ),
    ("monitoring.coreos.com/v1", "PodMonitor"): _object(
        "selector podMetricsEndpoints",
        selector=_LABEL_SELECTOR,
        podMetricsEndpoints=_array(
            _object("port path", port=_TEXT, path=_TEXT, interval=_DURATION, scrapeTimeout=_DURATION)
        ),
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): _object(
        "groups",
        groups=_array(
            _object(
                "name rules",
                name=_TEXT,
                interval=_DURATION,
                rules=_array(
                    _object(
                        "expr",
                        record=_TEXT,
                        alert=_TEXT,
                        expr=_TEXT,
                        for_=_DURATION,
                        labels=_LABELS,
                        annotations=_LABELS,
                    )
                ),
            )
        ),
    ),
    ("keda.sh/v1alpha1", "ScaledObject"): _object(
        "scaleTargetRef triggers",
        scaleTargetRef=_object("name", apiVersion=_TEXT, kind=_TEXT, name=_TEXT),
        minReplicaCount=_COUNT,
        maxReplicaCount=_COUNT,
        pollingInterval=_COUNT,
        cooldownPeriod=_COUNT,
        fallback=_object("failureThreshold replicas", failureThreshold=_COUNT, replicas=_COUNT),
        advanced=_object(
            horizontalPodAutoscalerConfig=_object(behavior=_object(scaleUp=_SCALING, scaleDown=_SCALING))
        ),
        triggers=_array(
            _object(
                "type metadata",
                type={"const": "prometheus"},
                metricType={"enum": ["AverageValue", "Value"]},
                metadata=_object(
                    "serverAddress query threshold", serverAddress=_TEXT, query=_TEXT, threshold=_TEXT
                ),
            )
        ),
    ),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): _object(
        "parentRefs rules",
        parentRefs=_array(_object("name", name=_TEXT, namespace=_TEXT, sectionName=_TEXT)),
        hostnames=_array(_TEXT),
        rules=_array(
            _object(
                "backendRefs",
                matches=_array(
                    _object(
                        path=_object(
                            "type value",
                            type={"enum": ["Exact", "PathPrefix", "RegularExpression"]},
                            value={"type": "string", "pattern": "^/"},
                        )
                    )
                ),
                backendRefs=_array(
                    _object(
                        "name", group={"type": "string"}, kind=_TEXT, name=_TEXT, port=_PORT, weight=_COUNT
                    )
                ),
                timeouts=_object(request=_DURATION, backendRequest=_DURATION),
            )
        ),
    ),
}
"""(apiVersion, kind) -> the schema of `spec`."""


def schema_errors(manifests: Manifests, version: str) -> Iterator[str]:
    """What a strict reader of this Kubernetes version would refuse."""
    for item in manifests.objects:
        where = f"{item['kind']}/{item['metadata']['name']}"
        custom = CUSTOM.get((item["apiVersion"], item["kind"]))
        try:
            if custom is not None:
                jsonschema.Draft202012Validator(custom).validate(item["spec"])
            else:
                kubernetes_validate.validate(item, version, strict=True)
        except (jsonschema.ValidationError, kubernetes_validate.ValidationError) as error:
            path = ".".join(str(part) for part in error.path)
            yield f"{where}: {path}: {error.message}"
        except kubernetes_validate.SchemaNotFoundError:
            yield f"{where}: Kubernetes {version} has no {item['apiVersion']} {item['kind']}"
