"""A recipe and a starting point -> a Run for fit().

``pretrain`` and ``resume`` differ only here: in where the weights and the state come from.
"""

import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import minigpt_cli
from minigpt_cli import recipe as recipes
from minigpt_cli.checkpoint import state as checkpoint_state
from minigpt_cli.checkpoint import store
from minigpt_cli.checkpoint.state import RunState
from minigpt_cli.data import tokenizer as tokenizers_
from minigpt_cli.data.batches import Batches
from minigpt_cli.data.shards import TokenDataset, open_dataset
from minigpt_cli.distributed import world as worlds
from minigpt_cli.errors import UserError
from minigpt_cli.model.config import config_from_recipe
from minigpt_cli.model.cost import flops_per_token, parameter_count, peak_flops
from minigpt_cli.model.gpt import GPT, initialize
from minigpt_cli.recipe import Recipe
from minigpt_cli.report import metrics
from minigpt_cli.report.console import say, warn
from minigpt_cli.train import guard, optimizer, precision
from minigpt_cli.train.loop import Run, Validation
from minigpt_cli.train.samples import Prompts
from minigpt_cli.train.step import Trainer

RECIPE = "recipe.toml"


def start_run(recipe: Recipe, directory: Path) -> tuple[Run, RunState]:
    """A new run in ``directory``, from random weights.

    Raises:
        UserError: the directory already holds a run's checkpoints, or the recipe can't be followed.
    """
    with ExitStack() as resources:
        resources.enter_context(_claimed(directory))
        check_start(recipe, directory)
        store.sweep(directory)
        run, state = _build(recipe, directory, resources)
        initialize(run.trainer.model, recipe.train.seed)
        metrics.cut_back(directory, -1)
        return _ready(run, resources), state


def check_start(recipe: Recipe, directory: Path) -> None:
    """What can be refused before the data is prepared, which may take hours.

    Raises:
        UserError: the model's sizes don't fit together, or ``directory`` holds a run already.
    """
    config_from_recipe(recipe, vocab_size=1)
    if steps := store.list_steps(directory):
        raise UserError(
            f"{directory} already holds a run at step {steps[-1][0]}: go on with minigpt resume "
            f"{directory}, or choose another --out"
        )


def check_recipe_is_elsewhere(recipe_file: Path, directory: Path) -> None:
    """Refuse to replace the user's recipe by the resolved one that a run keeps of it.

    Raises:
        UserError: the recipe lies where the run would write its own.
    """
    if recipe_file.resolve() == (directory / RECIPE).resolve():
        raise UserError(
            f"{recipe_file} would be overwritten by the run's own copy of it: choose another --out"
        )


def resume_run(path: Path, overrides: list[str], allow_changes: list[str]) -> tuple[Run, RunState]:
    """The run at ``path`` (its directory, or one checkpoint in it) as it stood there.

    Args:
        overrides: ``section.key=value`` settings to change from here on.
        allow_changes: keys among them that alter what was already trained, and may.

    Raises:
        UserError: there is nothing to resume, or a change that isn't allowed.
        Damaged: no checkpoint is valid, or the dataset is not the one trained on.
    """
    with ExitStack() as resources:
        directory, named = store.locate(path)
        if named is not None and named.parent != store.checkpoints_dir(directory):
            raise UserError(f"{named}: to go on from it, put it under RUN/checkpoints/")
        resources.enter_context(_claimed(directory))
        store.sweep(directory)
        _, checkpoint, manifest, passed_over = store.choose(path)
        for problem in passed_over:
            warn(problem)
        # What the last resume of the run changed holds; a checkpoint that is named brings its own.
        source = directory if named is None and (directory / RECIPE).exists() else checkpoint
        old = recipes.load(source / RECIPE, name=directory.name)
        recipe = recipes.load(source / RECIPE, overrides, name=directory.name)
        _check_changes(old, recipe, allow_changes)
        state = checkpoint_state.read_state(checkpoint)
        run, fresh = _build(recipe, directory, resources)
        _check_dataset(recipe, state, fresh, allow_changes)
        checkpoint_state.load_tensors(
            checkpoint, manifest.tensors, run.trainer.model, run.trainer.optimizers
        )
        if state.scaler:
            run.trainer.scaler.load_state_dict(state.scaler)
        run.trainer.guard.skipped += state.skipped
        for step, later in store.list_steps(directory):
            if step > state.step:
                aside = store.set_aside(later)
                say(f"{later.name} is beyond where the run goes on from: now {aside.name}")
        metrics.cut_back(directory, state.step, evaluated=state.evaluated_step == state.step)
        _warn_of_another_machine(run)
        say(f"resuming {directory} from step {state.step} of {recipe.total_steps}")
        return _ready(run, resources), state


@contextmanager
def _claimed(directory: Path) -> Iterator[None]:
    """The run directory, made if need be, and locked: nobody else trains in it.

    Raises:
        UserError: another process does, or it can't be written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{directory}: can't be written to: {error.strerror}") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{directory}: another process is training in it") from None
        yield
    finally:
        os.close(lock)


def _ready(run: Run, resources: ExitStack) -> Run:
    """The run, with its files opened: the last thing before training, since it changes them."""
    _record(run)
    file = metrics.MetricsFile(run.directory)
    resources.callback(file.close)
    return replace(run, metrics=file, resources=resources.pop_all())


def _build(recipe: Recipe, directory: Path, resources: ExitStack) -> tuple[Run, RunState]:
    """Everything but the weights; what must be closed at the end goes to ``resources``."""
    dataset = open_dataset(recipe.data_path, verify=recipe.data.verify)
    world = worlds.start()
    device = world.device
    dtype = precision.computing_dtype(recipe.precision, device)
    config = config_from_recipe(recipe, dataset.manifest.vocab_size)
    if recipe.train.deterministic:
        worlds.use_deterministic_kernels(device, recipe.precision.compile)
    train = dataset.splits["train"]
    length = recipe.train.sequence_length
    if not train.windows(length):
        raise UserError(
            f"{recipe.data_path}: the training split holds {train.tokens:,} tokens, too few for "
            f"one window of train.sequence_length {length} + 1: more text, or shorter sequences"
        )
    model = GPT(config).to(device, precision.weights_dtype(dtype))
    model.checkpoint_activations = recipe.train.activation_checkpointing
    model.train()
    trainer = Trainer(
        model=model,
        optimizers=optimizer.build(model, recipe.optimizer),
        scaler=precision.grad_scaler(dtype, device),
        guard=guard.new_guard(device),
        dtype=dtype,
        seed=recipe.train.seed,
        micro_batch_size=recipe.micro_batch_size,
        clip_norm=recipe.optimizer.clip_norm,
    )
    if recipe.precision.compile:
        compile_blocks(trainer, length, device)
    tokenizer = tokenizers_.load_tokenizer(dataset.tokenizer_file)
    val = dataset.splits["val"]
    if not val.windows(length):
        warn(f"{recipe.data_path}: no validation window of {length} tokens; nothing is evaluated")
    batches = Batches(
        train,
        seed=recipe.train.seed,
        global_batch_size=recipe.train.global_batch_size,
        sequence_length=length,
        share=slice(None),
        device=device,
    )
    resources.callback(batches.close)
    run = Run(
        recipe=recipe,
        directory=directory,
        world=world,
        trainer=trainer,
        batches=batches,
        validation=Validation(
            val,
            tokenizers_.token_byte_lengths(tokenizer),
            dataset.manifest.splits["val"].bytes / val.tokens,
        )
        if val.windows(length)
        else None,
        prompts=Prompts(
            recipe.eval.prompts,
            tokenizer,
            tokenizers_.eos_id(tokenizer),
            recipe.eval.prompt_tokens,
            dtype,
        ),
        metrics=None,
        tokenizer_json=dataset.tokenizer_file.read_bytes(),
        flops_per_token=flops_per_token(config, length),
        peak_flops=peak_flops(worlds.device_name(device)),
        resources=resources,
    )
    say(_summary(run, train.windows(length)))
    return run, RunState(dataset=_fingerprints(dataset))


def compile_blocks(trainer: Trainer, sequence_length: int, device: torch.device) -> None:
    """Compile each block; where that fails, say so and train with eager kernels.

    The blocks share one compilation. Only ``forward`` is replaced, so that no wrapper's prefix
    gets into the saved names. A trial step on zeros finds out whether a compiler is there.
    """
    model = trainer.model
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward)
    shape = (trainer.micro_batch_size, sequence_length)
    trial = torch.zeros(shape, dtype=torch.int64, device=device)
    try:
        with precision.autocast(trainer.dtype, device):
            loss = model(trial, trial)
        loss.backward()
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        warn(f"torch.compile failed, training goes on without it: {reason}")
        for layer in model.layers:
            del layer.forward
    model.zero_grad(set_to_none=True)


def _check_changes(old: Recipe, new: Recipe, allowed: list[str]) -> None:
    """Print what the command line changes; refuse what would alter what was already trained."""
    known = {"data", *recipes.settings(new)}
    if unknown := [key for key in allowed if key not in known]:
        raise UserError(f"--allow-change {unknown[0]}: no such setting")
    never, refused = [], []
    for key, before, after in recipes.differences(old, new):
        say(f"changed: {key} = {after} (was {before})")
        if key in recipes.CHANGED_BY_NAME:
            refused += [] if key in allowed else [key]
        elif key.startswith(recipes.NEVER_CHANGED):
            never.append(key)
    if never:
        raise UserError(
            f"{', '.join(never)} can't change within a run, whose saved tensors would not fit: "
            "start another with minigpt pretrain"
        )
    if refused:
        raise UserError(
            f"{', '.join(refused)} shaped what was already trained; to change it all the same, "
            "add " + " ".join(f"--allow-change {key}" for key in refused)
        )


def _check_dataset(
    recipe: Recipe, state: RunState, fresh: RunState, allow_changes: list[str]
) -> None:
    """Refuse another dataset than the one trained on."""
    for what, before in state.dataset.items():
        if fresh.dataset[what] != before and "data" not in allow_changes:
            raise UserError(
                f"{recipe.data_path}: its {what} is not that of the dataset this run was trained "
                "on; give that one with --set data.path=..., or add --allow-change data"
            )
    state.dataset = fresh.dataset


def _fingerprints(dataset: TokenDataset) -> dict[str, Any]:
    """What must be the same when a run goes on."""
    return {
        "tokenizer": dataset.manifest.tokenizer_fingerprint,
        "content": dataset.manifest.fingerprint,
    }


def _environment(run: Run) -> dict[str, Any]:
    device = run.world.device
    return {
        "minigpt": minigpt_cli.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": worlds.device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "computing_dtype": str(run.trainer.dtype).removeprefix("torch."),
    }


def _warn_of_another_machine(run: Run) -> None:
    """Bit-identity is promised for the same device, threads and torch only."""
    try:
        before = json.loads((run.directory / "environment.json").read_text())
    except (OSError, ValueError):
        return
    now = _environment(run)
    changed = [
        f"{key} {before.get(key)} -> {now[key]}"
        for key in ("torch", "device", "threads", "computing_dtype")
        if before.get(key) != now[key]
    ]
    if changed:
        warn(f"goes on with another {', '.join(changed)}: equal within rounding, not bit for bit")


def _record(run: Run) -> None:
    """Write what the run directory holds beside the checkpoints."""
    environment = json.dumps(_environment(run), indent=2) + "\n"
    try:
        for name, content in {
            RECIPE: recipes.dump(run.recipe).encode(),
            "tokenizer.json": run.tokenizer_json,
            "environment.json": environment.encode(),
        }.items():
            temporary = run.directory / f".{name}"
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(run.directory / name)
    except OSError as error:
        raise UserError(f"{run.directory}: can't be written to: {error.strerror}") from None


def _summary(run: Run, windows: int) -> str:
    recipe, model = run.recipe, run.trainer.model
    accumulation = recipe.train.global_batch_size // recipe.micro_batch_size
    epochs = recipe.total_steps * recipe.train.global_batch_size / windows
    return (
        f"{recipe.model.family}, {parameter_count(model.config):,} parameters, vocabulary "
        f"{model.config.vocab_size:,}; {worlds.device_name(run.world.device)}, "
        f"{str(run.trainer.dtype).removeprefix('torch.')}\n"
        f"{recipe.total_steps:,} steps of {recipe.train.global_batch_size} x "
        f"{recipe.train.sequence_length} tokens ({accumulation} micro-batches of "
        f"{recipe.micro_batch_size}): {epochs:.2f} epochs of {windows:,} windows"
    )
