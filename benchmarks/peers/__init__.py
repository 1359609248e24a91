"""Contestants of ``benchmarks/compare.py``: each trains the same model on the same rows, in its own process."""
