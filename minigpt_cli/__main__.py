"""``minigpt``, and ``python -m minigpt_cli``, which launchers start as workers."""

from minigpt_cli.distributed.join import follow_launcher
from minigpt_cli.stopping import block_signals


def main() -> None:
    block_signals()  # until cli.main() handles them
    follow_launcher()
    from minigpt_cli import cli

    cli.main()


if __name__ == "__main__":
    main()
