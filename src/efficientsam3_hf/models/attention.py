"""Attention in the implementation that a configuration asks for."""

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """Attention in the implementation that the configuration names.

    Args:
        module: Whose `config` names it.
        query: (batch, heads, queries, channels), as `key` and `value`.
        mask: (batch, 1, queries or 1, keys), true where a query may look.

    Returns:
        (batch, queries, heads, channels).
    """
    implementation = ALL_ATTENTION_FUNCTIONS.get_interface(
        module.config._attn_implementation, eager_attention
    )
    return implementation(
        module, query, key, value, mask, scaling=scaling, dropout=dropout, is_causal=False
    )[0]


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Attention in plain matrix products, for export and for those who want the weights."""
    scores = (query @ key.transpose(-2, -1)) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights
