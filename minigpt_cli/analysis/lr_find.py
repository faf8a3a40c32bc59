"""Find a learning rate: a range test, then short trainings at the candidates, which decide.

A range test alone misleads for transformers: its steepest fall is often far from the best rate. So
each candidate is trained under the recipe's own schedule, from the same weights on the same data,
and the advice is the rate with the lowest measured validation loss.
"""

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minigpt_cli.analysis.range_test import (
    FACTOR,
    RangeTest,
    choose_candidates,
    first_divergence,
    next_candidate,
    read_range_test,
    rising_rates,
    rounded,
)
from minigpt_cli.core.console import log
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.signals import nothing_is_saved
from minigpt_cli.data.dataset_manifest import is_dataset
from minigpt_cli.data.loader import BatchLoader
from minigpt_cli.data.packing import PackedSequences
from minigpt_cli.data.sequences import TrainingData
from minigpt_cli.distributed.parallel import copy_full_tensor
from minigpt_cli.distributed.world import World, start_world
from minigpt_cli.evaluate.loss import evaluate, fixed_sequences, sequence_batches
from minigpt_cli.huggingface.base_model import BaseModel
from minigpt_cli.model import precision
from minigpt_cli.model.gpt import initialize_weights
from minigpt_cli.prepare.from_recipe import prepare_data
from minigpt_cli.recipe import Recipe, ScheduleSettings
from minigpt_cli.train.base_weights import (
    auxiliary_files_of,
    check_base_tokenizer,
    load_recipe_base,
    model_template_of,
    open_recipe_base,
    start_from_base,
)
from minigpt_cli.train.guard import new_guard
from minigpt_cli.train.guard_report import read_guard
from minigpt_cli.train.optimizer import build_optimizers
from minigpt_cli.train.schedule import lr_factor
from minigpt_cli.train.start import open_verified_data
from minigpt_cli.train.start_checks import check_model
from minigpt_cli.train.step import StepContext, train_step
from minigpt_cli.train.trainer import build_context, warm_up

_MOST_EXTRA = 2  # candidates beside the best one
_READ_EVERY = 10  # steps between two looks at the losses: a look waits for the device


@dataclass(frozen=True)
class LrSearch:
    """How to search.

    Attributes:
        first, last: the range test's rates.
        steps: of the range test.
        budget: steps of each candidate.
    """

    first: float
    last: float
    steps: int
    budget: int


@dataclass(frozen=True)
class Candidate:
    """A rate and what a short training with it gave.

    Attributes:
        lr: ``optimizer.lr``.
        val_loss: nats per token at the end; None if it diverged.
        train_loss: mean of the last steps; None if it diverged.
    """

    lr: float
    val_loss: float | None
    train_loss: float | None


@dataclass(frozen=True)
class LrFindings:
    """The result of a search.

    Attributes:
        range_test: what it measured.
        budget: steps that each candidate was trained.
        candidates: by rate, rising.
        best: the candidate with the lowest validation loss; None if all diverged.
        repeats: the best one and the one it replaces, trained with another seed: to see how much
            chance matters.
    """

    range_test: RangeTest
    budget: int
    candidates: list[Candidate]
    best: Candidate | None
    repeats: list[Candidate]


@dataclass(frozen=True)
class _Bench:
    """What all trainings of a search share.

    Attributes:
        recipe: complete, also where it starts from a base.
        base: the model that the weights come from; None: they are drawn from the seed.
        context: without optimizers.
        show: called with what is trained, its steps so far and all its steps.
    """

    recipe: Recipe
    base: BaseModel | None
    data: TrainingData
    context: StepContext
    show: Callable[[str, int, int], None]


def find_lr(recipe: Recipe, search: LrSearch, show: Callable[[str, int, int], None]) -> LrFindings:
    """Search for the learning rate of a recipe; every rank calls it.

    Nothing is written, except the recipe's dataset if it isn't there yet.

    Args:
        recipe: as it was loaded.
        search: how to search.
        show: called with what is trained, its steps so far and all its steps.

    Returns:
        The same findings on every rank.

    Raises:
        UserError: the recipe can't be followed, or there is nothing to validate on.
        Damaged: the dataset is damaged.
    """
    world = start_world(
        recipe.distributed.timeout_minutes, deterministic=recipe.train.deterministic
    )
    recipe, base, data = _open(recipe, world)
    nothing_is_saved()
    if data.val is None:
        raise UserError(
            f"{recipe.data_path}: has no validation sequence, which the advice needs: use more "
            "data, a larger data.source.val_fraction or a shorter train.sequence_length"
        )
    context = replace(build_context(recipe, data.vocab_size, world), optimizers=[])
    bench = _Bench(recipe, base, data, context, show)
    _fill(bench, recipe)
    warm_up(context, recipe.train.sequence_length, isinstance(data.train, PackedSequences))

    log(f"range test: {search.steps} steps, optimizer.lr {search.first:g} to {search.last:g}")
    range_test = _test_range(bench, search)
    if range_test.diverged:
        log(f"range test: diverged after {len(range_test.losses)} steps")
    budget = min(search.budget, recipe.total_steps)
    rates = choose_candidates(range_test.steepest, recipe.optimizer.lr)
    candidates = [_try_rate(bench, rate, budget) for rate in rates]
    for _ in range(_MOST_EXTRA):
        best, tried = _best(candidates), [each.lr for each in candidates]
        if best is None:  # a lower rate may not diverge
            extra: float | None = rounded(tried[0] / FACTOR)
        else:
            extra = next_candidate(tried, best.lr)
        if extra is None:
            break
        candidates.append(_try_rate(bench, extra, budget))
        candidates.sort(key=lambda each: each.lr)
    best = _best(candidates)
    repeats = []
    if best is not None:
        seed = recipe.train.seed + 1
        others = [each for each in candidates if each is not best]
        own = [each for each in others if each.lr == recipe.optimizer.lr and each.val_loss]
        compared = [best, *(own or filter(None, [_best(others)]))]
        repeats = [_try_rate(bench, each.lr, budget, seed) for each in compared]
    return LrFindings(range_test, budget, candidates, best, repeats)


def with_lr(recipe: Recipe, lr: float) -> Recipe:
    """Return a recipe with another ``optimizer.lr``.

    With Muon a ``muon_lr`` that is set changes by the same factor: the search keeps their ratio.
    """
    settings = recipe.optimizer
    if lr == settings.lr:  # a muon_lr with many digits stays as it is
        return recipe
    if settings.name == "muon" and settings.muon_lr is not None:
        muon_lr = settings.muon_lr * (lr / settings.lr)
        settings = replace(settings, muon_lr=float(f"{muon_lr:.3g}"))
    return replace(recipe, optimizer=replace(settings, lr=lr))


def short_schedule(schedule: ScheduleSettings, total: int, budget: int) -> ScheduleSettings:
    """Return a recipe's schedule for a shorter training.

    The decay ends with the training. The warm-up keeps its steps, because what needs it is as long
    in a short training, but takes a quarter of the training at most.

    Args:
        schedule: the recipe's.
        total: steps of the recipe.
        budget: steps of the short training.
    """
    if budget >= total:
        return schedule
    return replace(
        schedule,
        warmup_steps=min(schedule.warmup_steps, budget // 4),
        milestones=tuple(max(1, each * budget // total) for each in schedule.milestones),
    )


def _open(recipe: Recipe, world: World) -> tuple[Recipe, BaseModel | None, TrainingData]:
    """Open base and data as a run does; make the dataset if it isn't there."""
    base, _ = open_recipe_base(recipe, world)
    if base is not None:
        recipe, base = start_from_base(recipe, base)
    template = model_template_of(recipe, auxiliary_files_of(recipe, base))

    def prepare() -> None:
        check_model(recipe)
        if recipe.data.source is not None and not is_dataset(Path(recipe.data_path)):
            log(f"{recipe.data_path}: the dataset isn't there yet; it is made now and stays")
        prepare_data(recipe, template)

    world.run_on_rank0(prepare)
    data = open_verified_data(recipe, world)
    if base is not None:
        check_base_tokenizer(recipe.data_path, base, data.fingerprints["tokenizer"])
    return recipe, base, data


def _test_range(bench: _Bench, search: LrSearch) -> RangeTest:
    rates = rising_rates(search.first, search.last, search.steps)
    peak = bench.recipe.optimizer.lr
    factors = [rate / peak for rate in rates]
    losses, diverged, _ = _train(bench, bench.recipe, factors, "range test")
    return read_range_test(rates, losses, diverged)


def _try_rate(bench: _Bench, lr: float, budget: int, seed: int | None = None) -> Candidate:
    """Train a candidate from the initial weights and evaluate it."""
    recipe = with_lr(bench.recipe, lr)
    if seed is not None:
        recipe = replace(recipe, train=replace(recipe.train, seed=seed))
    schedule = short_schedule(recipe.schedule, recipe.total_steps, budget)
    factors = [lr_factor(schedule, budget, step + 1) for step in range(budget)]
    name = f"optimizer.lr {lr:g}" + ("" if seed is None else ", another seed")
    losses, diverged, context = _train(bench, recipe, factors, name)
    val_loss = None if diverged else _evaluate(bench, context)
    if val_loss is None:
        log(f"{name}: diverged after {len(losses)} steps")
        return Candidate(lr, None, None)
    last = losses[-_READ_EVERY:]
    log(f"{name}: validation loss {val_loss:.4f} after {budget} steps")
    return Candidate(lr, val_loss, sum(last) / len(last))


def _train(
    bench: _Bench, recipe: Recipe, factors: list[float], name: str
) -> tuple[list[float], bool, StepContext]:
    """Train from the initial weights.

    Args:
        recipe: its learning rates and its seed count.
        factors: for each step, what its learning rates are multiplied by.
        name: of this training, to show.

    Returns:
        (the loss of each step until it diverged, whether it did, the context).
    """
    world = bench.context.parallel_dims.world
    _fill(bench, recipe)
    context = replace(
        bench.context,
        optimizers=build_optimizers(bench.context.model, recipe.optimizer),
        scaler=precision.grad_scaler(bench.context.dtype, world.device),
        guard=new_guard(world.device),
        seed=recipe.train.seed,
    )
    per_rank = recipe.train.global_batch_size // world.size
    batches = BatchLoader(
        bench.data.train,
        seed=recipe.train.seed,
        global_batch_size=recipe.train.global_batch_size,
        local_slice=slice(world.rank * per_rank, (world.rank + 1) * per_rank),
        device=world.device,
    )
    losses: list[float] = []
    unread: list[torch.Tensor] = []
    with closing(batches):
        for step, factor in enumerate(factors):
            unread.append(train_step(context, batches(step), step, factor)[0])
            if len(unread) < _READ_EVERY and step + 1 < len(factors):
                continue
            losses += torch.stack(unread).tolist()
            bench.show(name, len(losses), len(factors))
            unread = []
            bad = read_guard(context.guard).steps
            end = bad[0].step - 1 if bad else first_divergence(losses)
            if end is not None:
                return losses[:end], True, context
    return losses, False, context


def _evaluate(bench: _Bench, context: StepContext) -> float | None:
    """Return the validation loss; None if it is not finite."""
    val, world = bench.data.val, context.parallel_dims.world
    assert val is not None
    result = evaluate(
        context.model,
        sequence_batches(
            val,
            fixed_sequences(val.num_sequences, bench.recipe.eval.windows),
            context.micro_batch_size,
            world.rank,
            world.size,
        ),
        dtype=context.dtype,
        token_bytes=None,
        bytes_per_token=bench.data.bytes_per_token,
        world=world,
    )
    assert result is not None
    return result.loss if math.isfinite(result.loss) else None


def _fill(bench: _Bench, recipe: Recipe) -> None:
    """Give the model its initial weights."""
    if bench.base is None:
        initialize_weights(bench.context.model, recipe.train.seed, copy_full_tensor)
    else:
        load_recipe_base(recipe, bench.base, bench.context.model)


def _best(candidates: list[Candidate]) -> Candidate | None:
    measured = [each for each in candidates if each.val_loss is not None]
    return min(measured, key=lambda each: each.val_loss or 0.0) if measured else None
