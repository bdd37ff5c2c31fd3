"""Names and layouts of the released checkpoints, both ways.

One list of entries says for every parameter here which released tensors it is made of and how: as it is,
stacked over experts, or two halves side by side. Reading and writing walk the same list, so they cannot
disagree. MTP module k stands at `model.layers.{num_layers + k}` and carries copies of embedding and head,
written from the shared ones and, on reading, required to equal them. What is written are views of the model's own
tensors, so reading is copying into the same views.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from counterflow.config.model import ModelConfig
from counterflow.errors import CheckpointError
from counterflow.model.transformer import Transformer, expert_shards
from counterflow.progress import watched

DERIVED = ".rotary_emb."
"""In the names of tensors that some releases (Moonlight, Kimi) keep beside the weights: they follow from the config."""
EXPERT_PARTS = (("gate_proj", "up_proj"), ("down_proj",))


@dataclass(frozen=True)
class Entry:
    """One tensor of ours: its name, and its rows' parts' released names, expert by expert if stacked."""

    name: str
    released: tuple[tuple[str, ...], ...]
    """Per expert (a single item if not stacked) the released tensors that stand one under another."""
    stacked: bool = False


def entries(config: ModelConfig) -> Iterator[Entry]:
    """Every parameter and buffer of a model of this config, in order."""
    yield _plain("embed.weight", "model.embed_tokens.weight")
    for index in range(config.num_layers):
        yield from _layer(config, f"layers.{index}", f"model.layers.{index}", config.is_moe(index))
    yield _plain("norm.weight", "model.norm.weight")
    yield _plain("head", "lm_head.weight")
    for depth in range(config.num_mtp_modules):
        ours, theirs = f"mtp.{depth}", f"model.layers.{config.num_layers + depth}"
        yield _plain(f"{ours}.embed_norm.weight", f"{theirs}.enorm.weight")
        yield _plain(f"{ours}.hidden_norm.weight", f"{theirs}.hnorm.weight")
        yield _plain(f"{ours}.join.weight", f"{theirs}.eh_proj.weight")
        yield _plain(f"{ours}.norm.weight", f"{theirs}.shared_head.norm.weight")
        yield from _layer(config, f"{ours}.layer", theirs, is_moe=True)


def shared_copies(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """(ours, released) of the copies of embedding and head that every released MTP module carries."""
    for depth in range(config.num_mtp_modules):
        theirs = f"model.layers.{config.num_layers + depth}"
        yield "embed.weight", f"{theirs}.embed_tokens.weight"
        yield "head", f"{theirs}.shared_head.head.weight"


def _layer(config: ModelConfig, ours: str, theirs: str, is_moe: bool) -> Iterator[Entry]:
    yield _plain(f"{ours}.attn_norm.weight", f"{theirs}.input_layernorm.weight")
    attention = [("kv_down", "kv_a_proj_with_mqa"), ("kv_norm", "kv_a_layernorm"), ("kv_up", "kv_b_proj")]
    if config.q_lora_rank:
        attention += [("q_down", "q_a_proj"), ("q_norm", "q_a_layernorm"), ("q_up", "q_b_proj")]
    else:
        attention += [("q_up", "q_proj")]
    for mine, name in [*attention, ("out", "o_proj")]:
        yield _plain(f"{ours}.attention.{mine}.weight", f"{theirs}.self_attn.{name}.weight")
    yield _plain(f"{ours}.ffn_norm.weight", f"{theirs}.post_attention_layernorm.weight")
    if not is_moe:
        yield from _gated(f"{ours}.dense", [f"{theirs}.mlp"])
        return
    yield _plain(f"{ours}.router.score.weight", f"{theirs}.mlp.gate.weight")
    yield _plain(f"{ours}.router.bias", f"{theirs}.mlp.gate.e_score_correction_bias")
    experts = [f"{theirs}.mlp.experts.{expert}" for expert in range(config.num_routed_experts)]
    yield from _gated(f"{ours}.experts", experts, stacked=True)
    if config.num_shared_experts:
        yield from _gated(f"{ours}.shared", [f"{theirs}.mlp.shared_experts"])


def _plain(ours: str, theirs: str) -> Entry:
    return Entry(ours, ((theirs,),))


def _gated(ours: str, prefixes: list[str], stacked: bool = False) -> Iterator[Entry]:
    for mine, parts in zip(("gate_up", "down"), EXPERT_PARTS):
        released = tuple(tuple(f"{prefix}.{part}.weight" for part in parts) for prefix in prefixes)
        yield Entry(f"{ours}.{mine}", released, stacked)


def to_released(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model under its released name, of a part of the experts only theirs; views of the model's."""
    mine, shards = dict(model.state_dict()), expert_shards(model)
    for entry in entries(model.config):
        blocks = mine[entry.name] if entry.stacked else mine[entry.name][None]
        first = shards[entry.name].offset // blocks[0].numel() if entry.name in shards else 0
        for block, names in zip(blocks, entry.released[first:]):
            yield from zip(names, block.chunk(len(names)))
    for name, copy in shared_copies(model.config):
        yield copy, mine[name]


def released_shapes(model: Transformer) -> dict[str, Sequence[int]]:
    """Shapes of all that `to_released` gives of a model with all experts, but the copies, whatever part is held."""
    mine, shapes = model.state_dict(), {}
    for entry in entries(model.config):
        block = mine[entry.name][0] if entry.stacked else mine[entry.name]
        for names in entry.released:
            shapes |= {name: half.shape for name, half in zip(names, block.chunk(len(names)))}
    return shapes


@torch.no_grad()
def load_released(
    model: Transformer, shapes: Mapping[str, Sequence[int]], read: Callable[[str], Tensor]
) -> None:
    """Fill the model from released tensors, read one by one in the order of `shapes`.

    Fails (CheckpointError) before anything is read, with the tensor's name, where one is missing, of another shape or
    left over. MTP copies of embedding and head may be missing, but may not differ. Not read are derived buffers, and
    experts that the model does not hold.   Cost: one tensor at a time beside the model.
    """
    shapes = {name: shape for name, shape in shapes.items() if DERIVED not in name}
    copies = {copy: name for name, copy in shared_copies(model.config)}
    places = {name: place for name, place in to_released(model) if name not in copies}
    mine = model.state_dict()
    _require_fit(model.config, released_shapes(model), shapes)
    for name in watched(shapes, "reading weights", len(shapes), "tensors"):
        if name in places:
            places[name].copy_(read(name))
    for copy, name in copies.items():
        if copy in shapes and not torch.equal(read(copy).to(mine[name]), mine[name]):
            raise CheckpointError(
                f"'{copy}' differs from '{name}'; MTP modules share the main model's tensor."
            )


def _require_fit(
    config: ModelConfig, expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]
) -> None:
    """Refuse a checkpoint that is not of this config, with the first tensor's name and what to look at."""
    missing = [name for name in expected if name not in found]
    if missing:
        drafts = tuple(
            f"model.layers.{config.num_layers + depth}." for depth in range(config.num_mtp_modules)
        )
        why = "check the config's sizes, or that all shards are there."
        if all(name.startswith(drafts) for name in missing):
            why = (
                f"without it there is no MTP module: fetch that shard, or set num_nextn_predict_layers below "
                f"{config.num_mtp_modules} in the config to do without."
            )
        raise CheckpointError(
            f"tensor '{missing[0]}' is not in the checkpoint; the config promises it: {why}"
        )
    whole = dict(expected)
    for name, copy in shared_copies(config):
        whole[copy] = expected["model.embed_tokens.weight" if name == "embed.weight" else "lm_head.weight"]
    left = sorted(name for name in found if name not in whole)
    if left:
        raise CheckpointError(
            f"'{left[0]}' and {len(left) - 1} more tensors have no place in this model; the config must "
            "describe the checkpoint: see num_hidden_layers, num_nextn_predict_layers and n_routed_experts."
        )
    for name, shape in found.items():
        if tuple(shape) != tuple(whole[name]):
            raise CheckpointError(
                f"tensor '{name}' is {list(shape)}; the config makes it {list(whole[name])}: "
                "check the config's sizes."
            )


def from_mapping(model: Transformer, tensors: Mapping[str, Tensor]) -> None:
    """`load_released` from tensors already in memory."""
    load_released(model, {name: tensor.shape for name, tensor in tensors.items()}, tensors.__getitem__)
