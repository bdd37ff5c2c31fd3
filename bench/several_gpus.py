"""Pipeline and expert parallelism at once on 8, 4 or 2 GPUs, shown in one go that ends within its minutes.

One step's losses and gradients against the plain loop, fp32 and bf16, its routing replayed; tokens a second, bubble,
exposed transfers and memory by rank of DualPipe, DualPipeV, ZB1P and 1F1B, with the overlap on and off, on real routing
and on routing forced even, for layers of the report's sizes and for `small`; dispatch and combine against what the link
gives; and beside each what the planner said before, from rates that are measured first. The folder is whole after every
row: raw.json, README.md made of it, output.txt, a timeline for every way, the rates as hardware files. What time did
not allow stands there by name.

python bench/several_gpus.py --folder records/DATE-several-gpus                     (all GPUs of the machine; 9 minutes)
python bench/several_gpus.py --ranks 4 --schedules dualpipe 1f1b --models small --folder out
python bench/several_gpus.py --device cpu --ranks 4 --models tiny --compared tiny --compared-length 32 --length 32 \
    --micro-batch-size 1 --microbatches 4 --steps 2 --warmups 1 --rates-seconds 0.001 --hidden 64 --experts 16 \
    --tokens 64 --rounds 3 --minutes 20 --folder out                                (four processes of a laptop)
"""

import argparse
from pathlib import Path

import torch

from counterflow.benchmark.all_to_all import AllToAll
from counterflow.benchmark.several import several
from counterflow.benchmark.several_parts import ARRANGED, KINDS, REPORT, Several
from counterflow.errors import CounterflowError
from counterflow.schedule import SCHEDULES


def words() -> argparse.ArgumentParser:
    """What can be asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    more = parser.add_argument
    more("--folder", type=Path, required=True)
    more("--minutes", type=float, default=9.0, help="from the start; what is left then is listed as not run")
    more("--ranks", type=int, default=0, help="2, 4 or 8; 0: as many as there are GPUs for, 4 on a CPU")
    more("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    more("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="what is asked at all")
    more("--models", nargs="+", default=[REPORT, "small"], help=f"runs whose steps are timed, or {REPORT}")
    more("--schedules", nargs="+", default=["dualpipe", "dualpipev", "zb1p", "1f1b"], choices=list(SCHEDULES))
    more("--compared", default="small", help="the model of the step that must be equal")
    more("--compared-length", type=int, default=256, help="tokens of its sequences")
    more(
        "--dispatch", nargs="+", help="backends whose step must be equal; the first moves timed steps' tokens"
    )
    more("--precision", choices=("bf16", "fp32"), help="of timed steps; bf16 on GPUs, fp32 on a CPU")
    more(
        "--microbatches",
        type=int,
        default=0,
        help="of a data rank; 0: four for each pipeline rank, 8 at least",
    )
    more("--micro-batch-size", type=int, default=0, help="sequences of one; 0: the run's own")
    more("--length", type=int, default=0, help="tokens of a sequence; 0: the run's own")
    more("--steps", type=int, default=5)
    more("--warmups", type=int, default=2)
    more(
        "--rates-seconds", type=float, default=0.1, help="over which each of the planner's rates is measured"
    )
    more(
        "--tokens", type=int, nargs="+", default=[256, 1024, 4096], help="of a rank, for dispatch and combine"
    )
    more("--hidden", type=int, default=7168, help="width of a token there")
    more("--experts", type=int, default=256)
    more("--rounds", type=int, default=20)
    more("--set", nargs="*", default=[], help="further settings of timed runs, as section.name=value")
    return parser


def asked(given: argparse.Namespace) -> Several:
    """The words as settings."""
    cuda = given.device == "cuda"
    there = torch.cuda.device_count() if cuda else 4
    ranks = given.ranks or max([size for size in ARRANGED if size <= there], default=there)
    if cuda and ranks > there:
        raise CounterflowError(
            f"--ranks is {ranks} and PyTorch sees {there} GPUs, where each rank needs one of its own; start fewer, or "
            "try it with --device cpu."
        )
    size = [f"train.micro_batch_size={given.micro_batch_size}"] if given.micro_batch_size else []
    return Several(
        ranks=ranks,
        device=given.device,
        kinds=tuple(given.kinds),
        models=tuple(given.models),
        schedules=tuple(given.schedules),
        compared=given.compared,
        compared_length=given.compared_length,
        dispatch=tuple(given.dispatch or (("nvlink", "collective") if cuda else ("collective",))),
        precision=given.precision or ("bf16" if cuda else "fp32"),
        microbatches=given.microbatches,
        length=given.length,
        steps=given.steps,
        warmups=given.warmups,
        rates_s=given.rates_seconds,
        transfers=AllToAll(
            tuple(given.tokens),
            given.hidden,
            given.experts,
            rounds=given.rounds,
            warmups=min(5, given.rounds),
        ),
        words=(*size, *given.set),
        memory_bytes=float(torch.cuda.get_device_properties(0).total_memory) if cuda else 0.0,
    )


def main() -> None:
    """Run, within the minutes."""
    given = words().parse_args()
    try:
        several(asked(given), given.folder, given.minutes)
    except CounterflowError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
