"""Tensors in safetensors shards with an index: written one shard at a time, read through a map of the files.

What is in memory beside the model is one shard when writing and one mapped file when reading, so a model that fits
loads. The headers are read first: names, shapes and whether a file is all there are known before a weight is touched.
Our own index also holds each shard's CRC, since the format has none and a flipped bit makes a model that runs and is
wrong; folders of others are read without. What is stored in a form that is not known here, whole numbers above all, is
refused: copied into a weight they would give a model that runs and is wrong.
"""

import json
import zlib
from collections.abc import Iterable, Set
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from counterflow.convert import fp8
from counterflow.errors import CheckpointError
from counterflow.notation import from_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CHUNK = 1 << 22
NUMBERS = frozenset(("BF16", "F16", "F32", "F64"))
"""How numbers may be stored that are taken as they are."""
READABLE = 0o644
"""Of a shard: the library writes files that only their owner may read, and servers often run as another."""


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: float) -> None:
    """Shards of about so many bytes, in the order given, and the index last."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size = total = 0

    def write() -> None:
        shards.append(list(held))
        save_file(held, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        held.clear()

    for name, tensor in tensors:
        if held and size + tensor.nbytes > shard_bytes:
            write()
            size = 0
        held[name] = tensor.contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    write()
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for number, file in enumerate(files, start=1):
        (folder / f"{number}.part").rename(folder / file).chmod(READABLE)
    places = {name: file for file, names in zip(files, shards) for name in names}
    metadata = {"total_size": total, "crc32": {file: _crc(folder / file) for file in files}}
    (folder / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": places}, indent=1))


class Shards:
    """The tensors of a folder, FP8 blocks already multiplied out.   Use as a context: it keeps files mapped."""

    def __init__(self, folder: Path, exponents: bool = False) -> None:
        """Reads index and headers; `exponents` allows scales that are bytes.

        Fails: CheckpointError for a shard that is missing, torn or not the index's, or a tensor in no known form.
        """
        self.folder = folder
        self.scale_kinds = NUMBERS | {"F8_E8M0"} | ({"U8"} if exponents else set())
        index, self.crcs = _index(folder)
        self.places: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of the weights, shard by shard; scales are not weights."""
        self._open: dict[str, Any] = {}
        self._stack = ExitStack()
        self._scales: dict[str, tuple[int, ...]] = {}
        for file in dict.fromkeys(index.values()):
            self._survey(file, {name for name, place in index.items() if place == file})
        for name, shape in self._scales.items():
            self._require_scale(name, shape)

    def _survey(self, file: str, promised: set[str]) -> None:
        """Names and shapes of one file."""
        with ExitStack() as stack:
            shard = self._map(file, stack)
            names = list(shard.keys())
            for name in promised.difference(names):
                raise CheckpointError(
                    f"tensor '{name}' is not in {self.folder / file}, where {INDEX} has it; the folder is mixed "
                    "from two checkpoints or incomplete: fetch it anew."
                )
            for name in names:
                is_scale = name.endswith(fp8.SCALE)
                stored, kinds = shard.get_slice(name), self.scale_kinds if is_scale else NUMBERS | {"F8_E4M3"}
                self._require_kind(name, stored.get_dtype(), kinds)
                (self._scales if is_scale else self.shapes)[name] = tuple(stored.get_shape())
                self.places[name] = file

    def _require_kind(self, name: str, kind: str, known: Set[str]) -> None:
        """safetensors' word for how a tensor is stored must be one that is read."""
        if kind not in known:
            advice = "fetch the checkpoint in bf16, or in FP8 blocks"
            if kind == "U8" and name.endswith(fp8.SCALE):
                advice = "as exponents they need quantization_config.scale_fmt 'ue8m0' in config.json"
            raise CheckpointError(
                f"tensor '{name}' is stored as {kind}; {', '.join(sorted(known))} can be read here: {advice}."
            )

    def _require_scale(self, name: str, shape: tuple[int, ...]) -> None:
        weight = self.shapes.get(_weight_of(name))
        if weight is None or len(weight) != 2 or shape != fp8.num_blocks(*weight):
            raise CheckpointError(
                f"tensor '{name}' is {list(shape)} for a weight of {list(weight) if weight else 'no shape'}; "
                f"FP8 scales are one for each {fp8.BLOCK} × {fp8.BLOCK} block: the shard is damaged or in "
                "another FP8 format."
            )

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()
        self._stack.close()

    def read(self, name: str) -> Tensor:
        """One weight; from FP8 blocks in fp32.   Cost: pages of the file, let go with the next shard."""
        weight = self._shard(self.places[name]).get_tensor(name)
        scale = name.removesuffix("weight") + fp8.SCALE
        if scale in self._scales and weight.dtype == fp8.E4M3:
            return fp8.from_blocks(weight, self._shard(self.places[scale], weight=name).get_tensor(scale))
        if scale in self._scales or weight.dtype == fp8.E4M3:
            found = "not FP8 and has" if scale in self._scales else "FP8 and lacks"
            raise CheckpointError(
                f"tensor '{name}' is {found} '{scale}'; scales belong to FP8 blocks and these to their scales: "
                "fetch the checkpoint anew."
            )
        return weight

    def _shard(self, file: str, weight: str | None = None) -> Any:
        """The file mapped; one at a time, and a second where a weight and its scales lie apart."""
        if file not in self._open:
            keep = self.places[weight] if weight else None
            if any(name != keep for name in self._open):
                self._open.clear()
                self._stack.close()
            self._require_crc(file)
            self._open[file] = self._map(file, self._stack)
        return self._open[file]

    def _map(self, file: str, stack: ExitStack) -> Any:
        path = self.folder / file
        try:
            if not path.is_file():
                raise CheckpointError(f"{path} is missing; {INDEX} names it: fetch that shard.")
            return stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is no whole safetensors file ({error}); fetch that shard anew."
            ) from None

    def _require_crc(self, file: str) -> None:
        expected = self.crcs.pop(file, None)  # once a file
        if expected is not None and _crc(self.folder / file) != expected:
            raise CheckpointError(
                f"{self.folder / file} is corrupt: its CRC is not the one in {INDEX}; its first tensor is "
                f"'{next(name for name, place in self.places.items() if place == file)}'. Fetch that shard anew."
            )


def _weight_of(scale: str) -> str:
    return scale.removesuffix(fp8.SCALE) + "weight"


def _index(folder: Path) -> tuple[dict[str, str], dict[str, int]]:
    """The file of each tensor and the CRC of each file, if it is known; a folder with one unsharded file has no index.

    Fails: CheckpointError.
    """
    path = folder / INDEX
    if not path.is_file():
        single = folder / SINGLE
        if not single.is_file():
            raise CheckpointError(
                f"{folder} has neither {INDEX} nor {SINGLE}; a released checkpoint has one of them: give its folder."
            )
        try:
            with safe_open(single, framework="pt") as shard:
                return dict.fromkeys(shard.keys(), SINGLE), {}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{single} is no whole safetensors file ({error}); fetch it anew."
            ) from None
    try:
        index = from_json(path.read_bytes())
        files, crcs = index["weight_map"], (index.get("metadata") or {}).get("crc32") or {}
        if all(isinstance(file, str) for file in files.values()):
            return files, dict(crcs)
        found = "its weight_map holds no file names"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found = str(error) or type(error).__name__
    raise CheckpointError(f"{path} is no index of shards ({found}); fetch it anew.")


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            crc = zlib.crc32(block, crc)
    return crc


def as_stored(name: str, tensor: Tensor, dtype: torch.dtype, in_blocks: bool) -> Iterable[tuple[str, Tensor]]:
    """A weight as it lies in a shard: in `dtype`, or as FP8 blocks with their scales."""
    if in_blocks:
        blocks, scales = fp8.to_blocks(tensor)
        return (name, blocks), (name.removesuffix("weight") + fp8.SCALE, scales)
    return ((name, tensor.to(dtype, copy=True)),)
