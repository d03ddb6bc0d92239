"""The command ``wn21k``: data on stdout, messages and progress bars on stderr; heavy imports inside the commands."""

from __future__ import annotations

import io
import os
import sys

from wn21k_zoo.errors import first_line
from wn21k_zoo.messages import forget_unheard, say

__all__ = ["main"]


def main() -> None:
    """Run the command line; exit codes: 0 done, 1 failed, 2 usage, 3 some items failed, 130 interrupted."""
    # The caller may have closed them, as by >&-; what is written is then discarded.
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115, PTH123
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
    try:
        from wn21k_zoo.cli.app import app

        # JSON is UTF-8, whatever a pipe's encoding; a terminal has its own, which may lack a character.
        if isinstance(sys.stdout, io.TextIOWrapper):
            encoding = None if sys.stdout.isatty() else "utf-8"
            sys.stdout.reconfigure(encoding=encoding, errors="backslashreplace")
        arguments = sys.argv[1:]
        for option in ("--debug", "--offline"):  # allowed anywhere
            if option in arguments:
                arguments = [option, *(argument for argument in arguments if argument != option)]
        app(arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # from --help and --version, which do not reach the group's invoke
        if "--debug" in sys.argv:
            raise
        say(first_line(error))
        sys.exit(1)
    finally:
        forget_unheard()
