"""Documents -> a token dataset: bounded memory, all cores, restartable at any moment.

The main process reads, places each document into a split and writes; workers encode. Batches come
back in order, so the bytes written depend on the source and the settings alone: not on the number
of workers, and not on how often the work was killed. ``journal.json`` says how far the shards on
disk go.
"""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt_cli import __version__
from minigpt_cli.core.console import error_line as to_stderr
from minigpt_cli.core.errors import Damaged, UserError
from minigpt_cli.core.files import sha256_of, write_atomically
from minigpt_cli.data.dataset import open_dataset
from minigpt_cli.data.dataset_manifest import (
    JOURNAL,
    MANIFEST,
    SPLITS,
    TOKENIZER,
    DatasetManifest,
    Split,
    shard_problem,
    write_dataset_manifest,
)
from minigpt_cli.data.instruction_dataset import is_instructions
from minigpt_cli.data.tokenizer import (
    eos_id,
    load_tokenizer,
    tokenizer_fingerprint,
    vocabulary_size,
)
from minigpt_cli.prepare.bpe import MIN_VOCAB, train_bpe
from minigpt_cli.prepare.journal import State, read_journal
from minigpt_cli.prepare.pipeline import Work, encode_all, shard_files
from minigpt_cli.prepare.progress import Progress, ProgressReporter
from minigpt_cli.prepare.sources import Source, listing, source_files
from minigpt_cli.prepare.split import SplitPosition, SplitRule, assign_splits, choose_split_rule

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LOCK = ".lock"


def tokenize(
    source: Source,
    out: str | Path,
    *,
    tokenizer_path: str | Path | None = None,
    train_vocab: int | None = None,
    val_fraction: float = 0.05,
    shard_tokens: int = 100_000_000,
    strict: bool = False,
    workers: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> DatasetManifest:
    """Turn ``source`` into a token dataset in the directory ``out``; return what it holds.

    Exactly one of ``tokenizer_path`` (see `load_tokenizer`) and ``train_vocab`` (train a BPE
    tokenizer of that size on the training documents) is given. Every document ends with the
    end-of-text id. About ``val_fraction`` of the documents become validation, by a hash of their
    text; a single document is cut near its end instead (see `placement.py`). ``workers`` defaults
    to the cores this process may use. ``progress`` is called after every batch, ``warn`` with one
    line per bad line (the first 20) and notice; by default warnings go to standard error.

    Killed at any moment, the same call goes on where it was and gives the same bytes. A dataset
    that is complete with these settings is returned at once.

    Raises ``UserError`` when the settings or the source are wrong, ``out`` holds a dataset made
    with other settings, instructions or another tokenizer, another process works in it, or the disk
    is full; ``Damaged`` when finished shards were changed.
    """
    out = Path(out)
    _check_arguments(tokenizer_path, train_vocab, val_fraction, shard_tokens, workers)
    warn = warn or to_stderr
    given = None if tokenizer_path is None else load_tokenizer(tokenizer_path)
    if given is not None:
        eos_id(given)  # refused now rather than after a survey of the corpus
    names_and_sizes, total_bytes = listing(source)
    settings = {
        "source": {key: value for key, value in source.describe().items() if key != "path"},
        "source_files": names_and_sizes,
        "tokenizer": tokenizer_fingerprint(given) if given else f"bpe-{train_vocab}",
        "val_fraction": val_fraction,
        "shard_tokens": shard_tokens,
    }
    tell = ProgressReporter(progress, total_bytes)
    if is_instructions(out):
        raise UserError(f"{out} holds instructions: choose another place, or delete it")
    try:
        if (out / MANIFEST).exists():  # before the lock: a dataset may lie on a read-only disk
            return _finished(out, settings)
        with _locked(out):
            if (out / MANIFEST).exists():
                return _finished(out, settings)
            work, state = _resumed(source, out, strict, settings, warn) or _begun(
                source, out, strict, settings, given, train_vocab, tell
            )
            state = encode_all(work, state, workers or _cores(), tell, warn)
            return _completed(work, state)
    except OSError as error:
        raise _os_problem(error, out) from None


def _begun(
    source: Source,
    out: Path,
    strict: bool,
    settings: dict[str, Any],
    given: "Tokenizer | None",
    train_vocab: int | None,
    tell: ProgressReporter,
) -> tuple[Work, State]:
    """Choose what is validation, make the tokenizer, write the first journal."""
    strays = shard_files(out)
    if strays and not (out / JOURNAL).exists():
        raise UserError(
            f"{out} holds {strays[0].name} but neither {MANIFEST} nor {JOURNAL}: "
            "choose another --out, or delete it"
        )
    if given is not None:
        _check_place(out, given)  # before a survey of the corpus
    modified = _modified(source)  # before the first byte is read
    rule = choose_split_rule(source, strict, settings["val_fraction"])
    tokenizer = given
    if tokenizer is None:
        assert train_vocab is not None
        tokenizer = train_bpe(_training_texts(source, rule, strict, tell), train_vocab)
    if _check_place(out, tokenizer):
        write_atomically(out / TOKENIZER, tokenizer.to_str(pretty=True).encode())
    work = _work(source, out, strict, settings, rule, modified, tokenizer)
    work.journal(State())
    return work, State()


def _check_place(out: Path, tokenizer: "Tokenizer") -> bool:
    """Whether the tokenizer is yet to be written; one of unknown origin is never written over."""
    if (out / JOURNAL).exists() or not (out / TOKENIZER).exists():
        return True
    if tokenizer_fingerprint(load_tokenizer(out / TOKENIZER)) != tokenizer_fingerprint(tokenizer):
        raise UserError(f"{out / TOKENIZER} is another one: choose another place, or delete it")
    return False


def _resumed(
    source: Source,
    out: Path,
    strict: bool,
    settings: dict[str, Any],
    warn: Callable[[str], None],
) -> tuple[Work, State] | None:
    """Return where an interrupted run was; None when there is none."""
    journal = read_journal(out)
    if journal is None:
        return None
    changed = differences(journal.settings, settings)
    modified = _modified(source)
    if not changed and journal.source_modified != modified:
        changed = ["the source's files were written since"]
    state = journal.state
    if changed and not state.tokens:
        warn(f"{out}: beginning anew with other settings ({'; '.join(changed)})")
        return None
    anew = f"delete {out} to begin anew"
    if changed:
        raise UserError(
            f"{out} holds an unfinished dataset with other settings ({'; '.join(changed)}): "
            f"run with the same settings to go on, choose another --out, or {anew}"
        )
    tokenizer = load_tokenizer(out / TOKENIZER)
    work = _work(source, out, strict, settings, journal.rule, modified, tokenizer)
    if work.tokenizer_fingerprint != journal.tokenizer_fingerprint:
        raise Damaged(f"{out / TOKENIZER} was changed since the work began: {anew}")
    for shard in (shard for shards in state.shards for shard in shards):
        problem = shard_problem(out / shard.file, shard, work.dtype, verify=False)
        if problem:
            raise Damaged(f"{out / shard.file}: {problem}; {anew}")
    if state.tokens:
        warn(f"{out}: going on after {sum(state.documents):,} documents, {state.tokens:,} tokens")
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
        raise UserError(
            f"all {splits['val'].documents} documents fell to validation; lower val_fraction"
        )
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
    for leftover in (work.out / JOURNAL, *work.out.glob(".*.tmp")):
        leftover.unlink()
    return manifest


def _finished(out: Path, settings: dict[str, Any]) -> DatasetManifest:
    """Return the complete dataset that is there; ``UserError`` when it was made with other
    settings.
    """
    manifest = open_dataset(out).manifest
    then = dict(manifest.settings)
    if settings["tokenizer"] == manifest.tokenizer_fingerprint:
        then["tokenizer"] = settings["tokenizer"]  # the very tokenizer that was trained here
    changed = differences(then, settings)
    if changed:
        raise UserError(
            f"{out} holds a dataset with other settings ({'; '.join(changed)}): "
            "choose another --out, or delete it"
        )
    return manifest


def _training_texts(
    source: Source, rule: SplitRule, strict: bool, tell: ProgressReporter
) -> Iterator[str]:
    tell.begin("training the tokenizer")
    size = documents = 0
    # What is skipped here is told, and counted, when it is read to be encoded.
    for piece in assign_splits(source, rule, strict, None, SplitPosition()):
        size += len(piece.data)
        documents += piece.last
        if not piece.val:
            yield piece.data.decode(errors="replace")
            tell.read(size, documents)


def _check_arguments(
    tokenizer_path: str | Path | None,
    train_vocab: int | None,
    val_fraction: float,
    shard_tokens: int,
    workers: int | None,
) -> None:
    if (tokenizer_path is None) == (train_vocab is None):
        raise UserError("give either a tokenizer to load or the vocabulary size to train one with")
    if train_vocab is not None and train_vocab < MIN_VOCAB:
        raise UserError(f"a vocabulary of {train_vocab} is too small; ask for at least {MIN_VOCAB}")
    if not 0 <= val_fraction < 1:
        raise UserError(f"val_fraction must be at least 0 and below 1, not {val_fraction}")
    if shard_tokens < 1:
        raise UserError(f"shard_tokens must be positive, not {shard_tokens}")
    if workers is not None and workers < 1:
        raise UserError(f"workers must be positive, not {workers}")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the directory for this process; the system lets go of it however the process ends."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is tokenizing into {out}: wait for it or choose another --out"
            ) from None
        yield


def _modified(source: Source) -> int | None:
    """Return when the source's files were last written (ns); None for a Hugging Face dataset."""
    if source.kind == "huggingface":
        return None
    return max(file.stat().st_mtime_ns for file in source_files(source))


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return, in words, which settings of a run differ from those of another."""
    words = []
    for name in sorted(then.keys() | now.keys()):
        before, after = then.get(name), now.get(name)
        if before == after:
            continue
        if name == "source_files":
            words.append("the source's files have other names or sizes")
        elif name == "tokenizer":
            words.append(f"tokenizer: {str(before)[:12]} -> {str(after)[:12]}")
        else:
            words.append(f"{name}: {before} -> {after}")
    return words


def _os_problem(error: OSError, out: Path) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"the disk of {out} is full: free some space and run the same command again; "
            "it goes on where it was"
        )
    where = error.filename or out
    return UserError(f"can't write to {out}: {where}: {error.strerror}; choose another --out")


def _cores() -> int:
    """Return how many cores this process may use, a container's share counted."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, -(-int(quota) // int(period))))
    except (OSError, ValueError):  # another system, or "max": no limit
        return cores
