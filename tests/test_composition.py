from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from adapterd.adapter import Adapter
from adapterd.composition import compose, resolve_base
from adapterd.core import AdapterDigest, AdapterId, BaseSpec
from adapterd.errors import InvalidRequest
from adapterd.model_name import Part

SPEC = BaseSpec("mini", "mini", "LlamaForCausalLM", "float32", 400, 256, {}, frozenset({2}))


def adapter(name: str, digest: str, **changes: Any) -> Adapter:
    fields: dict[str, Any] = {
        "id": AdapterId(AdapterDigest(digest), name),
        "path": Path(name),
        "modules": (),
        "max_rank": 1,
        "num_bytes": 0,
        "base_model_name": None,
        "chat_template": None,
        "eos_token_ids": None,
        "generation_defaults": MappingProxyType({}),
    }
    return Adapter(**(fields | changes))


A, B = adapter("a", "aa"), adapter("b", "bb")


def test_base_is_the_empty_mix() -> None:
    resolved = resolve_base(SPEC)
    assert (resolved.mix, resolved.model, resolved.digest) == ((), "mini", "base")
    assert resolved.eos_token_ids == {2}


def test_one_adapter_is_itself_at_weight_one() -> None:
    resolved = compose(SPEC, [Part("a", None, 1.0)], [A])
    assert resolved.mix == ((A.id, 1.0),)
    assert (resolved.model, resolved.digest, resolved.adapter_names) == ("mini:a", "aa", ("a",))


def test_order_of_parts_makes_no_difference_to_the_mix() -> None:
    one = compose(SPEC, [Part("b", None, 0.3), Part("a", "aa", 0.7)], [B, A])
    other = compose(SPEC, [Part("a", "aa", 0.7), Part("b", None, 0.3)], [A, B])
    assert one.mix == other.mix == ((A.id, 0.7), (B.id, 0.3))
    assert one.digest == other.digest == "aa*0.7+bb*0.3"
    assert one.model == "mini:b*0.3+a@aa*0.7"


def test_same_content_twice_adds_up() -> None:
    twin = adapter("twin", "aa")
    resolved = compose(SPEC, [Part("a", None, 0.5), Part("twin", None, 0.5)], [A, twin])
    assert resolved.mix == ((A.id, 1.0),)
    with pytest.raises(InvalidRequest, match="add up to 0"):
        compose(SPEC, [Part("a", None, 0.5), Part("twin", None, -0.5)], [A, twin])


def test_different_templates_are_refused_by_name() -> None:
    with_template = adapter("a", "aa", chat_template="one")
    other_template = adapter("b", "bb", chat_template="two")
    parts = [Part("a", None, 1.0), Part("b", None, 1.0)]
    with pytest.raises(InvalidRequest, match="'a' and 'b' bring different chat templates"):
        compose(SPEC, parts, [with_template, other_template])
    assert compose(SPEC, parts, [with_template, B]).chat_template == "one"


def test_end_tokens_join_and_defaults_hold_where_all_agree() -> None:
    cold = MappingProxyType({"temperature": 0.1})
    first = adapter("a", "aa", eos_token_ids=frozenset({5}), generation_defaults=cold)
    second = adapter("b", "bb", generation_defaults=cold)
    parts = [Part("a", None, 1.0), Part("b", None, 1.0)]
    resolved = compose(SPEC, parts, [first, second])
    assert resolved.eos_token_ids == {2, 5}
    assert resolved.generation_defaults == cold
    assert compose(SPEC, parts, [first, B]).generation_defaults == {}
