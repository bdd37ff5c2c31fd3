"""`counterflow bench all-to-all` for machines without its command line: a process for every GPU of the host.

python bench/all_to_all.py --folder records/DATE-all-to-all
TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1 python bench/all_to_all.py   (one GPU, two processes: no link, a trial)
torchrun --nproc-per-node 2 bench/all_to_all.py --tokens 4096
"""

import argparse
import json
from dataclasses import asdict, fields
from pathlib import Path
from types import GenericAlias

from counterflow.benchmark.all_to_all import AllToAll, all_to_all
from counterflow.benchmark.processes import on_devices
from counterflow.benchmark.shown import aligned, focus, picture, table
from counterflow.comm.mesh import Mesh
from counterflow.train.provenance import provenance


def main() -> None:
    """Every setting of `AllToAll` as an option."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in fields(AllToAll):
        several = isinstance(field.type, GenericAlias)
        kind = type(field.default[0] if field.default else "") if several else type(field.default)
        more = {"nargs": "*"} if several else {}
        parser.add_argument(f"--{field.name}", type=kind, default=field.default, **more)
    parser.add_argument("--ranks", type=int, default=0, help="processes; 0: one a GPU, two on a CPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path)
    arguments = vars(parser.parse_args())
    ranks, device, folder = (arguments.pop(name) for name in ("ranks", "device", "folder"))
    wish = AllToAll(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    )
    on_devices(bench, ranks, device, wish, folder)


def bench(mesh: Mesh, wish: AllToAll, folder: Path | None) -> None:
    """All sizes; what is there so far is written after each."""
    made = provenance()
    for result in all_to_all(wish, mesh):
        if not mesh.first:
            continue
        print(aligned(table(result, result["rows"][-1]["tokens"])), flush=True)
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            whole = {"settings": asdict(wish), "provenance": made, **result}
            (folder / "raw.json").write_text(json.dumps(whole, indent=1))
            (folder / "picture.svg").write_text(picture(result))
    if mesh.first:
        print(f"\n{mesh.size} ranks\n" + aligned(table(result, focus(result))), *result["notes"], sep="\n")


if __name__ == "__main__":
    main()
