"""GET /v1/models: the base first, then every adapter that is ready."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterd.core import BASE_ADAPTER
from adapterd.server.responses import ModelCard, ModelList
from adapterd.server.seams import AdapterEntry
from adapterd.server.state import ServerState


class Models:
    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def list(self, request: Request) -> Response:
        cards = [
            self._adapter_card(entry, model_id)
            for entry in self._state.daemon.registry.list()
            if entry.id is not None
            for model_id in self._state.model_ids(entry.name)
        ]
        models: ModelList = {"object": "list", "data": [self._base_card(), *cards]}
        return JSONResponse(models)

    async def one(self, request: Request) -> Response:
        """Any spelling that a request's `model` may have. Raises ModelNotFound."""
        found = self._state.describe(request.path_params["model"])
        card = self._base_card()
        if found.digest != BASE_ADAPTER.digest:
            card |= {"id": found.model, "parent": self._state.spec.name, "digest": found.digest}
        if found.path is not None:
            card["root"] = str(found.path)
            card["created"] = int(found.loaded_at or self._state.created_unix)
        return JSONResponse(card)

    def _base_card(self) -> ModelCard:
        spec = self._state.spec
        return {
            "id": spec.name,
            "object": "model",
            "created": self._state.created_unix,
            "owned_by": "adapterd",
            "root": spec.root,
            "parent": None,
            "max_model_len": spec.max_model_len,
            "digest": BASE_ADAPTER.digest,
        }

    def _adapter_card(self, entry: AdapterEntry, model_id: str) -> ModelCard:
        card = self._base_card()
        card["id"] = model_id
        card["created"] = int(entry.loaded_at or self._state.created_unix)
        card["root"] = str(entry.path)
        card["parent"] = self._state.spec.name
        card["digest"] = entry.id.digest if entry.id is not None else ""
        return card
