"""A small model of odd sizes, and random weights for any config."""

import torch

from counterflow.config.model import ModelConfig
from counterflow.model.transformer import Transformer, initialise

BASE = ModelConfig(
    vocab_size=97,
    hidden_size=48,
    num_layers=3,
    num_dense_layers=1,
    num_heads=3,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    q_lora_rank=20,
    kv_lora_rank=16,
    dense_intermediate_size=56,
    moe_intermediate_size=24,
    num_routed_experts=12,
    num_experts_per_token=3,
    num_groups=3,
    num_limited_groups=2,
    num_mtp_modules=0,
    max_positions=64,
    initializer_std=0.1,
)


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """Random weights, gains and biases: nothing at its starting value."""
    torch.manual_seed(seed)
    model = Transformer(config)
    initialise(model, seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.dim() == 1:
                value.add_(torch.randn_like(value), alpha=0.05 if "bias" in name else 0.2)
    return model
