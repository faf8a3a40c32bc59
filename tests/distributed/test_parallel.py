"""However the work is spread over ranks, the run is the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from minigpt_cli.distributed.parallel import apply_fsdp, choose_parallel_dims, fill_own_rows
from minigpt_cli.distributed.world import World
from minigpt_cli.model.config import model_config
from minigpt_cli.model.gpt import GPT, initialize_weights
from minigpt_cli.model.random_rows import BLOCK
from minigpt_cli.report import metrics
from tests.helpers import measure
from tests.helpers.parallel_settings import COMMON, SETTINGS
from tests.helpers.ranks import train_many
from tests.helpers.recipes import TINY


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, license_dataset: Path) -> Path:
    """A folder of finished runs, ``<setting>-<strategy>-<ranks>``."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = folder / "tiny.toml"
    recipe.write_text(TINY.format(data=license_dataset))

    def job(setting: str, strategy: str, ranks: int) -> dict[str, Any]:
        overrides = [*COMMON, *SETTINGS[setting][0]]
        if strategy != "single":
            overrides.append(f"distributed.strategy={strategy}")
        if strategy == "hsdp":
            overrides.append("distributed.shard_size=2")
        out = folder / f"{setting}-{strategy}-{ranks}"
        scatters = setting == "scattered"
        return {
            "recipe": str(recipe), "out": str(out), "overrides": overrides, "scatters": scatters,
        }  # fmt: skip

    train_many(1, [job(setting, "single", 1) for setting in SETTINGS], folder)
    for ranks, place in ((2, 1), (4, 2)):
        jobs = [
            job(setting, strategy, ranks)
            for setting, values in SETTINGS.items()
            for strategy in values[place]  # type: ignore[union-attr]
        ]
        if ranks == 4:
            overflow = job("fp16", "fsdp", ranks)
            overflow["out"] = str(folder / "overflow")
            overflow["overrides"] += ["model.initializer_range=4.0", "optimizer.lr=1e-5"]
            jobs.append(overflow)
        train_many(ranks, jobs, folder)
    return folder


def cases() -> list[tuple[str, str, int]]:
    return [
        (setting, strategy, ranks)
        for setting, (_, on_two, on_four, _) in SETTINGS.items()
        for ranks, strategies in ((2, on_two), (4, on_four))
        for strategy in strategies
    ]


def ranks_of(run: Path) -> list[dict[str, Any]]:
    facts: list[dict[str, Any]] = json.loads((run / "ranks.json").read_text())
    return facts


@pytest.mark.parametrize(("setting", "strategy", "ranks"), cases())
def test_losses_agree_with_one_process(runs: Path, setting: str, strategy: str, ranks: int):
    one = metrics.read(runs / f"{setting}-single-1")
    many = metrics.read(runs / f"{setting}-{strategy}-{ranks}")
    tolerance = SETTINGS[setting][3]
    for name, count in (("loss", 50), ("val_loss", 2)):
        expected = [line[name] for line in one if name in line]
        assert len(expected) == count
        found = [line[name] for line in many if name in line]
        assert found == pytest.approx(expected, rel=tolerance, abs=0)
    assert expected[-1] < 5.6  # it learned something
    norms = [line["grad_norm"] for line in one if "grad_norm" in line]
    assert sum(norm > 0.5 for norm in norms) > 25  # else clipping is not tested


@pytest.mark.parametrize(("setting", "strategy", "ranks"), cases())
def test_data_and_initial_weights_are_the_same(runs: Path, setting: str, strategy: str, ranks: int):
    (one,) = ranks_of(runs / f"{setting}-single-1")
    many = ranks_of(runs / f"{setting}-{strategy}-{ranks}")
    assert {rank["initial"] for rank in many} == {one["initial"]}
    rows = {step: [row for rank in many for row in rank["rows"][step]] for step in one["rows"]}
    assert rows == one["rows"]
    assert len(rows) == 50


def test_sharded_state_shrinks_with_the_ranks(runs: Path):
    """ZeRO: of AdamW's 8 bytes a parameter each rank holds 8 / N, and of the weights 4 / N."""
    (one,) = ranks_of(runs / "fp32-single-1")
    whole = one["parameters"]
    assert (one["weight_bytes"], one["moment_bytes"]) == (4 * whole, 8 * whole)
    for name, shards in (("ddp-4", 1), ("fsdp-2", 2), ("hsdp-4", 2)):
        for rank in ranks_of(runs / f"fp32-{name}"):
            assert rank["weight_bytes"] == pytest.approx(4 * whole / shards, rel=0.01)
            assert rank["moment_bytes"] == pytest.approx(8 * whole / shards, rel=0.01)
    for name, shards in (("zero2-2", 2), ("fsdp-4", 4)):
        for rank in ranks_of(runs / f"fp64-{name}"):
            assert rank["moment_bytes"] == pytest.approx(16 * rank["parameters"] / shards, rel=0.01)


def test_a_rank_may_hold_nothing_of_a_tensor(runs: Path):
    assert [rank["empty"] for rank in ranks_of(runs / "muon-fsdp-4")] == [0, 0, 0, 4]


def test_ranks_agree_on_what_overflows(runs: Path):
    """Each rank sees but its own shards; yet all skip the same updates and scale alike."""
    scales = {rank["loss_scale"] for rank in ranks_of(runs / "overflow")}
    assert len(scales) == 1
    assert scales.pop() < 65536
    lines = [line for line in metrics.read(runs / "overflow") if "loss" in line]
    assert len(lines) == 50
    assert any(line["grad_norm"] is None for line in lines)  # infinite: that update was skipped


class _Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("strategy", ["fsdp", "hsdp"])
def test_a_rank_draws_only_its_rows(strategy: str):
    """Of matrices of several blocks whose rows 3 ranks can't share evenly."""
    sizes = {"vocab_size": 4000, "hidden_size": 400, "num_hidden_layers": 1,
             "num_attention_heads": 4, "max_position_embeddings": 8}  # fmt: skip
    config = model_config(family="llama", tie_word_embeddings=True, **sizes)
    one = GPT(config)
    initialize_weights(one, 5)
    for rank in range(3):
        ranks = 3 if strategy == "fsdp" else 6
        with measure.fake_ranks(ranks, rank):
            dims = choose_parallel_dims(World(rank, ranks, torch.device("cpu")), strategy, 3, 0, 0)
            model = GPT(config)
            apply_fsdp(model, model.layers, model.ends(), dims, torch.float32)
            with _Largest() as largest:
                initialize_weights(model, 5, fill_own_rows)
            assert BLOCK < largest.elements <= -(-4000 // 3) * 400
            for (name, mine), whole in zip(model.named_parameters(), one.parameters(), strict=True):
                own = mine.to_local() if isinstance(mine, DTensor) else mine
                parts = whole.chunk(3)
                expected = parts[rank] if rank < len(parts) else whole[:0]
                assert torch.equal(own, expected), name
