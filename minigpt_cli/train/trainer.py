"""Build model, optimizers and step from a recipe and a vocabulary size alone."""

import logging

import torch

from minigpt_cli.core.console import warn
from minigpt_cli.core.errors import UserError, first_line
from minigpt_cli.core.faq import faq
from minigpt_cli.core.memory import is_out_of_memory
from minigpt_cli.distributed import parallel
from minigpt_cli.distributed.device import use_deterministic_kernels, use_tf32
from minigpt_cli.distributed.parallel import ParallelDims
from minigpt_cli.distributed.world import World
from minigpt_cli.model import lora, precision
from minigpt_cli.model.compiled import is_compiled
from minigpt_cli.model.config import config_from_recipe
from minigpt_cli.model.cross_entropy import eager_loss_and_gradient, fused_loss_and_gradient
from minigpt_cli.model.gpt import GPT
from minigpt_cli.recipe import Recipe
from minigpt_cli.train.batch import micro_batch_size_of
from minigpt_cli.train.guard import new_guard
from minigpt_cli.train.optimizer import build_optimizers
from minigpt_cli.train.step import StepContext


def build_context(recipe: Recipe, vocab_size: int, world: World) -> StepContext:
    """Build the context of a training step; every rank calls it.

    Args:
        recipe: its data, run directory, evaluation and checkpoints play no role.
        vocab_size: the tokenizer's; the recipe may ask for a larger one.
        world: this process among the others.

    Returns:
        A context without weights: fill them by ``initialize_weights`` or ``load_base``.

    Raises:
        UserError: the recipe doesn't fit the ranks or their devices.
    """
    dtype = _common_dtype(recipe, world)
    config = config_from_recipe(recipe, vocab_size)
    micro_batch_size = micro_batch_size_of(recipe, world.size)
    compiles = precision.compiles(recipe.precision, world.device)
    if recipe.train.deterministic:
        use_deterministic_kernels(world.device, compiles)
    use_tf32(world.device, recipe.precision.tf32)
    with torch.device("meta"):  # so that a model too large for one rank is never whole
        model = GPT(config).to(precision.weights_dtype(dtype))
    if recipe.lora is not None:
        lora.attach(model, recipe.lora)
        round_frozen(model, dtype)
    dims = _choose_dims(recipe, model, world)
    model.checkpoint_activations = recipe.train.activation_checkpointing
    if compiles:
        compile_blocks(model)
    parallel.apply_fsdp(model, model.layers, model.ends(), dims, dtype)
    model.to_empty(device=world.device)
    model.train()
    return StepContext(
        model=model,
        forward=parallel.apply_ddp(model, dims),
        parallel_dims=dims,
        optimizers=build_optimizers(model, recipe.optimizer),
        scaler=precision.grad_scaler(dtype, world.device),
        guard=new_guard(world.device, recipe.guard),
        dtype=dtype,
        seed=recipe.train.seed,
        micro_batch_size=micro_batch_size,
        clip_norm=recipe.optimizer.clip_norm,
        dropout=bool(config.dropout or (recipe.lora is not None and recipe.lora.dropout)),
    )


def count_parameters(model: GPT) -> tuple[int, int]:
    """Return (all parameters, trainable parameters), over all ranks."""
    counts = [(p.numel(), p.numel() * p.requires_grad) for p in model.parameters()]
    return sum(whole for whole, _ in counts), sum(trained for _, trained in counts)


def round_frozen(model: GPT, dtype: torch.dtype) -> None:
    """Keep the frozen matrices of the blocks in the dtype of matrix products.

    Autocast would round them to the same numbers at every use. It doesn't round embeddings and
    norms, so these stay.

    Args:
        model: with adapters attached; changes in place.
        dtype: of matrix products.
    """
    if dtype in (torch.bfloat16, torch.float16):
        for module in model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                for name in ("weight", "bias"):
                    if (p := getattr(module, name)) is not None:
                        rounded = torch.nn.Parameter(p.to(dtype), requires_grad=False)
                        setattr(module, name, rounded)


def compile_blocks(model: GPT) -> None:
    """Have each block, the last norm and the kernel of the loss compiled when they first run.

    The blocks share one compilation. Only ``forward`` is replaced, so that saved names have no
    wrapper's prefix.
    """
    from torch._dynamo import config  # a second, so only where it is used

    config.optimize_ddp = False  # it would cut a block in two where a bucket of DDP ends
    # It warns of operations in place where blocks are recomputed; they have none.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward)
    model.last_norm = torch.compile(model.last_norm)  # type: ignore[method-assign]
    # dynamic=False: a second size of chunks would make the vocabulary's size a variable.
    model.loss_kernel = torch.compile(fused_loss_and_gradient, dynamic=False)


def use_eager_kernels(model: GPT) -> None:
    """Undo ``compile_blocks``."""
    for layer in model.layers:
        del layer.forward
    vars(model).pop("last_norm", None)
    model.loss_kernel = eager_loss_and_gradient


def warm_up(context: StepContext, sequence_length: int, packed: bool = False) -> None:
    """Run warm-up passes that change no weight.

    DDP rebuilds its buckets after the first backward pass and then sums in another order: without
    a warm-up a resumed run would differ from one that went straight on. With torch.compile this
    also finds out whether a compiler is there; if not, the run goes on with eager kernels.

    Args:
        context: of ``build_context``, with weights.
        sequence_length: tokens per sequence.
        packed: whether sequences hold several examples.

    Raises:
        Exception: the device has too little memory for a pass.
    """
    model, world = context.model, context.parallel_dims.world
    shape = (context.micro_batch_size, sequence_length)
    zeros = torch.zeros(shape, dtype=torch.int64, device=world.device)
    inputs = (zeros, zeros, zeros, len(zeros)) if packed else (zeros, zeros)

    def run_pass() -> None:
        with precision.autocast(context.dtype, world.device):
            loss = context.forward(*inputs)
        loss.backward()
        parallel.zero_grad(model, context.parallel_dims)

    if is_compiled(model):
        reason = ""
        try:
            if world.size == 1:
                run_pass()
            else:  # a pass has collectives, which would wait for a rank without a compiler
                torch.compile(lambda x: x.sin() + 1)(zeros[0].float())
        except Exception as error:
            # It may have failed in the middle of a backward pass.
            parallel.zero_grad(model, context.parallel_dims)
            if is_out_of_memory(error):
                raise
            reason = first_line(error)
        if reasons := [each for each in world.all_gather_json(reason, str) if each]:
            warn(
                f"torch.compile failed, training goes on without it: {reasons[0]} "
                f"{faq('training-is-slow')}"
            )
            use_eager_kernels(model)
        elif world.size > 1:
            run_pass()
    if context.parallel_dims.strategy == "ddp":
        run_pass()
        run_pass()


def _common_dtype(recipe: Recipe, world: World) -> torch.dtype:
    dtype = precision.compute_dtype(recipe.precision, world.device)
    if len(dtypes := set(world.all_gather_json(str(dtype).removeprefix("torch."), str))) > 1:
        raise UserError(
            f"[precision] dtype {recipe.precision.dtype} means {' and '.join(sorted(dtypes))} on "
            "these ranks' devices: set a dtype that all of them support"
        )
    return dtype


def _choose_dims(recipe: Recipe, model: GPT, world: World) -> ParallelDims:
    whole, trained = count_parameters(model)
    settings = recipe.distributed
    return parallel.choose_parallel_dims(
        world,
        settings.strategy,
        settings.shard_size,
        state_bytes=parallel.training_state_bytes(whole, trained),
        gradient_bytes=sum(p.nbytes for p in model.parameters() if p.requires_grad),
    )
