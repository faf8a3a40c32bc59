"""``minigpt``, and ``python -m minigpt_cli``, which is also what a launcher starts as workers."""

from minigpt_cli.core.signals import block_signals
from minigpt_cli.distributed.watch import follow_launcher


def main() -> None:
    follow_launcher()
    block_signals()  # until cli.main() handles them
    from minigpt_cli import cli

    cli.main()


if __name__ == "__main__":
    main()
