"""A server whose ranks reach each other's experts by `nvlink`: one a GPU, or two on the only one."""

import pytest
import torch

from counterflow.train.launch import SHARED
from tests.serve.test_ranks import GREEDY, SEEDED, asked, numbers, place, serving

pytestmark = pytest.mark.gpu
__all__ = ["place"]


def test_ranks_on_gpus_serve_what_one_serves(place, monkeypatch):
    folder, _ = place
    words = ["--device=cuda", "--precision=fp32", "--max_sequences=4"]
    with serving(folder, *words) as (server, _):
        alone = asked(server, GREEDY + SEEDED)
    if torch.cuda.device_count() < 2:
        monkeypatch.setenv(SHARED, "1")
    for dispatch in ("collective", "nvlink"):
        with serving(folder, *words, "--ranks=2", f"--dispatch={dispatch}") as (server, _):
            assert asked(server, GREEDY + SEEDED) == alone
            assert all(tokens > 0 for tokens in numbers(server, "tokens_total")), "both wrote"
