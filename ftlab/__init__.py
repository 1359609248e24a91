"""ftlab: fine-tuning of large language models as experiments."""

IGNORE_INDEX = -100
"""Target of a position that is not trained: padding and, without ``train_on_input``, the prompt; torch's default."""
