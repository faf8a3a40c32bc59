"""finetune-lora as users run it: stopped and gone on with, on several ranks, on conversations."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from minigpt_cli.data import chat
from minigpt_cli.data.tokenizer import load_tokenizer
from minigpt_cli.huggingface.auxiliary_files import chat_template
from minigpt_cli.huggingface.base_model import open_base, stop_token_ids
from minigpt_cli.huggingface.load import load_model
from minigpt_cli.recipe import load_recipe
from minigpt_cli.report import metrics
from minigpt_cli.train.start import start_run
from minigpt_cli.train.step import train_step
from tests.helpers.models import saved_model
from tests.helpers.processes import fork, minigpt
from tests.helpers.runs import curve, steps_logged, steps_saved
from tests.helpers.waiting import wait_until

RECIPE = """
[data]
path = "{data}"
{source}
[lora]
base = "{base}"
rank = 4
alpha = 8
{lora}
[train]
steps = 12
global_batch_size = 8
micro_batch_size = 4
sequence_length = 32
[optimizer]
lr = 1e-2
weight_decay = 0.0
[precision]
dtype = "fp32"
[checkpoint]
every_steps = 2
keep_last = 100
[eval]
every_steps = 6
[log]
every_steps = 1
"""
CHATS = [
    {"messages": [{"role": "user", "content": f"What is {n} plus {n}?"},
                  {"role": "assistant", "content": f"It is {2 * n}."}]}
    for n in range(30)
] + [{"prompt": "What is a licence? ", "completion": "It " + "grants rights " * 60}]  # fmt: skip


OWN_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}> {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant> {% endif %}"
)


@pytest.fixture
def base(tmp_path: Path, license_dataset: Path) -> Path:
    return saved_model("llama", tmp_path / "base", license_dataset)[1]


def recipe(folder: Path, base: Path, data: Path, source: str = "", lora: str = "") -> Path:
    file = folder / "lora.toml"
    file.write_text(RECIPE.format(data=data, base=base, source=source, lora=lora))
    return file


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final/adapter_model.safetensors")


def assert_same_adapter(one: Path, other: Path) -> None:
    a, b = adapter_of(one), adapter_of(other)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert any(tensor.any() for name, tensor in a.items() if "lora_B" in name)


def finished(*arguments: object) -> str:
    done = minigpt(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_resumed_the_adapters_are_the_same(
    tmp_path: Path,
    base: Path,
    license_dataset: Path,
    ranks: int,
):
    """Bit for bit, with dropout; and only adapters are saved."""
    file = recipe(tmp_path, base, license_dataset, lora="dropout = 0.1\nuse_dora = true")
    nproc = ("--nproc", 2, "--set", "distributed.strategy=fsdp") if ranks == 2 else ()
    said = finished("finetune-lora", file, "--out", tmp_path / "straight", *nproc)
    assert "63,216 parameters and 6,016 of adapters, which are trained (8.69%)" in said
    run = tmp_path / "killed"
    for _ in range(2):
        process = fork(tmp_path / "log.txt", "resume", run, "--or-start", file, *nproc)
        before = steps_logged(run)
        wait_until(lambda: steps_logged(run) >= before + 3, process)  # noqa: B023
        process.kill_all()
        process.wait()
    assert steps_saved(run)
    finished("resume", run, *nproc)
    assert_same_adapter(tmp_path / "straight", run)
    assert curve(tmp_path / "straight") == curve(run)
    saved = sum(f.stat().st_size for f in (run / "checkpoints/step-00000012").glob("*.safetens*"))
    assert 3 * 4 * 6016 < saved < 150_000  # adapters and moments, names and places; not the base


def test_peft_loads_what_a_run_leaves(tmp_path: Path, base: Path, license_dataset: Path):
    file = recipe(tmp_path, base, license_dataset)
    run = tmp_path / "run"
    finished("finetune-lora", file, "--out", run)
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), run / "final"
    ).eval()
    ids = torch.arange(40)[None]
    ours = load_model(run, torch.device("cpu"), [])
    with torch.no_grad():
        torch.testing.assert_close(ours.model(ids), theirs(ids).logits, rtol=0, atol=1e-4)
    finished("export", run, tmp_path / "merged", "--dtype", "bf16")
    finished("export", run, tmp_path / "adapter", "--adapter-only")
    a, b = adapter_of(run), load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)
    losses = []
    for model in ((run,), (base, "--adapter", run), (base, "--adapter", run / "final"),
                  (tmp_path / "merged",), (base,)):  # fmt: skip
        done = minigpt("eval", *model, "--data", license_dataset, "--json")
        losses.append(json.loads(done.stdout)["loss"])
    assert losses[0] == losses[1]
    # TokenSequences as long as the context, where no recipe says how long.
    assert losses[2] == pytest.approx(losses[3], rel=1e-2)
    assert losses[2] < losses[4] - 0.1
    both = (base, "--adapter", run, "--adapter", run / "final")
    done = minigpt("eval", *both, "--data", license_dataset, "--json")
    found = json.loads(done.stdout)["adapters"]
    assert [each["loss"] for each in found] == [losses[0], losses[0]]
    assert [each["adapter"] for each in found] == [str(run), str(run / "final")]
    assert minigpt("export", *both[:1], tmp_path / "x", *both[1:]).returncode == 2
    prompt = ("--prompt", "The ", "--greedy", "--max-new-tokens", 8, "--json")
    half = ("--adapter", run, "--adapter", run / "final", *prompt, "--dtype", "bf16")
    assert minigpt("sample", base, *half).returncode == 0
    prompt += ("--dtype", "fp32")  # bf16 rounds otherwise where weights are packed
    several = minigpt("sample", base, "--adapter", run, "--adapter", run / "final", *prompt)
    one = json.loads(minigpt("sample", run, *prompt).stdout)["completions"]
    found = json.loads(several.stdout)["adapters"]
    assert [each["completions"] for each in found] == [one, one]
    assert [each["adapter"] for each in found] == [str(run), str(run / "final")]
    assert found[0]["checkpoint"] == f"{run}/checkpoints/step-00000012"


@pytest.mark.parametrize("strategies", [
    ("fsdp",),
    pytest.param(("ddp", "fsdp", "zero2"), marks=pytest.mark.slow),
])  # fmt: skip
def test_ranks_and_one_process_agree(
    tmp_path: Path, base: Path, license_dataset: Path, strategies: tuple[str, ...]
):
    file = recipe(tmp_path, base, license_dataset, lora="use_dora = true")
    finished("finetune-lora", file, "--out", tmp_path / "one")
    for strategy in strategies:
        run, setting = tmp_path / strategy, f"distributed.strategy={strategy}"
        finished("finetune-lora", file, "--out", run, "--nproc", 2, "--set", setting, "--set",
                 "train.micro_batch_size=2")  # fmt: skip
        for mine, other in zip(curve(run), curve(tmp_path / "one"), strict=True):
            assert mine == pytest.approx(other, rel=1e-5, abs=1e-5)
    finished("resume", tmp_path / "fsdp", "--set", "train.steps=14")  # and on with one


def test_gradients_and_moments_are_of_adapters_only(
    tmp_path: Path,
    base: Path,
    license_dataset: Path,
):
    file = recipe(tmp_path, base, license_dataset)
    run, _ = start_run(load_recipe(file, ["precision.dtype=bf16"]), tmp_path / "run")
    try:
        train_step(run.context, run.batches(0), 0, 1.0)
        model = run.context.model
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert {name for name in trained if "lora_" in name} == trained
        state = run.context.optimizers[0].state
        moments = sum(m.numel() for s in state.values() for m in s.values() if m.ndim)
        assert moments == 2 * sum(p.numel() for p in model.parameters() if p.requires_grad) > 0
        dtypes = {name: p.dtype for name, p in model.named_parameters()}
        assert dtypes["layers.0.mlp.up_proj.weight"] == torch.bfloat16
        assert dtypes["layers.0.mlp.up_proj.lora_A"] == torch.float32
        assert dtypes["embed_tokens.weight"] == dtypes["norm.weight"] == torch.float32
    finally:
        run.resources.close()


@pytest.mark.parametrize(
    "settings",
    [
        ("optimizer.name=muon", "optimizer.muon_lr=0.1"),
        ("precision.dtype=fp16", "lora.use_dora=true"),
        ("precision.dtype=bf16", "train.activation_checkpointing=true", "lora.dropout=0.2"),
        ("precision.dtype=fp64",),
    ],
    ids=["muon", "fp16-dora", "recompute", "fp64"],
)
def test_it_learns_in_every_setting(
    tmp_path: Path, base: Path, license_dataset: Path, settings: tuple[str, ...]
):
    file = recipe(tmp_path, base, license_dataset)
    settings = ("train.steps=24", "optimizer.lr=3e-2", *settings)
    words = [word for setting in settings for word in ("--set", setting)]
    finished("finetune-lora", file, "--out", tmp_path / "run", *words)
    losses = [line["val_loss"] for line in metrics.read(tmp_path / "run") if "val_loss" in line]
    untrained = json.loads(minigpt("eval", base, "--data", license_dataset, "--json").stdout)
    assert losses[-1] < untrained["loss"] - 0.1


def test_base_in_bf16_equals_autocast(
    tmp_path: Path,
    base: Path,
    license_dataset: Path,
):
    file = recipe(tmp_path, base, license_dataset)
    losses = []
    for name in ("rounded", "whole"):
        loaded = load_recipe(file, ["precision.dtype=bf16"])
        run, _ = start_run(loaded, tmp_path / name)
        if name == "whole":
            weights = open_base(base)
            for layer, module in run.context.model.layers.named_modules():
                if isinstance(module, torch.nn.Linear):
                    assert module.weight.dtype == torch.bfloat16
                    whole = weights.read(f"layers.{layer}.weight").float()
                    module.weight = torch.nn.Parameter(whole, requires_grad=False)
        losses.append([train_step(run.context, run.batches(s), s, 1.0)[0].item() for s in range(3)])
        run.resources.close()
    assert losses[0] == losses[1]


def test_other_and_moved_base(
    tmp_path: Path,
    base: Path,
    license_dataset: Path,
):
    run = tmp_path / "run"
    finished("finetune-lora", recipe(tmp_path, base, license_dataset), "--out", run)
    shutil.move(base, tmp_path / "moved")
    refused = minigpt("resume", run, "--set", "train.steps=13")
    assert refused.returncode == 2
    assert f"{base}: no such directory" in refused.stderr
    refused = minigpt("sample", run)
    assert f"its base can't be opened: {base}: no such directory" in refused.stderr
    assert f"BASE --adapter {run}" in refused.stderr
    moved = f"lora.base={tmp_path}/moved"
    said = finished("resume", run, "--set", "train.steps=13", "--set", moved)
    assert "resuming" in said
    other = saved_model("llama", tmp_path / "other", license_dataset)[0]
    with torch.no_grad():
        other.model.norm.weight.add_(1e-3)
    other.save_pretrained(tmp_path / "other")
    refused = minigpt("resume", run, "--set", f"lora.base={tmp_path}/other")
    assert refused.returncode == 2
    assert "is not the model that this run's adapters were trained on" in refused.stderr
    refused = minigpt("resume", run, "--set", moved, "--set", "lora.rank=8")
    assert "lora.rank can't change within a run" in refused.stderr


def test_changed_base_is_refused(tmp_path: Path, license_dataset: Path, recipe_file: Path):
    """Its name is the same, its newest checkpoint is not; an export of it would be."""
    trained, run = tmp_path / "trained", tmp_path / "run"
    arguments = ("pretrain", recipe_file, "--set", f"data.path={license_dataset}", "--out", trained)
    finished(*arguments)
    finished("finetune-lora", recipe(tmp_path, trained, license_dataset), "--out", run)
    settings = json.loads((run / "final/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(trained / "final")
    finished("export", run, tmp_path / "merged")
    shutil.copytree(trained / "final", tmp_path / "kept")
    finished("resume", trained, "--set", "train.steps=16")
    finished("export", tmp_path / "kept", tmp_path / "alone", "--adapter", run, "--adapter-only")
    for command in (("export", run, tmp_path / "other"), ("sample", run), ("eval", run),
                    ("sample", run / "final"), ("eval", trained, "--adapter", tmp_path / "alone"),
                    ("sample", trained, "--adapter", run / "final")):  # fmt: skip
        refused = minigpt(*command)
        assert refused.returncode == 2
        assert re.search(
            rf"was not trained on the present weights of {trained}(/final)?;", refused.stderr
        )
    assert "is not the model that this run's adapters" in minigpt("resume", run).stderr
    finished("resume", run, "--set", f"lora.base={tmp_path}/kept")
    finished("export", tmp_path / "kept", tmp_path / "again", "--adapter", run)
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("merged", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_each_command_takes_its_own_recipes(
    tmp_path: Path,
    base: Path,
    license_dataset: Path,
    recipe_file: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    file = recipe(tmp_path, base, license_dataset)
    assert f"run minigpt finetune-lora {file}" in minigpt("pretrain", file).stderr
    assert "has no section [lora]" in minigpt("finetune-lora", recipe_file).stderr
    done = minigpt("finetune-lora", file, "--set", "lora.target_modules=['q_proj', 'wq']",
                   "--out", tmp_path / "run")  # fmt: skip
    assert done.returncode == 2
    assert "no layer is called wq; of a llama they are q_proj, k_proj, v_proj" in done.stderr
    monkeypatch.chdir(base.parent)  # what is written down holds elsewhere, too
    finished("finetune-lora", file, "--out", tmp_path / "run", "--set", f"lora.base={base.name}")
    monkeypatch.chdir("/")
    finished("sample", tmp_path / "run", "--max-new-tokens", 2)
    settings = json.loads((tmp_path / "run/final/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)
    assert "library_name: peft" in (tmp_path / "run/final/README.md").read_text()


# --- conversations -------------------------------------------------------------------------------


@pytest.fixture
def chats(tmp_path: Path) -> str:
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    return (
        f'[data.source]\nkind = "jsonl"\npath = "{file}"\nformat = "instructions"\n'
        'val_fraction = 0.2\nchat_template = "chatml"\n'
    )


def their_loss(model: Any, tokenizer: Any, chat: list[dict[str, str]]) -> tuple[float, int]:
    """Sum of the losses of an answer's tokens and their number, one conversation at a time."""
    prompt = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"]
           for text in (prompt, whole.removeprefix(prompt))]  # fmt: skip
    labels = torch.tensor([[-100] * len(ids[0]) + ids[1]])
    logits = model(torch.tensor([ids[0] + ids[1]])).logits
    loss = F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
    return loss.item(), len(ids[1])


def test_the_loss_is_that_of_the_answers_alone(tmp_path: Path, base: Path, chats: str):
    """Packed into rows, against transformers' on one conversation at a time."""
    file = recipe(tmp_path, base, tmp_path / "chats", chats)
    run = tmp_path / "run"
    length = ("--set", "train.sequence_length=96")
    said = finished("finetune-lora", file, "--out", run, *length)
    assert "train: 1 of 25 examples are longer than 96 tokens" in said
    assert "24 examples in" in said
    shutil.copytree(base, tmp_path / "with-template")
    shutil.copy(run / "final/chat_template.jinja", tmp_path / "with-template")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "with-template")
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    tuned = PeftModel.from_pretrained(plain, run / "final").eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for chat in CHATS[:-1]:
            loss, count = their_loss(tuned, tokenizer, chat["messages"])
            total, tokens = total + loss, tokens + count
    found, counted = 0.0, 0
    for split in ("train", "val"):
        done = minigpt("eval", run, "--split", split, "--json")
        result = json.loads(done.stdout)
        found += result["loss"] * result["tokens"]
        counted += result["tokens"]
    assert counted == tokens
    assert found == pytest.approx(total, rel=1e-4)
    first, *_, last = [line["loss"] for line in metrics.read(run) if "loss" in line]
    assert last < first - 0.3
    for model in ((run,), (run / "final",), (base, "--adapter", run / "final")):
        said = minigpt("sample", *model, "--chat", "--prompt", "hi", "--max-new-tokens", 2)
        assert said.returncode == 0, said.stderr


def test_own_template_and_full_training(tmp_path: Path, base: Path, chats: str):
    """pretrain does it from init_from; what isn't a conversation has no template."""
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["chat_template"] = OWN_TEMPLATE
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    text = recipe(tmp_path, base, tmp_path / "own", chats).read_text()
    begin, end = text.index("[lora]"), text.index("[train]")
    text = text.replace('chat_template = "chatml"\n', "")
    begin, end = text.index("[lora]"), text.index("[train]")
    file = tmp_path / "whole.toml"
    file.write_text(text[:begin] + f'[model]\ninit_from = "{base}"\n' + text[end:])
    run = tmp_path / "run"
    finished("pretrain", file, "--out", run, "--set", "train.sequence_length=64",
             "--set", "optimizer.lr=1e-3", "--set", "train.steps=60")  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    assert tokenizer.chat_template == settings["chat_template"]
    prompt = tokenizer.apply_chat_template(
        CHATS[3]["messages"][:1], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "user> What is 3 plus 3?<|endoftext|>assistant> "
    losses = [line["loss"] for line in metrics.read(run) if "loss" in line]
    assert losses[-1] < losses[0] / 2


def test_base_without_tokenizer(tmp_path: Path, base: Path, license_dataset: Path, chats: str):
    """With the chat template beside it; what was trained brings it along."""
    mine, run = tmp_path / "mine", tmp_path / "run"
    mine.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).rename(mine / name)
    (mine / "chat_template.jinja").write_text(OWN_TEMPLATE)
    (base / "generation_config.json").write_text('{"eos_token_id": 256}')
    source = chats.replace('chat_template = "chatml"\n', "")
    file = recipe(tmp_path, base, tmp_path / "chats", source)
    given = ("--set", f"data.tokenizer.path={mine}/tokenizer.json")
    for command in (("sample", base), ("finetune-lora", file, "--out", run),
                    ("finetune-lora", file, "--out", run, "--set", f"data.path={license_dataset}"),
                    ("finetune-lora", file, "--out", run, *given[:1], f"{given[1]}x")):  # fmt: skip
        done = minigpt(*command)
        assert done.returncode == 2
        assert re.search("(brings )?no tokenizer", done.stderr.splitlines()[-1])
    said = finished("finetune-lora", file, "--out", run, *given, "--set", "train.steps=2",
                    "--set", "train.sequence_length=96",
                    "--set", "data.source.val_fraction=0")  # fmt: skip
    assert (
        "no sequence of train.sequence_length 96, it holds no examples: nothing is evaluated"
        in said
    )
    assert f"{base}: has no tokenizer; was it trained with {mine}/tokenizer.json?" in said
    finished("resume", run, "--set", "train.steps=4")
    assert AutoTokenizer.from_pretrained(run / "final").chat_template == OWN_TEMPLATE
    finished("export", run, tmp_path / "merged")
    for model in ((run,), (run / "final",), (tmp_path / "merged",), (base, "--adapter", run)):
        finished("sample", *model, "--chat", "--prompt", "The", "--max-new-tokens", 2)


def test_special_tokens_before_a_prompt(tmp_path: Path, base: Path, license_dataset: Path):
    """Before that of others' models, and not before that of minigpt's, wherever it lies."""
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", end)]
    )
    tokenizer.save(str(base / "tokenizer.json"))

    def written(*model: object) -> str:
        done = minigpt("sample", *model, "--prompt", "The licence", "--greedy",
                       "--max-new-tokens", 12, "--dtype", "fp32", "--json")  # fmt: skip
        assert done.returncode == 0, done.stderr
        return str(json.loads(done.stdout)["completions"][0])

    theirs = AutoModelForCausalLM.from_pretrained(base)
    expected = []
    for special in (True, False):
        ids = torch.tensor([tokenizer.encode("The licence", add_special_tokens=special).ids])
        wrote = theirs.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=end)
        expected.append(tokenizer.decode(wrote[0, ids.shape[1] :].tolist()))
    assert expected[0] != expected[1]
    assert written(base) == expected[0]
    run = tmp_path / "run"
    finished("finetune-lora", recipe(tmp_path, base, license_dataset), "--out", run,
             "--set", "optimizer.lr=1e-30")  # fmt: skip
    finished("export", run, tmp_path / "merged")
    for model in ((run,), (run / "final",), (base, "--adapter", run), (tmp_path / "merged",)):
        assert written(*model) == expected[1], model
    told = json.loads((tmp_path / "merged/minigpt.json").read_text())
    assert told.pop("files").keys() >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert told == {"format": 1, "checkpoint": "step-00000012"}
    (run / "checkpoints/step-00000012/recipe.toml").unlink()  # which says what the base is
    assert written(run) == expected[1]


def test_too_large_vocabulary(tmp_path: Path, base: Path, chats: str):
    mine = tmp_path / "mine"
    mine.mkdir()
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["added_tokens"] += [
        {"id": 320 + n, "content": f"<{n}>", "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": True} for n in range(9)
    ]  # fmt: skip
    (mine / "tokenizer.json").write_text(json.dumps(tokenizer))
    (base / "tokenizer.json").unlink()
    file = recipe(tmp_path, base, tmp_path / "chats", chats)
    done = minigpt("finetune-lora", file, "--out", tmp_path / "run",
                   "--set", f"data.tokenizer.path={mine}")  # fmt: skip
    assert done.returncode == 2
    assert "vocab_size 320 is too small" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "chats").exists()


def test_special_tokens_of_chat(tmp_path: Path, base: Path, chats: str):
    """Those of the tokenizer that the recipe names, where nothing else came with the weights."""
    mine, run = tmp_path / "mine", tmp_path / "run"
    mine.mkdir()
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|begin|>", "<|im_end|>"])
    tokenizer.save(str(mine / "tokenizer.json"))
    names = {"bos_token": "<|begin|>", "eos_token": "<|im_end|>"}
    template = "{{ bos_token }}" + OWN_TEMPLATE
    settings = {"chat_template": template, "tokenizer_class": "PreTrainedTokenizerFast", **names}
    (mine / "tokenizer_config.json").write_text(json.dumps(settings))
    text = recipe(tmp_path, base, tmp_path / "data", chats).read_text()
    begin, end = text.index("[lora]"), text.index("[train]")
    model = ('[model]\nfamily = "llama"\nhidden_size = 32\nnum_hidden_layers = 1\n'
             'num_attention_heads = 4\n')  # fmt: skip
    file = tmp_path / "chat.toml"
    text = (text[:begin] + model + text[end:]).replace('chat_template = "chatml"\n', "")
    file.write_text(text + f'[data.tokenizer]\npath = "{mine}/tokenizer.json"\n')
    finished("pretrain", file, "--out", run, "--set", "train.sequence_length=96")
    asked = [{"role": "user", "content": "What?"}]
    expected = "<|begin|>user> What?<|im_end|>assistant> "
    theirs = AutoTokenizer.from_pretrained(run / "final")
    shown = theirs.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert shown == expected
    for trained in (open_base(run), open_base(run / "final")):
        template, variables = chat_template(trained.tokenizer, trained.auxiliary_files)
        assert template is not None
        rendered = chat.render(template, asked, add_generation_prompt=True, variables=variables)
        assert rendered == expected
        assert theirs.eos_token_id in stop_token_ids(trained, load_tokenizer(trained.tokenizer))
    assert AutoConfig.from_pretrained(run / "final").eos_token_id == [0, theirs.eos_token_id]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("data.source.chat_template=nowhere.jinja",), "chat_template nowhere.jinja: no such file"),
        (("train.sequence_length=4",), "all its 25 examples are longer"),
        (("train.sequence_length=97",), "sequence_length 97 is longer than the 96 positions"),
        (("data.source.kind=files",), "format instructions needs kind jsonl, parquet"),
    ],
)
def test_what_is_wrong_with_conversations_is_one_line(
    tmp_path: Path, base: Path, chats: str, changes: tuple[str, ...], message: str
):
    file = recipe(tmp_path, base, tmp_path / "chats", chats)
    settings = [word for change in changes for word in ("--set", change)]
    done = minigpt("finetune-lora", file, "--out", tmp_path / "run", *settings)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("minigpt: ")
