"""The same tiny base and daemon as the server's tests have."""

from tests.server.conftest import server_url, tiny_base

__all__ = ["server_url", "tiny_base"]
