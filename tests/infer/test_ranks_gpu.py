"""Engines in processes of their own reach each other's experts by `nvlink`: one a GPU, or two on the only one."""

import pytest
import torch
import torch.distributed as dist

from counterflow.infer.engine import Engine
from counterflow.infer.place import placed
from counterflow.infer.ranks import Ranks
from tests.comm.test_gpu import open_peers, start
from tests.infer.models import trained_model
from tests.infer.test_ranks import GREEDY, SETTINGS, part_of, prompts_of

pytestmark = pytest.mark.gpu


def written(rank: int, ranks: int) -> None:
    """This rank's texts, the first rank having no request, are those of one engine with all experts."""
    peers = open_peers(rank, ranks)
    asked = prompts_of([()] + [(5, 11, 2)] * (ranks - 1))[rank]
    part = placed(part_of(trained_model(), rank, peers, ranks, "nvlink"), "cuda", "fp32", SETTINGS)
    texts = []
    for model, together in ((part, Ranks(peers.whole)), (trained_model(), Ranks())):
        engine = Engine(placed(model, "cuda", "fp32", SETTINGS), SETTINGS, ranks=together)
        sequences = [engine.add(prompt, GREEDY)[0] for prompt in asked]
        while not engine.finished():
            engine.step()
        texts.append([sequence.tokens for sequence in sequences])
    assert texts[0] == texts[1]
    torch.cuda.synchronize()
    dist.destroy_process_group()


def test_nvlink_carries_an_engines_tokens():
    start(written)
