"""``minigpt``, and ``python -m minigpt_cli``, which launchers start as ranks."""

from minigpt_cli.core.signals import block_signals
from minigpt_cli.distributed.join import follow_launcher


def main() -> None:
    block_signals()  # until cli.main() handles them
    follow_launcher()
    from minigpt_cli import cli

    cli.main()


if __name__ == "__main__":
    main()
