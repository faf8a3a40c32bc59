"""Evaluate and sample on the null GPU; print how often the host waits for it, as JSON."""

import json

import numpy as np
import torch

from minigpt_cli.distributed.world import start_world
from minigpt_cli.evaluate.loss import evaluate
from minigpt_cli.generate.engine import generate
from minigpt_cli.generate.sampling import SamplingOptions
from minigpt_cli.model.gpt import GPT, initialize_weights
from minigpt_cli.recipe import parse_recipe
from minigpt_cli.train.trainer import build_context
from tests.nullgpu import counts
from tests.nullgpu.steps import FAMILIES, RECIPE, VOCAB_SIZE


def of_evaluation(model: GPT, batches: int) -> int:
    tokens = np.zeros((4, 65), dtype=np.int64)
    batch = (tokens[:, :-1], tokens[:, 1:], None)
    counts.reset()
    result = evaluate(
        model, [batch] * batches, dtype=torch.bfloat16, token_bytes=None, bytes_per_token=1.0
    )
    assert result is not None
    assert result.tokens == batches * 4 * 64
    return counts.counts().total("wait")


def of_sampling(model: GPT, samples: int, new_tokens: int) -> int:
    counts.reset()
    made = list(
        generate(
            model, [1, 2, 3], SamplingOptions(top_k=5), max_new_tokens=new_tokens,
            num_samples=samples, dtype=torch.bfloat16,
        )
    )  # fmt: skip
    assert len(made) == new_tokens
    return counts.counts().total("wait")


torch.backends.cuda.enable_cudnn_sdp(False)  # the null GPU has no cuDNN
found = {}
for family, settings in FAMILIES.items():
    recipe = parse_recipe(RECIPE, [*settings, "precision.compile=false"])
    model = build_context(recipe, VOCAB_SIZE, start_world()).model
    initialize_weights(model, 0)
    found[family] = {
        "evaluations": [of_evaluation(model, batches) for batches in (1, 5)],
        "samplings": [[of_sampling(model, samples, n) for n in (4, 12)] for samples in (1, 3)],
    }
print(json.dumps(found))
