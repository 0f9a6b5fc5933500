"""`python -m fastgan.train`: see `--help`. `torchrun --nproc-per-node N -m fastgan.train` trains with N processes."""

import sys
from collections.abc import Sequence

from fastgan.command import run_command
from fastgan.errors import Interrupted


def main(arguments: Sequence[str]) -> int:
    def run() -> None:  # imports within: they take seconds, in which Ctrl-C is to end as it does later
        from fastgan.train.config import parse
        from fastgan.train.processes import joined, only_rank_0_prints

        with joined():
            with only_rank_0_prints():
                config = parse(arguments)
            if config.dry_run:
                from fastgan.train.dry_run import dry_run

                dry_run(config)
            else:
                from fastgan.train.loop import Trainer

                Trainer(config).run()

    try:
        return run_command(run, debug="--debug" in arguments)
    except Interrupted as stop:
        print(f"{stop}; go on with: python -m fastgan.train --resume {stop.run_folder}", file=sys.stderr)
        return stop.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
