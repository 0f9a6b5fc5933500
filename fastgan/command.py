"""What all commands share: one clear line and exit code 2 for what the user can mend, 130 for Ctrl-C."""

import errno
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import fastgan
from fastgan.errors import FastganError

# Above a clone named fastgan, Python takes the clone's folder for the package, before an editable install's, and in it
# a folder `build` for our module. Commands therefore import this module before all others.
if getattr(fastgan, "__file__", None) is None:
    folder = next(iter(fastgan.__path__))
    print(
        f"error: {folder} hides the installed package from Python here; run the command inside that folder",
        file=sys.stderr,
    )
    sys.exit(2)


def run_command(main: Callable[[], object], *, debug: bool) -> int:
    """Run `main` and return the exit code; with `debug` errors keep their traceback."""
    try:
        main()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (FastganError, OSError) as error:
        if debug:
            traceback.print_exc()
        print(f"error: {_explain(error)}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; torch is not imported for a name
            raise
        print(f"error: out of memory; lower --batch-size or the widths ({error})".splitlines()[0], file=sys.stderr)
        return 2
    return 0


def run_configured(kind: type[Any], program: str, run: Callable[[Any], object], arguments: Sequence[str]) -> int:
    """`run_command` of `run(config)`, where `config` is a dataclass, with a field `debug`, of what the command line
    says."""
    import tyro

    config = tyro.cli(kind, prog=program, args=list(arguments))
    return run_command(lambda: run(config), debug=config.debug)


def _explain(error: Exception) -> str:
    if not isinstance(error, OSError):
        return str(error)
    advice = {
        errno.ENOSPC: "free some space; a training run goes on with --resume",
        errno.EDQUOT: "free some space; a training run goes on with --resume",
        errno.EACCES: "choose a folder that you may write to",
        errno.EPERM: "choose a folder that you may write to",
        errno.EROFS: "choose a folder that you may write to",
    }.get(error.errno or 0)
    return f"{error.filename or 'file'}: {error.strerror or error}" + (f"; {advice}" if advice else "")
