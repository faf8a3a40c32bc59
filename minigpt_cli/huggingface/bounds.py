"""Compare the sizes of a config with the tensors that are there, before a model is built."""

import math
import re

from minigpt_cli.checkpoint.manifest import CheckpointManifest
from minigpt_cli.checkpoint.tensors import WEIGHTS_PREFIX
from minigpt_cli.core.errors import Damaged, UserError
from minigpt_cli.model.config import ModelConfig
from minigpt_cli.model.cost import parameter_count

_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d{1,6})\.")


def check_sizes(
    config: ModelConfig,
    shapes: dict[str, list[int]],
    where: str,
    error: type[UserError] = UserError,
) -> None:
    """Refuse sizes for which the tensors don't suffice: building such a model might never end.

    Args:
        config: What a received file says.
        shapes: Tensor name -> shape, of tensors that are really there.
        where: The file that says it, for the message.
        error: The type of the error.

    Raises:
        UserError: There are more or fewer layers than the config says, or far too few numbers.
    """
    layers = {match[1] for name in shapes if (match := _LAYER.search(name))}
    if len(layers) != config.num_hidden_layers:
        raise error(
            f"{where}: num_hidden_layers is {config.num_hidden_layers:,}, but the weights have "
            f"{len(layers):,} layers"
        )
    needed, held = parameter_count(config), sum(map(math.prod, shapes.values()))
    if needed > 2 * held:  # smaller differences are listed tensor by tensor
        raise error(
            f"{where}: a model of these sizes has {needed:,} parameters, but the weights are "
            f"{held:,} numbers"
        )


def check_checkpoint_sizes(config: ModelConfig, manifest: CheckpointManifest, recipe: str) -> None:
    """Refuse a checkpoint whose recipe or tokenizer has other sizes than its weights.

    Args:
        config: What the recipe says.
        manifest: Of a verified checkpoint without adapters.
        recipe: The recipe's file, for the message.

    Raises:
        Damaged: See ``check_sizes``; or the embeddings have another shape.
    """
    shapes = {
        name: entry["shape"]
        for name, entry in manifest.tensors.items()
        if name.startswith(WEIGHTS_PREFIX)
    }
    check_sizes(config, shapes, recipe, Damaged)
    embeddings = shapes.get(f"{WEIGHTS_PREFIX}embed_tokens.weight")
    if embeddings != [config.vocab_size, config.hidden_size]:
        raise Damaged(
            f"{recipe}: with the tokenizer beside it, embeddings are {config.vocab_size} x "
            f"{config.hidden_size}, but the weights' are {embeddings}"
        )
