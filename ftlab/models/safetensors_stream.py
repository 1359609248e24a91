"""Writing a safetensors file whose tensors are never in memory together.

The format (github.com/huggingface/safetensors): 8 bytes with the header's length, little-endian; the header,
JSON of name -> dtype, shape, begin and end in what follows; the tensors' bytes without gaps. The library itself
writes from tensors that all exist.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT = 8  # of the first tensor, as the library has it


class SafetensorsWriter:
    """A file whose tensors are announced at once and written one after the other, in any number of pieces.

    Args:
        path: overwritten.
        shapes: name -> shape, in the order in which the tensors will come.
        dtype: of all tensors.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype):
        self._dtype = dtype
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shapes.items():
            begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % _ALIGNMENT)
        self._file = path.open("wb")
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)
        self._size = self._file.tell() + end

    def write(self, piece: Tensor) -> None:
        """Write the next rows (dim 0) of the tensor whose turn it is; on the host, in any float dtype."""
        self._file.write(piece.to(self._dtype).contiguous().view(torch.uint8).numpy().data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        written = self._file.tell()
        self._file.close()
        assert error is not None or written == self._size, f"{written} bytes written, {self._size} announced"
