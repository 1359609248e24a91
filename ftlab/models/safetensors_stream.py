"""Writing a safetensors file whose tensors are never in memory together.

The format (github.com/huggingface/safetensors): 8 bytes with the header's length, little-endian; the header,
JSON of name -> dtype, shape, begin and end in what follows; the tensors' bytes without gaps. The library itself
writes from tensors that all exist.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
    torch.bool: "BOOL",
}
"""The format's name of each dtype."""

_ALIGNMENT = 8  # of the first tensor, as the library has it


class _File(Protocol):
    def write(self, data: memoryview | bytes, /) -> int: ...

    def tell(self) -> int: ...


class SafetensorsWriter:
    """Tensors announced at once and written one after the other, in any number of pieces.

    Args:
        file: new and empty; whoever opened it closes it.
        tensors: name -> shape and dtype, in the order in which they will come.
        metadata: text to keep with them.
    """

    def __init__(
        self,
        file: _File,
        tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        metadata: Mapping[str, str] | None = None,
    ):
        header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        end = 0
        for name, (shape, dtype) in tensors.items():
            begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % _ALIGNMENT)
        self._file = file
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)
        self._size = self._file.tell() + end

    def write(self, piece: Tensor) -> None:
        """Write the next rows (dim 0) of the tensor whose turn it is; on the host, in its dtype."""
        self._file.write(piece.contiguous().view(-1).view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Make sure that all that was announced has come."""
        written = self._file.tell()
        assert written == self._size, f"{written} bytes written, {self._size} announced"
