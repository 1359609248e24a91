"""Comparisons and measurements; see README.md."""
