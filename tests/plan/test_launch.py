"""What `plan --launch` writes, read back by the loader that `counterflow train` uses."""

import pytest

from counterflow.config.backends import backends
from counterflow.config.load import load_run
from counterflow.errors import ConfigError
from counterflow.plan.hardware import hardware
from counterflow.plan.job import Layout, job_of
from counterflow.plan.launch import files
from counterflow.plan.layout import require_layout
from counterflow.plan.search import Pins, search

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(
    ("name", "card", "gpus", "pins", "overrides"),
    [
        ("tiny", "cpu", 2, Pins(), []),
        ("small", "h100", 8, Pins(), []),
        ("small", "h100", 8, Pins(expert=4, pipeline=2), ["parallel.dispatch=nvlink"]),
        ("small", "h100", 16, Pins(expert=16), []),
        ("small", "h100", 32, Pins(expert=16, pipeline=2, schedule="dualpipev"), ["train.batch_size=512"]),
        ("v3-16b", "h200", 32, Pins(schedule="interleaved-1f1b", pipeline=4), ["train.batch_size=1024"]),
        ("small", "h100", 8, Pins(expert=1), ["parallel.expert=4", "parallel.data=4", "parallel.dispatch=two_hop"]
         + ["parallel.node_ranks=2"]),
    ],
)  # fmt: skip
def test_the_best_layouts_of_a_search_are_runs(name, card, gpus, pins, overrides, tmp_path):
    run, kind = load_run(name, overrides), hardware(card)
    job = job_of(run, "bf16")
    found = search(job, kind, gpus, pins)
    assert found.best
    for one in found.best[:3]:
        layout = one.layout
        (tmp_path / "run.toml").write_text(files(run, layout, "bf16", kind)["run.toml"])
        read = load_run(str(tmp_path / "run.toml"))
        require_layout(read)
        parallel = read.parallel
        assert parallel.processes == gpus and (read.train.minutes, read.train.tokens) == (0, run.train.tokens)
        assert (parallel.pipeline, parallel.data, parallel.expert) == (
            layout.pipeline,
            layout.data,
            layout.expert,
        )
        crosses = layout.expert > kind.card.gpus_per_node
        assert (parallel.dispatch == "two_hop") == crosses
        assert parallel.node_ranks == (kind.card.gpus_per_node if crosses else 0)
        shares = layout.expert > 1 and kind.card.multiprocessors
        assert parallel.multiprocessors == (kind.communication_multiprocessors if shares else 0)


@pytest.mark.parametrize("name", backends(lambda row: row.one_host))
def test_a_backend_of_one_host_is_refused_between_nodes(name):
    run = load_run("small", [f"parallel.dispatch={name}"])
    with pytest.raises(
        ConfigError, match=rf"{name}, which joins the GPUs of one host.*or plan with --expert 8"
    ):
        files(run, Layout(1, 16, 16, 8), "bf16", hardware("h100"))
