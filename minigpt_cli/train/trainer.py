"""A recipe -> a Run, with everything in place but the weights."""

from contextlib import ExitStack
from pathlib import Path

import torch

from minigpt_cli.checkpoint.saver import Saver
from minigpt_cli.checkpoint.state import RunState
from minigpt_cli.core.console import log, warn
from minigpt_cli.core.errors import UserError, first_line
from minigpt_cli.data.loader import BatchLoader
from minigpt_cli.data.sequences import open_data, verify_data
from minigpt_cli.data.tokenizer import eos_id, load_tokenizer, token_byte_lengths
from minigpt_cli.distributed import parallel
from minigpt_cli.distributed.device import device_name, use_deterministic_kernels
from minigpt_cli.distributed.world import World
from minigpt_cli.huggingface.base_model import AuxiliaryFiles
from minigpt_cli.model import lora, precision
from minigpt_cli.model.config import config_from_recipe
from minigpt_cli.model.cost import flops_per_token, parameter_count, peak_flops
from minigpt_cli.model.gpt import GPT
from minigpt_cli.recipe import Recipe
from minigpt_cli.train import guard, optimizer
from minigpt_cli.train.run import Run, Validation
from minigpt_cli.train.samples import Prompts
from minigpt_cli.train.step import StepContext


def build(
    recipe: Recipe,
    directory: Path,
    world: World,
    resources: ExitStack,
    auxiliary_files: AuxiliaryFiles,
) -> tuple[Run, RunState]:
    """Everything but the weights; what must be closed at the end goes to ``resources``."""
    if recipe.data.verify:  # it may read for minutes, and the others wait for no collective
        world.run_on_rank0(lambda: verify_data(recipe))
    data = open_data(recipe)
    device = world.device
    dtype = precision.compute_dtype(recipe.precision, device)
    if len(dtypes := set(world.all_gather_json(str(dtype).removeprefix("torch.")))) > 1:
        raise UserError(
            f"[precision] dtype {recipe.precision.dtype} means {' and '.join(sorted(dtypes))} on "
            "these ranks' devices: set it to what all of them can"
        )
    config = config_from_recipe(recipe, data.vocab_size)
    micro_batch_size = _micro_batch_size(recipe, world)
    if recipe.train.deterministic:
        use_deterministic_kernels(device, recipe.precision.compile)
    wanted = recipe.distributed
    with torch.device("meta"):  # a model too large for one rank is never whole
        model = GPT(config).to(precision.weights_dtype(dtype))
    if recipe.lora is not None:
        lora.attach(model, recipe.lora)
        round_frozen(model, dtype)
    whole, trained = count(model)
    layout = parallel.choose_parallel_dims(
        world,
        wanted.strategy,
        wanted.shard_size,
        parallel.BYTES_PER_PARAMETER * trained + parallel.BYTES_PER_FROZEN * (whole - trained),
    )
    model.checkpoint_activations = recipe.train.activation_checkpointing
    if recipe.precision.compile:
        compile_blocks(model)
    parallel.apply_fsdp(model, model.layers, layout, dtype)
    model.to_empty(device=device)
    model.train()
    trainer = StepContext(
        model=model,
        forward=parallel.apply_ddp(model, layout),
        parallel_dims=layout,
        optimizers=optimizer.build(model, recipe.optimizer),
        scaler=precision.grad_scaler(dtype, device),
        guard=guard.new_guard(device, recipe.guard),
        dtype=dtype,
        seed=recipe.train.seed,
        micro_batch_size=micro_batch_size,
        clip_norm=recipe.optimizer.clip_norm,
        dropout=bool(config.dropout or (recipe.lora is not None and recipe.lora.dropout)),
    )
    tokenizer = load_tokenizer(data.tokenizer_file)
    batches = BatchLoader(
        data.train,
        seed=recipe.train.seed,
        global_batch_size=recipe.train.global_batch_size,
        share=_share(recipe, world),
        device=device,
    )
    resources.callback(batches.close)
    saver = resources.enter_context(Saver(directory, world, recipe.checkpoint))
    run = Run(
        recipe=recipe,
        directory=directory,
        world=world,
        context=trainer,
        batches=batches,
        validation=Validation(data.val, token_byte_lengths(tokenizer), data.bytes_per_token)
        if data.val is not None
        else None,
        prompts=Prompts(
            recipe.eval.prompts,
            tokenizer,
            eos_id(tokenizer),
            recipe.eval.prompt_tokens,
            dtype,
        ),
        metrics=None,
        saver=saver,
        tokenizer_json=data.tokenizer_file.read_bytes(),
        auxiliary_files=auxiliary_files.with_template(data.chat_template),
        flops_per_token=flops_per_token(
            config, recipe.train.sequence_length, trained if recipe.lora else None
        ),
        peak_flops=_peak_flops(world),
        resources=resources,
    )
    log(_summary(run, data.train.num_sequences, trained))
    return run, RunState(dataset=data.fingerprints)


def round_frozen(model: GPT, dtype: torch.dtype) -> None:
    """Keep the blocks' frozen matrices in the dtype that they are computed in.

    Autocast would round them at every use, to the same numbers; embeddings and norms it leaves.
    """
    if dtype in (torch.bfloat16, torch.float16):
        for module in model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                for name in ("weight", "bias"):
                    if (p := getattr(module, name)) is not None:
                        rounded = torch.nn.Parameter(p.to(dtype), requires_grad=False)
                        setattr(module, name, rounded)


def count(model: GPT) -> tuple[int, int]:
    """Parameters, and those of them that are trained."""
    counts = [(p.numel(), p.numel() * p.requires_grad) for p in model.parameters()]
    return sum(whole for whole, _ in counts), sum(trained for _, trained in counts)


def _micro_batch_size(recipe: Recipe, world: World) -> int:
    """Sequences per forward pass of one rank.

    Raises:
        UserError: the global batch can't be shared out evenly.
    """
    whole, micro = recipe.train.global_batch_size, recipe.train.micro_batch_size
    if whole % (world.size * (micro or 1)):
        raise UserError(
            f"[train] global_batch_size {whole} can't be shared out to {world.size} ranks"
            + (f" in micro-batches of {micro}" if micro else "")
            + f": it must be a multiple of {world.size * (micro or 1)}"
        )
    return micro or whole // world.size


def _share(recipe: Recipe, world: World) -> slice:
    """This rank's part of each global batch."""
    each = recipe.train.global_batch_size // world.size
    return slice(world.rank * each, (world.rank + 1) * each)


def _peak_flops(world: World) -> float | None:
    peak = peak_flops(device_name(world.device))
    return None if peak is None else peak * world.size


def compile_blocks(model: GPT) -> None:
    """Compile each block when it first runs.

    The blocks share one compilation. Only ``forward`` is replaced, so that no wrapper's prefix
    gets into the saved names.
    """
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward)


def warm_up(trainer: StepContext, sequence_length: int, packed: bool = False) -> None:
    """Steps on zeros that change nothing, where the first steps are unlike all others.

    DDP arranges its buckets anew after the first backward pass, and so sums in another order: a
    resumed run would differ from one that went straight on. And with torch.compile this finds out
    whether a compiler is there; if not, says so and trains with eager kernels.

    Args:
        packed: rows hold several examples.
    """
    model, device = trainer.model, trainer.parallel_dims.world.device
    compiled = "forward" in vars(model.layers[0])
    shape = (trainer.micro_batch_size, sequence_length)
    zeros = torch.zeros(shape, dtype=torch.int64, device=device)
    inputs = (zeros, zeros, zeros) if packed else (zeros, zeros)

    def step() -> None:
        with precision.autocast(trainer.dtype, device):
            loss = trainer.forward(*inputs)
        loss.backward()
        parallel.zero_grad(model, trainer.parallel_dims)

    if compiled:
        world, reason = trainer.parallel_dims.world, ""
        try:
            if world.size == 1:
                step()
            else:  # a step's collectives would wait for a rank that has no compiler
                torch.compile(lambda x: x.sin() + 1)(zeros[0].float())
        except Exception as error:
            reason = first_line(error)
        if reasons := [each for each in world.all_gather_json(reason) if each]:
            warn(f"torch.compile failed, training goes on without it: {reasons[0]}")
            for layer in model.layers:
                del layer.forward
        elif world.size > 1:
            step()
    if trainer.parallel_dims.strategy == "ddp":
        step()
        step()


def _summary(run: Run, windows: int, trained: int) -> str:
    recipe, model = run.recipe, run.context.model
    size, micro = run.world.size, run.context.micro_batch_size
    accumulation = recipe.train.global_batch_size // (size * micro)
    ranks = f"{size} ranks ({run.context.parallel_dims.strategy}) x " if size > 1 else ""
    epochs = recipe.total_steps * recipe.train.global_batch_size / windows
    whole = parameter_count(model.config)
    share = (
        ""
        if recipe.lora is None
        else (
            f" and {trained:,} of adapters, which are trained ({trained / (whole + trained):.2%})"
        )
    )
    return (
        f"{recipe.model.family}, {whole:,} parameters{share}, vocabulary "
        f"{model.config.vocab_size:,}; {device_name(run.world.device)}, "
        f"{str(run.context.dtype).removeprefix('torch.')}\n"
        f"{recipe.total_steps:,} steps of {recipe.train.global_batch_size} x "
        f"{recipe.train.sequence_length} tokens ({ranks}{accumulation} micro-batches of "
        f"{micro}): {epochs:.2f} epochs of {windows:,} windows"
    )
