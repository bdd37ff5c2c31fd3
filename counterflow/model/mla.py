"""Multi-head latent attention: keys and values of all heads grow from one small latent.

This is the expanded form, for training and prefill: multi-head attention with H + R wide queries and keys and
V wide values. (The absorbed form, which reads the cached latent as it is, serves decoding: `infer/attend.py`.)
Both latents are normalised before they are expanded [§4.2]; the rotary key is shared by all heads and comes
from the hidden state itself. With `q_lora_rank` 0 queries have no latent, as in the 16B model.

The matrices are fused as in the released weights: W_DKV with W_KR, W_UQ with W_QR (content | rotary per
head), W_UK with W_UV (key | value per head).
"""

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

from counterflow.config.model import ModelConfig
from counterflow.kernels.attention import attention
from counterflow.kernels.norm import rms_norm
from counterflow.kernels.rotate import rotate
from counterflow.model.debts import Ledger
from counterflow.model.linear import Linear
from counterflow.model.rope import softmax_scale


class Norm(nn.Module):
    """RMSNorm with its gain."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*T D"]) -> Float[Tensor, "*T D"]:
        """x normalised."""
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """MLA over whole sequences. [Eq. 11]"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = softmax_scale(config)
        width, latent = config.hidden_size, config.kv_lora_rank
        queries = config.num_heads * config.qk_head_dim
        if config.q_lora_rank:
            self.q_down = Linear(width, config.q_lora_rank)
            self.q_norm = Norm(config.q_lora_rank, config.rms_norm_eps)
        self.q_up = Linear(config.q_lora_rank or width, queries)
        self.kv_down = Linear(width, latent + config.qk_rope_head_dim)
        self.kv_norm = Norm(latent, config.rms_norm_eps)
        self.kv_up = Linear(latent, config.num_heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.out = Linear(config.num_heads * config.v_head_dim, width)

    def forward(
        self, u: Float[Tensor, "T D"], sequences: int, rope: Complex[Tensor, "S R2"], ledger: Ledger | None
    ) -> Float[Tensor, "T D"]:
        """Attention over `sequences` sequences of equal length laid end to end."""
        return self.out(self.attend(u, sequences, rope, ledger), ledger)

    def attend(
        self, u: Float[Tensor, "T D"], sequences: int, rope: Complex[Tensor, "S R2"], ledger: Ledger | None
    ) -> Float[Tensor, "T NV"]:
        """The heads' outputs side by side, before they are projected."""
        q = self.queries(u, sequences, rope, ledger)
        k, v = self.keys_values(u, sequences, rope, ledger)
        o = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), self.scale)
        return o.transpose(1, 2).reshape(len(u), -1)

    def queries(
        self, u: Float[Tensor, "T D"], sequences: int, rope: Complex[Tensor, "S R2"], ledger: Ledger | None
    ) -> Float[Tensor, "B S N HR"]:
        """Content and rotary query of every head. [Eq. 6-7, Eq. 9]"""
        latent = self.q_norm(self.q_down(u, ledger)) if self.config.q_lora_rank else u
        q = self.q_up(latent, ledger).view(sequences, -1, self.config.num_heads, self.config.qk_head_dim)
        return rotate(q, rope, keep=self.config.qk_nope_head_dim)

    def keys_values(
        self, u: Float[Tensor, "T D"], sequences: int, rope: Complex[Tensor, "S R2"], ledger: Ledger | None
    ) -> tuple[Float[Tensor, "B S N HR"], Float[Tensor, "B S N V"]]:
        """Each head's keys (rotary part shared) and values of the sequences' own tokens."""
        return self.expand(*self.compress(u, sequences, rope, ledger), ledger)

    def compress(
        self, u: Float[Tensor, "T D"], sequences: int, rope: Complex[Tensor, "S R2"], ledger: Ledger | None
    ) -> tuple[Float[Tensor, "T C"], Float[Tensor, "B S 1 R"]]:
        """The normalised latent and the turned rotary key: all that a cache keeps of a token. [Eq. 1]"""
        widths = [self.config.kv_lora_rank, self.config.qk_rope_head_dim]
        latent, shared = self.kv_down(u, ledger).split(widths, dim=-1)
        return self.kv_norm(latent), rotate(shared.view(sequences, len(rope), 1, -1), rope)

    def expand(
        self, latent: Float[Tensor, "T C"], rotary: Float[Tensor, "B S 1 R"], ledger: Ledger | None
    ) -> tuple[Float[Tensor, "B S N HR"], Float[Tensor, "B S N V"]]:
        """Each head's keys and values out of what `compress` gave. [Eq. 2, Eq. 4-5]"""
        config = self.config
        kv = self.kv_up(latent, ledger).view(*rotary.shape[:2], config.num_heads, -1)
        content, v = kv.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        return torch.cat([content, rotary.expand(-1, -1, config.num_heads, -1)], dim=-1), v
