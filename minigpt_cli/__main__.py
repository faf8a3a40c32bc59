"""``minigpt``, and ``python -m minigpt_cli``, which launchers start as ranks."""

import sys

from minigpt_cli.core.console import error_line
from minigpt_cli.core.env_variables import check_omp_num_threads
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.signals import block_signals
from minigpt_cli.distributed.join import follow_launcher


def main() -> None:
    block_signals()  # until cli.main() handles them
    try:
        check_omp_num_threads()
        follow_launcher()
    except UserError as error:
        error_line(str(error))
        sys.exit(error.exit_code)
    from minigpt_cli import cli

    cli.main()


if __name__ == "__main__":
    main()
