"""Transfers that take their time: nothing is read and no weight gradient made too early, and a pair hides them."""

import random

import pytest
import torch

from counterflow.benchmark import equality
from counterflow.benchmark.equality import Layout, compare, small_model
from counterflow.benchmark.overlap import pair_lanes, pair_of
from counterflow.comm.dispatch import Arrived, Pending
from counterflow.comm.local import Local
from counterflow.model import debts, experts
from counterflow.pipeline.stage import Stage
from counterflow.schedule.words import Kind


class Late(Local):
    """What a call gives is NaN until it is waited for, as a buffer that the wire still fills."""

    def __init__(self) -> None:
        self.waits = 0

    def __getattribute__(self, name):
        call = object.__getattribute__(self, name)
        return call if name not in CALLS else lambda *arguments: self.late(call(*arguments).wait())

    def __deepcopy__(self, memo):
        return self

    def late(self, value) -> Pending:
        tensors = [value.rows, value.gates] if isinstance(value, Arrived) else value
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        there = [tensor.clone() for tensor in tensors]
        empty = [torch.full_like(tensor, torch.nan) for tensor in tensors]

        def arrive():
            self.waits += 1
            for buffer, content in zip(empty, there):
                buffer.copy_(content)
            if isinstance(value, Arrived):
                return Arrived(empty[0], value.ids, empty[1])
            return empty[0] if isinstance(value, torch.Tensor) else tuple(empty)

        return Pending(arrive)


CALLS = {"dispatch", "combine", "combine_backward", "dispatch_backward"}


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "dualpipe", "dualpipev"])
def test_what_is_under_way_is_read_only_after_its_wait(name):
    model = small_model(8, 1)
    plain = model.dispatcher
    late = Late()
    run = equality.run_pipeline

    def with_late(model, *arguments):
        model.dispatcher = late
        try:
            return run(model, *arguments)
        finally:
            model.dispatcher = plain

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(equality, "run_pipeline", with_late)
        assert compare(Layout(name, 2, 6), model)["exact"] == 0.0
    assert late.waits > 100


@pytest.mark.parametrize("name", ["zb1p", "dualpipe"])
def test_no_weight_gradient_is_made_inside_a_backward_for_input(name, monkeypatch):
    """The products that pay weight gradients are called by W ops alone, whatever recomputation does."""
    inside, seen = [], {Kind.F: 0, Kind.I: 0, Kind.W: 0}
    run = Stage.run

    def watched(self, op, *arguments):
        inside.append(op.kind)
        run(self, op, *arguments)
        inside.pop()

    def counted(product):
        def call(*arguments, **named):
            if inside:
                seen[inside[-1]] += 1
            return product(*arguments, **named)

        return call

    monkeypatch.setattr(Stage, "run", watched)
    monkeypatch.setattr(debts, "add_product", counted(debts.add_product))
    monkeypatch.setattr(experts, "add_grouped_product", counted(experts.add_grouped_product))
    for recompute in ("none", "attention"):
        compare(Layout(name, 2, 4, recompute=recompute), small_model(4, 1))
    assert seen[Kind.F] == seen[Kind.I] == 0 and seen[Kind.W] > 100


@pytest.mark.parametrize("layers", [4, 8, 16])
def test_a_woven_pair_hides_its_transfers_up_to_one_op(layers):
    """In whatever ratio, a pair takes its longer lane and at most the op that nothing can run beside."""
    generator = random.Random(layers)
    for wire in [0.5, 1.0, 1.5, *(generator.uniform(0.1, 4.0) for _ in range(8))]:
        compute, moved = pair_lanes(1.0, wire, layers)
        assert max(compute, moved) - 1e-9 <= pair_of(1.0, wire, layers) <= max(compute, moved) + 2.0
        if moved < 0.9 * compute:
            assert pair_of(1.0, wire, layers) == pytest.approx(compute)
