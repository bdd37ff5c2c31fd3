"""Parameters and FLOPs of a model, part by part, from its config alone: no torch, so 671 billion take a blink.

Tests hold the parameters against the tensors of the real modules on the meta device, for every entry of MODELS, and the
FLOPs against a counter that watches a real forward pass there.
"""

from dataclasses import dataclass

from counterflow.config.model import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Counts of a model. The router's bias is a buffer and counts nowhere."""

    total: int
    """The main model: what the published sizes name, MTP modules left out."""
    active: int
    """Those a token is multiplied with: its chosen experts only, without the embedding's look-up."""
    mtp: int
    """The MTP modules' own, shared embedding and head left out."""
    mtp_active: int
    """Those of the modules a token is multiplied with, the shared head left out."""


def attention(config: ModelConfig) -> int:
    """One layer's attention, its latents' norms included."""
    width, latent, query = config.hidden_size, config.kv_lora_rank, config.q_lora_rank
    queries = config.num_heads * config.qk_head_dim
    total = width * query + query + query * queries if query else width * queries
    total += width * (latent + config.qk_rope_head_dim) + latent
    total += latent * config.num_heads * (config.qk_nope_head_dim + config.v_head_dim)
    return total + config.num_heads * config.v_head_dim * width


def layer(config: ModelConfig, index: int, experts: int) -> int:
    """A whole layer with its two norms, `experts` of the routed experts counted."""
    width = config.hidden_size
    total = attention(config) + 2 * width
    if not config.is_moe(index):
        return total + 3 * width * config.dense_intermediate_size
    total += config.num_routed_experts * width
    return total + 3 * width * config.moe_intermediate_size * (experts + config.num_shared_experts)


def count_parameters(config: ModelConfig) -> Parameters:
    """All four counts of a model."""

    def layers(start: int, end: int, experts: int) -> int:
        return sum(layer(config, index, experts) for index in range(start, end))

    width, depth = config.hidden_size, config.num_mtp_modules
    every, chosen = config.num_routed_experts, config.num_experts_per_token
    end = config.num_layers + depth
    merge = depth * (2 * width * width + 3 * width)
    table = config.vocab_size * width
    return Parameters(
        total=layers(0, config.num_layers, every) + 2 * table + width,
        active=layers(0, config.num_layers, chosen) + table + width,
        mtp=layers(config.num_layers, end, every) + merge,
        mtp_active=layers(config.num_layers, end, chosen) + merge,
    )


def matmul_weights(config: ModelConfig, mtp: bool = False) -> int:
    """Weights in products that a token passes, the head's included: no norms, no embedding's look-up."""
    counts = count_parameters(config)
    width, latents = config.hidden_size, config.q_lora_rank + config.kv_lora_rank
    end = config.num_layers + config.num_mtp_modules
    if not mtp:
        return counts.active - config.num_layers * (2 * width + latents) - width
    norms = (end - config.num_layers) * (2 * width + latents + 3 * width)
    return counts.mtp_active - norms + config.num_mtp_modules * config.vocab_size * width


def forward_flops(config: ModelConfig, sequence_length: int, causal: bool = True, mtp: bool = False) -> float:
    """Of one token; a causal core sees half of the positions. `mtp`: the modules' own FLOPs instead of the model's."""
    layers = config.num_mtp_modules if mtp else config.num_layers
    core = 2 * config.num_heads * (config.qk_head_dim + config.v_head_dim) * sequence_length
    return 2 * matmul_weights(config, mtp) + layers * core / (2 if causal else 1)


def flops_per_token(
    config: ModelConfig, sequence_length: int, causal: bool = True, with_mtp: bool = False
) -> float:
    """Of a trained token: three forwards' worth, no recomputation.   The report's model at 4K: 250 GFLOP causal."""
    total = forward_flops(config, sequence_length, causal)
    if with_mtp:
        total += forward_flops(config, sequence_length, causal, mtp=True)
    return 3 * total
