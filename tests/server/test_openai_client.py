"""The official client, unchanged, against the real daemon: sync and async, streamed and not."""

from collections.abc import AsyncIterator, Iterator

import openai
import pytest

MESSAGES = [{"role": "user", "content": "Hello there, how are you today?"}]


@pytest.fixture
def client(server_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(server_url: str, anyio_backend: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models_are_the_base_and_then_its_adapters(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == ["tiny", "tiny:medical", "medical", "tiny:support", "support"]
    assert [model.parent for model in models] == [None, *["tiny"] * 4]
    assert client.models.retrieve("support").id == "tiny:support"
    assert client.models.retrieve("tiny").max_model_len == 256
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


@pytest.mark.parametrize("model", ["tiny", "base", "tiny:support", "medical", "tiny:support*0.5+medical"])
def test_a_chat_streamed_says_what_it_says_whole(client: openai.OpenAI, model: str) -> None:
    options = {"model": model, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**options)
    assert whole.usage is not None
    assert 0 < whole.usage.completion_tokens <= 12
    chunks = list(
        client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert {chunk.model for chunk in chunks} == {whole.model}


def test_each_adapter_answers_in_its_own_way(client: openai.OpenAI) -> None:
    answers = {
        client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=16, temperature=0)
        .choices[0]
        .message.content
        for model in ("tiny", "tiny:support", "tiny:medical")
    }
    assert len(answers) == 3


def test_a_seed_gives_the_same_answer_again(client: openai.OpenAI) -> None:
    options = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "n": 2}
    one = client.chat.completions.create(**options, seed=7)
    again = client.chat.completions.create(**options, seed=7)
    other = client.chat.completions.create(**options, seed=8)
    assert [c.message.content for c in one.choices] == [c.message.content for c in again.choices]
    assert one.choices[0].message.content != one.choices[1].message.content
    assert one.choices[0].message.content != other.choices[0].message.content


def test_completions_score_their_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt=["Order 12345", "Hello there"], max_tokens=0, echo=True, logprobs=1
    )
    assert [choice.text for choice in answer.choices] == ["Order 12345", "Hello there"]
    for choice in answer.choices:
        scores = choice.logprobs
        assert scores is not None
        assert "".join(scores.tokens) == choice.text
        assert scores.token_logprobs[0] is None
        assert all(score < 0 for score in scores.token_logprobs[1:])
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


def test_scores_of_an_answer_are_those_of_the_same_text_echoed(client: openai.OpenAI) -> None:
    options = {"model": "tiny:support", "logprobs": 0, "temperature": 0}
    drawn = client.completions.create(
        **options, prompt="Hello", max_tokens=6, extra_body={"return_token_ids": True}
    )
    choice = drawn.choices[0]
    ids = choice.prompt_token_ids + choice.token_ids
    echoed = client.completions.create(**options, prompt=ids, max_tokens=0, echo=True)
    scores = echoed.choices[0].logprobs.token_logprobs[-6:]
    assert scores == pytest.approx(choice.logprobs.token_logprobs, abs=1e-4)


def test_errors_are_the_clients_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=10_000)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "max_tokens")
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert tools.value.code == "unsupported_parameter"


@pytest.mark.anyio
async def test_the_async_client_streams_and_may_leave(async_client: openai.AsyncOpenAI) -> None:
    whole = await async_client.chat.completions.create(
        model="tiny:medical", messages=MESSAGES, max_tokens=12, temperature=0
    )
    stream = await async_client.chat.completions.create(
        model="tiny:medical", messages=MESSAGES, max_tokens=12, temperature=0, stream=True
    )
    text = [choice.delta.content or "" async for chunk in stream for choice in chunk.choices]
    assert "".join(text) == whole.choices[0].message.content
    left = await async_client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    async for _ in left:
        break
    await left.close()


def test_every_option_of_sampling_is_taken(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny:support",
        messages=MESSAGES,
        max_completion_tokens=10,
        temperature=0.7,
        top_p=0.9,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"5": -100},
        stop=["zzz"],
        seed=1,
        logprobs=True,
        top_logprobs=3,
        user="me",
        extra_body={
            "top_k": 20,
            "min_p": 0.01,
            "repetition_penalty": 1.1,
            "min_tokens": 10,
            "ignore_eos": True,
        },
    )
    assert answer.choices[0].finish_reason == "length"
    content = answer.choices[0].logprobs.content
    assert len(content) == 10
    assert all(len(item.top_logprobs) == 3 for item in content)
