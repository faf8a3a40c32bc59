"""Two training steps of a recipe on random tokens, as a run takes them."""

from collections.abc import Callable

import torch
from torch import Tensor

from minigpt_cli.data.loader import Batch
from minigpt_cli.distributed.world import World
from minigpt_cli.model.gpt import Rows, initialize_weights
from minigpt_cli.recipe import Recipe
from minigpt_cli.train.step import train_step
from minigpt_cli.train.trainer import build_context, warm_up


def take_steps(
    recipe: Recipe, vocab_size: int, world: World, fill: Callable[[Tensor, Rows], None]
) -> None:
    context = build_context(recipe, vocab_size, world)
    initialize_weights(context.model, 0, fill)
    warm_up(context, recipe.train.sequence_length)
    shape = (recipe.train.global_batch_size, recipe.train.sequence_length)
    for step in range(2):
        ids = torch.randint(vocab_size, shape)
        train_step(context, Batch(ids, ids, None), step, 1.0)
