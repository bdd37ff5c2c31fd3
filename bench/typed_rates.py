"""What rates does somebody get who types `counterflow generate` and `counterflow serve`, by the number of drafts?

    python bench/typed_rates.py RUN [--depths 0 1] [--batches 1 8 32] [--tokens 400] [--repeats 5] [--json raw.json]

Nothing but the command line is used. `generate --stats` runs with cold kernel caches once and then with warm ones, with
the default and each number of drafts; a server runs with each of them too, and as many texts as the batch has are asked
for at once, `repeats` times, by openai's client, streamed, greedy, the same prompts for all. The clients share few
processes, so that reading 8,000 pieces a second does not become what is measured. A request's rate counts from
its 64th token to its last, over all texts of the batch: what comes after the choice of drafts has been made. The first
repeat at each batch is a text as any other. What is measured is written after every part.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

SETTLED = 64
"""Tokens of a text after which rates are taken."""
PROMPT = "def __init__(self, name, size={}):\n"
DEFAULT = -1
CLIENTS = max(1, min(8, (os.cpu_count() or 1) // 2))
"""Processes that ask."""
COMMAND = (sys.executable, "-m", "counterflow")


def arguments() -> argparse.Namespace:
    """What the line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run")
    parser.add_argument(
        "--depths", type=int, nargs="+", default=[0, 1], help="numbers of drafts beside the default"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit_s", type=float, default=330, help="no part begins after so many seconds")
    parser.add_argument("--parts", nargs="+", choices=("generate", "serve"), default=["generate", "serve"])
    parser.add_argument("--json", default="typed_rates.json")
    return parser.parse_args()


def generated(run: str, drafts: int, tokens: int, cache: str | None = None) -> dict[str, Any]:
    """One `generate --stats`: seconds from the command to its first output and its last, and what it says itself."""
    words = ["generate", "--run", run, "--prompt", PROMPT.format(0), "--temperature", "0", "--stats"]
    words += ["--max_tokens", str(tokens), "--drafts", str(drafts)]
    environment = os.environ | ({"TRITON_CACHE_DIR": cache} if cache else {})
    began, prompt = time.perf_counter(), len(PROMPT.format(0).encode())
    with subprocess.Popen(
        [*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout and process.stderr, "both are pipes"
        seen, first = 0, 0.0
        while piece := os.read(process.stdout.fileno(), 1 << 16):
            seen += len(piece)
            if seen > prompt and not first:
                first = time.perf_counter() - began
        said = process.stderr.read().decode()
    if process.returncode:
        raise SystemExit(said)
    rate = re.search(r"([\d,.]+) tokens/s after it", said)
    return {
        "drafts": drafts,
        "first_token_s": first,
        "whole_s": time.perf_counter() - began,
        "tokens_per_s": float(rate[1].replace(",", "")) if rate else None,
        "said": said.strip().splitlines(),
    }


@contextmanager
def serving(run: str, drafts: int) -> Iterator[tuple[str, float]]:
    """A server's address, and the seconds until it said so."""
    words = ["serve", "--run", run, "--port", "0", "--name", "model", "--drafts", str(drafts)]
    began = time.perf_counter()
    with subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout, "it is a pipe"
        address = next(
            (found[1] for line in process.stdout if (found := re.search(r"on (http\S+)", line))), None
        )
        if address is None:
            raise SystemExit("the server ended before it listened")
        try:
            yield address, time.perf_counter() - began
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def stamps(address: str, number: int, tokens: int) -> list[tuple[float, int]]:
    """When each piece of one text came, and how many tokens of it had come by then."""
    from openai import OpenAI

    found, total = [], 0
    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        pieces = client.completions.create(
            model="model",
            prompt=PROMPT.format(number),
            max_tokens=tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        for piece in pieces:
            if piece.usage:
                total = piece.usage.completion_tokens
            else:
                found.append(time.perf_counter())
    # A step gives several tokens in one piece; the first piece is one token, and the others are alike in the mean.
    share = (total - 1) / max(1, len(found) - 1)
    return [(moment, round(1 + share * index)) for index, moment in enumerate(found)]


def several(address: str, numbers: list[int], tokens: int) -> list[list[tuple[float, int]]]:
    """`stamps` of several texts at once, in this process."""
    import_module("openai")
    with ThreadPoolExecutor(max(1, len(numbers))) as pool:
        return list(pool.map(lambda number: stamps(address, number, tokens), numbers))


def batch(pool: ProcessPoolExecutor, address: str, size: int, tokens: int) -> dict[str, Any]:
    """One batch of texts at once: tokens a second from each one's `SETTLED`-th to the first end of any."""
    began = time.perf_counter()
    shares = [list(range(size))[client::CLIENTS] for client in range(min(CLIENTS, size))]
    asked = [pool.submit(several, address, share, tokens) for share in shares]
    texts = [text for one in asked for text in one.result()]
    whole = time.perf_counter() - began
    start = max(next((moment for moment, count in text if count >= SETTLED), text[-1][0]) for text in texts)
    end = min(text[-1][0] for text in texts)
    counted = [[count for moment, count in text if start <= moment <= end] for text in texts]
    settled = sum(each[-1] - each[0] for each in counted if each)
    written = sum(text[-1][1] for text in texts)
    return {
        "batch": size,
        "settled_tokens_per_s": settled / (end - start) if end > start else None,
        "tokens_per_s": written / whole,
        "first_token_s": statistics.median(text[0][0] for text in texts) - began,
        "tokens": written,
    }


def table(found: dict[str, Any]) -> str:
    """Medians and ranges of what was measured."""
    lines = ["generate          drafts   first token s   tokens/s after it"]
    for row in found["generate"]:
        name, rate = f"{row['caches']} caches", row["tokens_per_s"]
        lines.append(f"{name:18}{_name(row['drafts']):8}{row['first_token_s']:14.1f}   {rate or 0:10,.1f}")
    lines.append("\nserve  batch  drafts   settled tokens/s (range)           whole texts   first token s")
    rows = found["serve"]
    for size, drafts in sorted({(row["batch"], row["drafts"]) for row in rows}):
        mine = [row for row in rows if (row["batch"], row["drafts"]) == (size, drafts)]
        rates = [row["settled_tokens_per_s"] for row in mine if row["settled_tokens_per_s"]] or [0.0]
        whole, first = (
            statistics.median(row[key] for row in mine) for key in ("tokens_per_s", "first_token_s")
        )
        spread = f"{statistics.median(rates):10,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"
        lines.append(f"{size:12}  {_name(drafts):8}{spread:34}{whole:12,.0f}{first:16.3f}")
    return "\n".join(lines)


def _name(drafts: int) -> str:
    return "default" if drafts == DEFAULT else str(drafts)


def main() -> None:
    """All parts, as far as time allows; the default is served first and last, so that a slower machine shows."""
    wish, began = arguments(), time.perf_counter()
    found: dict[str, Any] = {"settings": vars(wish), "generate": [], "serve": [], "ready_s": {}}

    def late() -> bool:
        return time.perf_counter() - began > wish.limit_s

    def keep() -> None:
        found["seconds"] = time.perf_counter() - began
        Path(wish.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    if "generate" in wish.parts:
        with tempfile.TemporaryDirectory() as cold:
            found["generate"].append(generated(wish.run, DEFAULT, wish.tokens, cold) | {"caches": "cold"})
            found["generate"].append(generated(wish.run, DEFAULT, wish.tokens, cold) | {"caches": "warm"})
        for drafts in [DEFAULT, *wish.depths]:
            keep()
            if not late():
                found["generate"].append(generated(wish.run, drafts, wish.tokens) | {"caches": "own"})
    keep()
    with ProcessPoolExecutor(CLIENTS, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(several, [""] * CLIENTS, [[]] * CLIENTS, [0] * CLIENTS))  # each imports the client
        for drafts in [DEFAULT, *wish.depths] if "serve" in wish.parts else []:
            if late():
                break
            with serving(wish.run, drafts) as (address, ready_s):
                found["ready_s"][_name(drafts)] = ready_s
                for size, repeat in itertools.product(wish.batches, range(wish.repeats)):
                    row = batch(pool, address, size, wish.tokens)
                    found["serve"].append({"drafts": drafts, "repeat": repeat, **row})
                    keep()
    print(table(found))
    print(f"\n{wish.json}: {found['seconds']:.0f} s")


if __name__ == "__main__":
    main()
