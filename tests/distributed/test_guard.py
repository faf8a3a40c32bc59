"""What one rank alone meets, all of them act on: bad data, incidents, rollbacks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt_cli.checkpoint import store
from minigpt_cli.report import metrics
from tests.conftest import TINY
from tests.distributed.conftest import train_many
from tests.distributed.test_elastic import whole_tensors
from tests.train.conftest import SPIKES, incidents, poisoned, unused_token

STRATEGIES = ("ddp", "fsdp")
UNTIED = ("model.family=gpt2", "model.num_key_value_heads=4", "model.tie_word_embeddings=false")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, regular: Path) -> Path:
    """Runs that roll back, on one process and on 2 ranks, and some that diverge on rank 1 alone."""
    folder = tmp_path_factory.mktemp("guard")
    (folder / "tiny.toml").write_text(TINY.format(data="replaced"))
    token = unused_token(regular)
    noisy = poisoned(regular, folder / "noisy", [24, 25, 26, 27, 28])
    second_half = poisoned(regular, folder / "bad", [24], token, rows=slice(4, 8))

    def job(name: str, data: Path, *overrides: str, **more: Any) -> dict[str, Any]:
        settings = [*SPIKES[2:], f"data.path={data}", *overrides]
        return {"recipe": str(folder / "tiny.toml"), "out": str(folder / name),
                "overrides": settings, **more}  # fmt: skip

    exact = (*SPIKES[:2], "precision.dtype=fp64")
    train_many(1, [job("spikes-single", noisy, *exact)], folder)
    jobs = []
    for strategy in STRATEGIES:
        on = f"distributed.strategy={strategy}"
        jobs.append(job(f"spikes-{strategy}", noisy, on, *exact))
        jobs.append(job(f"bad-{strategy}", second_half, on, *UNTIED, ruined_token=token))
    train_many(2, jobs, folder)
    return folder


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_roll_back_together_as_one_process_does(runs: Path, strategy: str):
    one, many = runs / "spikes-single", runs / f"spikes-{strategy}"
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


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_not_finite_on_one_rank_ends_all_and_names_it(runs: Path, strategy: str):
    run = runs / f"bad-{strategy}"
    (incident,) = incidents(run)
    assert (incident["step"], incident["ranks"]) == (25, [1])
    facts = json.loads((run / "ranks.json").read_text())
    (said,) = {rank["diverged"] for rank in facts}
    assert "not finite at step 25" in said
    assert [step for step, _ in store.list_steps(run)] == [10, 20]
    saved = whole_tensors(run / "checkpoints/step-00000020")
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
