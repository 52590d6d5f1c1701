"""A family whose embedding, head and norms cannot be edited for some tokens: its linears can, or it is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from adapterd.adapter import Adapter, read_adapter
from adapterd.core import Request, RequestId, SamplingParams, alone
from adapterd.engine.build import build_engine
from adapterd.engine.detokenizer import Vocabulary
from adapterd.engine.offline import collect
from adapterd.errors import AdapterRefused
from adapterd.model.attention import register_attention
from adapterd.model.base import Base, base_of
from adapterd.model.checkpoint import load_weights
from adapterd.token_table import TokenTable
from tests.dialect.making import save_base, save_peft
from tests.exactness.families import Reference
from tests.offline import NO_TOKENIZER, OfflineSettings

# PEFT's: of saved embeddings, of patterns that it then applies all the same.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning"
)

CPU = torch.device("cpu")
NUM_TOKENS = 6


@pytest.fixture
def base(tmp_path: Path) -> Base:
    directory = tmp_path / "base"
    save_base("qwen2", directory)
    register_attention()
    model = load_weights(directory, "qwen2", "float32", CPU, "none")
    return base_of(
        model,
        CPU,
        name="qwen2",
        root="qwen2",
        directory=directory,
        max_model_len=128,
        kernels="torch",
        takes_edits=False,
    )


def read(base: Base, directory: Path, **config: Any) -> Adapter:
    save_peft(base.directory, directory, seed=1, **config)
    return read_adapter(
        directory, name="support", spec=base.spec, tokenizer=NO_TOKENIZER, base_weights=base.weights
    )


@pytest.mark.parametrize(
    "config",
    [{"target_modules": ["q_proj"], "use_dora": True}, {"target_modules": ["v_proj"], "lora_bias": True}],
)
def test_edits_of_linears_are_exact(config: dict[str, Any], base: Base, tmp_path: Path) -> None:
    """Regression: such an adapter was taken, and the step that it ran in failed, and with it the engine."""
    adapter = read(base, tmp_path / "adapter", **config)
    vocabulary = Vocabulary(TokenTable((b"x",) * 160, strips_leading_space=False), frozenset())
    settings = OfflineSettings(base="qwen2", kv_memory=1 << 20)
    _, engine = build_engine(base, vocabulary, lambda adapter_id: adapter, settings)
    prompt, params = (5, 60, 7, 120, 9), SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
    engine.submit(Request(RequestId("one"), prompt, params, alone(adapter.id), frozenset(), 0.0))
    (found,) = collect(engine).values()
    expected = Reference(base.directory, tmp_path / "adapter").greedy(prompt, NUM_TOKENS)
    assert expected.margin > 1e-3
    assert found.token_ids == expected.token_ids


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
)
def test_edits_of_embedding_head_and_norms_are_refused(
    config: dict[str, Any], base: Base, tmp_path: Path
) -> None:
    with pytest.raises(AdapterRefused):
        read(base, tmp_path / "adapter", **config)
