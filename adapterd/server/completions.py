"""The dialect of /v1/completions: text or token ids in, text out, `n` answers to each of several prompts."""

from collections.abc import Iterator

from adapterd.core import Output
from adapterd.server.dialect import AnswerHead, Prompt, finish_reason
from adapterd.server.logprobs import CompletionLogprobsWriter, extend
from adapterd.server.protocol import CompletionRequest
from adapterd.server.responses import Completion, CompletionChoice, CompletionLogprobs, Usage
from adapterd.server.seams import Renderer, ResolvedModel


def prompts(body: CompletionRequest, renderer: Renderer, resolved: ResolvedModel) -> list[Prompt]:
    """Slow: runs beside the event loop."""
    return [_prompt(prompt, renderer, echo=body.echo) for prompt in body.prompt]


def _prompt(prompt: str | tuple[int, ...], renderer: Renderer, *, echo: bool) -> Prompt:
    if isinstance(prompt, str):
        return Prompt(tuple(renderer.encode(prompt)), prompt)
    in_vocabulary = all(0 <= token < len(renderer.token_bytes) for token in prompt)
    return Prompt(prompt, renderer.decode(prompt) if echo and in_vocabulary else "")


class CompletionAnswer:
    """Writes the answer to one request, whole or as the chunks of a stream.

    Choice `i * n + k` is the k-th answer to the i-th prompt.
    """

    def __init__(self, body: CompletionRequest, head: AnswerHead, renderer: Renderer) -> None:
        self._body = body
        self._head = head
        self._renderer = renderer
        self._writers: dict[int, CompletionLogprobsWriter] = {}

    def whole(self, outputs: list[Output], usage: Usage) -> Completion:
        choices = sorted((self._choice(output) for output in outputs), key=lambda choice: choice["index"])
        return {**self._completion(choices), "usage": usage}

    def chunks(self, output: Output) -> Iterator[Completion]:
        opens = self._head.choice_index(output) not in self._writers
        tokens_shown = self._body.return_token_ids or self._body.logprobs is not None
        if output.text or output.finish_reason or (output.token_ids and tokens_shown) or opens:
            chunk = self._completion([self._choice(output)])
            if self._head.include_usage:
                chunk["usage"] = None
            yield chunk

    def usage_chunk(self, usage: Usage) -> Completion:
        return {**self._completion([]), "usage": usage}

    def _completion(self, choices: list[CompletionChoice]) -> Completion:
        return {
            "id": self._head.id,
            "object": "text_completion",
            "created": self._head.created,
            "model": self._head.model,
            "choices": choices,
        }

    def _choice(self, output: Output) -> CompletionChoice:
        """`output` continues what earlier calls have written of the same answer."""
        index = self._head.choice_index(output)
        opens = index not in self._writers
        if opens:
            skipped = self._renderer.special_token_ids if self._body.skip_special_tokens else frozenset()
            self._writers[index] = CompletionLogprobsWriter(
                self._renderer.token_bytes,
                skipped,
                strips_leading_space=self._body.echo and self._renderer.strips_leading_space,
            )
        text = output.text
        if opens and self._body.echo:
            text = self._head.prompt(output).text + text
        choice: CompletionChoice = {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(output, index, opens),
            "finish_reason": finish_reason(output) if output.finish_reason else None,
            "stop_reason": output.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = list(output.token_ids)
            if opens:
                choice["prompt_token_ids"] = list(self._head.prompt(output).token_ids)
        return choice

    def _logprobs(self, output: Output, index: int, opens: bool) -> CompletionLogprobs | None:
        if self._body.logprobs is None:
            return None
        writer = self._writers[index]
        echoes = opens and self._body.echo
        first = writer.write_first(self._head.prompt(output).token_ids[0]) if echoes else writer.write(())
        return extend(first, writer.write((*output.prompt_logprobs, *output.logprobs)))
