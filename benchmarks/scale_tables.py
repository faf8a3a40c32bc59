"""The tables of docs/scale.md: what a 1B and a 7B model need per GPU on 8, 64 and 512 GPUs.

    python -m benchmarks.scale_tables              # puts the tables into docs/scale.md
    python -m benchmarks.scale_tables --check 1B   # and one that compares it with torch; also 7B,
                                                   # and processes: minutes each, on 2 cores

The arithmetic is that of model/device_memory.py and model/traffic.py. tests/helpers/measure.py is
what it is compared with.
"""

import argparse
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from minigpt_cli.distributed.parallel import holds_whole_gradients
from minigpt_cli.model.config import ModelConfig, model_config
from minigpt_cli.model.cost import flops_per_token, parameter_count, peak_flops
from minigpt_cli.model.device_memory import (
    device_memory_needed,
    optimizer_elements,
)
from minigpt_cli.model.traffic import device_traffic
from minigpt_cli.model.workload import Workload

DOC = Path(__file__).parent.parent / "docs" / "scale.md"
LENGTH, GLOBAL_BATCH, NODE = 4096, 512, 8
MODELS = {
    "1B": model_config(
        family="llama", vocab_size=32_000, hidden_size=2048, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, intermediate_size=8192,
        max_position_embeddings=LENGTH,
    ),
    "7B": model_config(
        family="llama", vocab_size=32_000, hidden_size=4096, num_hidden_layers=32,
        num_attention_heads=32, intermediate_size=11_008, max_position_embeddings=LENGTH,
    ),
}  # fmt: skip
GPUS = {"80 GB": 80e9, "141 GB": 141e9}
USABLE = 0.9  # the rest is for the CUDA context, NCCL's buffers and the allocator's fragments
NVLINK, NETWORK = 450e9, 8 * 50e9  # bytes/s that a GPU sends in a node, and a node to others
HOST_COPY = 25e9  # bytes/s from a GPU to its host's memory
DISKS = (1e9, 2e9, 10e9)  # bytes/s in all
COMPUTE = 0.4 * (peak_flops("H100") or 0)  # FLOP/s


def workloads(config: ModelConfig) -> Iterator[Workload]:
    """One sequence per micro-batch; the more GPUs, the fewer micro-batches each."""
    whole = holds_whole_gradients(4 * parameter_count(config), int(GPUS["80 GB"]))
    for gpus in (8, 64, 512):
        for strategy in ("ddp", "zero2", "fsdp", "hsdp"):
            if strategy == "hsdp" and gpus == NODE:  # nothing to replicate
                continue
            yield Workload(
                strategy, gpus, micro_batch_size=1, sequence_length=LENGTH,
                accumulation=GLOBAL_BATCH // gpus, shard_size=NODE if strategy == "hsdp" else None,
                whole_gradients=whole,
            )  # fmt: skip


def tables() -> dict[str, str]:
    """Name -> Markdown, of all that needs no measuring."""
    made = {"models": models_table(), "checkpoints": checkpoint_table()}
    for name, config in MODELS.items():
        made[f"memory {name}"] = memory_table(config)
        made[f"traffic {name}"] = traffic_table(config)
    return made


def models_table() -> str:
    rows = [
        [
            name, f"{parameter_count(c):,}", c.hidden_size, c.num_hidden_layers,
            f"{c.num_attention_heads} / {c.num_key_value_heads}", c.intermediate_size, c.vocab_size,
        ]
        for name, c in MODELS.items()
    ]  # fmt: skip
    header = ["", "parameters", "hidden", "layers", "heads / kv", "intermediate", "vocabulary"]
    return markdown(header, rows)


def memory_table(config: ModelConfig) -> str:
    rows = []
    for work in workloads(config):
        plain = device_memory_needed(config, work)
        recomputing = device_memory_needed(config, replace(work, activation_checkpointing=True))
        parts = (
            plain.parameters, plain.gradients, plain.optimizer, plain.gathered, plain.activations,
            plain.peak, recomputing.activations, recomputing.peak,
        )  # fmt: skip
        fits = [
            "yes" if plain.peak <= USABLE * size
            else "recomputing" if recomputing.peak <= USABLE * size else "no"
            for size in GPUS.values()
        ]  # fmt: skip
        rows.append([work.world_size, work.strategy, work.accumulation, *map(gb, parts), *fits])
    return markdown(
        ["GPUs", "strategy", "micro-batches", "weights", "gradients", "AdamW", "gathered",
         "activations", "peak", "activations, recomputing", "peak, recomputing",
         *(f"fits {size}" for size in GPUS)],
        rows,
    )  # fmt: skip


def traffic_table(config: ModelConfig) -> str:
    rows = []
    for work in workloads(config):
        sent = device_traffic(config, work)
        muon = device_traffic(config, replace(work, optimizer="muon")).all_to_all
        # A ring through all nodes leaves each once; hsdp's rings between nodes are one per GPU.
        leaving = 0 if work.world_size == NODE else sent.total
        if work.strategy == "hsdp":
            leaving = NODE * sent.all_reduce
        slower = max(sent.total / NVLINK, leaving / NETWORK)
        tokens = GLOBAL_BATCH * LENGTH // work.world_size
        computing = tokens * flops_per_token(config, LENGTH) / COMPUTE
        rows.append([
            work.world_size, work.strategy, work.accumulation, gb(sent.all_gather),
            gb(sent.reduce_scatter), gb(sent.all_reduce), gb(sent.total), gb(leaving),
            f"{slower:.2f}", f"{computing:.2f}", gb(muon),
        ])  # fmt: skip
    return markdown(
        ["GPUs", "strategy", "micro-batches", "all-gather", "reduce-scatter", "all-reduce",
         "sent by a GPU", "leaves a node", "seconds of sending", "seconds of computing",
         "Muon's all-to-all"],
        rows,
    )  # fmt: skip


def checkpoint_table() -> str:
    rows = []
    for name, c in MODELS.items():
        size = 4 * (parameter_count(c) + optimizer_elements(c, "adamw"))
        muon = 4 * (parameter_count(c) + optimizer_elements(c, "muon"))
        copies = [size / shards / HOST_COPY for shards in (1, 8, 64, 512)]
        rows.append(
            [name, gb(size), gb(muon)]
            + [f"{size / rate:.0f} s" for rate in DISKS]
            + [f"{seconds:.2f} s" if seconds >= 0.01 else "< 0.01 s" for seconds in copies]
        )
    return markdown(
        ["", "AdamW, GB", "Muon, GB", *(f"written at {rate / 1e9:.0f} GB/s" for rate in DISKS),
         "blocked: ddp", "8 shards", "64 shards", "512 shards"],
        rows,
    )  # fmt: skip


# --- against torch -------------------------------------------------------------------------------


def fake_ranks_table(config: ModelConfig) -> str:
    """Each strategy on 64 and 512 of torch's fake ranks, at the model's full size."""
    from tests.helpers import measure

    rows = []
    for work in workloads(config):
        if work.world_size == NODE:
            continue
        # DDP's second pass would arrange its buckets anew, which needs tensors with storage.
        most = 1 if work.strategy == "ddp" else 2
        work = replace(work, accumulation=min(most, work.accumulation))
        peaks = []
        for recompute, optimizer in ((False, "adamw"), (True, "muon")):
            work = replace(work, activation_checkpointing=recompute, optimizer=optimizer)
            held, sent = measure.step_without_storage(config, work)
            expected = device_memory_needed(config, work)
            assert held.parameters == expected.parameters
            assert held.optimizer == expected.optimizer
            assert sent == device_traffic(config, work)
            peaks += [gb(expected.peak), gb(held.peak), off(expected.peak / held.peak)]
        rows.append([work.world_size, work.strategy, work.accumulation, *peaks])
        print(*rows[-1], flush=True)
    return markdown(
        ["ranks", "strategy", "micro-batches", "expected", "found", "",
         "recomputing: expected", "found", ""],
        rows,
    )  # fmt: skip


def allocator_table() -> str:
    """The peak of a small model against the allocator's, alone and in real processes."""
    from tests.helpers import measure

    config = model_config(
        family="llama", vocab_size=4096, hidden_size=256, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=704,
        max_position_embeddings=512,
    )  # fmt: skip
    jobs = [
        Workload(
            strategy, 4, micro_batch_size=2, sequence_length=512, accumulation=accumulation,
            shard_size=2 if strategy == "hsdp" else None, activation_checkpointing=recompute,
            whole_gradients=whole,
        )
        for strategy in ("ddp", "zero2", "fsdp", "hsdp")
        for accumulation, whole, recompute in (
            (1, False, False), (1, False, True), (2, False, False), (2, True, False)
        )
        if not (whole and strategy == "ddp")
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        real = measure.steps_of_real_ranks(config, jobs, Path(folder), watch=True)
    rows = []
    for work, ranks in zip(jobs, real, strict=True):
        expected = device_memory_needed(config, work)
        assert ranks[0].parameters == expected.parameters
        assert ranks[0].optimizer == expected.optimizer
        alone = measure.allocated_by_a_rank(config, work)
        rows.append([
            work.strategy, work.accumulation, "yes" if work.whole_gradients else "no",
            "yes" if work.activation_checkpointing else "no",
            mb(expected.peak), mb(alone), off(expected.peak / alone),
            " ".join(mb(rank.peak) for rank in ranks),
        ])  # fmt: skip
        print(*rows[-1], flush=True)
    return markdown(
        ["strategy", "micro-batches", "whole gradients", "recomputing", "expected, MB",
         "allocated, MB", "", "allocated by 4 real ranks, MB"],
        rows,
    )  # fmt: skip


# --- Markdown ------------------------------------------------------------------------------------


def gb(size: float) -> str:
    return f"{size / 1e9:.1f}" if size >= 5e7 or not size else f"{size / 1e9:.2f}"


def mb(size: float) -> str:
    return f"{size / 1e6:.1f}"


def off(ratio: float) -> str:
    """How far the expected is from the found."""
    return f"{round(100 * (ratio - 1), 1) + 0:+.1f}%"


def markdown(header: list[str], rows: list[list[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def put(text: str, name: str, table: str) -> str:
    """The text with another table between the marks of that name."""
    marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
    found, count = re.subn(
        f"{marks[0]}.*?{marks[1]}", f"{marks[0]}\n{table}\n{marks[1]}", text, flags=re.DOTALL
    )
    assert count == 1, f"{DOC} has no place for {name}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", choices=[*MODELS, "processes"])
    check = parser.parse_args().check
    made = tables()
    if check == "processes":
        made["processes"] = allocator_table()
    elif check:
        made[f"fake ranks {check}"] = fake_ranks_table(MODELS[check])
    text = DOC.read_text()
    for name, table in made.items():
        text = put(text, name, table)
    DOC.write_text(text)


if __name__ == "__main__":
    main()
