"""Few different numbers of rows, where they differ from batch to batch.

oneDNN compiles a kernel for every shape that it has not multiplied before, 3 to 15 ms each on a CPU with AMX, as long
as ten products of the shape take; it remembers 1,024 of them. A GPU's kernels prefer whole tiles.
"""

ROWS = 64


def rounded_up(n_rows: int, multiple: int = ROWS) -> int:
    """The next multiple: so many rows a matrix should have that holds ``n_rows``."""
    return -(-n_rows // multiple) * multiple
