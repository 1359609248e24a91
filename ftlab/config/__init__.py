"""Hydra's side of ftlab: compose, check, resolve, build, explain. Nothing here imports torch before it must."""
