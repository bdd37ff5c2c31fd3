"""Attention over the cache of latents, in two forms that give the same up to rounding.

Absorbed: W_UK goes onto the query and W_UV behind the sum, so that the latent itself is key and value of all
heads and the cache is read as it is. Expanded: keys and values of all heads are grown from the cached latents
first. The absorbed form does 2C + R products per query, head and key instead of H + R + V, but never expands;
so it wins where few queries meet many keys, in decoding, and the expanded form in long chunks of a prompt.
The operations of both are counted and the cheaper is taken.

The absorbed form is a kernel's (`kernels/decode.py`), which on a GPU reads the blocks where they lie; the expanded one
gathers a group's entries into one padded tensor first.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from counterflow.config.model import ModelConfig
from counterflow.infer.cache import Cache, Group, Rows
from counterflow.kernels.decode import decode_attention
from counterflow.model.mla import Attention


def attend(
    attention: Attention, u: Float[Tensor, "T D"], rows: Rows, cache: Cache, layer: int
) -> Float[Tensor, "T D"]:
    """Attention of every row to its own sequence up to itself; the rows' entries are written first."""
    q = attention.queries(u, 1, rows.rope, None)[0]
    latent, rotary = attention.compress(u, 1, rows.rope, None)
    cache.entries[layer][rows.slots] = torch.cat([latent, rotary[0, :, 0]], dim=-1)
    heads = []
    for group in rows.groups:
        form = absorbed if prefers_absorbed(attention.config, group) else expanded
        heads.append(form(attention, q[group.rows], cache, layer, group))
    return attention.out(torch.cat(heads), None)


def prefers_absorbed(config: ModelConfig, group: Group) -> bool:
    """Whether the absorbed form takes fewer multiplications for this group."""
    latent, content, values = config.kv_lora_rank, config.qk_nope_head_dim, config.v_head_dim
    queries, keys = group.positions.shape[1], group.keys
    growing = latent * (content + values)
    absorbing = queries * (keys * (2 * latent + config.qk_rope_head_dim) + growing)
    return absorbing <= queries * keys * (config.qk_head_dim + values) + keys * growing


def absorbed(
    attention: Attention, q: Float[Tensor, "T N HR"], cache: Cache, layer: int, group: Group
) -> Float[Tensor, "T NV"]:
    """The heads' outputs side by side, from the latents as they are."""
    config = attention.config
    weight = attention.kv_up.weight.view(config.num_heads, -1, config.kv_lora_rank)
    key_up, value_up = weight.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
    content, rotary = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
    query = torch.cat([torch.einsum("tnh,nhc->tnc", content, key_up), rotary], dim=-1)
    means = decode_attention(
        _padded(query, group),
        cache.entries[layer],
        group.blocks,
        group.positions,
        cache.size,
        config.kv_lora_rank,
        attention.scale,
    )
    return torch.einsum("tnc,nvc->tnv", _unpadded(means.flatten(0, 1), group), value_up).flatten(1)


def expanded(
    attention: Attention, q: Float[Tensor, "T N HR"], cache: Cache, layer: int, group: Group
) -> Float[Tensor, "T NV"]:
    """The heads' outputs side by side, from keys and values grown out of the latents."""
    seen = cache.seen(layer, group)
    keys = torch.arange(group.keys, device=q.device)
    latent, rotary = seen.split([attention.config.kv_lora_rank, attention.config.qk_rope_head_dim], dim=-1)
    k, v = attention.expand(latent.flatten(0, 1), rotary[:, :, None], None)
    o = F.scaled_dot_product_attention(
        _padded(q, group).transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=(keys <= group.positions[..., None])[:, None],
        scale=attention.scale,
    )
    return _unpadded(o.transpose(1, 2).flatten(0, 1), group).flatten(1)


def _padded(x: Float[Tensor, "T N W"], group: Group) -> Float[Tensor, "B S N W"]:
    batch, longest = group.positions.shape
    if not group.is_full:
        rows, x = x, x.new_zeros(batch * longest, *x.shape[1:])
        x[group.places] = rows
    return x.view(batch, longest, *x.shape[1:])


def _unpadded(x: Float[Tensor, "P N W"], group: Group) -> Float[Tensor, "T N W"]:
    return x if group.is_full else x[group.places]
