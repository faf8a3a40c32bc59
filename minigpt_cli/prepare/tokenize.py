"""Turn documents into a token dataset, with bounded memory, on all cores.

The work can be killed at any moment. The same call continues it: ``journal.json`` records how far
the shards on disk go.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt_cli import __version__
from minigpt_cli.core.console import counted, error_line
from minigpt_cli.core.constants import SHARD_TOKENS
from minigpt_cli.core.errors import Damaged, UserError
from minigpt_cli.core.files import sha256_of, write_atomically
from minigpt_cli.data.dataset_manifest import (
    JOURNAL,
    MANIFEST,
    SPLITS,
    TEMPORARY,
    TOKENIZER,
    DatasetManifest,
    Split,
    is_dataset,
    write_dataset_manifest,
)
from minigpt_cli.data.file_checks import shard_problem
from minigpt_cli.data.tokenizer import (
    eos_id,
    load_tokenizer,
    tokenizer_fingerprint,
    vocabulary_size,
)
from minigpt_cli.prepare.bpe import check_vocab_size, train_bpe
from minigpt_cli.prepare.journal import State, read_journal
from minigpt_cli.prepare.output import (
    differences,
    finished_dataset,
    locked_directory,
    write_error,
)
from minigpt_cli.prepare.pipeline import Work, encode_all, shard_files
from minigpt_cli.prepare.progress import Progress, ProgressReporter
from minigpt_cli.prepare.sources import Source, listing, source_files
from minigpt_cli.prepare.split import SplitPosition, assign_splits
from minigpt_cli.prepare.split_rule import SplitRule, choose_split_rule

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def tokenize(
    source: Source,
    out: str | Path,
    *,
    tokenizer_path: str | Path | None = None,
    train_vocab: int | None = None,
    val_fraction: float = 0.05,
    shard_tokens: int = SHARD_TOKENS,
    strict: bool = False,
    workers: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> DatasetManifest:
    """Turn ``source`` into a dataset of text in the directory ``out``.

    Every document ends with the end-of-text id. After a kill, the same call continues and gives the
    same bytes. A dataset that is there already, made with the same settings, is returned at once.

    Args:
        source: where the documents come from.
        out: the dataset's directory.
        tokenizer_path: the tokenizer to use, see `load_tokenizer`. Exactly one of
            ``tokenizer_path`` and ``train_vocab`` is given.
        train_vocab: train a BPE tokenizer of this size on the training documents.
        val_fraction: this share of the text becomes validation, within a tenth: whole documents
            chosen by a hash, or the end of each document, see `split_rule.py`.
        shard_tokens: tokens per file.
        strict: refuse bad lines instead of skipping them.
        workers: processes that encode; None: one per core that this process may use.
        progress: called after every batch.
        warn: called with one line for each notice and each of the first 20 bad lines; None: print
            it to standard error.

    Returns:
        The dataset's manifest.

    Raises:
        UserError: the settings or the source are wrong, ``out`` holds another dataset or another
            tokenizer, another process works in it, or the disk is full.
        Damaged: finished shards were changed.
    """
    out = Path(out)
    _check_arguments(tokenizer_path, train_vocab, val_fraction, shard_tokens, workers)
    warn = warn or error_line
    given = None if tokenizer_path is None else load_tokenizer(tokenizer_path)
    if given is not None:
        eos_id(given)  # fail before the corpus is read
    names_and_sizes, total_bytes = listing(source)
    settings = {
        "source": {key: value for key, value in source.describe().items() if key != "path"},
        "source_files": names_and_sizes,
        "tokenizer": tokenizer_fingerprint(given) if given else f"bpe-{train_vocab}",
        "val_fraction": val_fraction,
        "shard_tokens": shard_tokens,
    }
    reporter = ProgressReporter(progress, total_bytes)
    busy = f"another process is tokenizing into {out}: wait for it, or choose another directory"
    try:
        if is_dataset(out):  # before the lock: a dataset may lie on a read-only disk
            return finished_dataset(out, settings, instructions=False)
        with locked_directory(out, busy):
            if is_dataset(out):
                return finished_dataset(out, settings, instructions=False)
            work, state = _resumed(source, out, strict, settings, warn) or _begun(
                source, out, strict, settings, given, train_vocab, reporter
            )
            reporter.measured(work.rule.total_bytes)
            state = encode_all(work, state, workers or _cores(), reporter, warn)
            return _completed(work, state)
    except OSError as error:
        raise write_error(error, out) from None


def _begun(
    source: Source,
    out: Path,
    strict: bool,
    settings: dict[str, Any],
    given: "Tokenizer | None",
    train_vocab: int | None,
    reporter: ProgressReporter,
) -> tuple[Work, State]:
    """Measure the source, make the tokenizer, write the first journal."""
    strays = shard_files(out)
    if strays and not (out / JOURNAL).exists():
        raise UserError(
            f"{out} holds {strays[0].name} but neither {MANIFEST} nor {JOURNAL}: "
            "choose another directory (data.path in a recipe), or delete it"
        )
    if given is not None:
        _needs_tokenizer(out, given)  # fail before the corpus is read
    modified = _modified(source)  # before the first byte is read
    reporter.begin("measuring the text")
    rule = choose_split_rule(source, strict, settings["val_fraction"], reporter.read)
    reporter.measured(rule.total_bytes)
    tokenizer = given
    if tokenizer is None:
        assert train_vocab is not None
        reporter.begin("training the tokenizer")
        tokenizer = train_bpe(_training_texts(source, rule, strict, reporter), train_vocab)
    if _needs_tokenizer(out, tokenizer):
        write_atomically(out / TOKENIZER, tokenizer.to_str(pretty=True).encode())
    work = _work(source, out, strict, settings, rule, modified, tokenizer)
    work.journal(State())
    return work, State()


def _needs_tokenizer(out: Path, tokenizer: "Tokenizer") -> bool:
    """Return True if the tokenizer must still be written to ``out``.

    Raises:
        UserError: ``out`` holds another tokenizer, which may be a model's.
    """
    if (out / JOURNAL).exists() or not (out / TOKENIZER).exists():
        return True
    if tokenizer_fingerprint(load_tokenizer(out / TOKENIZER)) != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"{out / TOKENIZER} is another tokenizer: choose another "
            "directory (data.path in a recipe), or delete it"
        )
    return False


def _resumed(
    source: Source,
    out: Path,
    strict: bool,
    settings: dict[str, Any],
    warn: Callable[[str], None],
) -> tuple[Work, State] | None:
    """Return an interrupted work and its state, None if there is nothing to continue."""
    journal = read_journal(out)
    if journal is None:
        return None
    changed = differences(journal.settings, settings)
    modified = _modified(source)
    if not changed and journal.source_modified != modified:
        changed = ["the source's files were written since"]
    state = journal.state
    if changed and not state.tokens:
        warn(f"{out}: starting over with other settings ({'; '.join(changed)})")
        return None
    start_over = f"delete {out} to start over"
    if changed:
        raise UserError(
            f"{out} holds an unfinished dataset with other settings ({'; '.join(changed)}): "
            f"use the same settings to continue, choose another directory, or {start_over}"
        )
    tokenizer = load_tokenizer(out / TOKENIZER)
    if journal.rule.is_of_earlier_version and source.kind == "files":
        strict = True  # it kept invalid bytes, and their documents' hashes would now be others
    work = _work(source, out, strict, settings, journal.rule, modified, tokenizer)
    if work.tokenizer_fingerprint != journal.tokenizer_fingerprint:
        raise Damaged(f"{out / TOKENIZER} was changed since the work began: {start_over}")
    if max(state.pending) >= settings["shard_tokens"]:
        raise Damaged(f"{out / JOURNAL} counts more tokens than a file may hold: {start_over}")
    for shard in (shard for shards in state.shards for shard in shards):
        problem = shard_problem(out / shard.file, shard, work.dtype)
        if problem:
            raise Damaged(f"{out / shard.file}: {problem}; {start_over}")
    if state.tokens:
        done = counted(sum(state.documents), "document"), counted(state.tokens, "token")
        warn(f"{out}: continuing after {', '.join(done)}")
    return work, state


def _work(
    source: Source,
    out: Path,
    strict: bool,
    settings: dict[str, Any],
    rule: SplitRule,
    modified: int | None,
    tokenizer: "Tokenizer",
) -> Work:
    return Work(
        source=source,
        out=out,
        strict=strict,
        settings=settings,
        rule=rule,
        source_modified=modified,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        eos_id=eos_id(tokenizer),
        vocab_size=vocabulary_size(tokenizer),
    )


def _completed(work: Work, state: State) -> DatasetManifest:
    """Write ``dataset.json``."""
    splits = {
        name: Split(shards, sum(shard.tokens for shard in shards), documents, size)
        for name, shards, documents, size in zip(
            SPLITS, state.shards, state.documents, state.bytes, strict=True
        )
    }
    if not splits["train"].tokens:
        raise UserError("all of the text became validation: lower val_fraction, or give more text")
    manifest = DatasetManifest(
        splits=splits,
        eos_id=work.eos_id,
        dtype=work.dtype,
        vocab_size=work.vocab_size,
        tokenizer_fingerprint=work.tokenizer_fingerprint,
        tokenizer_sha256=sha256_of(work.out / TOKENIZER),
        source=work.source.describe(),
        source_fingerprint=state.chain,
        bad_lines=state.place.position.bad,
        settings=work.settings,
        minigpt_version=__version__,
    )
    write_dataset_manifest(work.out, manifest)
    for leftover in (JOURNAL, *TEMPORARY):
        (work.out / leftover).unlink(missing_ok=True)
    return manifest


def _training_texts(
    source: Source, rule: SplitRule, strict: bool, reporter: ProgressReporter
) -> Iterator[str]:
    size = documents = 0
    # Bad lines are reported and counted later, when the text is read to be encoded.
    for piece in assign_splits(source, rule, strict, None, SplitPosition()):
        size += len(piece.data)
        documents += piece.last
        if not piece.val:
            yield piece.data.decode(errors="replace")
            reporter.read(size, documents)


def _check_arguments(
    tokenizer_path: str | Path | None,
    train_vocab: int | None,
    val_fraction: float,
    shard_tokens: int,
    workers: int | None,
) -> None:
    if (tokenizer_path is None) == (train_vocab is None):
        raise UserError("give either --tokenizer PATH, or --vocab-size N to train a tokenizer")
    if train_vocab is not None:
        check_vocab_size(train_vocab)  # before the source is read
    if not 0 <= val_fraction < 1:
        raise UserError(f"val_fraction must be at least 0 and below 1, not {val_fraction}")
    if shard_tokens < 1:
        raise UserError(f"shard_tokens must be positive, not {shard_tokens}")
    if workers is not None and workers < 1:
        raise UserError(f"workers must be positive, not {workers}")


def _modified(source: Source) -> int | None:
    """Return the last modification (ns since the epoch), None for a Hugging Face dataset."""
    if source.kind == "huggingface":
        return None
    return max(file.stat().st_mtime_ns for file in source_files(source))


def _cores() -> int:
    """Return the number of cores that this process may use, within its container's quota."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, -(-int(quota) // int(period))))
    except (OSError, ValueError):  # not Linux, or "max": no limit
        return cores
