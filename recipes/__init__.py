"""The recipes that come with minigpt; installed as ``minigpt_cli.recipes``."""
