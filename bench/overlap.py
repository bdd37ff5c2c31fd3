"""`counterflow bench overlap` for machines without its command line: a process for every GPU of the host.

python bench/overlap.py --backends nvlink copy_engine collective --ratio 1:1 --folder records/DATE
python bench/overlap.py --device cpu --hidden 64 --intermediate 32 --heads 2 --experts 16 --tokens 64
"""

import argparse
import json
from dataclasses import asdict, fields
from pathlib import Path
from types import GenericAlias

from counterflow.benchmark.pair import Overlap
from counterflow.benchmark.pair_result import overlap, table, timelines
from counterflow.benchmark.processes import on_devices
from counterflow.benchmark.shown import aligned
from counterflow.comm.mesh import Mesh
from counterflow.train.provenance import provenance


def main() -> None:
    """Every setting of `Overlap` as an option."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in fields(Overlap):
        several = isinstance(field.type, GenericAlias)
        kind = type(field.default[0]) if several else type(field.default)
        more = {"nargs": "*"} if several else {}
        parser.add_argument(f"--{field.name}", type=kind, default=field.default, **more)
    parser.add_argument("--ranks", type=int, default=0, help="processes; 0: one a GPU, two on a CPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path)
    arguments = vars(parser.parse_args())
    ranks, device, folder = (arguments.pop(name) for name in ("ranks", "device", "folder"))
    wish = Overlap(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    )
    on_devices(bench, ranks, device, wish, folder)


def bench(mesh: Mesh, wish: Overlap, folder: Path | None) -> None:
    """All contenders; what is there so far is written after each."""
    made, result = provenance(), None
    for result in overlap(wish, mesh):
        if not mesh.first:
            continue
        print(aligned(table(result)), flush=True)
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            numbers = {key: value for key, value in result.items() if key != "timelines"}
            (folder / "raw.json").write_text(
                json.dumps({"settings": asdict(wish), "provenance": made, **numbers}, indent=1)
            )
            if drawn := timelines(result):
                (folder / "picture.svg").write_text(drawn)
    if mesh.first and result:
        print(*result["notes"], sep="\n")


if __name__ == "__main__":
    main()
