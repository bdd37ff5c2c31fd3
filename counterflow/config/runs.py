"""RUNS: named whole runs, one for every entry of MODELS. To add one, add an entry."""

from collections.abc import Mapping

from counterflow.config.models import MODELS
from counterflow.config.run import Data, Keep, LearningRate, Parallel, RunConfig, Train

REPORT = Train(
    tokens=14.8e12,
    batch_size=15360,
    batch_start=3072,
    micro_batch_size=1,
    lr=LearningRate(warmup=0.0019, warmup_steps=2000),
    ema_decay=0.999,
    precision="bf16",
    recompute="attention",
)
"""The report's settings [§4.2]; the EMA's decay is not published. 2K steps of warm-up are 28 billion tokens: they
lie where the batch is still near its start."""

V2_LITE = LearningRate(
    peak=4.2e-4,
    warmup=0.0284,
    warmup_steps=2000,
    constant_until=0.8,
    cosine_until=0.8,
    floor=0.316,
    last_from=0.9,
    last=0.1,
)
"""V2-Lite's: 2K steps of warm-up (38 of 1330 billion tokens), then × 0.316 at 80 % and again at 90 %."""

RUNS: Mapping[str, RunConfig] = {
    "tiny": RunConfig(
        name="tiny",
        model=MODELS["tiny"],
        data=Data(sequence_length=256),
        train=Train(
            tokens=1.7e6,
            minutes=5.0,
            batch_size=16,
            micro_batch_size=4,
            lr=LearningRate(peak=3e-3, warmup=0.03),
            bias_speed=0.005,
            ema_decay=0.99,
            precision="auto",
        ),
        parallel=Parallel(pipeline=2),
        keep=Keep(checkpoint_every=100, eval_every=25, eval_samples=32),
    ),
    "small": RunConfig(
        name="small",
        model=MODELS["small"],
        data=Data(sequence_length=2048),
        train=Train(
            tokens=1e9,
            batch_size=64,
            batch_start=32,
            micro_batch_size=8,
            lr=LearningRate(peak=4e-4, warmup_steps=100),
            bias_speed=0.005,
            bias_speed_start=0.06,
            ema_decay=0.999,
            precision="bf16",
        ),
        keep=Keep(checkpoint_every=500, eval_every=250),
    ),
    "v3-16b": RunConfig(
        name="v3-16b",
        model=MODELS["v3-16b"],
        data=Data(sequence_length=4096),
        train=Train(
            tokens=1.33e12,
            batch_size=4608,
            micro_batch_size=1,
            lr=V2_LITE,
            precision="bf16",
            recompute="attention",
        ),
        keep=Keep(checkpoint_every=1000, eval_every=1000),
    ),
    "v3-671b": RunConfig(
        name="v3-671b",
        model=MODELS["v3-671b"],
        data=Data(sequence_length=4096),
        train=REPORT,
        keep=Keep(checkpoint_every=1000, eval_every=1000),
    ),
}
