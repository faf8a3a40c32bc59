"""What one rank alone meets, all of them act on: bad data, incidents, rollbacks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt_cli.checkpoint import store
from minigpt_cli.report import metrics
from tests.helpers.poison import SPIKES, incidents, poisoned, unused_token
from tests.helpers.ranks import train_many
from tests.helpers.recipes import TINY
from tests.helpers.runs import whole_tensors

STRATEGIES = ("ddp", "fsdp")
UNTIED = ("model.family=gpt2", "model.num_key_value_heads=4", "model.tie_word_embeddings=false")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, regular: Path) -> Path:
    """Runs that roll back, on one process and on 2 ranks."""
    folder = tmp_path_factory.mktemp("guard")
    (folder / "tiny.toml").write_text(TINY.format(data="replaced"))
    noisy = poisoned(regular, folder / "noisy", [24, 25, 26, 27, 28])
    exact = (*SPIKES, "precision.dtype=fp64")
    train_many(1, [job(folder, "single", noisy, *exact)], folder)
    many = [job(folder, each, noisy, *exact, f"distributed.strategy={each}") for each in STRATEGIES]
    train_many(2, many, folder)
    return folder


def job(folder: Path, name: str, data: Path, *overrides: str, **more: Any) -> dict[str, Any]:
    settings = [f"data.path={data}", *overrides]
    return {"recipe": str(folder / "tiny.toml"), "out": str(folder / name),
            "overrides": settings, **more}  # fmt: skip


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_roll_back_together_as_one_process_does(runs: Path, strategy: str):
    one, many = runs / "single", runs / strategy
    (rollback,), (expected,) = incidents(many, "rollback"), incidents(one, "rollback")
    assert rollback["data_passed_over"] == expected["data_passed_over"] == [20, 27]
    for name, count in (("loss", 40), ("grad_norm", 40)):
        losses = [line[name] for line in metrics.read(one) if name in line]
        assert len(losses) == count
        found = [line[name] for line in metrics.read(many) if name in line]
        assert found == pytest.approx(losses, rel=1e-9)
    states = [
        json.loads((run / "checkpoints/step-00000040/state.json").read_text())
        for run in (one, many)
    ]
    for name in ("step", "data_offset", "rollbacks", "rollback_step", "tokens"):
        assert states[0][name] == states[1][name]
    assert states[0]["data_offset"] == 7


def test_nonfinite_on_one_rank(tmp_path: Path, regular: Path):
    (tmp_path / "tiny.toml").write_text(TINY.format(data="replaced"))
    token = unused_token(regular)
    data = poisoned(regular, tmp_path / "bad", [24], token, rows=slice(4, 8))  # rank 1's
    settings = (*SPIKES[2:], *UNTIED, "distributed.strategy=fsdp")
    said = train_many(
        2, [job(tmp_path, "run", data, *settings, ruined_token=token)], tmp_path, code=3
    )
    assert "".join(said).count("minigpt: training diverged: loss or gradient was not finite") == 1
    run = tmp_path / "run"
    (incident,) = incidents(run)
    assert (incident["step"], incident["ranks"]) == (25, [1])
    assert [step for step, _ in store.list_steps(run)] == [10, 20]
    saved = whole_tensors(run / "checkpoints/step-00000020")
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
