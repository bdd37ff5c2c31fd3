"""One rank's dispatch: nothing moves, and every backend in the table answers the four calls alike."""

import pytest
import torch

from counterflow.comm import open_dispatcher
from counterflow.comm.dispatch import Dispatcher, Route, Terms
from counterflow.comm.peers import thread_peers
from counterflow.config.backends import BACKENDS


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "deep_ep"])
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_four_calls_on_one_rank(name, tokens):
    (peers,) = thread_peers(1, node_ranks=1)
    dispatcher = open_dispatcher(name, peers, Terms(12))
    assert isinstance(dispatcher, Dispatcher)
    x, into = torch.randn(tokens, 6), torch.randn(tokens, 6)
    route = Route(torch.randint(0, 12, (tokens, 3)), torch.rand(tokens, 3))
    arrived = dispatcher.dispatch(x, route).wait()
    assert torch.equal(arrived.rows, x) and torch.equal(arrived.ids, route.ids)
    assert torch.equal(dispatcher.combine(x, arrived, into).wait(), into + x)
    assert torch.equal(dispatcher.combine_backward(into, arrived).wait(), into)
    dx, dgates = dispatcher.dispatch_backward(x, route.gates, arrived).wait()
    assert torch.equal(dx, x) and torch.equal(dgates, route.gates)
