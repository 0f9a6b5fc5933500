"""`python -m fastgan.train`: see `--help`."""

import sys
from collections.abc import Sequence

from fastgan.command import run_command


def main(arguments: Sequence[str]) -> int:
    from fastgan.train.config import parse

    def run() -> None:
        from fastgan.train.dry_run import dry_run
        from fastgan.train.loop import Trainer

        config = parse(arguments)
        if config.dry_run:
            dry_run(config)
        else:
            Trainer(config).run()

    from fastgan.train.loop import Interrupted

    try:
        return run_command(run, debug="--debug" in arguments)
    except Interrupted as stop:
        print(f"{stop}; go on with: python -m fastgan.train --resume {stop.run_folder}", file=sys.stderr)
        return stop.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
