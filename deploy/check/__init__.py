"""Proof of manifests without a cluster: rendered, held against Kubernetes' own schemas, then against our own rules."""
