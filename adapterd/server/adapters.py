"""Loading and unloading adapters at run time as other servers do it: their paths, bodies, sentences, error types.

Controllers of several projects call vLLM's and read the status, the sentence, or `type` at the top level of an
error, where older versions of vLLM had it; so errors carry it in both places.
"""

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from adapterd.errors import AdapterdError, Conflict, ModelNotFound
from adapterd.server.body import read_json
from adapterd.server.envelope import envelope
from adapterd.server.protocol import (
    LoadAdapterRequest,
    SglangLoadRequest,
    SglangUnloadRequest,
    UnloadAdapterRequest,
)
from adapterd.server.state import ServerState
from adapterd.server.validation import validate


class VllmAdapters:
    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._registry = state.daemon.registry

    async def load(self, request: Request) -> Response:
        """Once this has answered, new requests use what was loaded."""
        body = validate(LoadAdapterRequest, await read_json(request))
        if not body.lora_name or not body.lora_path:
            return _refuse(400, "Both 'lora_name' and 'lora_path' must be provided.")
        try:
            await self._state.changes.run(
                lambda: self._registry.load(body.lora_name, body.lora_path, inplace=body.load_inplace)
            )
        except Conflict as error:
            return _refuse(
                400,
                f"The lora adapter '{body.lora_name}' has already been loaded. If you want to load the adapter"
                f" in place, set 'load_inplace' to True. ({error.message})",
            )
        except AdapterdError as error:
            status = 404 if error.param == "lora_path" else error.status
            return _refuse(status, f"Loading lora {body.lora_name} failed: {error.message}", error)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        """Requests that run keep the version they started with; new ones get 404."""
        body = validate(UnloadAdapterRequest, await read_json(request))
        if not body.lora_name:
            return _refuse(400, "'lora_name' needs to be provided to unload a LoRA adapter.")
        try:
            await self._state.changes.run(lambda: self._registry.unload(body.lora_name))
        except ModelNotFound:
            return _refuse(404, f"The lora adapter '{body.lora_name}' cannot be found.")
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


class SglangAdapters:
    """SGLang's answer is JSON with `success`, and with what is loaded by then."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._registry = state.daemon.registry

    async def load(self, request: Request) -> Response:
        """A name that serves other content is refused: SGLang unloads first."""
        body = validate(SglangLoadRequest, await read_json(request))
        try:
            await self._state.changes.run(
                lambda: self._registry.load(body.lora_name, body.lora_path, inplace=False)
            )
            if body.pinned:
                await self._state.changes.run(lambda: self._registry.pin(body.lora_name))
        except AdapterdError as error:
            return self._failed(error)
        return self._loaded()

    async def unload(self, request: Request) -> Response:
        body = validate(SglangUnloadRequest, await read_json(request))
        try:
            await self._state.changes.run(lambda: self._registry.unload(body.lora_name))
        except AdapterdError as error:
            return self._failed(error)
        return self._loaded()

    def _loaded(self) -> Response:
        loaded = {entry.name: str(entry.path) for entry in self._registry.list() if entry.id is not None}
        return JSONResponse({"success": True, "loaded_adapters": loaded})

    def _failed(self, error: AdapterdError) -> Response:
        return JSONResponse({"success": False, "error_message": error.message}, status_code=400)


def _refuse(status: int, message: str, error: AdapterdError | None = None) -> Response:
    kind = {400: "InvalidUserInput", 404: "NotFoundError"}.get(status, "InternalServerError")
    code = error.code if error is not None else None
    body = envelope(AdapterdError(message, param=error.param if error else None, code=code))
    body["error"]["type"] = kind
    return JSONResponse({**body, "message": message, "type": kind}, status_code=status)
