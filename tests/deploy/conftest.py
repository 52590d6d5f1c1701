"""`pytest --deploy tests/deploy` runs what needs root, or packages of Debian and npm: `make test-deploy`."""

import shutil

import pytest

PACKAGES = {
    "buildah": "buildah",
    "mmdebstrap": "mmdebstrap",
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "npm": "npm",
    "rsvg-convert": "librsvg2-bin",
}
"""Command -> the Debian package that has it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--deploy", action="store_true", help="run what needs root, or Debian's packages")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--deploy", default=False):
        skip = pytest.mark.skip(reason="needs root or Debian's packages: make test-deploy")
        for item in items:
            if item.get_closest_marker("deploy"):
                item.add_marker(skip)


def require(*commands: str) -> None:
    """Fail, rather than skip, for want of a command: who asked for --deploy wants to know."""
    missing = sorted({PACKAGES[command] for command in commands if shutil.which(command) is None})
    assert not missing, f"apt-get install {' '.join(missing)}"
