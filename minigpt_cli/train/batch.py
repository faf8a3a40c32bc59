"""How the global batch is divided among ranks and forward passes. Imports no torch."""

from minigpt_cli.core.errors import UserError
from minigpt_cli.recipe import Recipe


def micro_batch_size_of(recipe: Recipe, ranks: int) -> int:
    """Return the sequences per forward pass of one rank.

    Raises:
        UserError: the global batch can't be divided among the ranks.
    """
    whole, micro = recipe.train.global_batch_size, recipe.train.micro_batch_size
    if whole % (ranks * (micro or 1)):
        raise UserError(
            f"[train] global_batch_size {whole} can't be divided among {ranks} ranks"
            + (f" in micro-batches of {micro}" if micro else "")
            + f": it must be a multiple of {ranks * (micro or 1)}"
        )
    return micro or whole // ranks
