"""``python -m minigpt_cli``, which is also what torchrun starts."""

from minigpt_cli.cli import main

main()
