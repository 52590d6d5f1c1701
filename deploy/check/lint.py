"""All rules by name, and what they find."""

from collections.abc import Callable, Iterator

from deploy.check import object_rules, pod_rules
from deploy.check.manifests import Manifests

Rule = Callable[[Manifests], Iterator[str]]

RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        pod_rules.enums,
        pod_rules.restricted,
        pod_rules.read_only_root,
        pod_rules.volumes,
        pod_rules.probes,
        pod_rules.grace,
        pod_rules.settings,
        pod_rules.memory,
        pod_rules.downloads,
        pod_rules.images,
        pod_rules.isolation,
        pod_rules.jobs,
        object_rules.names,
        object_rules.selectors,
        object_rules.ports,
        object_rules.scaling,
        object_rules.budgets,
        object_rules.rollout,
        object_rules.pools,
        object_rules.rights,
        object_rules.series,
    )
}


def lint(manifests: Manifests) -> list[str]:
    """What the rules find, as `rule: sentence`."""
    return [f"{name}: {sentence}" for name, rule in RULES.items() for sentence in rule(manifests)]
