"""`counterflow data`: a run's text to tokens before it is trained on, so that no rank waits for it.

It takes the words of `counterflow train`. Under torchrun or srun each process makes a share, and one that finds all
shares made joins them; what a killed process had made is kept, and the next one goes on from there.
"""

import sys
from collections.abc import Sequence
from os.path import expanduser

from counterflow.cli.train import split
from counterflow.config.load import load_run
from counterflow.config.runs import RUNS
from counterflow.progress import say
from counterflow.units import count

HELP = """usage: counterflow data [RUN] [KEY=VALUE | --KEY VALUE ...]

Learn the tokenizer of a run and turn its text into tokens, before training does. RUN ({runs}; default tiny, or a .toml
file) and settings are those of `counterflow train`; of them data.* and model.vocab_size matter here. What is made is
kept in data.cache_dir, also where this is killed half-way: the same command goes on from there. Started by torchrun or
srun on several machines that share that folder, each process makes a share.
"""


def run(arguments: Sequence[str]) -> int:
    """Tokenise, then say what there is."""
    name, overrides, wants_help = split(list(arguments))
    config = load_run(name, overrides)
    if wants_help:
        print(HELP.format(runs=", ".join(RUNS)), end="")
        return 0
    from counterflow.data.files import skipped
    from counterflow.data.loader import Samples, tokenise_share
    from counterflow.train.environment import place_here

    place, size = place_here(), config.model.vocab_size
    if not place or place.rank == 0:
        for line in filter(None, map(skipped, config.data.sources)):
            say(f"counterflow: {line}", sys.stderr)
    if place and not tokenise_share(config.data, size, (place.rank, place.processes), quiet=place.rank > 0):
        print(f"Rank {place.rank} of {place.processes} has made its share.", flush=True)
        return 0
    samples = Samples(config.data, size, config.train.seed)
    print(
        f"{count(samples.train_tokens)} tokens to train on and {samples.num_held_out:,} held-out samples of "
        f"{config.data.sequence_length} tokens are in {expanduser(config.data.cache_dir)}."
    )
    return 0
