"""Train a model on the packages of an environment, whole packages held out: what bench/speculative.py then measures.

    python bench/train_on_packages.py --packages .venv/lib/python3.12/site-packages --work .cache/code \
        small train.tokens=8e7 train.batch_size=32

Writes WORK/train.jsonl, WORK/held_out.jsonl, WORK/split.json and the run WORK/run.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from counterflow.benchmark.packages import split, write
from counterflow.config.load import load_run
from counterflow.config.run import Source
from counterflow.data.corpus import open_corpus
from counterflow.data.tokenizer import learn
from counterflow.train.loop import train

LEARN_BYTES = 20e6
"""Of training text that the tokenizer is learnt from: more changes few merges and takes minutes."""


def prepared(packages: Path, work: Path, vocab_size: int, most: float) -> None:
    """The two parts and a tokenizer of the training part, unless they are there."""
    if (work / "split.json").is_file():
        return
    began = time.perf_counter()
    work.mkdir(parents=True, exist_ok=True)
    parts = split(packages, most=most)
    write(parts.train, work / "train.jsonl")
    write(parts.held_out, work / "held_out.jsonl")
    sample, size = [], 0
    while size < min(LEARN_BYTES, sum(map(len, parts.train)) / 2):
        sample.append(parts.train[len(sample)])
        size += len(sample[-1])
    write(sample, work / "sample.jsonl")
    corpus = open_corpus(Source(str(work / "sample.jsonl")), 0.01, work / "cache")
    (work / "tokenizer.json").write_text(learn([corpus], vocab_size).to_str(), encoding="utf-8")
    facts = parts.described() | {"seconds": time.perf_counter() - began}
    (work / "split.json").write_text(json.dumps(facts, indent=1))
    print(f"prepared in {facts['seconds']:.0f} s: {json.dumps(facts)}", flush=True)


def main() -> None:
    """Prepare, then train; SIGTERM saves and stops."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--most", type=float, default=1e12, help="bytes of training text at most")
    parser.add_argument("--run", default="run", help="folder in WORK")
    parser.add_argument("model", help="a name of the model table")
    parser.add_argument("overrides", nargs="*", help="as of counterflow train")
    wish = parser.parse_args()
    own = [
        f"data.sources={wish.work / 'train.jsonl'}",
        f"data.tokenizer={wish.work / 'tokenizer.json'}",
        f"data.cache_dir={wish.work / 'cache'}",
        "data.held_out=0.002",
        f"keep.folder={wish.work / wish.run}",
        "keep.checkpoint_every=1000000",
        "keep.eval_every=1000000",
    ]
    run = load_run(wish.model, [*own, *wish.overrides])
    prepared(wish.packages, wish.work, run.model.vocab_size, wish.most)
    sys.stdout.flush()
    code = train(run)
    sys.stdout.flush()
    sys.exit(0 if code in (0, 143) else code)


if __name__ == "__main__":
    main()
