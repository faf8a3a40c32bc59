"""A recipe -> a Run, with everything in place but the weights."""

from contextlib import ExitStack
from pathlib import Path

import torch

from minigpt_cli.checkpoint.base import Companions
from minigpt_cli.checkpoint.saver import Saver
from minigpt_cli.checkpoint.state import RunState
from minigpt_cli.data import tokenizer as tokenizers_
from minigpt_cli.data.batches import Batches
from minigpt_cli.distributed import device as devices
from minigpt_cli.distributed import parallel
from minigpt_cli.distributed.world import World
from minigpt_cli.errors import UserError
from minigpt_cli.model import lora
from minigpt_cli.model.config import config_from_recipe
from minigpt_cli.model.cost import flops_per_token, parameter_count, peak_flops
from minigpt_cli.model.gpt import GPT
from minigpt_cli.recipe import Recipe
from minigpt_cli.report.console import say, warn
from minigpt_cli.train import guard, optimizer, precision
from minigpt_cli.train.data import open_data, verify_data
from minigpt_cli.train.run import Run, Validation
from minigpt_cli.train.samples import Prompts
from minigpt_cli.train.step import Trainer


def build(
    recipe: Recipe,
    directory: Path,
    world: World,
    resources: ExitStack,
    companions: Companions,
) -> tuple[Run, RunState]:
    """Everything but the weights; what must be closed at the end goes to ``resources``."""
    if recipe.data.verify:  # it may read for minutes, and the others wait for no collective
        world.run_on_rank0(lambda: verify_data(recipe))
    data = open_data(recipe)
    device = world.device
    dtype = precision.computing_dtype(recipe.precision, device)
    if len(dtypes := set(world.all_gather_json(str(dtype).removeprefix("torch.")))) > 1:
        raise UserError(
            f"[precision] dtype {recipe.precision.dtype} means {' and '.join(sorted(dtypes))} on "
            "these ranks' devices: set it to what all of them can"
        )
    config = config_from_recipe(recipe, data.vocab_size)
    micro_batch_size = _micro_batch_size(recipe, world)
    if recipe.train.deterministic:
        devices.use_deterministic_kernels(device, recipe.precision.compile)
    wanted = recipe.distributed
    with torch.device("meta"):  # a model too large for one rank is never whole
        model = GPT(config).to(precision.weights_dtype(dtype))
    if recipe.lora is not None:
        lora.attach(model, recipe.lora)
        round_frozen(model, dtype)
    whole, trained = count(model)
    layout = parallel.choose_layout(
        world,
        wanted.strategy,
        wanted.shard_size,
        parallel.BYTES_PER_PARAMETER * trained + parallel.BYTES_PER_FROZEN * (whole - trained),
    )
    model.checkpoint_activations = recipe.train.activation_checkpointing
    if recipe.precision.compile:
        compile_blocks(model)
    parallel.spread(model, model.layers, layout, dtype)
    model.to_empty(device=device)
    model.train()
    trainer = Trainer(
        model=model,
        forward=parallel.replicate(model, layout),
        layout=layout,
        optimizers=optimizer.build(model, recipe.optimizer),
        scaler=precision.grad_scaler(dtype, device),
        guard=guard.new_guard(device, recipe.guard),
        dtype=dtype,
        seed=recipe.train.seed,
        micro_batch_size=micro_batch_size,
        clip_norm=recipe.optimizer.clip_norm,
        dropout=bool(config.dropout or (recipe.lora is not None and recipe.lora.dropout)),
    )
    tokenizer = tokenizers_.load_tokenizer(data.tokenizer_file)
    batches = Batches(
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
        trainer=trainer,
        batches=batches,
        validation=Validation(
            data.val, tokenizers_.token_byte_lengths(tokenizer), data.bytes_per_token
        )
        if data.val is not None
        else None,
        prompts=Prompts(
            recipe.eval.prompts,
            tokenizer,
            tokenizers_.eos_id(tokenizer),
            recipe.eval.prompt_tokens,
            dtype,
        ),
        metrics=None,
        saver=saver,
        tokenizer_json=data.tokenizer_file.read_bytes(),
        companions=companions.with_template(data.chat_template),
        flops_per_token=flops_per_token(
            config, recipe.train.sequence_length, trained if recipe.lora else None
        ),
        peak_flops=_peak_flops(world),
        resources=resources,
    )
    say(_summary(run, data.train.windows, trained))
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
    peak = peak_flops(devices.device_name(world.device))
    return None if peak is None else peak * world.size


def compile_blocks(model: GPT) -> None:
    """Compile each block when it first runs.

    The blocks share one compilation. Only ``forward`` is replaced, so that no wrapper's prefix
    gets into the saved names.
    """
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward)


def warm_up(trainer: Trainer, sequence_length: int, packed: bool = False) -> None:
    """Steps on zeros that change nothing, where the first steps are unlike all others.

    DDP arranges its buckets anew after the first backward pass, and so sums in another order: a
    resumed run would differ from one that went straight on. And with torch.compile this finds out
    whether a compiler is there; if not, says so and trains with eager kernels.

    Args:
        packed: rows hold several examples.
    """
    model, device = trainer.model, trainer.layout.world.device
    compiled = "forward" in vars(model.layers[0])
    shape = (trainer.micro_batch_size, sequence_length)
    zeros = torch.zeros(shape, dtype=torch.int64, device=device)
    inputs = (zeros, zeros, zeros) if packed else (zeros, zeros)

    def step() -> None:
        with precision.autocast(trainer.dtype, device):
            loss = trainer.forward(*inputs)
        loss.backward()
        parallel.clear_gradients(model, trainer.layout)

    if compiled:
        world, reason = trainer.layout.world, ""
        try:
            if world.size == 1:
                step()
            else:  # a step's collectives would wait for a rank that has no compiler
                torch.compile(lambda x: x.sin() + 1)(zeros[0].float())
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
        if reasons := [each for each in world.all_gather_json(reason) if each]:
            warn(f"torch.compile failed, training goes on without it: {reasons[0]}")
            for layer in model.layers:
                del layer.forward
        elif world.size > 1:
            step()
    if trainer.layout.strategy == "ddp":
        step()
        step()


def _summary(run: Run, windows: int, trained: int) -> str:
    recipe, model = run.recipe, run.trainer.model
    size, micro = run.world.size, run.trainer.micro_batch_size
    accumulation = recipe.train.global_batch_size // (size * micro)
    ranks = f"{size} ranks ({run.trainer.layout.strategy}) x " if size > 1 else ""
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
        f"{model.config.vocab_size:,}; {devices.device_name(run.world.device)}, "
        f"{str(run.trainer.dtype).removeprefix('torch.')}\n"
        f"{recipe.total_steps:,} steps of {recipe.train.global_batch_size} x "
        f"{recipe.train.sequence_length} tokens ({ranks}{accumulation} micro-batches of "
        f"{micro}): {epochs:.2f} epochs of {windows:,} windows"
    )
