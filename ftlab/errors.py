"""What ftlab raises when the fault is the user's input or the world's, never our own.

Every other exception is a bug in ftlab and keeps its traceback.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence


class FtlabError(Exception):
    """Shown to the user as its message alone; ``exit_code`` becomes the process's."""

    exit_code = 1


class ConfigError(FtlabError):
    """A value the user gave cannot work: which key, what is wrong with it, what to type instead.

    Args:
        key: dotted path of the configuration key, e.g. ``trainer.batch_size``.
        problem: the value seen and the rule it breaks.
        fix: an override to paste, or one short sentence where no override can help.
    """

    exit_code = 2

    def __init__(self, key: str, problem: str, fix: str | None = None):
        self.key, self.problem, self.fix = key, problem, fix
        super().__init__(key, problem, fix)  # these args keep it picklable across processes

    def __str__(self) -> str:
        return f"{self.key}: {self.problem}" + (f"\n  try: {self.fix}" if self.fix else "")


class ConfigErrors(FtlabError):  # noqa: N818 - several of them
    """All that is wrong with one configuration, reported together."""

    exit_code = 2

    def __init__(self, problems: Sequence[ConfigError]):
        self.problems = list(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class Interrupted(KeyboardInterrupt):
    """A signal other than Ctrl-C's asks this process to end now."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(number)


class DataError(FtlabError):
    """The data cannot be read or used; the message names file and row."""

    exit_code = 2


class CheckpointError(FtlabError):
    """A checkpoint, or a file of one, cannot be believed or used; nothing of it was loaded.

    Args:
        path: the file or folder.
        problem: what is wrong with it.
        fix: what to do instead, if anything can help.
    """

    exit_code = 2

    def __init__(self, path: object, problem: str, fix: str | None = None):
        self.path, self.problem, self.fix = str(path), problem, fix
        super().__init__(self.path, problem, fix)

    def __str__(self) -> str:
        return f"{self.path} {self.problem}" + (f"\n  try: {self.fix}" if self.fix else "")


class NonFiniteError(FtlabError):
    """A loss or gradient is NaN or infinite; the message names the step and its samples."""

    exit_code = 3


class OutOfMemoryError(FtlabError):
    """The machine, the container or a limit had no memory left for the run."""


class NotEnoughMemoryError(ConfigError):
    """A run that would not fit, refused before anything of it was loaded."""


class KilledError(FtlabError):
    """The process ended without a word: a signal that cannot be caught, or an abort in native code."""


# What native code says when an allocation fails; none of it is a MemoryError in Python.
_NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "std::bad_alloc", "CUDA out of memory")
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE)


def kind_of(error: BaseException) -> str:
    """What went wrong, in one word to filter runs by.

    Returns:
        ``bad_input``, ``diverged``, ``out_of_memory``, ``disk``, ``killed``, ``interrupted``; ``error`` for all else.
    """
    failure = getattr(error, "failure", None)  # of another rank: its first words are what counts
    name, message = (failure.kind, failure.message) if failure is not None else (type(error).__name__, str(error))
    number = error.errno if isinstance(error, OSError) else None
    if "OutOfMemory" in name or "MemoryError" in name or number == errno.ENOMEM:
        return "out_of_memory"
    if any(words in message for words in _NO_MEMORY):
        return "out_of_memory"
    if name == NonFiniteError.__name__:
        return "diverged"
    if name in ("KilledError", "Lost"):
        return "killed"
    if isinstance(error, KeyboardInterrupt) or (failure is not None and failure.interrupted):
        return "interrupted"
    if name == "SaveError" or number in OF_THE_DISK:
        return "disk"
    return "bad_input" if getattr(error, "exit_code", 1) == 2 else "error"
