"""One host by compose, some hosts by Envoy and the endpoint picker: what can be known of the files without them."""

import ipaddress
import re
from typing import Any

import pytest
import yaml

from adapterd.config import ServeSettings, load_settings
from adapterd.server.auth import check_exposure
from deploy.check.manifests import DEPLOY
from deploy.check.object_rules import picker_errors
from deploy.check.pod_rules import EXIT_SECONDS, drain_seconds

COMPOSE = ("compose.yaml", "hosts/compose.yaml")


def load(path: str) -> Any:
    return yaml.safe_load((DEPLOY / path).read_text())


def serve_settings() -> ServeSettings:
    service = load("compose.yaml")["services"]["adapterd"]
    return load_settings(ServeSettings, {}, service["environment"])


def test_the_daemon_accepts_its_settings_and_may_be_public() -> None:
    settings = serve_settings()
    check_exposure(settings.host, has_keys=False, insecure_no_auth=settings.insecure_no_auth)


def test_the_daemon_gets_the_time_to_drain() -> None:
    given = load("compose.yaml")["services"]["adapterd"]["stop_grace_period"]
    assert float(given.removesuffix("s")) >= drain_seconds(serve_settings()) + EXIT_SECONDS


def test_without_keys_only_this_host_reaches_the_ports() -> None:
    for service in load("compose.yaml")["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


@pytest.mark.parametrize("path", COMPOSE)
def test_services_have_fixed_images_no_capabilities_and_files_that_exist(path: str) -> None:
    compose = load(path)
    for name, service in compose["services"].items():
        assert re.fullmatch(r"[a-z0-9./-]+:v?[0-9]+\.[0-9.]+", service["image"]), name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            known = source in compose.get("volumes", {}) or ((DEPLOY / path).parent / source).exists()
            assert known, f"{name}: {source}"


def test_the_daemon_s_container_is_as_closed_as_a_pod() -> None:
    service = load("compose.yaml")["services"]["adapterd"]
    assert service["user"] == "65532:65532"
    assert service["read_only"] is True
    assert service["tmpfs"] == ["/tmp"]


def test_the_picker_scores_adapters_on_hosts_as_in_a_cluster() -> None:
    hosts = load("hosts/endpoint-picker-config.yaml")
    cluster = load("components/inference-pool/endpoint-picker-config.yaml")
    assert list(picker_errors("hosts", hosts)) == []
    assert hosts["schedulingProfiles"] == cluster["schedulingProfiles"]
    (discovery,) = [plugin for plugin in hosts["plugins"] if plugin["type"] == "file-discovery"]
    assert hosts["plugins"] == [discovery, *cluster["plugins"]]
    assert hosts["dataLayer"]["discovery"]["endpoints"]["pluginRef"] == discovery["name"]


def test_endpoints_are_what_file_discovery_takes() -> None:
    endpoints = load("hosts/endpoints.yaml")["endpoints"]
    assert len({endpoint["name"] for endpoint in endpoints}) == len(endpoints) > 1
    for endpoint in endpoints:
        ipaddress.IPv4Address(endpoint["address"])
        assert endpoint["port"].isdecimal()
        assert endpoint.keys() <= {"name", "namespace", "address", "port", "labels"}


def test_envoy_asks_the_picker_that_compose_starts() -> None:
    envoy = load("hosts/envoy.yaml")["static_resources"]
    clusters = {cluster["name"]: cluster for cluster in envoy["clusters"]}
    manager = envoy["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    asks, routes = manager["http_filters"]
    assert clusters.keys() == {
        asks["typed_config"]["grpc_service"]["envoy_grpc"]["cluster_name"],
        manager["route_config"]["virtual_hosts"][0]["routes"][0]["route"]["cluster"],
    }
    assert routes["name"] == "envoy.filters.http.router"
    lb = clusters["endpoint_picker"]["load_assignment"]["endpoints"][0]["lb_endpoints"][0]
    port = lb["endpoint"]["address"]["socket_address"]["port_value"]
    command = load("hosts/compose.yaml")["services"]["endpoint-picker"]["command"]
    assert f"--grpc-port={port}" in command
    # The picker serves TLS unless it is told not to.
    assert ("transport_socket" in clusters["endpoint_picker"]) == ("--secure-serving=false" not in command)
    # Answers stream: nothing may gather them first.
    assert asks["typed_config"]["processing_mode"]["response_body_mode"] == "FULL_DUPLEX_STREAMED"


def test_envoy_starts_as_the_user_it_runs_as() -> None:
    """As root its entrypoint changes the owner of its output and then the user, and both are capabilities."""
    envoy = load("hosts/compose.yaml")["services"]["envoy"]
    assert envoy["cap_drop"] == ["ALL"]
    assert envoy["user"] == "101:101"
