"""The ranks that share the experts: all of them, those of this node, and those with this local index on every node."""

from collections.abc import Callable
from dataclasses import dataclass

from counterflow.comm.exchange import Exchange, GroupExchange, Mailbox, ThreadExchange
from counterflow.comm.mesh import Mesh


@dataclass(frozen=True)
class Peers:
    """This rank's exchanges; a node is `node` neighbours in the order of ranks."""

    whole: Exchange
    rail: Exchange | None = None
    node: Exchange | None = None


def process_peers(mesh: Mesh, node_ranks: int = 0) -> Peers:
    """Between processes. A collective: groups are made in the same order on every rank."""

    def exchange(members: Callable[[int], list[int]]) -> Exchange:
        return GroupExchange(mesh.expert_group(members), mesh.device)

    whole = exchange(lambda index: list(range(mesh.expert)))
    if not node_ranks:
        return Peers(whole)
    node = exchange(
        lambda index: [other for other in range(mesh.expert) if other // node_ranks == index // node_ranks]
    )
    rail = exchange(
        lambda index: [other for other in range(mesh.expert) if other % node_ranks == index % node_ranks]
    )
    return Peers(whole, rail, node)


def thread_peers(size: int, node_ranks: int = 0) -> list[Peers]:
    """Between threads of this process, for tests: every rank's."""
    whole = Mailbox(size)
    if not node_ranks:
        return [Peers(ThreadExchange(whole, index)) for index in range(size)]
    nodes = [Mailbox(node_ranks) for _ in range(size // node_ranks)]
    rails = [Mailbox(size // node_ranks) for _ in range(node_ranks)]
    return [
        Peers(
            ThreadExchange(whole, index),
            ThreadExchange(rails[index % node_ranks], index // node_ranks),
            ThreadExchange(nodes[index // node_ranks], index % node_ranks),
        )
        for index in range(size)
    ]
