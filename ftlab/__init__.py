"""ftlab: fine-tuning of large language models as experiments."""

import os

IGNORE_INDEX = -100
"""Target of a position that is not trained: padding and, without ``train_on_input``, the prompt; torch's default."""

# Here, because libgomp reads it once, when torch is loaded. By default its threads spin for milliseconds while they
# wait for each other, so that one busy neighbour slows small tensors down several times over. Measured with
# benchmarks/step.py seq_len=52 on 2 cores with 0, 1, 2 busy neighbours: 27, 101, 608 ms a step; so: 26, 72, 91 ms.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# Here too, because torch reads it at its first tensor. Blocks of 2 MiB and more are then whole pages, and glibc can
# give the memory of one step's logits to the next: aligned to 64 bytes, as otherwise, what is cut off at their end
# goes to a small object, the gap is too short for the same size again, and the heap grows (glibc before 2.38). A run
# of 20 M parameters, vocabulary 32,000: 250 page faults a step instead of 31,000, and half the memory.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
