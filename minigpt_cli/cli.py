"""The command line: thin commands, each of which imports what it needs when it runs."""

import contextlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from minigpt_cli import __version__, stopping
from minigpt_cli.distributed.failure import announce_failure
from minigpt_cli.distributed.join import find_rank_info, is_rank0, leave_world, session
from minigpt_cli.errors import Damaged, Stopped, UserError, tell

app = typer.Typer(
    name="minigpt",
    help="Pre-train GPT language models from one TOML recipe.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Out = Annotated[
    Path | None, typer.Option("--out", help="The run directory; default: runs/<recipe's name>.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a recipe's setting."),
]
Nproc = Annotated[
    int | None,
    typer.Option("--nproc", help="Start so many processes on this machine, one per GPU.", min=1),
]
Model = Annotated[
    Path,
    typer.Argument(help="A run, a checkpoint, a Hugging Face directory or Hub id, or an adapter."),
]
Adapter = Annotated[
    Path | None,
    typer.Option(help="For a base: a finetune-lora run, or a directory in PEFT's format."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere.")
    ] = False,
) -> None:
    # Both are handled in main(), before a command is looked for.
    del version, debug


@app.command()
def tokenize(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Text files, globs, .jsonl or .parquet files, a Hugging Face dataset "
            "(a directory or ORG/NAME), or python-stdlib.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The token dataset to make.")],
    train_vocab: Annotated[
        int | None, typer.Option(help="Train a byte-level BPE tokenizer of this size.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="A tokenizer.json, or a directory with vocab.json and merges.txt."),
    ] = None,
    text_field: Annotated[str, typer.Option(help="The field that holds the text.")] = "text",
    split: Annotated[str, typer.Option(help="The split of a Hugging Face dataset.")] = "train",
    config: Annotated[
        str | None, typer.Option(help="The configuration of a Hugging Face dataset.")
    ] = None,
    val_fraction: Annotated[
        float, typer.Option(help="The share of documents for validation.")
    ] = 0.05,
    strict: Annotated[bool, typer.Option(help="A malformed document is an error.")] = False,
    workers: Annotated[int | None, typer.Option(help="Processes; default: all cores.")] = None,
    as_json: Json = False,
) -> None:
    """Make a token dataset from text."""
    from minigpt_cli.data.sources import detect_source
    from minigpt_cli.train.prepare import make_dataset, summary

    manifest = make_dataset(
        detect_source(sources, text_field, split, config),
        out,
        tokenizer_path=tokenizer,
        train_vocab=train_vocab,
        val_fraction=val_fraction,
        strict=strict,
        workers=workers,
    )
    if as_json:
        _print_json(summary(manifest, out))


@app.command()
def pretrain(
    recipe: Annotated[Path, typer.Argument(help="A TOML recipe; see recipes/.")],
    out: Out = None,
    overrides: Overrides = None,
    nproc: Nproc = None,
    as_json: Json = False,
) -> int:
    """Train a model from a recipe, preparing its data first where it isn't there."""
    if _is_launcher(nproc):
        loaded = _load(recipe, overrides)  # an error is shown before any process starts
        return _launch(nproc, _run_directory(loaded, out))
    _join()
    _start(_load(recipe, overrides), recipe, out, as_json)
    return 0


@app.command("finetune-lora")
def finetune_lora(
    recipe: Annotated[Path, typer.Argument(help="A TOML recipe with a section [lora].")],
    out: Out = None,
    overrides: Overrides = None,
    nproc: Nproc = None,
    as_json: Json = False,
) -> int:
    """Train adapters on a frozen base; stops, resumes and saves as pretrain does."""
    if _is_launcher(nproc):
        loaded = _load(recipe, overrides, lora=True)
        return _launch(nproc, _run_directory(loaded, out))
    _join()
    _start(_load(recipe, overrides, lora=True), recipe, out, as_json)
    return 0


def _load(recipe: Path, overrides: list[str] | None, lora: bool = False) -> Any:
    from minigpt_cli import recipe as recipes

    loaded = recipes.load(recipe, overrides)
    if loaded.lora is not None and not lora:
        raise UserError(f"{recipe}: trains adapters, [lora]: run it with minigpt finetune-lora")
    if loaded.lora is None and lora:
        raise UserError(f"{recipe}: has no section [lora]; a whole model is trained by pretrain")
    return loaded


def _run_directory(loaded: Any, out: Path | None) -> Path:
    return out or Path("runs") / loaded.name


def _start(loaded: Any, recipe_file: Path, out: Path | None, as_json: bool) -> None:
    from minigpt_cli.train import setup

    directory = _run_directory(loaded, out)
    setup.check_recipe_is_elsewhere(recipe_file, directory)
    _fit(*setup.start_run(loaded, directory), as_json)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="A run directory, or one checkpoint in it.")],
    overrides: Overrides = None,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SECTION.KEY",
            help="A setting that shaped what was already trained, and may change all the same.",
        ),
    ] = None,
    or_start: Annotated[
        Path | None,
        typer.Option(metavar="RECIPE", help="Where RUN holds no checkpoint yet, start it."),
    ] = None,
    nproc: Nproc = None,
    as_json: Json = False,
) -> int:
    """Go on with a run from its newest valid checkpoint, as if it had never stopped."""
    from minigpt_cli import recipe as recipes

    if _is_launcher(nproc):
        if or_start is not None:
            recipes.load(or_start, overrides)
        return _launch(nproc, run.parent.parent if run.parent.name == "checkpoints" else run)
    _join()
    from minigpt_cli.checkpoint import store
    from minigpt_cli.distributed.world import start_world
    from minigpt_cli.train import setup

    if or_start is not None:
        loaded = recipes.load(or_start, overrides)
        world = start_world(loaded.distributed.timeout_minutes, run)
        if not world.run_on_rank0(
            lambda: store.is_checkpoint(run) or store.holds_a_checkpoint(run)
        ):
            _start(loaded, or_start, run, as_json)
            return 0
    _fit(*setup.resume_run(run, overrides or [], allow_change or []), as_json)
    return 0


def _is_launcher(nproc: int | None) -> bool:
    """Return whether this process starts the ranks of a run, instead of being one."""
    if nproc is None or session.launched:
        return False
    if "TORCHELASTIC_RUN_ID" in os.environ or find_rank_info() is not None:
        raise UserError(
            "--nproc starts processes, but torchrun or srun has started this one: leave out --nproc"
        )
    return nproc > 1


def _launch(nproc: int | None, run: Path) -> int:
    """Run this same command as several processes; return their exit code."""
    from minigpt_cli.distributed.launch import launch

    assert nproc is not None
    return launch(sys.argv[1:], nproc=nproc, run=run)


def _join() -> None:
    """Meet the other ranks, if there are any: from here on rank 0 speaks for all."""
    if find_rank_info() is not None:
        # Silence torch's C++ traces when a peer is lost. Must be set before torch is imported.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from minigpt_cli.distributed.world import join
        from minigpt_cli.report import console

        join()
        if not is_rank0():
            console.be_quiet()


def _fit(run: Any, state: Any, as_json: bool) -> None:
    from minigpt_cli.train.loop import fit

    fit(run, state)
    if as_json and run.world.rank == 0:
        _print_json(
            {
                "run": str(run.directory),
                "step": state.step,
                "tokens": state.tokens,
                "val_loss": state.val_loss,
                "best_val_loss": state.best_val_loss,
                "best_step": state.best_step,
            }
        )


@app.command("eval")
def evaluate(
    model: Model,
    adapter: Adapter = None,
    data: Annotated[
        Path | None, typer.Option(help="A token dataset; default: the one it was trained on.")
    ] = None,
    split: Annotated[str, typer.Option(help="The split of the dataset.")] = "val",
    text: Annotated[Path | None, typer.Option(help="A text file, instead of a dataset.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences at a time.", min=1)] = 8,
    as_json: Json = False,
) -> None:
    """Loss, perplexity and bits per byte on all of a split or a text."""
    from minigpt_cli.commands import evaluate_model

    result = evaluate_model(model, adapter, data, split, text, batch_size)
    if as_json:
        _print_json(result)
    else:
        typer.echo(
            "loss {loss:.4f}  perplexity {perplexity:.2f}  bits per byte {bits_per_byte:.4f}  "
            "over {tokens:,} tokens".format(**result)
        )


@app.command()
def sample(
    model: Annotated[
        Path | None,
        typer.Argument(help="As for eval; default: the newest run under runs/."),
    ] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(help="For a base, as for eval; of several, one after the other."),
    ] = None,
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = "",
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message; the model's template is used.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens at most.", min=1)] = 200,
    num_samples: Annotated[int, typer.Option(help="Completions, made as one batch.", min=1)] = 1,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Only the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="The fewest tokens that hold p.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Tokens at least p times as likely as the likeliest.")
    ] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: repeat less.")] = 1.0,
    greedy: Annotated[bool, typer.Option("--greedy", help="The likeliest token always.")] = False,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends a completion; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed, another text.")] = 0,
    dtype: Annotated[
        Literal["auto", "fp32", "bf16"], typer.Option(help="auto: bf16 on a GPU, else fp32.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Continue a prompt, streamed as it is written."""
    from minigpt_cli.commands import sample_model
    from minigpt_cli.generate.sampling import SamplingOptions

    sampling = SamplingOptions(
        temperature=0.0 if greedy else temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    result = sample_model(
        model,
        adapter or [],
        prompt,
        chat,
        sampling,
        max_new_tokens=max_new_tokens,
        num_samples=num_samples,
        stop=stop or [],
        seed=seed,
        dtype=dtype,
        stream=not as_json,
    )
    if as_json:
        _print_json(result)


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The Hugging Face directory to make.")],
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"], typer.Option(help="What the weights are stored in.")
    ] = "fp32",
    adapter: Adapter = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="The adapter in PEFT's format, not merged.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a model as a Hugging Face directory, proven by reloading it with transformers."""
    from minigpt_cli import commands

    result = commands.export(model, out, dtype, adapter, adapter_only)
    if as_json:
        _print_json(result)


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="A run, a checkpoint or a token dataset.")],
    as_json: Json = False,
) -> None:
    """Check every file against the size and sha256 that were recorded when it was written."""
    from minigpt_cli.checkpoint import store
    from minigpt_cli.data.instructions import is_instructions, verify_instructions
    from minigpt_cli.data.manifest import MANIFEST
    from minigpt_cli.data.shards import verify_dataset

    if (path / MANIFEST).exists():
        checked, damaged = 1, verify_dataset(path)
    elif is_instructions(path):
        checked, damaged = 1, verify_instructions(path)
    else:
        run, checkpoint = store.locate(path)
        checkpoints = [checkpoint] if checkpoint else [p for _, p in store.list_steps(run)]
        checked = len(checkpoints)
        if not checkpoints:
            raise UserError(f"{path}: holds no checkpoint to verify")
        damaged = [problem for each in checkpoints for problem in store.verify(each)]
    if as_json:
        _print_json({"valid": not damaged, "checked": checked, "damaged": damaged})
    elif not damaged:
        typer.echo(f"{path}: valid ({checked} checked)")
    if damaged:
        raise Damaged(f"{path}: " + "; ".join(damaged))


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value))


# --- errors --------------------------------------------------------------------------------------


def main() -> None:
    """Run a command; an error that a user can meet is one line and an exit code."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    if arguments == ["--version"]:
        print(f"minigpt {__version__}")
        sys.exit(0)
    try:
        code = _run(arguments)
    except (Exception, Stopped) as error:
        stopping.ignore_signals()
        if debug:
            traceback.print_exc()
        code = _report(error)
    if session.info is not None:
        _leave(code)
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    """Run a command; returns its exit code. Signals stop it, and are ignored when it is over."""
    try:
        stopping.stop_at_signals()
        code = app(arguments, standalone_mode=False)
        sys.stdout.flush()
    finally:
        stopping.ignore_signals()
    return code if isinstance(code, int) else 0


def _leave(code: int) -> NoReturn:
    """End one of several ranks at once: gloo's threads may abort the interpreter at its exit."""
    leave_world(patience=30 if code == 0 else 4)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def _report_usage(error: Any) -> int:
    """Of an error of typer's about the arguments; without any there is help instead."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        context = getattr(error, "ctx", None)
        command = "minigpt" if context is None else context.command_path
        tell(f"{error.format_message().rstrip('.')} (see {command} --help)")
    return int(error.exit_code)


def _report(error: Exception | Stopped) -> int:
    """Print one line for this error; returns the exit code."""
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        return _report_usage(error)
    if isinstance(error, BrokenPipeError):  # `minigpt ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    outcome = announce_failure(error)
    if outcome.is_shown_here:
        tell(outcome.message)
    return outcome.code
