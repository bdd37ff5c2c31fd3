"""Does the server do what it says of itself? schemathesis asks by that description, what it allows and what not.

    pip install '.[serve,bench]'
    python bench/openapi.py RUN FOLDER [--examples 200] [--seeds 1 2]

Serves RUN twice, without a key and with one, has every route asked as its description has it and otherwise, and writes
what schemathesis said and numbers.json into FOLDER. Ends with 1 where a check failed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KEY = "secret"
LEFT_OUT = "positive_data_acceptance"
"""That what fits the description is taken: a sum of lengths, or one field that needs another, cannot be described."""


@contextmanager
def served(run: str, key: str) -> Iterator[str]:
    """The address of a server on the run."""
    command = [sys.executable, "-m", "counterflow", "serve", "--run", run, "--port", "0", "--grace_s", "5"]
    environment = os.environ | {"COUNTERFLOW_API_KEY": key}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            found = (re.search(r"^Serving .* on (http://\S+) ", line) for line in process.stdout)
            yield next(one[1] for one in found if one)
        finally:
            process.terminate()
    assert process.returncode == 0, f"the server ended with {process.returncode}"


def asked(url: str, key: str, examples: int, seed: int) -> tuple[int, str]:
    """How schemathesis ended, and what it said."""
    words = [
        str(Path(sys.executable).parent / "schemathesis"),
        "run",
        f"{url}/openapi.json",
        "--seed",
        str(seed),
    ]
    words += ["--max-examples", str(examples), "--exclude-checks", LEFT_OUT, "--continue-on-failure"]
    words += ["--phases", "coverage,fuzzing", "--request-timeout", "60"]
    words += ["-H", f"Authorization: Bearer {key}"] if key else []
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    return ended.returncode, ended.stdout + ended.stderr


def main() -> int:
    """Both servers; 1 where a check has failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    wish = parser.parse_args()
    wish.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, key in (("open", ""), ("keyed", KEY)):
        with served(wish.run, key) as url:
            for seed in wish.seeds:
                code, said = asked(url, key, wish.examples, seed)
                (wish.folder / f"{name}-{seed}.txt").write_text(said, encoding="utf-8")
                counted = re.search(r"(\d+) generated, (.*)", said)
                row = {"server": name, "seed": seed, "exit": code, "cases": int(counted[1]) if counted else 0}
                rows.append(row | {"said": counted[2] if counted else said.splitlines()[-1:]})
                print(json.dumps(rows[-1]), flush=True)
    (wish.folder / "numbers.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(any(row["exit"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
