"""Loading and unloading adapters at run time as other servers do it: their paths, bodies, sentences, error types.

Controllers of several projects call vLLM's and read the status, the sentence, or `type` at the top level of an
error, where older versions of vLLM had it; so errors carry it in both places. Our own API is in adapter_api.py.
"""

from functools import wraps

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from adapterd.errors import AdapterdError, ModelNotFound, OtherContent, is_clients_own
from adapterd.server.adapter_bodies import (
    LoadAdapterRequest,
    SglangLoadRequest,
    SglangUnloadRequest,
    UnloadAdapterRequest,
)
from adapterd.server.auth import Endpoint
from adapterd.server.body import read_json
from adapterd.server.envelope import count_error, envelope, error_headers
from adapterd.server.state import ServerState
from adapterd.server.validation import validate

_PARAMS = {"name": "lora_name", "source": "lora_path"}
"""The registry's words, and those of the bodies here."""


class VllmAdapters:
    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._registry = state.daemon.registry

    async def load(self, request: Request) -> Response:
        """Once this has answered, new requests use what was loaded."""
        body = validate(LoadAdapterRequest, await read_json(request))
        if not body.lora_name or not body.lora_path:
            raise _Refusal(400, "Both 'lora_name' and 'lora_path' must be provided.")
        try:
            await self._state.changes.run(
                lambda: self._registry.load(body.lora_name, body.lora_path, inplace=body.load_inplace)
            )
        except OtherContent as error:
            sentence = (
                f"The lora adapter '{body.lora_name}' has already been loaded. If you want to load the adapter"
                f" in place, set 'load_inplace' to True. ({error.message})"
            )
            raise _Refusal(400, sentence, error) from None
        except AdapterdError as error:
            status = 404 if error.param == "source" else error.status
            raise _Refusal(status, f"Loading lora {body.lora_name} failed: {error.message}", error) from None
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        """Requests that run keep the version they started with; new ones get 404."""
        body = validate(UnloadAdapterRequest, await read_json(request))
        if not body.lora_name:
            raise _Refusal(400, "'lora_name' needs to be provided to unload a LoRA adapter.")
        try:
            await self._state.changes.run(lambda: self._registry.unload(body.lora_name))
        except ModelNotFound as error:
            raise _Refusal(404, f"The lora adapter '{body.lora_name}' cannot be found.", error) from None
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


class _Refusal(AdapterdError):
    """`error`, if one is behind it, with vLLM's status and sentence."""

    type = "invalid_request_error"
    code = "invalid_value"

    def __init__(self, status: int, sentence: str, error: AdapterdError | None = None) -> None:
        param = None if error is None or error.param is None else _PARAMS.get(error.param, error.param)
        super().__init__(sentence, param=param, code=None if error is None else error.code)
        self.status = status


def in_vllms_words(endpoint: Endpoint) -> Endpoint:
    """The endpoint, every error of which has vLLM's `type`, and that and `message` at the top level too."""

    @wraps(endpoint)
    async def answering(request: Request) -> Response:
        try:
            return await endpoint(request)
        except AdapterdError as error:
            count_error(request.app.state.metrics, error)
            kind = "InvalidUserInput" if is_clients_own(error) else "InternalServerError"
            if error.status == 404:
                kind = "NotFoundError"
            body = envelope(error)
            body["error"]["type"] = kind
            return JSONResponse(
                {**body, "message": error.message, "type": kind},
                status_code=error.status,
                headers=error_headers(error),
            )

    return answering


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
                lambda: self._registry.load(body.lora_name, body.lora_path, inplace=False, pinned=body.pinned)
            )
        except OtherContent as error:
            raise OtherContent(f"{error.message}; unload it first", param="lora_name") from None
        return self._loaded()

    async def unload(self, request: Request) -> Response:
        body = validate(SglangUnloadRequest, await read_json(request))
        await self._state.changes.run(lambda: self._registry.unload(body.lora_name))
        return self._loaded()

    def _loaded(self) -> Response:
        loaded = {entry.name: str(entry.path) for entry in self._registry.list() if entry.id is not None}
        return JSONResponse({"success": True, "loaded_adapters": loaded})


def in_sglangs_words(endpoint: Endpoint) -> Endpoint:
    """The endpoint, every error of which is a 400 without `success`."""

    @wraps(endpoint)
    async def answering(request: Request) -> Response:
        try:
            return await endpoint(request)
        except AdapterdError as error:
            count_error(request.app.state.metrics, error)
            return JSONResponse({"success": False, "error_message": error.message}, status_code=400)

    return answering
