"""One rank: trains the runs that are listed in a JSON file, one after another, in one world.

Beside each run it leaves ranks.json: what the ranks saw, held and began with. Nothing may be
unpickled meanwhile: it would have come from a socket.
"""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.helpers.unpickled import STACKS  # before torch

# isort: split
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from minigpt_cli.cli import _leave, _report
from minigpt_cli.commands.launching import join_ranks
from minigpt_cli.core.errors import UserError
from minigpt_cli.data.loader import Batch, BatchLoader
from minigpt_cli.distributed import parallel
from minigpt_cli.recipe import load_recipe
from minigpt_cli.train.loop import fit
from minigpt_cli.train.run import Run
from minigpt_cli.train.start import resume_run, start_run


class Recorder:
    """Batches, and a digest of every row that was trained on."""

    def __init__(self, batches: BatchLoader):
        self.batches = batches
        self.sequences = batches.sequences
        self.trained_on: dict[int, list[str]] = {}

    def __call__(self, step: int) -> Batch:
        batch = self.batches(step)
        self.trained_on[step] = [
            hashlib.md5(row.numpy().tobytes()).hexdigest() for row in batch.inputs
        ]
        return batch


def weights_digest(run: Run) -> str:
    digest = hashlib.sha256()
    for parameter in run.context.model.parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        digest.update(whole.detach().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def ruin(run: Run, token: int) -> None:
    """Near float32's limit, so that LayerNorm's mean overflows wherever this token is read."""
    weight = run.context.model.embed_tokens.weight
    whole = weight.full_tensor() if isinstance(weight, DTensor) else weight.clone()
    whole[token] = 3e38
    parallel.copy_full_tensor(weight, whole)


def moments(run: Run) -> list[torch.Tensor]:
    return [
        value
        for optimizer in run.context.optimizers
        for values in optimizer.state.values()
        for value in values.values()
        if isinstance(value, torch.Tensor) and value.ndim
    ]


def held(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in parallel.to_local(tensors))


def train(job: dict[str, Any]) -> None:
    out = Path(job["out"])
    if job.get("resume"):
        run, state = resume_run(out, job["overrides"], [])
    else:
        recipe = load_recipe(Path(job["recipe"]), job["overrides"], name="tiny")
        run, state = start_run(recipe, out)
    if job.get("scatters"):  # in each micro-batch, as models do that are large for their device
        dims = replace(run.context.parallel_dims, whole_gradients=False)
        run = replace(run, context=replace(run.context, parallel_dims=dims))
    facts: dict[str, Any] = {"initial": weights_digest(run)}
    recorder = Recorder(run.batches)
    if "ruined_token" in job:
        ruin(run, job["ruined_token"])
    fit(replace(run, batches=recorder), state)
    facts["rows"] = recorder.trained_on
    facts["parameters"] = sum(p.numel() for p in run.context.model.parameters())
    facts["empty"] = sum(
        not p.numel() for p in parallel.to_local(list(run.context.model.parameters()))
    )
    facts["loss_scale"] = run.context.scaler.get_scale()
    facts["weight_bytes"] = held(list(run.context.model.parameters()))
    facts["moment_bytes"] = held(moments(run))
    of_all = run.world.all_gather_json(facts, dict[str, Any])
    if run.world.rank == 0:
        (out / "ranks.json").write_text(json.dumps(of_all))


def check_nothing_was_unpickled() -> None:
    assert not STACKS, f"{len(STACKS)} times:\n{STACKS[0]}"
    if not dist.is_initialized():
        return
    ranks: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, dist.get_rank())
    assert len(STACKS) >= len(ranks), "an object collective must count"


if __name__ == "__main__":
    join_ranks()
    try:
        for each in json.loads(Path(sys.argv[1]).read_text()):
            train(each)
    except UserError as error:
        _leave(_report(error))
    check_nothing_was_unpickled()
    _leave(0)
