"""From a request's body to its answer: the way through the rooms, the same for both dialects.

Whatever happens on the way (an error, a client that goes away, the end of the answer), the engine's sequences,
the place to deliver to and the hold on the adapters' weights are given back in the reverse order.
"""

import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from adapterd.busiest import OTHER
from adapterd.core import Output, Request, RequestId
from adapterd.errors import AdapterdError, is_clients_own
from adapterd.server import chat, completions
from adapterd.server.auth import prefix_scope
from adapterd.server.body import read_json
from adapterd.server.dialect import AnswerHead, Prompt, UsageTally, check_alive
from adapterd.server.envelope import INTERNAL_ERROR, count_error, envelope
from adapterd.server.protocol import ChatCompletionRequest, CompletionRequest
from adapterd.server.responses import Usage
from adapterd.server.sampling import check_prompt, sampling_params
from adapterd.server.seams import Renderer, ResolvedModel
from adapterd.server.sse import EventStream, unless_disconnected
from adapterd.server.state import ServerState
from adapterd.server.streams import OutputStream
from adapterd.server.validation import validate

B = TypeVar("B", ChatCompletionRequest, CompletionRequest)


class Answer(Protocol):
    def whole(self, outputs: list[Output], usage: Usage) -> Any: ...
    def chunks(self, output: Output) -> Any: ...
    def usage_chunk(self, usage: Usage) -> Any: ...


@dataclass(frozen=True)
class Dialect(Generic[B]):
    """What differs between the endpoints: the body, how it becomes prompts, and how the answer is written."""

    body: type[B]
    prompt_field: str
    continues_prompt: bool
    id_prefix: str
    prompts: Callable[[B, Renderer, ResolvedModel], list[Prompt]]
    answer: Callable[[B, AnswerHead, Renderer], Answer]


CHAT = Dialect(ChatCompletionRequest, "messages", False, "chatcmpl-", chat.prompts, chat.ChatAnswer)
COMPLETIONS = Dialect(
    CompletionRequest, "prompt", True, "cmpl-", completions.prompts, completions.CompletionAnswer
)


class Generate(Generic[B]):
    """One endpoint, as an ASGI application: it must hear of the client's going away while it works."""

    def __init__(self, state: ServerState, dialect: Dialect[B]) -> None:
        self._state = state
        self._dialect: Dialect[B] = dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = validate(self._dialect.body, await read_json(HttpRequest(scope, receive)))
            with self._state.drain.running():
                await unless_disconnected(receive, self._respond(body, scope, receive, send))
        except ClientDisconnect:
            return  # nobody is there to be told, and it is no error of ours to log

    async def _respond(self, body: B, scope: Scope, receive: Receive, send: Send) -> None:
        arrival_seconds = time.monotonic()
        daemon = self._state.daemon
        adapter_names: tuple[str, ...] = (OTHER,)  # until they are known
        with ExitStack() as held:
            try:
                resolved = await self._state.resolve(body.model)
                adapter_names = resolved.adapter_names
                lease = daemon.registry.lease(resolved.mix)
                held.callback(lease.release)
                prompts = await self._state.render_pool.run(
                    self._dialect.prompts, body, daemon.renderer, resolved
                )
                shared = prefix_scope(scope, body.cache_salt)
                requests = self._requests(body, resolved, prompts, arrival_seconds, shared)
                head = self._head(body, resolved, prompts, requests)
                stream = self._submit(requests, resolved, held)
            except Exception as error:
                if not is_clients_own(error):
                    self._state.metrics.failed_early(adapter_names)
                raise
            held.enter_context(self._state.in_use.by(stream, resolved.mix))
            answer = self._dialect.answer(body, head, daemon.renderer)
            tally = UsageTally(prompts)
            headers = {"x-adapterd-digest": resolved.digest}
            if body.stream:
                await self._stream(EventStream(send, headers), stream, answer, tally, head.include_usage)
            else:
                outputs = await stream.take_all()
                check_alive(outputs)
                for output in outputs:
                    tally.add(output)
                response = JSONResponse(answer.whole(outputs, tally.usage()), headers=headers)
                await response(scope, receive, send)

    def _requests(
        self,
        body: B,
        resolved: ResolvedModel,
        prompts: list[Prompt],
        arrival_seconds: float,
        shared: bytes,
    ) -> list[Request]:
        spec = self._state.spec
        answer_id = self._dialect.id_prefix + uuid.uuid4().hex
        requests = []
        for number, prompt in enumerate(prompts):
            check_prompt(prompt.token_ids, spec, self._dialect.prompt_field)
            params = sampling_params(body, resolved.generation_defaults, spec, len(prompt.token_ids))
            requests.append(
                Request(
                    id=RequestId(answer_id if number == 0 else f"{answer_id}-{number}"),
                    prompt_token_ids=prompt.token_ids,
                    params=params,
                    mix=resolved.mix,
                    eos_token_ids=resolved.eos_token_ids,
                    arrival_seconds=arrival_seconds,
                    num_sequences=body.n,
                    continues_prompt=self._dialect.continues_prompt,
                    prompt_field=self._dialect.prompt_field,
                    prefix_scope=shared,
                )
            )
        return requests

    def _head(
        self, body: B, resolved: ResolvedModel, prompts: list[Prompt], requests: list[Request]
    ) -> AnswerHead:
        return AnswerHead(
            id=requests[0].id,
            created=int(time.time()),
            model=resolved.model,
            prompts=tuple(prompts),
            request_ids=tuple(request.id for request in requests),
            n=body.n,
            include_usage=body.stream_options is not None and body.stream_options.include_usage,
        )

    def _submit(self, requests: list[Request], resolved: ResolvedModel, held: ExitStack) -> OutputStream:
        """Hand `requests` to the engine; `held` takes them back at its end, finished or not."""
        engine, streams = self._state.daemon.engine, self._state.streams
        for request in requests:
            held.callback(engine.abort, request.id)
            engine.submit(request)
        # No output is missed: they come through the event loop, which is busy with this function.
        record = self._state.metrics.record(resolved.adapter_names, requests)
        held.callback(record.close)
        ids = [request.id for request in requests]
        held.callback(streams.close, ids)
        return streams.open(ids, requests[0].num_sequences, record.observe)

    async def _stream(
        self,
        events: EventStream,
        stream: OutputStream,
        answer: Answer,
        tally: UsageTally,
        include_usage: bool,
    ) -> None:
        """Errors before the first event keep their HTTP status; later ones become the stream's last event."""
        try:
            while not stream.is_finished:
                outputs = await stream.take()
                check_alive(outputs)
                for output in outputs:
                    tally.add(output)
                await events.events(chunk for output in outputs for chunk in answer.chunks(output))
            if include_usage:
                await events.events([answer.usage_chunk(tally.usage())])
            await events.done()
        except AdapterdError as error:
            if not events.is_started:
                raise
            count_error(self._state.metrics, error)
            await events.error(envelope(error))
        except Exception:
            if events.is_started:
                await events.error(INTERNAL_ERROR)
            raise
