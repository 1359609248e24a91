"""``ftlab generate``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from ftlab.verbs._types import not_negative, share, whole

HELP = "ask the model of a finished run"


def declare(parser: ArgumentParser) -> None:
    parser.add_argument("run", help="RUN, RUN@STEP or RUN@best, e.g. outputs/latest")
    parser.add_argument("prompt", help="the instruction; the run's own template is put around it")
    parser.add_argument("--input", default="", help="further context, Alpaca's input field")
    parser.add_argument("--max-new-tokens", type=whole(1), default=256, metavar="N")
    parser.add_argument("--temperature", type=not_negative, default=0.0, metavar="T", help="0, the default, is greedy")
    parser.add_argument("--top-p", type=share, default=1.0, metavar="P", help="sample from this share of probability")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of the sampling")


def run(arguments: Namespace) -> None:
    from ftlab.lab.ask import ask

    ask(
        arguments.run,
        arguments.prompt,
        input=arguments.input,
        on_text=lambda text: print(text, end="", flush=True),
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    print()
