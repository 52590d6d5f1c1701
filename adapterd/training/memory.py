"""Whether activations fit beside the base, and what is done if they do not."""

import logging
from typing import Any

from adapterd.model.device_memory import free_bytes
from adapterd.training.network import Network
from adapterd.training.recipe import Recipe

_logger = logging.getLogger(__name__)

_SHARE_OF_FREE_MEMORY = 0.8


def fit_memory(network: Network, recipe: Recipe, longest: int) -> None:
    """Compute activations again in the backward pass if they would not fit beside the base otherwise.

    Of a family that cannot, only what is to be feared is said: CUDA running out of memory makes forwards smaller.
    """
    if recipe.gradient_checkpointing != "auto" or network.checkpointed:
        return
    tokens = max(min(network.micro_batch_tokens, recipe.batch_size * longest), longest)
    needed = activation_bytes(network.model.config.get_text_config(), tokens, network.dtype.itemsize)
    free = free_bytes(network.device)
    if needed <= free * _SHARE_OF_FREE_MEMORY:
        return
    found = f"activations of {tokens} tokens would take about {needed / 2**30:.1f} of the {free / 2**30:.1f} GiB free"
    if network.may_checkpoint:
        network.checkpoint_activations()
        _logger.info("%s: computed again instead (--gradient-checkpointing off keeps them)", found)
    else:
        _logger.warning(
            "%s, and %s cannot compute them again: lower --micro-batch-tokens if memory runs out",
            found,
            type(network.model).__name__,
        )


def activation_bytes(config: Any, tokens: int, itemsize: int) -> int:
    """What a forward of `tokens` keeps for its gradient, about: per layer and token some twelve vectors of the
    hidden size, six of the feed-forward's, and as much again as q, k and v.
    """
    hidden = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or hidden // heads)
    per_token = 12 * hidden + 6 * inner + 6 * heads * head_dim
    return int(config.num_hidden_layers) * tokens * per_token * itemsize
