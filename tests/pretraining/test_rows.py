import itertools

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from pretraining import corpus, rows, tokenizer
from pretraining.corpus.drills import Message
from pretraining.recipe import Recipe, build_model


@pytest.fixture(scope="module")
def chats() -> list[list[Message]]:
    return list(itertools.islice(corpus.stream(corpus.conversation, "1"), 300))


@pytest.fixture(scope="module")
def small_tokenizer(chats: list[list[Message]]) -> PreTrainedTokenizerFast:
    return tokenizer.train(message["content"] for chat in chats for message in chat)


def test_encoding_agrees_with_the_chat_template(
    small_tokenizer: PreTrainedTokenizerFast, chats: list[list[Message]]
) -> None:
    for chat, encoded in zip(chats[:50], rows.encode(small_tokenizer, chats[:50], 0.1), strict=True):
        rendered = small_tokenizer.apply_chat_template(
            chat, return_assistant_tokens_mask=True, return_dict=True
        )
        assert encoded.ids == rendered["input_ids"]
        assert [weight == 1.0 for weight in encoded.weights] == [
            mark == 1 for mark in rendered["assistant_masks"]
        ]


def test_digits_are_one_token_each(small_tokenizer: PreTrainedTokenizerFast) -> None:
    assert small_tokenizer.tokenize("132/84") == ["1", "3", "2", "/", "8", "4"]
    assert small_tokenizer.tokenize("BP 132/84")[-6:] == ["1", "3", "2", "/", "8", "4"]


def test_packing_keeps_every_chat_whole(
    small_tokenizer: PreTrainedTokenizerFast, chats: list[list[Message]]
) -> None:
    encoded = [chat for chat in rows.encode(small_tokenizer, chats, 0.1) if len(chat.ids) <= 256]
    packed = list(rows.pack(encoded, 256, 0))
    found = []
    for row in packed:
        assert len(row.ids) == len(row.weights) == len(row.chats) == len(row.positions) == 256
        for number in sorted(set(row.chats.tolist())):
            inside = row.chats == number
            assert row.positions[inside].tolist() == list(range(int(inside.sum())))
            if row.weights[inside].any():
                found.append(row.ids[inside].tolist())
    assert sorted(found) == sorted(chat.ids for chat in encoded)


def test_a_packed_chat_has_the_logits_it_has_alone(
    small_tokenizer: PreTrainedTokenizerFast, chats: list[list[Message]]
) -> None:
    torch.manual_seed(0)
    model = build_model(Recipe(hidden_size=64, intermediate_size=96, num_layers=2), small_tokenizer).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(
                parameter, std=0.1
            )  # a fresh model's blocks are the identity: nothing could leak
    row = next(row for row in rows.pack(rows.encode(small_tokenizer, chats[:20], 0.1), 256, 0))
    with torch.inference_mode():
        packed = model(
            input_ids=row.ids[None],
            attention_mask=rows.mask(row.chats[None]),
            position_ids=row.positions[None],
            use_cache=False,
        ).logits[0]
        for number in (0, 1):
            inside = row.chats == number
            assert inside.any()
            alone = model(input_ids=row.ids[inside][None], use_cache=False).logits[0]
            torch.testing.assert_close(packed[inside], alone, atol=1e-4, rtol=1e-4)
