"""What only a CUDA GPU shows. Run by scripts/gpu_check.sh; needs no network and no `datasets`."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minigpt_cli.checkpoint import store
from minigpt_cli.data.loader import Batch
from minigpt_cli.distributed.world import start_world
from minigpt_cli.model.attention import causal_attention, has_varlen
from minigpt_cli.model.cost import peak_flops
from minigpt_cli.model.gpt import GPT, initialize_weights
from minigpt_cli.model.segments import segment_boundaries, segment_mask
from minigpt_cli.recipe import Recipe
from minigpt_cli.recipe.schema import LoraSettings
from minigpt_cli.report import metrics
from minigpt_cli.train.loop import fit
from minigpt_cli.train.start import resume_run, start_run
from minigpt_cli.train.step import StepContext, train_step
from minigpt_cli.train.trainer import build_context, warm_up
from tests.helpers.runs import assert_same_run, rewind

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
MakeRecipe = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def default_kernels():
    yield
    torch.use_deterministic_algorithms(False)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics.read(run) if "loss" in line]


@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_it_learns(tmp_path: Path, make_recipe: MakeRecipe, dtype: str, name: str):
    recipe = make_recipe(
        "train.steps=60", f"precision.dtype={dtype}", f"optimizer.name={name}",
        "eval.every_steps=1000", "checkpoint.every_steps=1000",
    )  # fmt: skip
    run, state = start_run(recipe, tmp_path)
    assert run.context.model.embed_tokens.weight.is_cuda
    fit(run, state)
    curve = losses(tmp_path)
    assert curve[-1] < curve[0] - 1.5
    if peak_flops(torch.cuda.get_device_name()):
        assert all(0 < line["mfu"] < 1 for line in metrics.read(tmp_path) if "mfu" in line)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_never_waits_for_the_gpu(tmp_path: Path, make_recipe: MakeRecipe, name: str):
    for dtype, sigma in (("bf16", 100), ("fp16", 100), ("bf16", None)):
        watching = [f"guard.spike_sigma={sigma}", "guard.spike_window=8"] if sigma else []
        recipe = make_recipe(f"precision.dtype={dtype}", f"optimizer.name={name}", *watching)
        run, _ = start_run(recipe, tmp_path / f"{dtype}-{sigma}")
        take_step_without_waits(run.context, run.batches)
        run.resources.close()


@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize("way", ["plain", "dropout", "packed", "lora"])
def test_other_steps_never_wait_for_the_gpu(make_recipe: MakeRecipe, way: str, compiled: str):
    dropout = ["model.dropout=0.1"] if way == "dropout" else []
    recipe = make_recipe(f"precision.compile={compiled}", "precision.dtype=bf16", *dropout)
    if way == "lora":
        recipe = replace(recipe, lora=LoraSettings(base="unused", rank=4, dropout=0.1))
    context = build_context(recipe, 384, start_world())
    initialize_weights(context.model, 0)
    warm_up(context, 32, packed=way == "packed")
    tokens = torch.randint(320, (8, 33), device="cuda")
    segment_ids = torch.arange(32, device="cuda").div(10, rounding_mode="floor").expand(8, 32)
    segments = (segment_ids, [4] * 8) if way == "packed" else (None, None)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], *segments)
    take_step_without_waits(context, lambda step: batch)


def take_step_without_waits(context: StepContext, batches: Callable[[int], Batch]) -> None:
    for step in range(2):
        train_step(context, batches(step), step, 1.0)
    batch = batches(2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(context, batch, 2, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_forced_fp16_overflow_only_skips(tmp_path: Path, make_recipe: MakeRecipe, name: str):
    recipe = make_recipe("precision.dtype=fp16", f"optimizer.name={name}", "train.steps=60")
    run, state = start_run(recipe, tmp_path)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    run = replace(run, context=replace(run.context, scaler=scaler))
    fit(run, state)
    lines = [line for line in metrics.read(tmp_path) if "loss" in line]
    skipped = [line for line in lines if line["grad_norm"] is None]
    assert 5 < len(skipped) < 40
    assert lines[0]["loss_scale"] == 2.0**39
    assert lines[-1]["loss_scale"] < 2.0**30
    assert lines[len(skipped)]["loss"] == pytest.approx(lines[0]["loss"], abs=0.2)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5


def test_compiled_and_eager_agree(
    tmp_path: Path, make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
):
    for name, compiled in (("eager", "false"), ("compiled", "true")):
        recipe = make_recipe("precision.dtype=fp32", f"precision.compile={compiled}")
        fit(*start_run(recipe, tmp_path / name))
    assert "torch.compile failed" not in capsys.readouterr().err
    eager, compiled_losses = losses(tmp_path / "eager"), losses(tmp_path / "compiled")
    assert compiled_losses == pytest.approx(eager, rel=1e-3)


@pytest.mark.parametrize(
    "overrides",
    [
        ("precision.dtype=bf16", "optimizer.name=muon"),
        ("precision.dtype=fp16", "model.dropout=0.1"),
        ("precision.dtype=bf16", "precision.compile=true"),
        ("precision.dtype=bf16", "model.family=gpt2", "model.num_key_value_heads=4"),
    ],
    ids=["bf16-muon", "fp16-dropout", "compiled", "gpt2"],
)
def test_resume_is_bit_exact(tmp_path: Path, make_recipe: MakeRecipe, overrides: tuple[str, ...]):
    recipe = make_recipe(*overrides)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    fit(*start_run(recipe, straight))
    shutil.copytree(straight, resumed)
    rewind(resumed, 4)
    fit(*resume_run(resumed, [], []))
    assert_same_run(straight, resumed, 12)
    assert [step for step, _ in store.list_steps(resumed)] == [4, 8, 12]


def test_a_seed_gives_the_same_weights_on_gpu_and_cpu(tmp_path: Path, make_recipe: MakeRecipe):
    run, _ = start_run(make_recipe(), tmp_path)
    on_cpu = GPT(run.context.model.config)
    initialize_weights(on_cpu, run.recipe.train.seed)
    for p, q in zip(run.context.model.parameters(), on_cpu.parameters(), strict=True):
        assert torch.equal(p.cpu(), q)
    run.resources.close()


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_segments_by_their_boundaries_are_those_of_the_mask(kv_heads: int):
    """Attention and its gradients, in bf16, against the mask in float64."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(2, heads, 200, 64) for heads in (4, kv_heads, kv_heads, 4)]
    q, k, v, weights = (
        torch.randn(shape, device="cuda", generator=generator).bfloat16() for shape in shapes
    )
    ids = torch.zeros((2, 200), dtype=torch.int64, device="cuda")
    for row, ends in enumerate(((3, 130, 131, 190), (77,))):
        for end in ends:
            ids[row, end:] += 1
    assert has_varlen(q.device, q.dtype, 64, 0.0)

    def results(mask: Tensor, dtype: torch.dtype) -> list[Tensor]:
        parts = [each.to(dtype).requires_grad_() for each in (q, k, v)]
        out = causal_attention(*parts, mask=mask)
        return [out, *torch.autograd.grad(out, parts, weights.to(dtype))]

    expected = results(segment_mask(ids), torch.float64)
    for count in (None, 7):
        found = results(segment_boundaries(ids, count), torch.bfloat16)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_recomputing_changes_little(tmp_path: Path, make_recipe: MakeRecipe, compiled: str):
    """No bit in eager kernels."""
    curves = []
    for mode in ("false", "true", "selective"):
        recipe = make_recipe(
            f"train.activation_checkpointing={mode}", f"precision.compile={compiled}"
        )
        fit(*start_run(recipe, tmp_path / mode))
        curves.append(losses(tmp_path / mode))
    for curve in curves[1:]:
        assert curve == (curves[0] if compiled == "false" else pytest.approx(curves[0], rel=1e-2))
