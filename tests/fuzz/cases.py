"""What is mutated in the scene, and which commands are run on it then."""

import hashlib
import json
import os
import random
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.mutate import ODD, PATHS, TEMPLATES, VALUES, mutate
from tests.fuzz.scene import CHAT, CORPUS, JOURNALED, LORA, RECIPE, TEMPLATE

Chance = random.Random
STEP, TUNED_STEP = (f"{run}/checkpoints/step-00000002" for run in ("run", "tuned"))
SAMPLE = "--prompt a --max-new-tokens 3"


@dataclass
class Case:
    """One command after some mutations.

    Attributes:
        arguments: of minigpt.
        done: what was mutated, for people.
        environment: variables to set.
        must_be_refused: whether it reads files that differ from their recorded checksums.
    """

    arguments: list[str]
    done: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    must_be_refused: bool = False


@dataclass(frozen=True)
class Kind:
    """What is fuzzed.

    Attributes:
        needs: what of the scene is copied.
        share: how many of the cases are of this kind, in relation to the others.
        commands: one a line; one of them is run.
        make: mutates files in the working directory; gets all of ``commands``.
        is_users: whether all of it is the user's own, who may also write outside.
    """

    needs: str
    share: int
    commands: str
    make: Callable[[Chance, list[list[str]]], Case]
    is_users: bool = False


def make_case(kind: Kind, chance: Chance) -> Case:
    """Mutate files of the working directory; return what to run there."""
    return kind.make(chance, [line.split() for line in kind.commands.strip().splitlines()])


def _files(*patterns: str, seal: bool = False) -> Callable[[Chance, list[list[str]]], Case]:
    """Mutate one to three of the files that match.

    Args:
        seal: in half of the cases, have the manifests vouch for the changed files.
    """

    def make(chance: Chance, commands: list[list[str]]) -> Case:
        paths = sorted(path for pattern in patterns for path in Path().glob(pattern))
        files = [path for path in paths if not path.name.startswith(".")]
        arguments = chance.choice(commands)
        before = _recorded(arguments)
        chosen = [chance.choice(files) for _ in range(chance.choice([1, 1, 2, 3]))]
        chosen.sort(key=lambda path: -len(path.parts))  # directories after what is in them
        done = [mutate(chance, file) for file in chosen]
        changed = before != _recorded(arguments)
        if seal and chance.random() < 0.6:
            done += [f"{file} vouches for it" for file in sorted(set(files)) if _seal(file)]
            changed = False
        return Case(arguments, done, must_be_refused=changed)

    return make


def _recorded(arguments: list[str]) -> dict[str, object]:
    """The content of every file that the command must compare with its checksum."""
    tops = {"data", "chat", STEP, TUNED_STEP} & set(arguments)
    tops |= {top for top in ("run", "tuned") if [*arguments, top][:2] == ["verify", top]}
    tops |= {
        data for file, data in (("tiny.toml", "data"), ("lora.toml", "chat")) if file in arguments
    }
    if arguments[0] == "tokenize":  # a dataset that is there is not read again
        return {}
    found: dict[str, object] = {}
    for path in sorted(path for top in tops for path in Path(top).rglob("*")):
        if path.parent.name in ("data", "chat") or path.parent.name.startswith("step-"):
            found[str(path)] = _meaning(path) if path.suffix == ".json" else _content(path)
    return found


def _content(file: Path) -> bytes | None:
    """None for what is large, and for what is no file."""
    return file.read_bytes() if file.is_file() and file.stat().st_size < 1 << 24 else None


def _meaning(file: Path) -> object:
    """What JSON says, whatever its form: another tool may have saved a tokenizer."""
    from tokenizers import Tokenizer

    content = _content(file) or b""
    try:
        if file.name == "tokenizer.json":
            return str(Tokenizer.from_str(content.decode()).to_str())
        return json.dumps(json.loads(content), sort_keys=True)
    except BaseException:  # a panic of Rust's is no Exception
        return "damaged"


def _seal(manifest: Path) -> bool:
    """Make a manifest right about its files again, as far as it can be read."""
    from minigpt_cli.core.files import json_checksum

    if manifest.name not in ("manifest.json", "dataset.json"):
        return False
    try:
        content = json.loads(_content(manifest) or b"")
        entries = [(name, each, "bytes") for name, each in content.get("files", {}).items()]
        for split in content.get("splits", {}).values():
            shards = [*split["shards"], *(split[n] for n in ("loss_mask", "offsets") if n in split)]
            entries += [(shard["file"], shard, "bytes_on_disk") for shard in shards]
        for name, entry, size in entries:
            if (data := _content(manifest.with_name(name))) is not None:
                entry |= {size: len(data), "sha256": hashlib.sha256(data).hexdigest()}
        data = _content(manifest.with_name("tokenizer.json"))
        if "tokenizer_sha256" in content and data is not None:
            content["tokenizer_sha256"] = hashlib.sha256(data).hexdigest()
        content.pop("checksum", None)
        content["checksum"] = json_checksum(content)
        manifest.write_text(json.dumps(content, indent=1) + "\n")
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return False
    return True


def _overrides(chance: Chance, commands: list[list[str]]) -> Case:
    text, arguments = chance.choice(
        [(RECIPE, commands[0]), (RECIPE, commands[1]), (LORA, commands[2])]
    )
    tables = tomllib.loads(text)
    names = ["x.y", *(f"{section}.{key}" for section, table in tables.items() for key in table)]
    for _ in range(chance.choice([1, 1, 2])):
        value = _plain(chance.choice([*ODD, *VALUES, 4, 8, 64]))
        setting = f"{chance.choice(names)}={value}" if chance.random() < 0.9 else value
        arguments = [*arguments, "--set", setting]
    return Case(arguments)


def _plain(value: object) -> str:
    """As a process's argument, which can't hold a zero byte, nor be very long."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("\0", "").replace("\ud800", "\udcff")[:60_000]


def _template(chance: Chance, commands: list[list[str]]) -> Case:
    text = chance.choice(TEMPLATES) if chance.random() < 0.2 else TEMPLATE  # those may take 10 s
    for _ in range(chance.choice([0, 1, 2])):
        place = chance.randrange(len(text) + 1)
        pieces = ["{{", "}}", "{%", "%}", "|", "-", "é", "loop", "{{ messages }}", "\n"]
        piece = chance.choice([*pieces, chance.choice(TEMPLATES)])
        text = text[:place] + piece + text[place + chance.choice([0, 0, 1, 5]) :]
    arguments = chance.choice(commands)
    file = Path("chat.jinja" if "chat.jinja" in arguments else "base/chat_template.jinja")
    file.write_bytes(text.encode(errors="surrogatepass"))
    return Case(arguments, [f"{file}: {text[:300]!r}"])


_RANKS = "RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29471"
_SLURM = (
    "SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_STEP_NUM_TASKS=2 SLURM_JOB_ID=1 "
    "SLURM_STEP_TASKS_PER_NODE=2 SLURM_STEP_ID=0 SLURM_STEP_NODELIST=n1"
)
_OTHERS = (
    "LOCAL_RANK LOCAL_WORLD_SIZE SLURM_NTASKS TORCHELASTIC_RUN_ID TORCHELASTIC_USE_AGENT_STORE "
    "MINIGPT_STORE_FD MINIGPT_LAUNCHER_PID COLUMNS LINES TERM NO_COLOR LANG LC_ALL TZ "
    "OMP_NUM_THREADS HOME TMPDIR HF_HOME CUDA_VISIBLE_DEVICES PATH PYTHONPATH"
)


def _environment(chance: Chance, commands: list[list[str]]) -> Case:
    sets = [dict(pair.split("=") for pair in text.split()) for text in (_RANKS, _SLURM)]
    variables = dict(chance.choice([{}, {}, *sets]))
    names = [*variables, *variables, *sets[0], *sets[1], *_OTHERS.split()]
    for _ in range(chance.choice([1, 1, 2, 3])):
        variables[chance.choice(names)] = chance.choice(VALUES)
    return Case(chance.choice(commands), [], variables)


def _options(chance: Chance, commands: list[list[str]]) -> Case:
    os.mkfifo("fifo")
    Path("loop").symlink_to("loop")
    Path("hole").touch()
    os.truncate("hole", 1 << 36)
    arguments, other = list(chance.choice(commands)), chance.choice(commands)
    for _ in range(chance.choice([1, 1, 2])):
        place = chance.randrange(len(arguments))
        kind = chance.choice(["value", "value", "path", "path", "remove", "repeat", "other"])
        if kind == "value":
            arguments[place] = _plain(chance.choice([*ODD, *VALUES]))
        elif kind == "path":
            arguments[place] = chance.choice(PATHS)
        elif kind == "remove":
            arguments.pop(place)
        else:
            arguments.insert(place, arguments[place] if kind == "repeat" else chance.choice(other))
        arguments = arguments or ["sample"]
    return Case(arguments)


_RECIPES = "tiny.toml lora.toml corpus chat.jsonl base data chat"
_SOURCES = "text.txt.gz text.txt.zst text.txt.xz table.parquet records.jsonl chat.jsonl"
KINDS = {
    "recipe": Kind(_RECIPES, 6, """
        pretrain tiny.toml -o new
        resume new --or-start tiny.toml
        finetune-lora lora.toml -o new
    """, _files("tiny.toml", "tiny.toml", "lora.toml"), is_users=True),
    "override": Kind(f"{_RECIPES} run", 3, """
        pretrain tiny.toml -o new
        resume run
        finetune-lora lora.toml -o new
    """, _overrides, is_users=True),
    "dataset": Kind("tiny.toml corpus data run", 4, f"""
        pretrain tiny.toml -o new
        verify data
        eval run --data data
        resume run --set train.steps=3
        tokenize corpus -o data {CORPUS}
    """, _files("data/*", "data/dataset.json", seal=True)),
    "instructions": Kind("lora.toml chat.jsonl chat base", 4, f"""
        finetune-lora lora.toml -o new
        verify chat
        eval base --data chat
        tokenize chat.jsonl -o chat {CHAT}
    """, _files("chat/*", "chat/*.npy", "chat/dataset.json", seal=True)),
    "run": Kind(f"{_RECIPES} run", 6, f"""
        resume run --set train.steps=3
        resume {STEP} --set train.steps=3
        resume run
        verify run
        verify {STEP}
        runs .
        eval run
        sample run {SAMPLE}
        sample {STEP} {SAMPLE}
        sample run/final {SAMPLE}
        export {STEP} new
        finetune-lora lora.toml -o new --set lora.base=run --set data.path=other
        report run -o new
        report run -o new
    """, _files("run/*", f"{STEP}/*", f"{STEP}/*.json", "run/final/*", seal=True)),
    "tuned": Kind(f"{_RECIPES} tuned", 4, f"""
        resume tuned --set train.steps=3
        verify {TUNED_STEP}
        runs tuned --json
        eval tuned
        sample {TUNED_STEP} {SAMPLE}
        sample tuned --chat {SAMPLE}
        export tuned new
        export {TUNED_STEP} new --adapter-only
    """, _files("tuned/*", f"{TUNED_STEP}/*", f"{TUNED_STEP}/*.json", seal=True)),
    "base": Kind(f"{_RECIPES} continued.toml", 6, f"""
        sample base {SAMPLE}
        sample base --chat {SAMPLE}
        eval base --text corpus/0.txt
        export base new
        finetune-lora lora.toml -o new
        pretrain continued.toml -o new
        verify base
    """, _files("base/*", "base/*.json", "base/config.json")),
    "adapter": Kind("corpus base adapter", 4, f"""
        sample base --adapter adapter {SAMPLE}
        sample adapter {SAMPLE}
        export adapter new
        eval base --adapter adapter --text corpus/0.txt
        export base new --adapter adapter --adapter-only
    """, _files("adapter/*", "adapter/adapter_config.json")),
    "export": Kind("exported adapter data", 2, f"""
        sample exported {SAMPLE}
        export exported new
        eval exported --data data
        sample exported --adapter adapter {SAMPLE}
    """, _files("exported/*", "exported/minigpt.json")),
    "tokenizer": Kind("tiny.toml corpus base chat.jsonl", 4, f"""
        tokenize corpus -o new --tokenizer base
        tokenize corpus/0.txt -o new --tokenizer base/tokenizer.json
        tokenize chat.jsonl -o new {CHAT}
        sample base {SAMPLE}
        pretrain tiny.toml -o new --set data.path=other --set data.tokenizer={{path='base'}}
    """, _files("base/tokenizer*.json")),
    "journal": Kind("torn.jsonl torn data", 3, f"""
        {JOURNALED}
        {JOURNALED}
        {JOURNALED}
        verify torn
    """, _files("torn/*", "torn/journal.json", "torn/journal.json", "torn/journal.json")),
    "source": Kind(f"corpus {_SOURCES} base run", 4, f"""
        tokenize corpus -o new --tokenizer base
        tokenize corpus -o new --vocab-size 300 --strict
        tokenize text.txt.gz text.txt.zst text.txt.xz -o new --tokenizer base
        tokenize text.txt.gz -o new --vocab-size 300
        tokenize text.txt.zst -o new --vocab-size 300
        tokenize text.txt.xz -o new --vocab-size 300
        tokenize table.parquet -o new --tokenizer base
        tokenize records.jsonl -o new --tokenizer base
        tokenize records.jsonl -o new --vocab-size 300 --strict
        tokenize chat.jsonl -o new {CHAT}
        tokenize chat.jsonl -o new {CHAT} --strict
        eval run --text corpus/0.txt
        sample run --prompt-file corpus/0.txt --max-new-tokens 3
    """, _files("corpus/0.txt", *_SOURCES.split())),
    "template": Kind("lora.toml chat.jsonl chat.jinja base", 2, f"""
        tokenize chat.jsonl -o new {CHAT} --chat-template chat.jinja
        tokenize chat.jsonl -o new {CHAT}
        sample base --chat {SAMPLE}
        finetune-lora lora.toml -o new --set data.path=other
    """, _template),
    "environment": Kind(f"{_RECIPES} run", 1, f"""
        pretrain tiny.toml -o new
        pretrain tiny.toml -o new --nproc 1
        resume run --set train.steps=3
        sample run {SAMPLE}
        verify run
        tokenize corpus -o new --tokenizer base
        pretrain -h
    """, _environment, is_users=True),
    "options": Kind(f"{_RECIPES} {_SOURCES} chat.jinja run tuned adapter", 6, f"""
        tokenize corpus -o new {CORPUS} --workers 1 --shard-tokens 900
        tokenize records.jsonl -o new --text-field text --tokenizer base --split train --json
        tokenize chat.jsonl -o new --format instructions --tokenizer base --chat-template chatml
        pretrain tiny.toml -o new --json
        resume run --allow-change train.steps --set train.steps=3
        finetune-lora lora.toml -o new
        verify run --json
        export run new --dtype bf16 --json
        export base new --adapter adapter --adapter-only
        eval run --data data --split val --batch-size 2 --dtype fp32 --device cpu --json
        eval run --text corpus/0.txt
        sample run {SAMPLE} --temperature 0.5 --top-k 5 --top-p 0.9 --min-p 0.1 --stop x
        sample base {SAMPLE} --repetition-penalty 1.1 --seed 3 --num-samples 2 --dtype bf16 --json
        sample base --adapter adapter --chat {SAMPLE} --greedy --device cpu
        sample run --prompt-file corpus/0.txt --max-new-tokens 3 --json
        report run tuned -o new --json
    """, _options, is_users=True),
}  # fmt: skip
