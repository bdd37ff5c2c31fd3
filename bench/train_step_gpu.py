"""How many tokens a second does one GPU train, beside torchtitan 0.2.2 and transformers where they are installed?

    python bench/train_step_gpu.py [small b16x6 v3x2 ...] [--contenders counterflow torchtitan ...] [--rounds 3]
        [--steps 10] [--json records/DATE-NAME/raw.json] [--profile FOLDER] [train.recompute=attention ...]

A process a measurement, the contenders in turn, `--rounds` times; steps on random tokens, the first four not counted.
MTP is off on both sides, the batch and its micro-batches are the same, and so is the optimizer (AdamW over fp32
weights, clipped gradients). torchtitan runs as on a single GPU out of the box: its model, its compile recipe, fp32
weights under bf16 autocast, fused AdamW, with `-compile` and `-flex` (attention) as its name says; transformers
likewise, in eager mode. No routing is forced to be balanced. Words with `=` are settings of ours alone, kept with the
result. `--profile` writes the kernels of one more step of each.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from counterflow.benchmark.saved import save
from counterflow.benchmark.steps import RandomTokens
from counterflow.comm.mesh import Mesh
from counterflow.config.load import load_run
from counterflow.config.model import ModelConfig
from counterflow.config.models import MODELS
from counterflow.train.provenance import provenance
from counterflow.train.trainer import Trainer

WARMUPS = 4
LEARNING_RATE = 1e-4
KERNELS = 40
"""Of a profile, the most expensive first."""


@dataclass(frozen=True)
class Size:
    """A model and how it is fed: `accumulated` micro-batches of `sequences` × `length` tokens a step."""

    model: ModelConfig
    length: int
    sequences: int
    accumulated: int

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.length * self.sequences * self.accumulated

    @property
    def operations(self) -> float:
        """Floating-point operations of the step's products, forward and both gradients; attention's half is causal."""
        m = self.model
        query = m.hidden_size * (m.q_lora_rank or m.num_heads * m.qk_head_dim)
        query += m.q_lora_rank * m.num_heads * m.qk_head_dim
        latent = m.hidden_size * (m.kv_lora_rank + m.qk_rope_head_dim)
        expanded = m.kv_lora_rank * m.num_heads * (m.qk_nope_head_dim + m.v_head_dim)
        scores = m.num_heads * (m.qk_head_dim + m.v_head_dim) * self.length / 2
        attention = query + latent + expanded + scores + m.num_heads * m.v_head_dim * m.hidden_size
        active = m.num_experts_per_token + m.num_shared_experts
        experts = m.hidden_size * (3 * m.moe_intermediate_size * active + m.num_routed_experts)
        dense = 3 * m.hidden_size * m.dense_intermediate_size
        a_token = m.num_layers * attention + m.num_dense_layers * dense + m.num_moe_layers * experts
        return 6.0 * self.tokens * (a_token + m.hidden_size * m.vocab_size)


def sized(name: str, length: int, sequences: int, accumulated: int, **changes: Any) -> Size:
    """A named model, changed, without MTP."""
    return Size(
        replace(MODELS[name], num_mtp_modules=0, max_positions=length, **changes),
        length,
        sequences,
        accumulated,
    )


SIZES = {
    "small": sized("small", 2048, 8, 8),
    # the 16B model's layers, six of them
    "b16x6": sized("v3-16b", 4096, 4, 4, num_layers=6, routed_scaling_factor=2.5),
    # the 671B model's layers, two of them, with an eighth of its experts
    "v3x2": sized(
        "v3-671b", 4096, 2, 4, num_layers=2, num_dense_layers=0, num_routed_experts=32, vocab_size=32768
    ),
    # a released model's vocabulary and long sequences on few layers, where the head is a large part
    "vocab8k": sized("v3-16b", 8192, 2, 4, num_layers=4, vocab_size=129280, routed_scaling_factor=2.5),
    # many small experts, which make many small groups
    "fine": sized(
        "small", 4096, 4, 4, num_routed_experts=128, num_experts_per_token=8, moe_intermediate_size=256
    ),
}


class Contender(NamedTuple):
    """What takes part: its step, its module, whose weights count."""

    step: Callable[[], Any]
    model: torch.nn.Module


def counterflow(size: Size, words: list[str]) -> Contender:
    """A trainer's step; the batch is whole, balance, clipping and the optimizer included."""
    model = [
        f"model.{key}={value}" for key, value in asdict(size.model).items() if isinstance(value, int | float)
    ]
    batch = [f"train.batch_size={size.sequences * size.accumulated}", "train.batch_start=0"]
    batch += [f"train.micro_batch_size={size.sequences}", f"data.sequence_length={size.length}"]
    fixed = ["train.precision=bf16", "train.ema_decay=0", "train.tokens=1e9"]
    run = load_run("small", [*model, *batch, *fixed, *words])
    trainer = Trainer(run, RandomTokens(run), Mesh(device=torch.device("cuda")))
    return Contender(trainer.step, trainer.model)


def torchtitan(size: Size, compiled: bool, flex: bool) -> Contender:
    """Its DeepSeek-V3 with its own compile recipe, and a loop as its trainer has it on one GPU."""
    from torchtitan.config.job_config import Compile  # pyright: ignore[reportMissingImports]
    from torchtitan.models.deepseek_v3 import DeepSeekV3ModelArgs  # pyright: ignore[reportMissingImports]
    from torchtitan.models.deepseek_v3.model.model import DeepSeekV3Model  # pyright: ignore[reportMissingImports]
    from torchtitan.models.llama4.infra.parallelize import apply_compile  # pyright: ignore[reportMissingImports]
    from torchtitan.models.moe import MoEArgs  # pyright: ignore[reportMissingImports]

    m = size.model
    grouped = m.num_groups > 1
    experts = MoEArgs(
        num_experts=m.num_routed_experts,
        num_shared_experts=m.num_shared_experts,
        top_k=m.num_experts_per_token,
        score_func="sigmoid",
        route_norm=True,
        route_scale=m.routed_scaling_factor,
        score_before_experts=False,
        num_expert_groups=m.num_groups if grouped else None,
        num_limited_groups=m.num_limited_groups if grouped else None,
    )
    args = DeepSeekV3ModelArgs(
        vocab_size=m.vocab_size,
        dim=m.hidden_size,
        inter_dim=m.dense_intermediate_size,
        moe_inter_dim=m.moe_intermediate_size,
        n_layers=m.num_layers,
        n_dense_layers=m.num_dense_layers,
        n_heads=m.num_heads,
        moe_args=experts,
        q_lora_rank=m.q_lora_rank,
        kv_lora_rank=m.kv_lora_rank,
        qk_nope_head_dim=m.qk_nope_head_dim,
        qk_rope_head_dim=m.qk_rope_head_dim,
        v_head_dim=m.v_head_dim,
        max_seq_len=size.length,
        **({"attn_type": "flex", "attn_mask_type": "causal"} if flex else {}),
    )
    args.moe_impl = "standard"
    with torch.device("meta"):
        model = DeepSeekV3Model(args)
    model.to_empty(device="cuda")
    with torch.no_grad():
        model.init_weights(torch.device("cuda"))
    model.train()
    loss = summed
    if compiled:
        apply_compile(model, Compile(enable=True, components=["model", "loss"]), False)
        loss = torch.compile(summed)
    mixtures = [block.moe for block in model.layers.values() if block.moe_enabled]

    def forward(samples: torch.Tensor) -> torch.Tensor:
        masks = model.get_attention_masks(samples[:, :-1], None, {}) if flex else None
        return loss(model(samples[:, :-1], masks), samples[:, 1:])

    def balance() -> None:
        with torch.no_grad():
            counts = torch.vstack([mixture.tokens_per_expert for mixture in mixtures])
            for mixture, count in zip(mixtures, counts, strict=True):
                change = 1e-3 * torch.sign(count.mean() - count)
                mixture.expert_bias.add_(change - change.mean())
                mixture.tokens_per_expert.zero_()

    return Contender(looped(size, model, forward, balance), model)


def transformers(size: Size) -> Contender:
    """Its DeepseekV3 in eager mode with grouped products, which balances nothing."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from counterflow.config.released import to_released

    settings: dict[str, Any] = to_released(size.model) | {"use_cache": False}
    config = DeepseekV3Config(**settings)
    with torch.device("cuda"):
        model = DeepseekV3ForCausalLM._from_config(
            config, attn_implementation="sdpa", experts_implementation="grouped_mm"
        )
    model.float().train()
    return Contender(
        looped(size, model, lambda samples: summed(model(input_ids=samples[:, :-1]).logits, samples[:, 1:])),
        model,
    )


def summed(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over all tokens, in fp32."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(0, 1), reduction="sum")


def looped(
    size: Size,
    model: torch.nn.Module,
    forward: Callable[[torch.Tensor], torch.Tensor],
    balance: Callable[[], None] = lambda: None,
) -> Callable[[], None]:
    """A step of the usual loop: micro-batches under autocast, clipped gradients, fused AdamW."""
    parameters = list(model.parameters())
    adam = torch.optim.AdamW(parameters, LEARNING_RATE, (0.9, 0.95), weight_decay=0.1, fused=True)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        adam.zero_grad()
        for _ in range(size.accumulated):
            shape = (size.sequences, size.length + 1)
            samples = torch.randint(size.model.vocab_size, shape, generator=generator).pin_memory()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = forward(samples.cuda(non_blocking=True)) / size.tokens
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        balance()
        adam.step()
        loss.item()

    return step


TITANS = [f"torchtitan{compiled}{flex}" for compiled in ("", "-compile") for flex in ("", "-flex")]
CONTENDERS = ["counterflow", *TITANS, "transformers"]


def contender(name: str, size: Size, words: list[str]) -> Contender:
    """By name."""
    if name == "counterflow":
        return counterflow(size, words)
    if name == "transformers":
        return transformers(size)
    return torchtitan(size, "-compile" in name, "-flex" in name)


def measured(name: str, size: Size, steps: int, words: list[str], profiled: Path | None) -> dict[str, Any]:
    """Seconds of each step, parameters, peak memory; in this process."""
    torch.manual_seed(0)
    try:
        step, model = contender(name, size, words)
        seconds = []
        for _ in range(WARMUPS + steps):
            torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    except torch.cuda.OutOfMemoryError:
        return {"error": "out of memory"}
    memory, parameters = torch.cuda.max_memory_allocated(), sum(each.numel() for each in model.parameters())
    found = {"steps_s": seconds[WARMUPS:], "memory_bytes": memory, "parameters": parameters}
    return found | (kernels_of(step, profiled) if profiled else {})


def kernels_of(step: Callable[[], Any], file: Path) -> dict[str, Any]:
    """One more step's kernels, written to a file; how long the card was busy, and with how many launches."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    events = [event for event in seen.key_averages() if event.device_type == DeviceType.CUDA]
    events.sort(key=lambda event: -event.self_device_time_total)
    busy = sum(event.self_device_time_total for event in events)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        "".join(
            f"{event.self_device_time_total / 1e3:9.2f} ms {event.self_device_time_total / busy:6.1%} "
            f"{event.count:6d}  {event.key[:150]}\n"
            for event in events[:KERNELS]
        )
    )
    return {"busy_s": busy / 1e6, "launches": sum(event.count for event in events)}


def apart(name: str, size: str, asked: argparse.Namespace) -> dict[str, Any]:
    """A measurement in a process of its own."""
    command = [sys.executable, __file__, size, f"--contenders={name}", f"--steps={asked.steps}", "--here"]
    if asked.profile:
        command.append(f"--profile={asked.profile}")
    done = subprocess.run([*command, *asked.settings], capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def line(name: str, size: Size, rounds: list[dict[str, Any]]) -> str:
    """Of the table: the median over the rounds' medians, and the slowest and the fastest of them."""
    good = [statistics.median(each["steps_s"]) for each in rounds if "steps_s" in each]
    if not good:
        return f"  {name:26} {rounds[0]['error']}"
    rates = sorted(size.tokens / seconds for seconds in good)
    peak = max(each["memory_bytes"] for each in rounds if "steps_s" in each)
    flops = size.operations / size.tokens * statistics.median(rates) / 1e12
    return (
        f"  {name:26}{statistics.median(rates):10,.0f} tokens/s ({rates[0]:,.0f} to {rates[-1]:,.0f})"
        f"{flops:7.0f} TFLOP/s{peak / 1e9:8.1f} GB"
    )


def main() -> None:
    """Time all in turn, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("words", nargs="*", default=[], metavar="SIZE or KEY=VALUE", help=", ".join(SIZES))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=["counterflow"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", type=Path, help="a folder")
    parser.add_argument(
        "--here", action="store_true", help="one contender and size, in this process; prints JSON"
    )
    asked = parser.parse_intermixed_args()
    asked.settings = [word for word in asked.words if "=" in word]
    names = [word for word in asked.words if "=" not in word] or list(SIZES)
    if unknown := [name for name in names if name not in SIZES]:
        parser.error(f"no size is called {', '.join(unknown)}; there are {', '.join(SIZES)}")
    if asked.here:
        (size,), (name,) = names, asked.contenders
        file = asked.profile / f"{size}-{name}.txt" if asked.profile else None
        print(json.dumps(measured(name, SIZES[size], asked.steps, asked.settings, file)))
        return
    found: dict[str, dict[str, list]] = {}
    for size in names:
        mine = found[size] = {name: [] for name in asked.contenders}
        for _ in range(asked.rounds):
            for name in asked.contenders:
                mine[name].append(apart(name, size, asked))
                save(asked.json, {"provenance": provenance(), "settings": asked.settings, "found": found})
        print(f"{size}: {SIZES[size].tokens:,} tokens a step")
        for name, rounds in mine.items():
            print(line(name, SIZES[size], rounds), flush=True)


if __name__ == "__main__":
    main()
