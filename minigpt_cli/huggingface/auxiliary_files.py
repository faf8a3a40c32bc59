"""The small files beside a model's weights that say how to use it.

They are chat templates, special tokens and generation settings. A run that starts from a model
carries them through its checkpoints (huggingface.json) into its export.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minigpt_cli.core.errors import Damaged, UserError
from minigpt_cli.core.reading import MAX_BYTES, read_json, read_text
from minigpt_cli.core.run_dir import AUXILIARY_FILES
from minigpt_cli.data.chat import (
    CHAT_TEMPLATE,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    ModelTemplate,
    template_and_tokens,
)

GENERATION_CONFIG = "generation_config.json"
_NAMES = (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, CHAT_TEMPLATE, GENERATION_CONFIG)
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LARGEST = 1 << 24  # bytes of such a file
_FORMAT = 1


@dataclass(frozen=True)
class AuxiliaryFiles:
    """The auxiliary files of a model.

    Attributes:
        special_token_ids: Those of config.json: "eos_token_id" -> one id or a list.
        files: File name -> text.
    """

    special_token_ids: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.special_token_ids or self.files)

    def with_template(self, chat_template: str | None) -> "AuxiliaryFiles":
        """Add the chat template that conversations were rendered with; None: change nothing."""
        if chat_template is None:
            return self
        return replace(self, files=self.files | {CHAT_TEMPLATE: chat_template})

    def dump(self) -> bytes:
        """Return the content of huggingface.json."""
        content = {
            "format": _FORMAT,
            "special_tokens": self.special_token_ids,
            "files": self.files,
        }
        return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()

    @contextlib.contextmanager
    def directory(self, tokenizer: Path) -> Iterator[Path]:
        """Give a directory that holds the files, in the ``with`` block.

        Args:
            tokenizer: Its file or directory; if there are no files, this directory is given.
        """
        if not self.files:
            yield tokenizer if tokenizer.is_dir() else tokenizer.parent
            return
        with tempfile.TemporaryDirectory() as folder:
            for name, text in self.files.items():
                (Path(folder) / name).write_text(text, encoding="utf-8")
            yield Path(folder)


def read_auxiliary_files(directory: Path, config: dict[str, Any]) -> AuxiliaryFiles:
    """Read the auxiliary files of a Hugging Face directory.

    Args:
        directory: As transformers writes it.
        config: Its config.json; {} to leave the special tokens out.

    Raises:
        UserError: A file can't be read.
    """
    ids = {name: config[name] for name in _SPECIAL_TOKENS if config.get(name) is not None}
    for name, value in ids.items():
        if not all(type(each) is int for each in (value if isinstance(value, list) else [value])):
            raise UserError(f"{directory}: config.json: {name} must be one token id or a list")
    files = [directory / name for name in _NAMES if (directory / name).is_file()]
    return AuxiliaryFiles(ids, {file.name: read_text(file, limit=_LARGEST) for file in files})


def files_beside(tokenizer: Path) -> dict[str, str]:
    """Return name -> text of the auxiliary files that belong to a tokenizer.

    Args:
        tokenizer: Its file or directory.

    Raises:
        UserError: A file can't be read.
    """
    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    files = read_auxiliary_files(folder, {}).files
    return {name: text for name, text in files.items() if name != GENERATION_CONFIG}


def auxiliary_files_of_checkpoint(checkpoint: Path) -> AuxiliaryFiles:
    """Read the auxiliary files that a checkpoint carries; none if it has no huggingface.json.

    Raises:
        Damaged: ``AuxiliaryFiles.dump`` can't have made it.
    """
    file = checkpoint / AUXILIARY_FILES
    if not file.exists():
        return AuxiliaryFiles()
    content = read_json(file, limit=MAX_BYTES)
    tokens, files = content.get("special_tokens"), content.get("files")
    if not (
        content.get("format", _FORMAT) == _FORMAT  # the first versions wrote no format
        and isinstance(tokens, dict)
        and isinstance(files, dict)
        and tokens.keys() <= set(_SPECIAL_TOKENS)
        and files.keys() <= set(_NAMES)  # other names might lead out of the directory
        and all(isinstance(text, str) for text in files.values())
    ):
        raise Damaged(f"{file}: not written by this version of minigpt, or damaged")
    return AuxiliaryFiles(tokens, files)


def chat_template(tokenizer: Path, auxiliary_files: AuxiliaryFiles) -> ModelTemplate:
    """Return a model's chat template and the special tokens that the template may use.

    Args:
        tokenizer: Its file or directory. Without auxiliary files, the files beside it are read.
        auxiliary_files: The model's.

    Raises:
        UserError: A file can't be read, or the tokenizer has no end-of-text token.
    """
    with auxiliary_files.directory(tokenizer) as folder:
        return template_and_tokens(tokenizer, folder)
