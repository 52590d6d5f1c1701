"""What a client may ask: the request bodies of the OpenAI API with vLLM's additions, checked strictly.

A field is either here, and then it is done as asked; or here with the one value that changes nothing; or it
is refused by name. JSON null equals absent. Fields left out take the adapter's own generation defaults.
"""

from typing import Annotated, Any, Literal, TypeGuard

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from adapterd.messages import join_text_parts, template_role

MAX_SEQUENCES = 128
"""Answers that one request may ask for, over all of its prompts; OpenAI's limit of `n`."""

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_LOGPROBS = 20

Int32 = Annotated[int, Field(lt=2**31)]


def _as_tuple(value: object) -> object:
    """JSON has lists; frozen bodies hold tuples."""
    return tuple(value) if isinstance(value, list) else value


def _one_or_many(value: object) -> object:
    return (value,) if isinstance(value, str) else _as_tuple(value)


class Body(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: object) -> object:
        if isinstance(data, dict):
            return {name: value for name, value in data.items() if value is not None}
        return data


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: Literal[False] = False
    include_obfuscation: Literal[False] = False


class TextFormat(Body):
    type: Literal["text"]


def _token_biases(value: object) -> object:
    """{"42": 1.5} -> ((42, 1.5),): JSON has no integer keys."""
    if not isinstance(value, dict):
        raise PydanticCustomError("bias_type", "should be an object of token ids and biases")
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 10):
            raise PydanticCustomError("bias", "keys must be token ids, not {key}", {"key": repr(key)[:64]})
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise PydanticCustomError("bias", "the bias of token {key} must be in [-100, 100]", {"key": key})
    return tuple((int(key), float(bias)) for key, bias in value.items())


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Sampling(Body):
    """How to choose tokens and when to stop: the fields that both endpoints share."""

    model: str = Field(min_length=1, max_length=512)
    n: int = Field(1, ge=1, le=MAX_SEQUENCES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[Int32, Field(ge=0)] | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float = Field(0, ge=-2, le=2)
    frequency_penalty: float = Field(0, ge=-2, le=2)
    logit_bias: Annotated[
        tuple[tuple[int, float], ...],
        BeforeValidator(_token_biases, json_schema_input_type=dict[str, float]),
        Field(max_length=1024),
    ] = ()
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        tuple[StopString, ...],
        BeforeValidator(_one_or_many, json_schema_input_type=str | list[str]),
        Field(max_length=MAX_STOP_STRINGS),
    ] = ()

    # vLLM's additions
    top_k: Annotated[Int32, Field(ge=-1)] | None = None
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    min_tokens: Annotated[Int32, Field(ge=0)] = 0
    stop_token_ids: Annotated[tuple[TokenId, ...], BeforeValidator(_as_tuple), Field(max_length=128)] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    return_token_ids: bool = False
    cache_salt: Annotated[str, Field(min_length=1, max_length=512)] | None = None

    # sent by well-known clients; these values change nothing
    user: Annotated[str, Field(max_length=512)] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    use_beam_search: Literal[False] = False
    length_penalty: float = Field(1, ge=1, le=1)
    spaces_between_special_tokens: Literal[True] = True
    return_tokens_as_token_ids: Literal[False] = False
    priority: Literal[0] = 0

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options is only allowed when stream is true")
        return self


class TextPart(Body):
    type: Literal["text"]
    text: str


def _text_of_parts(value: object) -> object:
    """A list of text parts as one string."""
    if not isinstance(value, list):
        return value
    texts = []
    for number, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise PydanticCustomError(
                "text_part",
                "part {number} is {kind}; this model reads text parts only",
                {"number": number, "kind": repr(kind)[:64]},
            )
        texts.append(TextPart.model_validate(part).text)
    return join_text_parts(texts)


class Message(Body):
    """One message, as templates know it: `developer` has become `system`."""

    role: Annotated[
        Literal["system", "user", "assistant"],
        BeforeValidator(
            lambda role: template_role(role) if isinstance(role, str) else role,
            json_schema_input_type=Literal["developer", "system", "user", "assistant"],
        ),
    ]
    content: Annotated[str, BeforeValidator(_text_of_parts, json_schema_input_type=str | list[TextPart])]
    name: Annotated[str, Field(min_length=1, max_length=64)] | None = None

    # what an assistant's message carries when a client sends back the one it was given
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


Scalar = str | bool | int | float


class ChatCompletionRequest(Sampling):
    messages: Annotated[tuple[Message, ...], BeforeValidator(_as_tuple), Field(min_length=1, max_length=2048)]
    max_tokens: Annotated[Int32, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Int32, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool = True
    chat_template_kwargs: Annotated[dict[str, Scalar], Field(max_length=16)] = Field(default_factory=dict)

    # these values change nothing
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    store: Literal[False] = False
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = None
    echo: Literal[False] = False
    add_special_tokens: Literal[False] = False
    continue_final_message: Literal[False] = False

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> "ChatCompletionRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs is only allowed when logprobs is true")
        return self


Prompt = str | tuple[int, ...]


def _prompts(value: object) -> tuple[object, ...]:
    """The four shapes of `prompt`: text, texts, token ids, lists of token ids."""
    many = value if isinstance(value, list) and not _is_token_ids(value) else [value]
    prompts = tuple(tuple(prompt) if _is_token_ids(prompt) else prompt for prompt in many)
    if not prompts or not all(prompt and isinstance(prompt, str | tuple) for prompt in prompts):
        raise PydanticCustomError(
            "prompt", "prompt must be text, token ids, or a list of either, and not be empty"
        )
    return prompts


def _is_token_ids(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


class CompletionRequest(Sampling):
    prompt: Annotated[
        tuple[Prompt, ...],
        BeforeValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
        Field(min_length=1, max_length=MAX_SEQUENCES),
    ]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    # these values change nothing
    best_of: int | None = None
    suffix: Literal[""] | None = None
    add_special_tokens: Literal[True] = True

    @model_validator(mode="after")
    def _bounded(self) -> "CompletionRequest":
        if self.n * len(self.prompt) > MAX_SEQUENCES:
            message = "{prompts} prompts of n {n} are more than {limit} answers"
            context = {"prompts": len(self.prompt), "n": self.n, "limit": MAX_SEQUENCES}
            raise PydanticCustomError("prompt", message, context)
        if self.best_of is not None and self.best_of != self.n:
            raise PydanticCustomError("best_of", "best_of is supported only where it equals n")
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError("max_tokens", "max_tokens 0 is only allowed with echo")
        return self


UNSUPPORTED: dict[str, str] = {
    "allowed_token_ids": "use logit_bias",
    "audio": "answers are text",
    "bad_words": "use logit_bias",
    "chat_template": "a template comes from the base or from the adapter, never from a request",
    "documents": "put them into a message",
    "function_call": "tools are not supported",
    "functions": "tools are not supported",
    "guided_choice": "answers are not constrained",
    "guided_grammar": "answers are not constrained",
    "guided_json": "answers are not constrained",
    "guided_regex": "answers are not constrained",
    "prediction": "speculation by the client is not supported",
    "prompt_embeds": "send text or token ids",
    "prompt_logprobs": "use echo with logprobs on /v1/completions",
    "reasoning_effort": "use chat_template_kwargs if the template knows a switch",
    "structured_outputs": "answers are not constrained",
    "truncate_prompt_tokens": "send a prompt that fits",
    "verbosity": "say it in a message",
    "web_search_options": "there is no web search",
}
"""Fields that clients know from elsewhere, with the way out. Other unknown names are refused as unknown."""
