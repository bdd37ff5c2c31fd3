"""Part of a flat tensor that has a name and a place: what a checkpoint is made of.

Every parameter is saved as one flat tensor under its canonical name, in as many pieces as it has owners, so that any
shard of any layout is an interval of it and any layout reads what any other wrote. torch's distributed checkpoint does
the reading and writing; the two planners here tell it how to find a piece.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


@dataclass(frozen=True)
class Piece:
    """`value` is elements offset … of a flat tensor of `total` elements, and a view of where they live."""

    value: Tensor
    offset: int
    total: int

    @staticmethod
    def whole(tensor: Tensor) -> "Piece":
        """All of a tensor, flat."""
        return Piece(tensor.view(-1), 0, tensor.numel())

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([self.offset]), torch.Size([len(self.value)]))

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        """Asked by torch's checkpoint at saving."""
        data = TensorWriteData(
            self._chunk(), TensorProperties.create_from_tensor(self.value), torch.Size([self.total])
        )
        index = MetadataIndex(name, torch.Size([self.offset]))
        return [WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """Asked by torch's checkpoint at loading."""
        return [self._chunk()]


class SavePieces(DefaultSavePlanner):
    """Finds the tensor of a piece to write."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The piece's value."""
        return self.state_dict[index.fqn].value


class LoadPieces(DefaultLoadPlanner):
    """Finds the tensor of a piece to fill."""

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        """Take the pieces as they are; the default would make copies of nested and meta tensors first."""
        self.original_state_dict = self.state_dict = state_dict
        self.metadata, self.is_coordinator, self.mappings = metadata, is_coordinator, {}

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The piece's value."""
        return self.state_dict[index.fqn].value
