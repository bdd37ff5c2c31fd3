"""Who holds what: the groups that sum gradients, the part of the experts held here, and how tokens reach the others."""

import math
from collections.abc import Mapping

import torch

from counterflow.comm import open_dispatcher
from counterflow.comm.dispatch import Dispatcher, Terms
from counterflow.comm.local import Local
from counterflow.comm.mesh import Group, Mesh
from counterflow.comm.peers import process_peers
from counterflow.config.run import RunConfig
from counterflow.model.rope import rope_table
from counterflow.model.transformer import Transformer, keep_experts

EXPERTS = ".experts."
"""In the name of every weight of routed experts, and of no other."""


def whole_model(run: RunConfig, mesh: Mesh) -> Transformer:
    """All layers, and of their experts the part that this rank holds; uninitialised."""
    if mesh.expert == 1:
        return Transformer(run.model)
    with torch.device("meta"):
        model = Transformer(run.model)
    keep_experts(model, mesh.expert_rank, mesh.expert)
    model.to_empty(device="cpu")
    model.rope = rope_table(run.model, run.model.max_positions)
    return model


def holders_of(mesh: Mesh, rows: Mapping[tuple[int, ...], set[str]]) -> list[tuple[Group, frozenset[str]]]:
    """The groups of ranks that hold the same names, where `rows` of the pipeline hold them.

    Experts are held by those data ranks that have the same part. A collective.
    """
    if mesh.size == 1:
        return []
    groups = []
    for key in sorted(rows):
        experts = frozenset(name for name in rows[key] if EXPERTS in name and mesh.expert > 1)
        if rows[key] - experts:
            groups.append((mesh.group(key), frozenset(rows[key] - experts)))
        for index in range(mesh.expert) if experts else ():
            group = mesh.group(key, index)
            if index == mesh.expert_rank:
                groups.append((group, experts))
    return groups


def dispatcher_of(run: RunConfig, mesh: Mesh) -> Dispatcher:
    """This rank's dispatcher. A collective."""
    if mesh.expert == 1:
        return Local()
    parallel = run.parallel
    peers = process_peers(mesh, parallel.node_ranks if parallel.backend.by_node else 0)
    tokens = run.train.micro_batch_size * run.data.sequence_length
    terms = Terms(
        run.model.num_routed_experts,
        parallel.dispatch_fp8,
        tokens,
        mesh.expert_multiprocessors,
        math.ceil(parallel.dispatch_room * tokens),
    )
    return open_dispatcher(parallel.dispatch, peers, terms)
