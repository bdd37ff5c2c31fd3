"""Passes and kernels of our own ops, held against a counter that watches them run."""

from dataclasses import replace

import pytest
import torch

from counterflow.benchmark.launches import Watcher
from counterflow.config.models import MODELS
from counterflow.model.transformer import Transformer, initialise
from counterflow.pipeline.stage import Pass, Stage, StepSettings, Sums
from counterflow.plan.eager import eager
from counterflow.plan.job import Job, Layout
from counterflow.plan.stages import layer_plan
from counterflow.plan.work import Workload
from counterflow.schedule.words import OWING, TRANSFERS, Chunk, Kind, Op, Part, StageId

CONFIG = replace(MODELS["tiny"], num_layers=2)
SEQUENCES, LENGTH = 2, 256
PLAN = ((Part.EMBED, 0), *layer_plan(CONFIG, 0), *layer_plan(CONFIG, 1), (Part.HEAD, 0))


@pytest.mark.parametrize("recompute", ["none", "attention"])
def test_passes_and_kernels_are_those_that_run(recompute):
    """Within 15 % of the bytes of every op that moves more than a hundred a token, and 20 % of its kernels."""
    model = Transformer(CONFIG)
    initialise(model, 0)
    model.recompute = recompute
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
        parameter.main_grad = torch.zeros(parameter.shape)
    tokens, stage, sums = SEQUENCES * LENGTH, Stage(model, PLAN), Sums()
    samples = torch.randint(CONFIG.vocab_size, (SEQUENCES, LENGTH + 1))
    state = Pass(samples, StepSettings(SEQUENCES, LENGTH, 1 / tokens))
    layout = Layout(1, 1, 1, SEQUENCES, recompute=recompute)
    load = Workload(Job(CONFIG, LENGTH, SEQUENCES, 1e6, "bf16"), layout, on_gpu=False)
    for kind in Kind.F, Kind.I, Kind.W:
        for part, layer in PLAN if kind is Kind.F else PLAN[::-1]:
            if kind is Kind.W and part not in OWING:
                continue
            with Watcher() as counter, torch.set_grad_enabled(kind is Kind.F):
                stage.run(Op(kind, part, layer, Chunk(kind, StageId(0, 0), 0)), state, sums)
            if part in TRANSFERS or (part, kind) == (Part.EMBED, Kind.I):
                continue
            moe = part in (Part.ATTN, Part.MLP) and CONFIG.is_moe(layer)
            work = eager(load, kind, part, moe, load(kind, part, layer))
            assert work.passes == pytest.approx(counter.bytes, rel=0.15), (kind, part, layer)
            assert work.kernels == pytest.approx(counter.kernels, rel=0.2), (kind, part, layer)


def test_a_gpu_fuses_what_a_cpu_passes_over_and_fp8_is_always_fused():
    job = Job(MODELS["small"], 2048, 8, 1e6, "bf16")
    layout = Layout(1, 1, 1, 8)
    for kind, part in ((Kind.I, Part.ATTN), (Kind.F, Part.MLP), (Kind.I, Part.MLP)):
        on_gpu, on_cpu = (
            eager(load, kind, part, True, load(kind, part, 5))
            for load in (Workload(job, layout), Workload(job, layout, on_gpu=False))
        )
        assert on_gpu.passes < on_cpu.passes and on_gpu.kernels < on_cpu.kernels
    assert job.is_eager and not replace(job, precision="fp8").is_eager
