"""The scene of small valid files, and what is mutated and run in it."""

import gzip
import hashlib
import json
import lzma
import os
import random
import re
import shutil
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.mutate import ODD, mutate
from tests.helpers.processes import ROOT

Chance = random.Random
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
CONTINUED = re.sub(r"\[model\]\n(\w.*\n)*", '[model]\ninit_from = "base"\n', RECIPE).replace("train_vocab = 300", 'path = "base"')
CHAT = ["--format", "instructions", "--tokenizer", "base", "--val-fraction", "0.2"]
JOURNALED = ["tokenize", "torn.jsonl", "-o", "torn", "--tokenizer", "data", "--shard-tokens", "500", "--strict", "--val-fraction", "0"]


def make_scene(minigpt: Callable[[list[str]], int]) -> None:
    """Make everything in the working directory.

    Args:
        minigpt: runs a command there and returns its exit code.
    """
    text = (ROOT / "LICENSE").read_text()[:6000]
    parts = text.split("\n\n")
    Path("corpus").mkdir()
    for number in range(3):
        Path(f"corpus/{number}.txt").write_text(text[number * 2000 : number * 2000 + 2000])
    records = [json.dumps({"text": part}) for part in parts]
    Path("records.jsonl").write_text("\n".join(records) + "\n")
    Path("torn.jsonl").write_text('{"text": "a"}\n' * 4200 + "{")
    Path("text.txt.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    Path("text.txt.xz").write_bytes(lzma.compress(text.encode()))
    _write_tables(parts)
    talks = [{"prompt": f"{number}?", "completion": part[:60]} for number, part in enumerate(parts)]
    asked = [[{"role": "user", "content": each["prompt"]}, {"role": "assistant", "content": each["completion"]}]
             for each in talks]  # fmt: skip
    lines = [json.dumps(each) for each in talks] + [json.dumps({"messages": each}) for each in asked]
    Path("chat.jsonl").write_text("\n".join(lines) + "\n")
    Path("chat.jinja").write_text(TEMPLATE)
    Path("tiny.toml").write_text(RECIPE)
    Path("lora.toml").write_text(LORA)
    Path("continued.toml").write_text(CONTINUED)

    def do(*arguments: str, code: int = 0) -> None:
        ended = minigpt(list(arguments))
        assert ended == code, (arguments, ended)

    do("tokenize", "corpus", "-o", "data", "--vocab-size", "300", "--val-fraction", "0.2")
    do(*JOURNALED, code=2)
    assert Path("torn/journal.json").exists()
    do("pretrain", "tiny.toml", "-o", "run")
    do("export", "run", "exported")
    _make_base(Path("exported"), Path("base"))
    do("tokenize", "chat.jsonl", "-o", "chat", *CHAT)
    do("finetune-lora", "lora.toml", "-o", "tuned")
    do("export", "tuned", "adapter", "--adapter-only")


def _write_tables(parts: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": parts}), "table.parquet")
    with pa.CompressedOutputStream("text.txt.zst", "zstd") as stream:
        stream.write("".join(parts).encode())


def _make_base(exported: Path, base: Path) -> None:
    """A model from elsewhere: two files of weights with an index, and a chat template."""
    shutil.copytree(exported, base)
    for file in ("minigpt.json", "README.md"):
        (base / file).unlink(missing_ok=True)
    content = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").unlink()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    names = sorted(header)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        data, entries = b"", {}
        for name in part:
            begin, end = header[name]["data_offsets"]
            entries[name] = header[name] | {"data_offsets": [len(data), len(data) + end - begin]}
            data += content[8 + size :][begin:end]
            weight_map[name] = file
        text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
        (base / file).write_bytes(struct.pack("<Q", len(text)) + text + data)
    index = {"metadata": {"total_size": len(content)}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    settings = base / "tokenizer_config.json"
    config = json.loads(settings.read_text()) if settings.exists() else {}
    settings.write_text(json.dumps(config | {"chat_template": TEMPLATE, "eos_token": "<|endoftext|>"}))


@dataclass
class Case:
    """One command after some mutations.

    Attributes:
        arguments: of minigpt.
        done: what was mutated, for people.
        environment: variables to set.
        must_be_refused: whether the command vouches for files that were changed.
    """

    arguments: list[str]
    done: list[str]
    environment: dict[str, str]
    must_be_refused: bool = False


@dataclass(frozen=True)
class Kind:
    """What is fuzzed.

    Attributes:
        needs: what of the scene is copied.
        make: mutates files in the working directory and chooses a command.
        share: how many of the cases are of this kind, in relation to the others.
        is_users: whether all of it is the user's own, who may also write outside.
    """

    needs: tuple[str, ...]
    make: Callable[[Chance], Case]
    share: int = 4
    is_users: bool = False


def _files(chance: Chance, patterns: Iterable[str], commands: list[list[str]], seal: bool = False) -> Case:
    """Mutate one to three of the files that match; then one of the commands.

    Args:
        seal: in half of the cases, have the manifests vouch for the changed files.
    """
    found = sorted({path for pattern in patterns for path in Path().glob(pattern) if path.is_file()})
    arguments = chance.choice(commands)
    before = _recorded(Path(arguments[1])) if arguments[0] == "verify" else {}
    done = [mutate(chance, chance.choice(found)) for _ in range(chance.choice([1, 1, 2, 3]))]
    changed = before != (_recorded(Path(arguments[1])) if before else {})
    if seal and chance.random() < 0.6:
        done += [f"{file} vouches for it" for file in found if _seal(file)]
        changed = False
    return Case(arguments, done, {}, must_be_refused=changed)


def _recorded(top: Path) -> dict[str, object]:
    """The content of each file that a dataset or a checkpoint records; JSON by its meaning."""
    found: dict[str, object] = {}
    for path in sorted(top.rglob("*")):
        if path.parent.name in ("data", "chat") or path.parent.name.startswith("step-"):
            try:
                content: object = path.read_bytes() if _is_small(path) else None
                if path.name in ("dataset.json", "tokenizer.json"):
                    content = json.dumps(json.loads(content), sort_keys=True)  # type: ignore[arg-type]
                if path.name == "tokenizer.json":
                    content = _meaning(str(content))
            except (OSError, ValueError, RecursionError, TypeError):
                content = "damaged"
            found[str(path)] = content
    return found


def _is_small(file: Path) -> bool:
    return file.is_file() and file.stat().st_size < 1 << 24


def _meaning(text: str) -> object:
    from tokenizers import Tokenizer

    try:
        return str(Tokenizer.from_str(text).to_str())
    except Exception:
        return "damaged"


def _seal(manifest: Path) -> bool:
    """Make a manifest right about its files again, as far as it can be read."""
    from minigpt_cli.core.files import json_checksum

    if manifest.name not in ("manifest.json", "dataset.json") or not _is_small(manifest):
        return False
    try:
        content = json.loads(manifest.read_text())
        shards = [shard for split in content.get("splits", {}).values() for shard in split["shards"]]
        shards += [split[name] for split in content.get("splits", {}).values() for name in ("loss_mask", "offsets")
                   if name in split]  # fmt: skip
        entries = [(each["file"], each, "bytes_on_disk") for each in shards]
        entries += [(name, each, "bytes") for name, each in content.get("files", {}).items()]
        for name, entry, size in entries:
            file = manifest.with_name(name)
            if _is_small(file):
                data = file.read_bytes()
                entry |= {size: len(data), "sha256": hashlib.sha256(data).hexdigest()}
        tokenizer = manifest.with_name("tokenizer.json")
        if "tokenizer_sha256" in content and _is_small(tokenizer):
            content["tokenizer_sha256"] = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
        content.pop("checksum", None)
        content["checksum"] = json_checksum(content)
        manifest.write_text(json.dumps(content, indent=1) + "\n")
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return False
    return True


NEW = ["-o", "new"]
SAMPLE = ["--prompt", "a b", "--max-new-tokens", "3"]
STEP = "run/checkpoints/step-00000002"


def _recipe(chance: Chance) -> Case:
    return _files(chance, ["tiny.toml", "tiny.toml", "lora.toml"], [
        ["pretrain", "tiny.toml", *NEW], ["pretrain", "tiny.toml", *NEW], ["resume", "new", "--or-start", "tiny.toml"],
        ["finetune-lora", "lora.toml", *NEW],
    ]) if chance.random() < 0.7 else _overrides(chance)  # fmt: skip


def _overrides(chance: Chance) -> Case:
    import tomllib

    text = chance.choice([RECIPE, LORA])
    tables = tomllib.loads(text)
    names = [f"{section}.{key}" for section, table in tables.items() for key in table] + ["x.y", "data.source.kind"]
    sets: list[str] = []
    for _ in range(chance.choice([1, 1, 2])):
        value = chance.choice([*ODD, *"1 2 -3 1e-3 true 'x' [1,2] {a=1} [[ \"".split(), 4, 8, 64])
        sets += ["--set", chance.choice([f"{chance.choice(names)}={_plain(value)}", _plain(value)])]
    ways = [["pretrain", "tiny.toml", *NEW], ["resume", "run"]] if text == RECIPE else [["finetune-lora", "lora.toml", *NEW]]
    return Case(chance.choice(ways) + sets, [], {})


def _plain(value: object) -> str:
    """As a process's argument, which can't hold a zero byte, nor be very long."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("\0", "").replace("\ud800", "\udcff")[:60_000]


def _dataset(chance: Chance) -> Case:
    return _files(chance, ["data/*"], [
        ["pretrain", "tiny.toml", *NEW], ["verify", "data"], ["verify", "data"], ["eval", "run", "--data", "data"],
        ["resume", "run", "--set", "train.steps=3"],
        ["tokenize", "corpus", "-o", "data", "--vocab-size", "300", "--val-fraction", "0.2"],
    ], seal=True)  # fmt: skip


def _instructions(chance: Chance) -> Case:
    return _files(chance, ["chat/*", "chat/*.npy", "chat/dataset.json"], [
        ["finetune-lora", "lora.toml", *NEW], ["verify", "chat"], ["eval", "base", "--data", "chat"],
        ["tokenize", "chat.jsonl", "-o", "chat", *CHAT],
    ], seal=True)  # fmt: skip


def _run(chance: Chance) -> Case:
    return _files(chance, ["run/*", f"{STEP}/*", f"{STEP}/*.json", "run/final/*"], [
        ["resume", "run", "--set", "train.steps=3"], ["resume", STEP, "--set", "train.steps=3"], ["resume", "run"],
        ["verify", "run"], ["verify", STEP], ["eval", "run"], ["sample", "run", *SAMPLE], ["sample", STEP, *SAMPLE],
        ["export", STEP, "new"], ["sample", *SAMPLE], ["sample", "run/final", *SAMPLE],
        ["finetune-lora", "lora.toml", *NEW, "--set", "lora.base=run", "--set", "data.source.chat_template=chatml"],
    ], seal=True)  # fmt: skip


def _tuned(chance: Chance) -> Case:
    step = "tuned/checkpoints/step-00000002"
    return _files(chance, ["tuned/*", f"{step}/*", f"{step}/*.json"], [
        ["resume", "tuned", "--set", "train.steps=3"], ["verify", step], ["eval", "tuned"], ["sample", step, *SAMPLE],
        ["sample", "tuned", "--chat", *SAMPLE], ["export", "tuned", "new"], ["export", step, "new", "--adapter-only"],
    ], seal=True)  # fmt: skip


def _base(chance: Chance) -> Case:
    return _files(chance, ["base/*", "base/*.json", "base/config.json"], [
        ["sample", "base", *SAMPLE], ["sample", "base", "--chat", *SAMPLE], ["eval", "base", "--text", "corpus/0.txt"],
        ["export", "base", "new"], ["finetune-lora", "lora.toml", *NEW], ["verify", "base"],
        ["pretrain", "continued.toml", *NEW],
    ])  # fmt: skip


def _adapter(chance: Chance) -> Case:
    return _files(chance, ["adapter/*", "adapter/adapter_config.json"], [
        ["sample", "base", "--adapter", "adapter", *SAMPLE], ["sample", "adapter", *SAMPLE], ["export", "adapter", "new"],
        ["eval", "base", "--adapter", "adapter", "--text", "corpus/0.txt"],
        ["export", "base", "new", "--adapter", "adapter", "--adapter-only"],
    ])  # fmt: skip


def _export(chance: Chance) -> Case:
    return _files(chance, ["exported/*", "exported/minigpt.json"], [
        ["sample", "exported", *SAMPLE], ["export", "exported", "new"], ["eval", "exported", "--data", "data"],
        ["sample", "exported", "--adapter", "adapter", *SAMPLE],
    ])  # fmt: skip


def _tokenizer(chance: Chance) -> Case:
    return _files(chance, ["base/tokenizer*.json"], [
        ["tokenize", "corpus", *NEW, "--tokenizer", "base"], ["tokenize", "chat.jsonl", *NEW, *CHAT],
        ["tokenize", "corpus/0.txt", *NEW, "--tokenizer", "base/tokenizer.json"], ["sample", "base", *SAMPLE],
        ["pretrain", "tiny.toml", *NEW, "--set", "data.path=other", "--set", "data.tokenizer={path='base'}"],
    ])  # fmt: skip


def _journal(chance: Chance) -> Case:
    return _files(chance, ["torn/*", "torn/journal.json", "torn/journal.json"], [JOURNALED, JOURNALED, ["verify", "torn"]])


def _source(chance: Chance) -> Case:
    files = ["corpus/0.txt", "records.jsonl", "text.txt.gz", "text.txt.zst", "text.txt.xz", "table.parquet", "chat.jsonl"]
    file = chance.choice(files)
    done = [mutate(chance, Path(file)) for _ in range(chance.choice([1, 1, 2, 3]))]
    if file == "chat.jsonl":
        arguments = ["tokenize", file, *NEW, *CHAT]
    else:
        how = ["--tokenizer", "base"] if chance.random() < 0.7 else ["--vocab-size", "300"]
        arguments = ["tokenize", "corpus" if file.startswith("corpus") else file, *NEW, *how]
    if chance.random() < 0.2:
        arguments = ["eval", "run", "--text", file]
    return Case(arguments + ["--strict"] * (arguments[0] == "tokenize" and chance.random() < 0.3), done, {})


_TEMPLATES = [
    "{{ 9**9**9 }}", "{% for i in range(10**9) %}x{% endfor %}", "{{ messages[0].content * 10**9 }}", "{{ 1/0 }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{",
    "{% include '/etc/hostname' %}", "{{ raise_exception('a\nb\x1b[2J') }}", "{{ messages|tojson(indent=10**8) }}",
    "{{ 'x'|center(10**10) }}", "{{ '%1000000000d' % 1 }}", "{{ '{:>9999999999}'.format(1) }}", "{% if %}", "{{ x.y.z }}",
    "{{ cycler.__init__.__globals__ }}", "{% set ns = namespace(a=1) %}{% for i in range(99999999) %}{% set ns.a = ns.a * 2 %}{% endfor %}",
    "{{ lipsum(n=10**7) }}", "{{ messages[99].content }}", "{{ messages[0]['role'] + 1 }}", "{{ strftime_now('%Y' * 99) }}",
    "{{ [1]*10**10 }}", "{{ ('a'*10**6)|wordwrap(1) }}", "{% generation %}x{% endgeneration %}", "{{ '\ud800' }}", "", "x",
    "{{ messages|sort|join }}", "{{ range(10**8)|list|length }}", "{{ 'a'|batch(10**10)|list }}", "{{ 10**10**7 }}",
    "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "{% if 1 %}" * 3000, "{{ messages.append(messages) }}{{ messages }}", "\0\x07",
]  # fmt: skip


def _template(chance: Chance) -> Case:
    text = chance.choice([*_TEMPLATES, TEMPLATE, TEMPLATE, TEMPLATE])
    for _ in range(chance.choice([0, 1, 2])):
        place = chance.randrange(len(text) + 1)
        piece = chance.choice(["{{", "}}", "{%", "%}", "|", "-", "é", "\n", "{{ messages }}", "loop", " ", chance.choice(_TEMPLATES)])
        text = text[:place] + piece + text[place + chance.choice([0, 0, 1, 5]) :]
    file = Path(chance.choice(["chat.jinja", "base/chat_template.jinja"]))
    file.write_bytes(text.encode(errors="surrogatepass"))
    given = ["--chat-template", "chat.jinja"] if file.name == "chat.jinja" else []
    ways = [["tokenize", "chat.jsonl", *NEW, *CHAT, *given]]
    if not given:
        ways += [["sample", "base", "--chat", *SAMPLE], ["finetune-lora", "lora.toml", *NEW, "--set", "data.path=other"]]
    return Case(chance.choice(ways), [f"{file}: {text[:300]!r}"], {})


_NAMES = [
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_LOCALID",
    "SLURM_NODEID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST", "SLURM_JOB_ID",
    "SLURM_STEP_ID", "SLURM_NTASKS", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "MINIGPT_STORE_FD",
    "MINIGPT_LAUNCHER_PID", "COLUMNS", "LINES", "TERM", "NO_COLOR", "FORCE_COLOR", "LANG", "LC_ALL", "OMP_NUM_THREADS",
    "HOME", "TMPDIR", "HF_HOME", "CUDA_VISIBLE_DEVICES", "PATH", "TZ", "TTY_COMPATIBLE", "TOKENIZERS_PARALLELISM",
]  # fmt: skip
_VALUES = [
    "", "0", "1", "2", "-1", "3", "1e3", "x", "9" * 50, "\x1b[2J", "é", "\udcff\udcfe", "127.0.0.1", "[::1", "localhost", "::1",
    "65536", "29471", " 1 ", "0x10", "1_0", "True", "2(x1)", "1(x999999)", "(", "/dev/null", "canary", "nan", "a\nb", "x" * 70_000,
    "256.1.1.1", "no.such.host.invalid", "dumb", "C", "xx_YY.UTF-8",
]  # fmt: skip


def _environment(chance: Chance) -> Case:
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29471"}
    slurm = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "1",
             "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n1"}  # fmt: skip
    variables = dict(chance.choice([{}, {}, ranks, slurm]))
    likely = list(variables) * 2 + _NAMES
    for _ in range(chance.choice([1, 1, 2, 3])):
        variables[chance.choice(likely)] = chance.choice(_VALUES)
    arguments = chance.choice([
        ["pretrain", "tiny.toml", *NEW], ["resume", "run", "--set", "train.steps=3"], ["sample", "run", *SAMPLE], ["verify", "run"],
        ["tokenize", "corpus", *NEW, "--tokenizer", "base"], ["pretrain", "-h"], ["pretrain", "tiny.toml", *NEW, "--nproc", "1"],
    ])  # fmt: skip
    return Case(arguments, [], variables)


_COMMANDS = [
    ["tokenize", "corpus", *NEW, "--vocab-size", "300", "--val-fraction", "0.2", "--workers", "1", "--shard-tokens", "900"],
    ["tokenize", "records.jsonl", *NEW, "--text-field", "text", "--tokenizer", "base", "--split", "train", "--json"],
    ["tokenize", "chat.jsonl", *NEW, "--format", "instructions", "--tokenizer", "base", "--chat-template", "chatml"],
    ["pretrain", "tiny.toml", *NEW, "--json"], ["resume", "run", "--allow-change", "train.steps", "--set", "train.steps=3"],
    ["finetune-lora", "lora.toml", *NEW], ["verify", "run", "--json"], ["export", "run", "new", "--dtype", "bf16", "--json"],
    ["eval", "run", "--data", "data", "--split", "val", "--batch-size", "2", "--dtype", "fp32", "--device", "cpu", "--json"],
    ["eval", "run", "--text", "corpus/0.txt"], ["export", "base", "new", "--adapter", "adapter", "--adapter-only"],
    ["sample", "run", *SAMPLE, "--temperature", "0.5", "--top-k", "5", "--top-p", "0.9", "--min-p", "0.1", "--stop", "x"],
    ["sample", "base", *SAMPLE, "--repetition-penalty", "1.1", "--seed", "3", "--num-samples", "2", "--dtype", "bf16", "--json"],
    ["sample", "base", "--adapter", "adapter", "--chat", *SAMPLE, "--greedy", "--device", "cpu"],
]  # fmt: skip
_PATHS = [
    "nothing", "fifo", "/dev/zero", "/dev/null", "/dev/full", "corpus", "canary", "run", "run/checkpoints", STEP, "data", "base",
    "adapter", "tuned", "loop", "", ".", "/", "~", "a" * 300, "/".join("a" * 9 for _ in range(500)), "corpus/*.txt", "**", "[", "{a,b}",
    "tiny.toml", "chat.jsonl", "run/final", "/proc/self/mem", "/proc/self/fd/0", "org/name", "http://x/y", "-", "--", "hole",
    "run/metrics.jsonl", "data/train-00000.npy", "python-stdlib/x", "\udcff\udcfe", "table.parquet", "text.txt.xz",
]  # fmt: skip


def _options(chance: Chance) -> Case:
    os.mkfifo("fifo")
    Path("loop").symlink_to("loop")
    Path("hole").touch()
    os.truncate("hole", 1 << 36)
    arguments = list(chance.choice(_COMMANDS))
    for _ in range(chance.choice([1, 1, 2])):
        place = chance.randrange(1, len(arguments))
        kind = chance.choice(["odd", "odd", "path", "path", "remove", "repeat", "other", "swap"])
        value = _plain(chance.choice([*ODD, *ODD, "4", "1000", "auto", "cuda", "cuda:99", "meta", "mps", "-h", "--version"]))
        other = chance.choice(_COMMANDS)
        if kind in ("odd", "path"):
            arguments[place] = value if kind == "odd" else chance.choice(_PATHS)
        elif kind == "remove":
            del arguments[place]
        elif kind == "repeat":
            arguments.insert(place, arguments[place])
        elif kind == "other":
            arguments.append(chance.choice(other[1:]))
        else:
            arguments[0] = chance.choice([other[0], value])
        if len(arguments) < 2:
            break
    return Case(arguments, [], {})


_RECIPES = ("tiny.toml", "lora.toml", "corpus", "chat.jsonl", "base", "data", "chat")
KINDS = {
    "recipe": Kind((*_RECIPES, "run"), _recipe, 8, is_users=True),
    "dataset": Kind(("tiny.toml", "corpus", "data", "run"), _dataset),
    "instructions": Kind(("lora.toml", "chat.jsonl", "chat", "base"), _instructions),
    "run": Kind((*_RECIPES, "run"), _run, 6),
    "tuned": Kind((*_RECIPES, "tuned"), _tuned),
    "base": Kind((*_RECIPES, "continued.toml"), _base, 6),
    "adapter": Kind(("corpus", "base", "adapter"), _adapter),
    "export": Kind(("exported", "adapter", "data"), _export, 2),
    "tokenizer": Kind(("tiny.toml", "corpus", "base", "chat.jsonl"), _tokenizer),
    "journal": Kind(("torn.jsonl", "torn", "data"), _journal),
    "source": Kind(("corpus", "records.jsonl", "text.txt.gz", "text.txt.zst", "text.txt.xz", "table.parquet", "chat.jsonl",
                    "base", "run"), _source),
    "template": Kind(("lora.toml", "chat.jsonl", "chat.jinja", "base"), _template, 3),
    "environment": Kind((*_RECIPES, "run"), _environment, 3, is_users=True),
    "options": Kind((*_RECIPES, "run", "tuned", "adapter", "chat.jinja", "records.jsonl", "table.parquet", "text.txt.xz"),
                    _options, 6, is_users=True),
}  # fmt: skip
