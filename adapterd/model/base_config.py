"""A base's config.json: whether it is one that can be read, and the context in which it is exact. No torch."""

import logging
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from adapterd.errors import BaseRefused

logger = logging.getLogger(__name__)


def read_config(directory: Path, name: str) -> Any:
    """The config of a decoder that is stored in 16 or 32 bits; anything else is BaseRefused."""
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise BaseRefused(f"base '{name}': config.json cannot be used: {error}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise BaseRefused(
            f"base '{name}' is an encoder-decoder ({config.model_type}); only decoders are served"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise BaseRefused(f"base '{name}' is a quantised checkpoint; give the 16-bit or 32-bit one")
    return config


def exact_context(config: Any, wanted: int | None, *, flag: str = "--max-model-len") -> int:
    """The longest context that is exact, or the shorter one that was asked for with `flag`.

    RoPE variants that change their frequencies with the longest position of the forward (longrope, dynamic)
    would do so for every sequence packed into it; below their switch they are plain, so that is their limit.
    Raises BaseRefused for a longer one, and for a base that does not say its own.
    """
    text = config.get_text_config()
    limit = int(getattr(text, "max_position_embeddings", 0) or 0)
    if limit <= 0:
        raise BaseRefused(f"base of type {config.model_type} does not say max_position_embeddings")
    rope = getattr(text, "rope_parameters", None) or {}
    reason = ""
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if parameters.get("rope_type") in ("longrope", "dynamic"):
            switch = parameters.get("original_max_position_embeddings") or limit
            if int(switch) < limit:
                limit = int(switch)
                reason = (
                    f" ({parameters['rope_type']} RoPE switches its frequencies there, for a whole batch)"
                )
    if wanted is None:
        if reason:
            logger.warning("context limited to %d tokens%s", limit, reason)
        return limit
    if wanted > limit:
        raise BaseRefused(f"{flag} {wanted} exceeds the base's {limit} tokens{reason}")
    return wanted
