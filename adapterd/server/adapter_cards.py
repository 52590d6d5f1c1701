"""What /v1/adapters says of an adapter, and what its other endpoints answer."""

from collections.abc import Collection
from typing import Any, Literal

from typing_extensions import TypedDict

from adapterd.core import AdapterId, BaseMatch
from adapterd.proof import Proof, Verdict
from adapterd.server.seams import AdapterEntry, FullProofs, Registry, Version

Tier = Literal["device", "host", "disk", "remote"]
"""The fastest place where a version's weights are now."""


class ProofCard(TypedDict):
    """How the products of a version's modules compared with those of PEFT's own layers when it was read.

    `max_error` is the largest difference of any module, over that module's largest output; with `has_effect` false
    the adapter adds nothing but zeros.
    """

    verdict: Verdict
    max_error: float
    num_modules: int
    has_effect: bool
    seconds: float


class VersionCard(TypedDict):
    """`requests_served` and `last_used` count since the daemon's start, for this content under any name."""

    number: int
    digest: str
    is_current: bool
    aliases: list[str]
    rank: int
    targets: list[str]
    bytes: int
    tier: Tier
    source: str
    first_loaded_at: float
    requests_served: int
    requests_running: int
    last_used: float | None
    proof: ProofCard | None


class BaseCard(TypedDict):
    """The base that serves the adapter, the one its configuration names, and how we know that they are the same:
    by the fingerprint that training left, or only because every tensor fits."""

    served: str
    declared: str | None
    match: BaseMatch | None


class AdapterCard(TypedDict):
    """`error` beside READY: a newer version was refused, and the one before serves on. `proof` is the current
    version's; a version whose proof fails is never served. `full_proof` is what `adapters prove` says of its whole
    answers, or why it could not: null unless the daemon makes such proofs, and until it has."""

    id: str
    object: Literal["adapter"]
    name: str
    state: str
    error: str | None
    owner: str | None
    source: str
    sha256: str | None
    digest: str | None
    version: int | None
    previous_version: int | None
    aliases: dict[str, int]
    pinned: bool
    rank: int
    targets: list[str]
    bytes: int
    tier: Tier | None
    loaded_at: float | None
    requests_served: int
    last_used: float | None
    base: BaseCard
    proof: ProofCard | None
    full_proof: dict[str, Any] | None
    versions: list[VersionCard]


class ManifestCard(TypedDict):
    """Which manifest holds; `error` says why a newer one does not."""

    path: str
    sha256: str
    error: str | None


class AdapterList(TypedDict):
    object: Literal["list"]
    data: list[AdapterCard]
    manifest: ManifestCard | None


class StillHeld(TypedDict):
    """A version whose memory is not back: requests that run it, and its bytes."""

    digest: str
    requests: int
    host_bytes: int
    device_bytes: int


class Unloaded(TypedDict):
    """Bytes are those that are free again. `held` is empty once all of them are."""

    object: Literal["adapter.unloaded", "adapter.unloading"]
    name: str
    digests: list[str]
    host_bytes: int
    device_bytes: int
    requests_aborted: int
    held: list[StillHeld]


class Cards:
    """Makes cards of one moment: `resident` is what is in device memory."""

    def __init__(
        self,
        registry: Registry,
        base_name: str,
        resident: Collection[AdapterId],
        full_proofs: FullProofs | None = None,
    ) -> None:
        self._registry = registry
        self._full_proofs = full_proofs
        self._base_name = base_name
        self._resident = frozenset(resident)

    def card(self, entry: AdapterEntry) -> AdapterCard:
        versions = [self._version(entry, version) for version in entry.versions]
        current = next((version for version in entry.versions if version.number == entry.number), None)
        used = [version["last_used"] for version in versions if version["last_used"] is not None]
        match = None if current is None else current.base_match
        return {
            "id": f"{self._base_name}:{entry.name}",
            "object": "adapter",
            "name": entry.name,
            "state": entry.state,
            "error": entry.error,
            "owner": entry.owner,
            "source": entry.source or str(entry.path),
            "sha256": entry.sha256,
            "digest": None if entry.id is None else entry.id.digest,
            "version": entry.number,
            "previous_version": entry.previous,
            "aliases": dict(entry.aliases),
            "pinned": entry.is_pinned,
            "rank": entry.rank,
            "targets": list(entry.targets),
            "bytes": entry.num_bytes,
            "tier": None if current is None else self._tier(current),
            "loaded_at": entry.loaded_at,
            "requests_served": sum(version["requests_served"] for version in versions),
            "last_used": max(used, default=None),
            "base": {
                "served": self._base_name,
                "declared": None if current is None else current.base_model,
                "match": match,
            },
            "proof": None if current is None else _proof(current.proof),
            "full_proof": None if current is None else self._full_proof(current),
            "versions": versions,
        }

    def _version(self, entry: AdapterEntry, version: Version) -> VersionCard:
        use = self._registry.use_of(version.id)
        return {
            "number": version.number,
            "digest": version.id.digest,
            "is_current": version.number == entry.number,
            "aliases": [alias for alias, number in entry.aliases if number == version.number],
            "rank": version.rank,
            "targets": list(version.targets),
            "bytes": version.num_bytes,
            "tier": self._tier(version),
            "source": version.source or str(version.path),
            "first_loaded_at": version.first_loaded_at,
            "requests_served": use.num_requests,
            "requests_running": use.num_leases,
            "last_used": use.last_used,
            "proof": _proof(version.proof),
        }

    def _full_proof(self, version: Version) -> dict[str, Any] | None:
        proof = None if self._full_proofs is None else self._full_proofs.of(version.id.digest)
        return None if proof is None else dict(proof)

    def _tier(self, version: Version) -> Tier:
        if version.id in self._resident:
            return "device"
        if self._registry.use_of(version.id).host_bytes:
            return "host"
        return "disk" if self._registry.is_on_disk(version.id.name, version.number) else "remote"


def _proof(proof: Proof | None) -> ProofCard | None:
    if proof is None:
        return None
    return {
        "verdict": proof.verdict,
        "max_error": proof.max_error,
        "num_modules": proof.num_modules,
        "has_effect": proof.has_effect,
        "seconds": proof.seconds,
    }
