"""minigpt: pre-train GPT language models from one TOML recipe."""

__version__ = "0.1.0"
