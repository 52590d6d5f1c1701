"""The error tree. Each error carries the HTTP status and OpenAI `code` a client sees.

AdapterdError
├── InvalidRequest            400  the request asks for what cannot be done; `param` names the field
│   └── ContextLengthExceeded 400  prompt and answer do not fit the model's context
├── Unauthorized              401
├── Forbidden                 403
├── ModelNotFound             404  no base or adapter of that name
├── Conflict                  409  what was asked for goes against what is there, or its owner is elsewhere
│   └── OtherContent          409  the name exists with other content
├── Overloaded                429  a bounded queue is full; `retry_after_seconds` says when to come back
├── AdapterRefused            400  an adapter that cannot be applied exactly; names the field and the reason
├── SourceMissing             404  a source that holds no adapter
├── SourceFailed              502  a source that could not be read: the network, the store, what it sent
├── BaseRefused               start-up only: a base that cannot be served exactly
├── ConfigError               start-up only: a setting that is unknown, malformed or unsafe
└── Unavailable               503  starting, draining, or the adapter is still loading
    └── BeingRead             503  its weights are on the way to memory; `done` says when they are there
"""

from concurrent.futures import Future


class AdapterdError(Exception):
    """Base of all errors meant for people. `param` is the request field or setting at fault, if one is."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


def is_clients_own(error: Exception) -> bool:
    """Whether an idle daemon without bugs would refuse the same request too."""
    return isinstance(error, AdapterdError) and error.status < Overloaded.status


class InvalidRequest(AdapterdError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class Unauthorized(AdapterdError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class Forbidden(AdapterdError):
    status = 403
    type = "invalid_request_error"
    code = "forbidden"


class ModelNotFound(AdapterdError):
    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class Conflict(AdapterdError):
    status = 409
    type = "invalid_request_error"
    code = "conflict"


class OtherContent(Conflict):
    """How to serve the new content all the same is for each API to say in its own words."""

    code = "other_content"


class Overloaded(AdapterdError):
    status = 429
    type = "rate_limit_error"
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_seconds: int = 1) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class AdapterRefused(AdapterdError):
    status = 400
    type = "invalid_request_error"
    code = "adapter_refused"


class SourceMissing(AdapterdError):
    status = 404
    type = "invalid_request_error"
    code = "source_not_found"


class SourceFailed(AdapterdError):
    status = 502
    type = "server_error"
    code = "source_failed"


class BaseRefused(AdapterdError):
    code = "base_refused"


class ConfigError(AdapterdError):
    code = "invalid_config"


class Unavailable(AdapterdError):
    status = 503
    type = "server_error"
    code = "unavailable"

    def __init__(self, message: str, *, retry_after_seconds: int = 1) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class BeingRead(Unavailable):
    """Who can wait asks again when `done` is, and keeps its result until then: the weights, or the error.

    `name` is the adapter's.
    """

    def __init__(self, message: str, *, name: str, done: "Future[object]") -> None:
        super().__init__(message)
        self.name = name
        self.done = done
