"""Saved on some ranks, resumed on others: the same data, the same curve."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt_cli.checkpoint import integrity
from minigpt_cli.report import metrics
from tests.helpers.opens import opens_in
from tests.helpers.ranks import train_many
from tests.helpers.recipes import TINY
from tests.helpers.runs import curve, rewind, whole_tensors

STEPS = 24
COMMON = [f"train.steps={STEPS}", "checkpoint.every_steps=6", "eval.every_steps=12",
          "model.dropout=0.1", "train.micro_batch_size=2"]  # fmt: skip
PRECISIONS = {"fp64": 1e-12, "fp32": 1e-5}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, license_dataset: Path) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    (folder / "tiny.toml").write_text(TINY.format(data=license_dataset))

    def start(name: str, *overrides: str) -> dict[str, Any]:
        return {"recipe": str(folder / "tiny.toml"), "out": str(folder / name),
                "overrides": [*COMMON, *overrides]}  # fmt: skip

    def resume(name: str, step: int, *overrides: str) -> dict[str, Any]:
        rewind(folder / name, step)
        return {"resume": True, "out": str(folder / name), "overrides": list(overrides)}

    def elastic(step: int, *overrides: str) -> list[dict[str, Any]]:
        for precision in PRECISIONS:
            name = f"{precision}-elastic"
            shutil.copy(folder / name / "ranks.json", folder / f"{name}-before-{step}.json")
        return [resume(f"{precision}-elastic", step, *overrides) for precision in PRECISIONS]

    alone = [start(f"{p}-straight", f"precision.dtype={p}") for p in PRECISIONS]
    two = [
        start(f"{p}-elastic", f"precision.dtype={p}", "distributed.strategy=fsdp")
        for p in PRECISIONS
    ]
    same = [f"same-{strategy}" for strategy in ("ddp", "hsdp")]
    fp32 = ("precision.dtype=fp32", "distributed.shard_size=2")
    train_many(2, two, folder)
    train_many(1, [*alone, *elastic(6)], folder)
    train_many(
        4,
        [
            *elastic(12, "distributed.strategy=hsdp", "distributed.shard_size=2"),
            *(start(n, *fp32, f"distributed.strategy={n.removeprefix('same-')}") for n in same),
        ],
        folder,
    )
    for name in same:
        shutil.copytree(folder / name, folder / f"{name}-resumed")
    jobs = [resume(f"{name}-resumed", 12) for name in same]
    with opens_in(folder / "same-hsdp-resumed/checkpoints/step-00000012") as opens:
        train_many(4, jobs, folder)
    (folder / "opens.json").write_text(json.dumps(opens))
    train_many(2, elastic(18, "distributed.strategy=ddp"), folder)
    return folder


@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_ranks_then_one_then_four_then_two(runs: Path, precision: str):
    straight, elastic = runs / f"{precision}-straight", runs / f"{precision}-elastic"
    for name, count in (("loss", STEPS), ("val_loss", 2), ("grad_norm", STEPS)):
        expected = [line[name] for line in metrics.read(straight) if name in line]
        found = [line[name] for line in metrics.read(elastic) if name in line]
        assert len(expected) == count
        tolerance = PRECISIONS[precision] * (10 if name == "grad_norm" else 1)
        assert found == pytest.approx(expected, rel=tolerance, abs=0)
    last = f"checkpoints/step-{STEPS:08d}"
    one, other = whole_tensors(straight / last), whole_tensors(elastic / last)
    assert one.keys() == other.keys()
    worst = max(
        ((one[name] - other[name]).norm() / one[name].norm().clamp(min=1e-30)).item()
        for name in one
    )
    assert worst < (1e-10 if precision == "fp64" else 1e-3)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_data_order_is_uninterrupted(runs: Path, precision: str):
    (straight,) = json.loads((runs / f"{precision}-straight/ranks.json").read_text())
    expected = {int(step): rows for step, rows in straight["rows"].items()}
    assert sorted(expected) == list(range(STEPS))
    files = [runs / f"{precision}-elastic-before-{step}.json" for step in (6, 12, 18)]
    files.append(runs / f"{precision}-elastic/ranks.json")
    for file, ranks, first in zip(files, (2, 1, 4, 2), (0, 6, 12, 18), strict=True):
        facts = json.loads(file.read_text())
        assert len(facts) == ranks
        steps = sorted(map(int, facts[0]["rows"]))
        assert steps == list(range(first, STEPS))
        for step in steps:
            rows = [row for rank in facts for row in rank["rows"][str(step)]]
            assert rows == expected[step]


@pytest.mark.parametrize("strategy", ["ddp", "hsdp"])
def test_on_the_same_four_ranks_it_is_bit_identical(runs: Path, strategy: str):
    straight, resumed = runs / f"same-{strategy}", runs / f"same-{strategy}-resumed"
    last = f"checkpoints/step-{STEPS:08d}"
    one, other = whole_tensors(straight / last), whole_tensors(resumed / last)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert curve(straight) == curve(resumed)


def test_the_manifest_is_read_by_one_rank(runs: Path):
    opens = json.loads((runs / "opens.json").read_text())
    # Once to resume, and later to prune at steps 18 and 24.
    assert 1 <= opens["manifest.json"] <= 3


@pytest.mark.parametrize("strategy", ["ddp", "hsdp"])
def test_ranks_share_what_several_hold(runs: Path, strategy: str):
    """Each value is written once, by a rank that holds it, and each rank writes about as much."""
    checkpoint = runs / f"same-{strategy}/checkpoints/step-{STEPS:08d}"
    assert integrity.verify(checkpoint) == []
    sizes = [
        sum(file.stat().st_size for file in checkpoint.glob(f"shard-{rank:05d}-*.safetensors"))
        for rank in range(1, 5)
    ]
    assert min(sizes) > 0.5 * max(sizes), sizes
