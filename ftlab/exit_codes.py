"""How a command ends: what it tells the user, and the process's exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable

from ftlab import ctrl_c
from ftlab.errors import FtlabError, Interrupted


def exit_code_of(run: Callable[[], int]) -> int:
    """The exit code of ``run``, with the user's own mistakes told in a line or two."""
    try:
        return run()
    except Interrupted as interrupt:
        return 128 + interrupt.number
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if ctrl_c.came():  # which it is a consequence of
            return 130
        if not isinstance(error, FtlabError):
            raise
        from ftlab.outputs.secrets import mask_secrets  # others may read the log

        print(mask_secrets(str(error)), file=sys.stderr)
        return error.exit_code
