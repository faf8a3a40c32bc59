"""The arithmetic of docs/scale.md against what torch holds, saves and sends."""

from dataclasses import replace

import pytest

from benchmarks import scale_tables
from minigpt_cli.model.config import ModelConfig, model_config
from minigpt_cli.model.cost import parameter_count
from minigpt_cli.model.device_memory import (
    device_memory_needed,
    optimizer_elements,
)
from minigpt_cli.model.traffic import Traffic, device_traffic
from minigpt_cli.model.workload import Workload
from tests.helpers import measure

STRATEGIES = ("ddp", "zero2", "fsdp", "hsdp")


def config(family: str = "llama", **changes: int) -> ModelConfig:
    """Sequences that 4 ranks, let alone 64, can't share evenly."""
    kv_heads = 4 if family == "gpt2" else 2
    sizes = {"vocab_size": 331, "hidden_size": 72, "num_hidden_layers": 3, "head_dim": 18,
             "num_attention_heads": 4, "num_key_value_heads": kv_heads, "intermediate_size": 162,
             "max_position_embeddings": 96}  # fmt: skip
    return model_config(family=family, **(sizes | changes))


def workload(strategy: str = "single", ranks: int = 1, **changes: object) -> Workload:
    shard_size = ranks // 2 if strategy == "hsdp" else None
    made = Workload(strategy, ranks, micro_batch_size=3, sequence_length=90, shard_size=shard_size)
    return replace(made, **changes)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("compute_bytes", [2, 4])
def test_activations_are_what_autograd_saves(family: str, recompute: bool, compute_bytes: int):
    work = workload(compute_bytes=compute_bytes, activation_checkpointing=recompute)
    with measure.kernels_of_a_gpu():
        saved = measure.saved_bytes(config(family), work)
    of_loss = 331 * 72 * 4 + work.tokens * 72 * compute_bytes  # gradients
    of_loss += work.tokens  # which of them count
    assert saved == device_memory_needed(config(family), work).activations + of_loss


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[Workload, list[measure.Held]]:
    """What each of 2 and of 4 real ranks held."""
    found = {}
    for ranks, jobs in (
        (2, [("ddp", "muon"), ("fsdp", "adamw")]),
        (4, [("ddp", "adamw"), ("zero2", "adamw"), ("fsdp", "muon"), ("hsdp", "adamw")]),
    ):
        works = [
            workload(
                strategy, ranks, optimizer=optimizer, accumulation=2 if strategy == "hsdp" else 1
            )
            for strategy, optimizer in jobs
        ]
        held = measure.steps_of_real_ranks(config(), works, tmp_path_factory.mktemp("ranks"))
        found |= dict(zip(works, held, strict=True))
    return found


def test_real_ranks_hold_what_was_expected(real: dict[Workload, list[measure.Held]]):
    """To the byte: the first rank holds most, and a group of shards the model exactly once."""
    count = parameter_count(config())
    assert len(real) == 6
    for work, ranks in real.items():
        expected = device_memory_needed(config(), work)
        assert ranks[0].parameters == expected.parameters, work
        assert ranks[0].gradients == expected.gradients
        assert ranks[0].optimizer == expected.optimizer
        assert sum(rank.parameters for rank in ranks[: work.shards]) == 4 * count
        assert sum(rank.gradients for rank in ranks[: work.shards]) == 4 * count
        of_all = 4 * optimizer_elements(config(), work.optimizer)
        assert sum(rank.optimizer for rank in ranks[: work.shards]) == of_all
        assert all(rank.parameters <= expected.parameters for rank in ranks)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("accumulation", "whole"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize(
    ("recompute", "tied"), [(False, False), (True, False), ("selective", False), (False, True)]
)
def test_the_peak_is_the_allocators(
    strategy: str, accumulation: int, whole: bool, recompute: bool | str, tied: bool
):
    """Within a few percent of a small model, where a CPU's copies of the head weigh most."""
    if strategy == "ddp" and (whole or (tied and accumulation > 1)):
        pytest.skip("the same as without")
    small = config(vocab_size=2048, hidden_size=128, head_dim=32, intermediate_size=384)
    small = replace(small, tie_word_embeddings=tied)
    work = workload(
        strategy, 4, accumulation=accumulation, whole_gradients=whole,
        activation_checkpointing=recompute,
    )  # fmt: skip
    measured = measure.allocated_by_a_rank(small, work)
    assert device_memory_needed(small, work).peak == pytest.approx(measured, rel=0.04)


@pytest.mark.parametrize("model", scale_tables.MODELS)
@pytest.mark.parametrize(
    ("strategy", "ranks", "accumulation", "optimizer"),
    [("ddp", 64, 1, "adamw"), ("zero2", 512, 2, "adamw"), ("fsdp", 64, 2, "muon"),
     ("fsdp", 512, 1, "adamw"), ("hsdp", 64, 1, "adamw"), ("hsdp", 512, 2, "muon")],
)  # fmt: skip
def test_64_and_512_fake_ranks(
    model: str, strategy: str, ranks: int, accumulation: int, optimizer: str
):
    """The shapes of docs/scale.md, two blocks of them: bytes to the byte, the peak within 1%."""
    two_blocks = replace(scale_tables.MODELS[model], num_hidden_layers=2)
    work = Workload(
        strategy, ranks, micro_batch_size=1, sequence_length=4096, accumulation=accumulation,
        shard_size=8 if strategy == "hsdp" else None, optimizer=optimizer,
        whole_gradients=strategy == "zero2",
    )  # fmt: skip
    held, sent = measure.step_without_storage(two_blocks, work)
    expected = device_memory_needed(two_blocks, work)
    assert held.parameters == expected.parameters
    assert held.optimizer == expected.optimizer
    assert sent == device_traffic(two_blocks, work)
    assert expected.peak == pytest.approx(held.peak, rel=0.01)
    if strategy in ("zero2", "fsdp"):  # of a mesh with two sides torch remembers rank 0's groups
        last, _ = measure.step_without_storage(two_blocks, work, rank=ranks - 1)
        assert 0 < last.parameters <= held.parameters
        assert last.peak == pytest.approx(held.peak, rel=0.01)


@pytest.mark.parametrize(("micro_batch_size", "accumulation"), [(1, 1), (4, 1), (1, 2)])
def test_peak_with_recomputing(micro_batch_size: int, accumulation: int):
    eight_blocks = replace(scale_tables.MODELS["7B"], num_hidden_layers=8)
    work = Workload(
        "fsdp", 64, micro_batch_size, 4096, accumulation, activation_checkpointing=True
    )  # fmt: skip
    held, _ = measure.step_without_storage(eight_blocks, work)
    expected = device_memory_needed(eight_blocks, work)
    assert 0.97 < expected.peak / held.peak < 1.07


def test_a_single_device_sends_nothing():
    assert device_traffic(config(), workload(optimizer="muon")) == Traffic()


def test_parameter_counts_are_known_ones():
    """Llama 2 7B's is Meta's; the other follows from its shape by hand."""
    block = 2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192 + 2 * 2048
    assert parameter_count(scale_tables.MODELS["1B"]) == 16 * block + 2 * 32_000 * 2048 + 2048
    assert parameter_count(scale_tables.MODELS["7B"]) == 6_738_415_616


def test_the_page_has_the_tables_of_today():
    page = scale_tables.DOC.read_text()
    for name, table in scale_tables.tables().items():
        assert scale_tables.put(page, name, table) == page, "run python -m benchmarks.scale_tables"
