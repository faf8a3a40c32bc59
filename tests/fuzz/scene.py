"""The scene: small valid files of every kind that minigpt reads."""

import gzip
import json
import lzma
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.helpers.processes import ROOT

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ eos_token }}"
RECIPE = """
[data]
path = "data"
[data.source]
kind = "files"
path = "corpus/*.txt"
val_fraction = 0.2
[data.tokenizer]
train_vocab = 300
[model]
family = "llama"
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
max_position_embeddings = 64
[train]
steps = 2
global_batch_size = 2
sequence_length = 16
[optimizer]
lr = 3e-3
betas = [0.9, 0.95]
[schedule]
name = "step"
warmup_steps = 1
milestones = [1]
[precision]
dtype = "fp32"
[checkpoint]
every_steps = 1
[eval]
windows = 2
prompts = ["a"]
prompt_tokens = 2
"""
CONTINUED = re.sub(r"\[model\]\n(\w.*\n)*", '[model]\ninit_from = "base"\n', RECIPE).replace(
    "train_vocab = 300", 'path = "base"'
)
LORA = """
[lora]
base = "base"
rank = 2
target_modules = ["all-linear"]
[data]
path = "chat"
[data.source]
kind = "jsonl"
path = "chat.jsonl"
format = "instructions"
val_fraction = 0.2
[train]
steps = 2
global_batch_size = 2
sequence_length = 32
[optimizer]
lr = 3e-3
[eval]
windows = 2
"""
CORPUS = "--vocab-size 300 --val-fraction 0.2"
CHAT = "--format instructions --tokenizer base --val-fraction 0.2"
JOURNALED = "tokenize torn.jsonl -o torn --tokenizer data --shard-tokens 3000 --val-fraction 0"


def make_scene(minigpt: Callable[..., int]) -> None:
    """Make everything in the working directory.

    Args:
        minigpt: runs a command there, with environment variables, and returns its exit code.
    """
    _write_sources((ROOT / "LICENSE").read_text()[:6000])
    for file, text in (("tiny", RECIPE), ("lora", LORA), ("continued", CONTINUED)):
        Path(f"{file}.toml").write_text(text)

    def do(command: str, code: int = 0, **variables: str) -> None:
        assert minigpt(command.split(), **variables) == code, command

    do("pretrain -h")
    do(f"tokenize corpus -o data {CORPUS}")
    do(JOURNALED, code=-9, FUZZ_KILL_AT_JOURNAL="2")
    assert Path("torn/journal.json").exists()
    do("pretrain tiny.toml -o run")
    do("export run exported")
    _make_base(Path("exported"), Path("base"))
    do(f"tokenize chat.jsonl -o chat {CHAT}")
    do("finetune-lora lora.toml -o tuned")
    do("export tuned adapter --adapter-only")


def _write_sources(text: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = text.split("\n\n")
    Path("corpus").mkdir()
    for number in range(3):
        Path(f"corpus/{number}.txt").write_text(text[number * 2000 : number * 2000 + 2000])
    _write_lines("records.jsonl", [{"text": part} for part in parts])
    Path("torn.jsonl").write_text('{"text": "a"}\n' * 4200)
    Path("text.txt.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    Path("text.txt.xz").write_bytes(lzma.compress(text.encode()))
    with pa.CompressedOutputStream("text.txt.zst", "zstd") as stream:
        stream.write(text.encode())
    pq.write_table(pa.table({"text": parts}), "table.parquet")
    pairs = [{"prompt": f"{n}?", "completion": part[:60]} for n, part in enumerate(parts)]
    talks = [
        {
            "messages": [
                {"role": "user", "content": pair["prompt"]},
                {"role": "assistant", "content": pair["completion"]},
            ]
        }
        for pair in pairs
    ]
    _write_lines("chat.jsonl", [*pairs, *talks])
    Path("chat.jinja").write_text(TEMPLATE)


def _write_lines(file: str, records: list[object]) -> None:
    Path(file).write_text("".join(json.dumps(record) + "\n" for record in records))


def _make_base(exported: Path, base: Path) -> None:
    """A model from elsewhere: two files of weights with an index, and a chat template."""
    from safetensors.torch import load_file, save_file

    names = ("minigpt.json", "README.md", "model.safetensors")
    shutil.copytree(exported, base, ignore=shutil.ignore_patterns(*names))
    weights = load_file(exported / "model.safetensors")
    weight_map = {}
    for number, part in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, base / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    settings = base / "tokenizer_config.json"
    config = json.loads(settings.read_text()) if settings.exists() else {}
    config |= {"chat_template": TEMPLATE, "eos_token": "<|endoftext|>"}
    settings.write_text(json.dumps(config))
