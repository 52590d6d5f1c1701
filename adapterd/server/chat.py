"""The dialect of /v1/chat/completions: messages in, one assistant message an answer out."""

from collections.abc import Iterator

from adapterd.core import Output
from adapterd.messages import template_message
from adapterd.server.dialect import AnswerHead, Prompt, finish_reason
from adapterd.server.logprobs import chat_logprobs
from adapterd.server.protocol import ChatCompletionRequest
from adapterd.server.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    Delta,
    Usage,
)
from adapterd.server.seams import Renderer, ResolvedModel


def prompts(body: ChatCompletionRequest, renderer: Renderer, resolved: ResolvedModel) -> list[Prompt]:
    """The one prompt of a chat. Slow: runs beside the event loop."""
    messages = [
        template_message(role=message.role, content=message.content, name=message.name)
        for message in body.messages
    ]
    ids = renderer.render(
        messages,
        chat_template=resolved.chat_template,
        add_generation_prompt=body.add_generation_prompt,
        template_kwargs=body.chat_template_kwargs,
    )
    return [Prompt(tuple(ids))]


class ChatAnswer:
    """Writes the answer to one request, whole or as the chunks of a stream."""

    def __init__(self, body: ChatCompletionRequest, head: AnswerHead, renderer: Renderer) -> None:
        self._body = body
        self._head = head
        self._renderer = renderer
        self._opened: set[int] = set()

    def whole(self, outputs: list[Output], usage: Usage) -> ChatCompletion:
        answer: ChatCompletion = {
            "id": self._head.id,
            "object": "chat.completion",
            "created": self._head.created,
            "model": self._head.model,
            "choices": [self._choice(output) for output in sorted(outputs, key=lambda output: output.index)],
            "usage": usage,
        }
        if self._body.return_token_ids:
            answer["prompt_token_ids"] = list(self._head.prompts[0].token_ids)
        return answer

    def _choice(self, output: Output) -> ChatChoice:
        choice: ChatChoice = {
            "index": output.index,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": self._logprobs(output),
            "finish_reason": finish_reason(output),
            "stop_reason": output.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = list(output.token_ids)
        return choice

    def chunks(self, output: Output) -> Iterator[ChatCompletionChunk]:
        """OpenAI's order for each answer: the role, pieces of content, an empty delta with the reason to stop."""
        if output.index not in self._opened:
            opening = self._chunk(output.index, {"role": "assistant", "content": ""})
            if self._body.return_token_ids and not self._opened:
                opening["prompt_token_ids"] = list(self._head.prompts[0].token_ids)
            self._opened.add(output.index)
            yield opening
        tokens_shown = self._body.return_token_ids or self._body.logprobs
        if output.text or (output.token_ids and tokens_shown):
            chunk = self._chunk(output.index, {"content": output.text})
            chunk["choices"][0]["logprobs"] = self._logprobs(output)
            if self._body.return_token_ids:
                chunk["choices"][0]["token_ids"] = list(output.token_ids)
            yield chunk
        if output.finish_reason is not None:
            chunk = self._chunk(output.index, {})
            chunk["choices"][0]["finish_reason"] = finish_reason(output)
            chunk["choices"][0]["stop_reason"] = output.stop_reason
            yield chunk

    def usage_chunk(self, usage: Usage) -> ChatCompletionChunk:
        return {**self._chunk_head(), "choices": [], "usage": usage}

    def _chunk(self, index: int, delta: Delta) -> ChatCompletionChunk:
        choice: ChatChunkChoice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        chunk = self._chunk_head()
        chunk["choices"] = [choice]
        if self._head.include_usage:
            chunk["usage"] = None
        return chunk

    def _chunk_head(self) -> ChatCompletionChunk:
        return {
            "id": self._head.id,
            "object": "chat.completion.chunk",
            "created": self._head.created,
            "model": self._head.model,
            "choices": [],
        }

    def _logprobs(self, output: Output) -> ChatLogprobs | None:
        return chat_logprobs(output.logprobs, self._renderer.token_bytes) if self._body.logprobs else None
