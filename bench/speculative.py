"""What do drafts by the MTP modules bring, at batch 1, 8 and 32?

    counterflow train tiny && python bench/speculative.py --run runs/tiny --json records/DATE-speculative/raw.json

After `bench/train_on_packages.py`, whose packages are held out whole: `--run WORK/run --texts WORK/held_out.jsonl`.
With --transformers its own greedy `generate` writes after the same prompts on the exported run, plainly and with our
modules.
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from counterflow.benchmark import packages
from counterflow.benchmark.saved import save
from counterflow.benchmark.speculative import held_out, rounds, stretches, summary, teacher_forced
from counterflow.infer.engine import EngineSettings
from counterflow.infer.place import placed
from counterflow.train.provenance import provenance
from counterflow.train.restore import restore

HEADER = (
    "batch  D  tokens/s  E     v     c     E/(v+Dc)  speed-up (range)     kept by position   repeated 8-grams"
)
LEAST_TEXTS = 16
"""Of a batch size: one text says little of acceptance, so small batches have more rounds."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument(
        "--texts", type=Path, help="a .jsonl of held-out texts; else those of the run's split"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7])
    parser.add_argument("--tokens", type=int, default=96, help="of each text")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument(
        "--graphs", type=int, nargs="+", default=[1], help="1: CUDA graphs where possible; 0: none"
    )
    parser.add_argument("--transformers", type=Path, help="a folder to export to; it must not be there")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """A table for each temperature, and the raw numbers if asked for, written after each batch size."""
    wish = arguments()
    torch.set_num_threads(wish.threads)
    model, tokenizer = restore(wish.run)
    documents = packages.read(wish.texts) if wish.texts else held_out(wish.run)
    texts = stretches(documents, tokenizer, 4 * max(wish.batches), 2 * wish.prompt)
    raw: dict[str, Any] = {"arguments": {**vars(wish), "json": None}, "provenance": provenance(), "rows": []}
    if wish.transformers:  # before the weights are rounded and their modules cut
        from counterflow.convert.export import Form, export

        export(model, tokenizer, wish.transformers, Form(wish.precision))
    model = placed(model, wish.device, wish.precision, EngineSettings())
    raw["provenance"] |= {"threads": str(torch.get_num_threads()), "device_type": model.head.device.type}
    raw["teacher_forced"] = teacher_forced(model, texts)
    for depth, shares in enumerate(raw["teacher_forced"], start=1):
        print(f"module {depth} on held-out text: " + ", ".join(f"{k} {v:.3f}" for k, v in shares.items()))
    for graphs in wish.graphs:
        for temperature in wish.temperatures:
            print(
                f"\ntemperature {temperature:g}, CUDA graphs {'where possible' if graphs else 'off'}\n{HEADER}"
            )
            for batch in wish.batches:
                measured(model, texts, batch, temperature, bool(graphs), wish, raw)
    if wish.transformers:
        judged(wish, texts, tokenizer.eos, model.config, raw)


def measured(
    model: Any,
    texts: list[list[int]],
    batch: int,
    temperature: float,
    graphs: bool,
    wish: argparse.Namespace,
    raw: dict[str, Any],
) -> None:
    """All rounds of one batch size, printed and kept."""
    repeats = max(wish.rounds, LEAST_TEXTS // batch)
    depths = [0, *wish.depths]
    rows = list(rounds(model, texts, batch, depths, temperature, wish.tokens, repeats, graphs))
    raw["rows"] += rows
    for row in summary(rows):
        low, high = row["speed_up_range"]
        kept = " ".join(f"{share:.0%}" for share in row["acceptance"])
        print(
            f"{row['batch']:5}  {row['drafts']}  {row['tokens_per_s']:8.0f}  {row['length']:.2f}  {row['v']:.2f}  "
            f"{row['c']:.2f}  {row['predicted']:8.2f}  {row['speed_up']:8.2f} ({low:.2f}-{high:.2f})  {kept:17}  "
            f"{row['repeated']:.1%}",
            flush=True,
        )
        raw.setdefault("summary", []).append({"temperature": temperature, "graphs": graphs, **row})
    save(wish.json, raw)


def judged(
    wish: argparse.Namespace, texts: list[list[int]], eos: int, config: Any, raw: dict[str, Any]
) -> None:
    """Tokens a second of transformers' greedy generate on the exported run; it drafts for one text alone."""
    import transformers

    family = transformers.DeepseekV3ForCausalLM
    family._keys_to_ignore_on_load_unexpected = [
        rf"model\.layers\.{config.num_layers + k}\." for k in range(config.num_mtp_modules)
    ]
    device = "cuda" if raw["provenance"]["device_type"] == "cuda" else "cpu"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[wish.precision]
    judge: Any = family.from_pretrained(
        str(wish.transformers), dtype=dtype, experts_implementation="grouped_mm"
    )
    judge = judge.to(device).eval()
    raw["transformers"] = {"version": transformers.__version__, "rows": []}
    for batch, use_mtp in [(1, False), (1, True), *((each, False) for each in wish.batches if each > 1)]:
        row: dict[str, Any] = {"batch": batch, "use_mtp": use_mtp}
        try:
            row["tokens_per_s"] = list(written(judge, texts, batch, use_mtp, eos, wish))[1:]
            speed = f"{statistics.median(row['tokens_per_s']):.0f} tokens/s"
        except (TypeError, ValueError) as error:  # an older one has no such drafts
            row["failed"] = speed = repr(error)
        raw["transformers"]["rows"].append(row)
        print(f"transformers, batch {batch}, use_mtp {use_mtp}: {speed}", flush=True)
        save(wish.json, raw)


def written(
    judge: Any, texts: list[list[int]], batch: int, use_mtp: bool, eos: int, wish: argparse.Namespace
) -> Iterator[float]:
    """Tokens a second of each round, the first to warm up; its prompt's pass is in the time."""
    for turn in range(wish.rounds + 1):
        prompts = [text[: wish.prompt] for text in texts[turn * batch % (len(texts) - batch + 1) :][:batch]]
        given = torch.tensor(prompts, device=judge.device)
        began = time.perf_counter()
        out = judge.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            max_new_tokens=wish.tokens,
            min_new_tokens=wish.tokens,
            pad_token_id=eos,
            **({"use_mtp": True} if use_mtp else {}),
        )
        made = out.shape[0] * (out.shape[1] - wish.prompt)
        yield made / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
