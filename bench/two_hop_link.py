"""What do two hops save on a slow link between nodes? Real sockets between network namespaces, a rate-limited wire.

The script makes one namespace a node, joins each to a bridge by a link limited to --rate (tc tbf), starts the ranks in
them over gloo, takes everything down again and stops by itself after --limit seconds. Packets go between these
addresses only. In turn, in one run: a copy for every expert, one for every rank, one for every node and then on to its
ranks; dispatch and combine of the same tokens. Needs root, ip and tc.

python bench/two_hop_link.py --nodes 2 --ranks 4 --rate 400mbit --json records/DATE-two-hop-link/raw.json
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from counterflow.benchmark.saved import save

NAME, NET, BRIDGE = "cf-node", "10.83.7", "cf-bridge"
WAYS = ("a copy for every expert", "one for every rank", "two hops")


def sh(*words: str, check: bool = True) -> None:
    """One command; its complaint is the error."""
    done = subprocess.run(words, capture_output=True, text=True)
    if check and done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr.strip()} (root, iproute2 and tbf are needed)")


@contextmanager
def nodes(count: int, rate: str):
    """Namespaces joined by a bridge; gone afterwards, whatever happens."""
    down(count)
    try:
        sh("ip", "link", "add", BRIDGE, "type", "bridge")
        sh("ip", "link", "set", BRIDGE, "up")
        for node in range(count):
            name, inner, outer = f"{NAME}{node}", f"cf-in{node}", f"cf-out{node}"
            sh("ip", "netns", "add", name)
            sh("ip", "link", "add", inner, "type", "veth", "peer", "name", outer)
            sh("ip", "link", "set", inner, "netns", name)
            sh("ip", "link", "set", outer, "master", BRIDGE, "up")
            inside = ("ip", "netns", "exec", name)
            sh(*inside, "ip", "address", "add", f"{NET}.{node + 1}/24", "dev", inner)
            for link in ("lo", inner):
                sh(*inside, "ip", "link", "set", link, "up")
            limit = ("root", "tbf", "rate", rate, "burst", "64kb", "latency", "200ms")
            sh(*inside, "tc", "qdisc", "add", "dev", inner, *limit)
            sh("tc", "qdisc", "add", "dev", outer, *limit)
        yield
    finally:
        down(count)


def down(count: int) -> None:
    """Take away what `nodes` makes, as far as it is there."""
    for node in range(count):
        sh("ip", "netns", "delete", f"{NAME}{node}", check=False)
        sh("ip", "link", "delete", f"cf-out{node}", check=False)
    sh("ip", "link", "delete", BRIDGE, check=False)


def rank_main(arguments: argparse.Namespace) -> None:
    """One rank: all ways in turn, `rounds` times; rows and seconds of its own to a file."""
    import torch
    import torch.distributed as dist

    from counterflow.comm import open_dispatcher
    from counterflow.comm.dispatch import Route, Terms
    from counterflow.comm.mesh import Mesh
    from counterflow.comm.peers import process_peers

    torch.set_num_threads(1)
    world, rank = arguments.nodes * arguments.ranks, arguments.rank
    dist.init_process_group("gloo", init_method=f"tcp://{NET}.1:29511", rank=rank, world_size=world)
    peers = process_peers(Mesh(1, world, rank, expert=world), arguments.ranks)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(arguments.tokens, arguments.width, generator=generator)
    scores = torch.rand(arguments.tokens, arguments.experts, generator=generator)
    ids = scores.topk(arguments.top, dim=-1).indices
    whole = Route(ids, torch.ones(ids.shape))
    single = Route(ids.view(-1, 1), torch.ones(ids.numel(), 1))
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    rows: dict[str, list[int]] = {}
    for _ in range(arguments.rounds + 1):
        for way in WAYS:
            given, route = (x.repeat_interleave(arguments.top, 0), single) if way == WAYS[0] else (x, whole)
            name = "two_hop" if way == WAYS[2] else "collective"
            dispatcher = open_dispatcher(name, peers, Terms(arguments.experts))
            dist.barrier()
            start = time.perf_counter()
            arrived = dispatcher.dispatch(given, route).wait()
            here = (arrived.ids >= 0).sum(1, keepdim=True)
            out = dispatcher.combine(arrived.rows * here, arrived, torch.zeros_like(given)).wait()
            found[way].append(time.perf_counter() - start)
            assert torch.allclose(out.view(len(x), -1, x.shape[1]).sum(1), x * arguments.top, rtol=1e-4)
            home, far = rank // arguments.ranks, arrived.way[0].sent  # pyright: ignore[reportAttributeAccessIssue]
            node_of = range(len(far)) if way == WAYS[2] else [to // arguments.ranks for to in range(len(far))]
            rows[way] = [sum(count for count, node in zip(far, node_of) if node != home)]
    result = {"seconds": {way: times[1:] for way, times in found.items()}, "rows": rows}
    Path(arguments.out, f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()


def start_ranks(arguments: argparse.Namespace, folder: str) -> list[subprocess.Popen]:
    """All ranks, each in its node's namespace."""
    started = []
    for rank in range(arguments.nodes * arguments.ranks):
        node = rank // arguments.ranks
        words = ["ip", "netns", "exec", f"{NAME}{node}", sys.executable, *sys.argv, "--rank", str(rank)]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": f"cf-in{node}", "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen([*words, "--out", folder], env=environment, start_new_session=True))
    return started


def main() -> None:
    """Nodes up, ranks through, nodes down; the slowest rank of every round, the median of rounds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {"nodes": 2, "ranks": 2, "tokens": 512, "width": 1024, "experts": 64, "top": 8, "rounds": 10}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rate", default="200mbit")
    parser.add_argument("--limit", type=float, default=300.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--out", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank >= 0:
        rank_main(arguments)
        return
    from counterflow.train.provenance import provenance

    made, world = provenance(), arguments.nodes * arguments.ranks
    with TemporaryDirectory() as folder, nodes(arguments.nodes, arguments.rate):
        started = start_ranks(arguments, folder)
        deadline = time.monotonic() + arguments.limit
        try:
            codes = [process.wait(max(0.1, deadline - time.monotonic())) for process in started]
        finally:
            for process in started:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        assert not any(codes), f"a rank failed: {codes}"
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]
    print(f"{arguments.nodes} nodes of {arguments.ranks} ranks, {arguments.rate} between nodes")
    for way in WAYS:
        slowest = [max(times) for times in zip(*(rank["seconds"][way] for rank in ranks))]
        rows = sum(rank["rows"][way][0] for rank in ranks) / world
        print(
            f"{way:24} {statistics.median(slowest) * 1e3:7.0f} ms ({min(slowest) * 1e3:.0f} to "
            f"{max(slowest) * 1e3:.0f}); {rows:.0f} rows a rank over the slow link, out"
        )
    save(arguments.json, {"settings": vars(arguments), "provenance": made, "ranks": ranks})


if __name__ == "__main__":
    main()
