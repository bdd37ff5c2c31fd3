"""MODELS: the named architectures. To add one, add an entry; tests run over the table.

`tiny` has every feature on at a size that a laptop trains in minutes; `v3-16b` is the report's small ablation
model, "similar to DeepSeek-V2-Lite" [§3.3]; `v3-671b` is DeepSeek-V3 [§4.2].
"""

from collections.abc import Mapping

from counterflow.config.model import ModelConfig

MODELS: Mapping[str, ModelConfig] = {
    "tiny": ModelConfig(
        vocab_size=4096,
        hidden_size=256,
        num_layers=4,
        num_dense_layers=1,
        num_heads=4,
        qk_nope_head_dim=48,
        qk_rope_head_dim=16,
        v_head_dim=64,
        q_lora_rank=128,
        kv_lora_rank=64,
        dense_intermediate_size=768,
        moe_intermediate_size=128,
        num_routed_experts=16,
        num_shared_experts=1,
        num_experts_per_token=4,
        num_groups=4,
        num_limited_groups=2,
        num_mtp_modules=1,
        max_positions=512,
        initializer_std=0.02,
    ),
    "small": ModelConfig(
        vocab_size=32768,
        hidden_size=1024,
        num_layers=12,
        num_dense_layers=1,
        num_heads=16,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        q_lora_rank=512,
        kv_lora_rank=256,
        dense_intermediate_size=4096,
        moe_intermediate_size=512,
        num_routed_experts=32,
        num_shared_experts=1,
        num_experts_per_token=4,
        num_groups=8,
        num_limited_groups=4,
        num_mtp_modules=1,
        max_positions=2048,
        initializer_std=0.02,  # router logits of 0.6, as 0.006 gives at the report's width; 0.006 here gives 0.19
    ),
    "v3-16b": ModelConfig(
        vocab_size=102400,
        hidden_size=2048,
        num_layers=27,
        num_dense_layers=1,
        num_heads=16,
        q_lora_rank=0,
        dense_intermediate_size=10944,
        moe_intermediate_size=1408,
        num_routed_experts=64,
        num_shared_experts=2,
        num_experts_per_token=6,
        num_groups=1,
        num_limited_groups=1,
        routed_scaling_factor=1.0,
    ),
    "v3-671b": ModelConfig(),
}
