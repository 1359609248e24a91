"""The verbs beside training, a file each: its arguments, and what it calls.

A verb's file imports nothing heavier than argparse before it runs, so that every ``--help`` is there at once; what the
verb does is under `ftlab.lab`, and knows nothing of command lines.
"""
