"""The recipe: frozen dataclasses read from TOML, with every problem listed at once.

A value comes from the command line (``--set section.key=value``), else from the recipe's file, else
from the default here; ``Recipe.origin`` remembers which. ``dump`` writes the resolved recipe with
each value's origin in a comment, ``load`` reads such a file back with its origins.
"""

import dataclasses
import difflib
import math
import re
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import tomli_w

from minigpt_cli.errors import UserError


@dataclass(frozen=True)
class DataSource:
    """Where the text comes from, when ``[data] path`` is not there yet."""

    kind: Literal["files", "jsonl", "parquet", "huggingface", "python-stdlib"]
    path: tuple[str, ...] = ()  # files, globs, a dataset's directory or its id on the Hub
    field: str = "text"
    split: str = "train"  # huggingface only
    config: str | None = None  # huggingface only: the dataset's configuration
    val_fraction: float = 0.05
    # instructions: records with prompt and completion, or messages; the loss is on the answers
    format: Literal["text", "instructions"] = "text"
    chat_template: str | None = None  # a file, or chatml; default: the tokenizer's own


@dataclass(frozen=True)
class DataTokenizer:
    """One of the two: a tokenizer's files, or the size of a vocabulary to train."""

    path: str | None = None
    train_vocab: int | None = None


@dataclass(frozen=True)
class Data:
    path: str | None = None  # default: data/<recipe's name>
    source: DataSource | None = None
    tokenizer: DataTokenizer | None = None
    verify: bool = True  # compare every shard's sha256 before training


@dataclass(frozen=True)
class RopeScaling:
    """Rotary angles for contexts longer than a model was first trained on."""

    rope_type: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float | None = None  # these three: llama3 only, and needed there
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


@dataclass(frozen=True)
class Model:
    """The first four are needed, unless ``init_from`` brings them."""

    family: Literal["gpt2", "llama", "qwen3"] | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None  # default: num_attention_heads
    head_dim: int | None = None  # default: hidden_size / num_attention_heads
    intermediate_size: int | None = None  # default: 4 h (gpt2) or 8/3 h
    max_position_embeddings: int | None = None  # default: [train] sequence_length
    vocab_size: int | None = None  # default: the tokenizer's; more is padding
    rope_theta: float | None = None
    norm_eps: float | None = None
    tie_word_embeddings: bool | None = None  # default: true for gpt2
    attention_bias: bool | None = None  # llama, qwen3; default: false
    mlp_bias: bool | None = None  # llama; default: false
    initializer_range: float = 0.02
    dropout: float = 0.0
    rope_scaling: RopeScaling | None = None
    init_from: str | None = None  # a Hugging Face directory or a Hub id to take the weights from


@dataclass(frozen=True)
class Train:
    global_batch_size: int  # sequences per optimizer step, over all devices
    sequence_length: int
    steps: int | None = None
    tokens: int | None = None  # instead of steps
    micro_batch_size: int | None = None  # sequences per forward pass; default: all at once
    seed: int = 1337
    activation_checkpointing: bool = False
    deterministic: bool = True  # the same bits every time, also where a device needs slower kernels


@dataclass(frozen=True)
class Optimizer:
    lr: float
    name: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.1  # of matrices only
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip_norm: float = 1.0  # 0 switches clipping off
    muon_lr: float | None = None  # of the hidden matrices under Muon; default: lr
    muon_momentum: float = 0.95


@dataclass(frozen=True)
class Schedule:
    name: Literal["cosine", "linear", "constant", "wsd", "step"] = "cosine"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.1
    decay_ratio: float = 0.2  # wsd: the share of all steps in which the rate falls
    milestones: tuple[int, ...] = ()  # step: where the rate is multiplied by gamma
    gamma: float = 0.1


@dataclass(frozen=True)
class Precision:
    dtype: Literal["auto", "bf16", "fp16", "fp32", "fp64"] = "auto"
    compile: bool = False


@dataclass(frozen=True)
class Distributed:
    strategy: Literal["auto", "ddp", "zero2", "fsdp", "hsdp"] = "auto"
    shard_size: int | None = None  # hsdp: ranks that share one copy; default: those of a machine
    timeout_minutes: float = 10.0  # how long to wait for a rank that doesn't answer


@dataclass(frozen=True)
class Checkpoint:
    every_steps: int | None = None
    every_minutes: float = 15.0  # 0: never
    keep_last: int = 2
    keep_best: bool = True  # the one with the lowest validation loss
    keep_every: int | None = None  # keep for good each checkpoint at a multiple of this step
    asynchronous: bool = True  # training goes on while a copy is written; takes memory for the copy


@dataclass(frozen=True)
class Eval:
    every_steps: int | None = None  # default: only at the end
    windows: int = 64  # validation windows of sequence_length tokens, the same ones every time
    patience: int | None = None  # stop after this many evaluations without a new best
    prompts: tuple[str, ...] = ()  # completed at each evaluation
    prompt_tokens: int = 48


@dataclass(frozen=True)
class Guard:
    """What to do about spikes of the loss or the gradient's norm; by default nothing."""

    spike_sigma: float | None = None  # a spike: so many standard deviations above the mean ...
    spike_window: int = 128  # ... of so many ordinary steps
    rollback_after: int = 3  # so many spikes in a row: back to the last checkpoint


@dataclass(frozen=True)
class Log:
    every_steps: int = 10


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Low-rank adapters (Hu et al. 2021), in PEFT's terms."""

    rank: int = 16
    alpha: float = 32.0  # what an adapter adds is multiplied by alpha / rank
    dropout: float = 0.0  # of what goes into an adapter
    target_modules: tuple[str, ...] = ("all-linear",)  # or names as q_proj, attn.c_proj
    use_rslora: bool = False  # alpha / sqrt(rank) instead (Kalajdzievski 2023)
    use_dora: bool = False  # also train the length of each row (Liu et al. 2024)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclass(frozen=True, kw_only=True)
class Lora(Adapter):
    """An adapter, and what it is trained on."""

    base: str  # a Hugging Face directory, a Hub id, or a run of minigpt's

    @property
    def adapter(self) -> Adapter:
        names = [f.name for f in dataclasses.fields(Adapter)]
        return Adapter(**{name: getattr(self, name) for name in names})


# "base": from the config.json of what the run started from.
Origin = Literal["default", "recipe", "command line", "base"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    data: Data
    model: Model = field(default_factory=Model)
    train: Train
    optimizer: Optimizer
    schedule: Schedule = field(default_factory=Schedule)
    precision: Precision = field(default_factory=Precision)
    distributed: Distributed = field(default_factory=Distributed)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    eval: Eval = field(default_factory=Eval)
    guard: Guard = field(default_factory=Guard)
    log: Log = field(default_factory=Log)
    lora: Lora | None = None  # finetune-lora
    name: str = field(default="recipe", metadata={"internal": True})
    origin: dict[str, Origin] = field(
        default_factory=dict, compare=False, metadata={"internal": True}
    )

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch_size * self.train.sequence_length

    @property
    def total_steps(self) -> int:
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.tokens is not None
        return -(-self.train.tokens // self.tokens_per_step)

    @property
    def base(self) -> str | None:
        """What the weights come from, if not from a seed."""
        return self.lora.base if self.lora is not None else self.model.init_from

    @property
    def data_path(self) -> str:
        assert self.data.path is not None  # parse() fills it in
        return self.data.path


# What a run has already been shaped by: ``resume`` changes these only if told to by name ...
CHANGED_BY_NAME = (
    "model.dropout",
    "train.seed",
    "train.global_batch_size",
    "train.sequence_length",
    "lora.alpha",
    "lora.dropout",
)
# ... and these never: the saved tensors would not fit. (Another lora.base is compared by content.)
NEVER_CHANGED = (
    "model.",
    "optimizer.name",
    "lora.rank",
    "lora.target_modules",
    "lora.use_",
)


def load(path: Path | str, overrides: list[str] | None = None, name: str | None = None) -> Recipe:
    """Read a recipe, put the command line's ``section.key=value`` overrides over it, check it.

    Args:
        name: what to call it; by default the file's name without its ending.

    Raises:
        UserError: the file can't be read, or a list of everything that is wrong in it.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe; recipes/ holds examples") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the recipe can't be read: {error}") from None
    return parse(text, overrides or [], where=str(path), name=name or path.stem)


def parse(
    text: str, overrides: list[str], *, where: str = "recipe", name: str = "recipe"
) -> Recipe:
    """The recipe in ``text``; see ``load``."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{where}: not valid TOML: {error}") from None

    problems: list[str] = []
    origin: dict[str, Origin] = dict.fromkeys(_leaves(tables), "recipe")
    origin.update(_origins_in_comments(text))
    for override in overrides:
        key, equals, raw = override.partition("=")
        key = key.strip()
        if not equals or "." not in key:
            problems.append(f"--set {override}: write it as --set section.key=value")
            continue
        _assign(tables, key.split("."), _toml_value(raw.strip()))
        origin[key] = "command line"

    locate = _Locator(where, text, origin)
    if not tables.keys() & {"model", "lora"}:
        problems.append(f"{where}: the section [model] is missing")
    recipe = _build(Recipe, tables, "", problems, locate)
    if recipe is not None:
        problems += _contradictions(recipe)
    if problems:
        if len(problems) == 1:
            (problem,) = problems
            raise UserError(problem if problem.startswith(where) else f"{where}: {problem}")
        raise UserError("\n  ".join([f"{where}: {len(problems)} problems", *problems]))
    assert recipe is not None
    data = dataclasses.replace(recipe.data, path=recipe.data.path or f"data/{name}")
    recipe = dataclasses.replace(recipe, data=data)
    all_leaves = _leaves(to_tables(recipe, with_unset=True))
    origin = {leaf: origin.get(leaf, "default") for leaf in all_leaves}
    return dataclasses.replace(recipe, name=name, origin=origin)


def to_tables(recipe: Recipe, with_unset: bool = False) -> dict[str, Any]:
    """The recipe as nested plain dictionaries; settings that are None are left out by default."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {
                f.name: plain(getattr(value, f.name))
                for f in dataclasses.fields(value)
                if not f.metadata.get("internal")
                and (with_unset or getattr(value, f.name) is not None)
            }
        return list(value) if isinstance(value, tuple) else value

    tables: dict[str, Any] = plain(recipe)
    return tables


def dump(recipe: Recipe) -> str:
    """The resolved recipe as TOML, each value's origin in a comment."""
    lines = [f"# {recipe.name}: the resolved recipe; where each value came from stands behind it"]

    def section(table: dict[str, Any], prefix: str) -> None:
        values = {key: value for key, value in table.items() if not isinstance(value, dict)}
        if not prefix:
            values = {}  # a whole section that is not set
        if values:
            lines.append(f"\n[{prefix}]")
        for key, value in values.items():
            origin = recipe.origin.get(f"{prefix}.{key}", "default")
            if value is None:
                lines.append(f"# {key} is not set  # {origin}")
            else:
                if isinstance(value, list):  # on one line, unlike tomli_w's arrays
                    items = (tomli_w.dumps({"x": item}).strip()[4:] for item in value)
                    shown = f"{key} = [{', '.join(items)}]"
                else:
                    shown = tomli_w.dumps({key: value}).strip()
                lines.append(f"{shown}  # {origin}")
        for key, value in table.items():
            if isinstance(value, dict):
                section(value, f"{prefix}.{key}" if prefix else key)

    section(to_tables(recipe, with_unset=True), "")
    return "\n".join(lines) + "\n"


def settings(recipe: Recipe) -> list[str]:
    """The names of all settings, as ``--set`` takes them."""
    return list(_leaves(to_tables(recipe, with_unset=True)))


def differences(old: Recipe, new: Recipe) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of every setting that differs."""
    before, after = (_leaves(to_tables(recipe, with_unset=True)) for recipe in (old, new))
    return [
        (key, before.get(key), after.get(key))
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]


# --- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Locator:
    """Says where in the file, or that on the command line, a setting was given."""

    where: str
    text: str
    origin: dict[str, Origin]

    def __call__(self, section: str, key: str) -> str:
        dotted = f"{section}.{key}" if section else key
        if self.origin.get(dotted) == "command line":
            return f"--set {dotted}"
        current = ""
        for number, line in enumerate(self.text.splitlines(), 1):
            if header := re.match(r"\s*\[([\w.\- ]+)\]", line):
                current = header[1].replace(" ", "")
                if current == dotted:
                    return f"{self.where}:{number}: [{dotted}]"
            elif current == section and re.match(rf"\s*{re.escape(key)}\s*=", line):
                return f"{self.where}:{number}: [{section}] {key}"
        return f"{self.where}: [{section}] {key}" if section else f"{self.where}: [{key}]"


def _build(cls: type, table: Any, section: str, problems: list[str], locate: _Locator) -> Any:
    """An instance of the dataclass ``cls`` from a TOML table, or None with ``problems`` added."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if not f.metadata.get("internal")}
    values: dict[str, Any] = {}
    before = len(problems)
    for key, value in table.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
            known = f"did you mean {near[0]}?" if near else f"known here: {', '.join(fields)}"
            problems.append(f"{locate(section, key)}: unknown; {known}")
            continue
        kind = _dataclass_in(hints[key])
        if kind is None:
            try:
                values[key] = _convert(hints[key], value)
            except TypeError as error:
                problems.append(f"{locate(section, key)}: {error}, not {value!r}")
        elif not isinstance(value, dict):
            problems.append(f"{locate(section, key)}: must be a table, [{key}]")
        else:
            inner = f"{section}.{key}" if section else key
            values[key] = _build(kind, value, inner, problems, locate)
    for key, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and key not in table:
            if (kind := _dataclass_in(hints[key])) and not section:
                if kind is Data:
                    values[key] = Data()
                    continue
                problems.append(f"{locate.where}: the section [{key}] is missing")
            else:
                problems.append(f"{locate.where}: [{section}] {key} is missing")
    return cls(**values) if len(problems) == before else None


def _dataclass_in(hint: Any) -> type | None:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)  # type: ignore[return-value]


def _convert(hint: Any, value: Any) -> Any:
    """``value`` as the type ``hint``; TypeError says what was expected."""
    kind = get_origin(hint)
    if kind in (Union, types.UnionType):
        (hint,) = (option for option in get_args(hint) if option is not type(None))
        return _convert(hint, value)
    if kind is Literal:
        if value in get_args(hint):
            return value
        options = [str(option) for option in get_args(hint)]
        near = difflib.get_close_matches(str(value), options, n=1, cutoff=0.6)
        raise TypeError(
            f"must be one of {', '.join(options)}" + (f" (did you mean {near[0]}?)" if near else "")
        )
    if kind is tuple:
        inner = get_args(hint)
        if isinstance(value, str) and inner == (str, ...):
            return (value,)
        if not isinstance(value, list):
            raise TypeError("must be a list")
        if inner[-1] is ...:
            return tuple(_convert(inner[0], item) for item in value)
        if len(value) != len(inner):
            raise TypeError(f"must be a list of {len(inner)}")
        return tuple(_convert(each, item) for each, item in zip(inner, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is hint:
        return value
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    raise TypeError(f"must be {names[hint]}")


def _toml_value(raw: str) -> Any:
    try:
        return tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return raw  # a bare word: --set precision.dtype=bf16


def _assign(tables: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        if not isinstance(tables.get(key), dict):
            tables[key] = {}
        tables = tables[key]
    tables[keys[-1]] = value


def _leaves(tables: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, dict):
            found.update(_leaves(value, f"{prefix}{key}."))
        else:
            found[prefix + key] = value
    return found


def _origins_in_comments(text: str) -> dict[str, Origin]:
    """The origins that ``dump`` wrote; nothing in a recipe that a person wrote."""
    found: dict[str, Origin] = {}
    if "the resolved recipe; where each value came from" not in text.partition("\n")[0]:
        return found
    section = ""
    for line in text.splitlines():
        if header := re.match(r"\[([\w.\-]+)\]", line):
            section = header[1]
        elif value := re.match(r"(\w+) = .*  # (default|recipe|command line|base)$", line):
            found[f"{section}.{value[1]}"] = typing.cast(Origin, value[2])
    return found


# --- what types can't say ------------------------------------------------------------------------


def _contradictions(recipe: Recipe) -> list[str]:
    """Settings that are each of the right type but out of range, or don't go together."""
    r, found = recipe, []

    def need(true: bool, problem: str) -> None:
        if not true:
            found.append(problem)

    need(r.base != "", "[lora] base and [model] init_from must not be empty")
    if r.lora is not None and r.model.init_from is not None:
        found.append("[model] init_from and [lora] base both say where the weights come from")
    elif r.lora is None and r.model.init_from is None:
        names = ("family", "hidden_size", "num_hidden_layers", "num_attention_heads")
        missing = [name for name in names if getattr(r.model, name) is None]
        found += [f"[model] {name} is missing" for name in missing]
    if r.lora is not None:
        need(r.lora.rank > 0, f"[lora] rank must be positive, not {r.lora.rank}")
        need(0 < r.lora.alpha < math.inf, f"[lora] alpha must be above 0, not {r.lora.alpha}")
        need(0 <= r.lora.dropout < 1, f"[lora] dropout must lie in [0, 1), not {r.lora.dropout}")
        need(bool(r.lora.target_modules), "[lora] target_modules must not be empty")

    positive = {
        "[train] global_batch_size": r.train.global_batch_size,
        "[train] sequence_length": r.train.sequence_length,
        "[train] steps": r.train.steps,
        "[train] tokens": r.train.tokens,
        "[train] micro_batch_size": r.train.micro_batch_size,
        "[optimizer] lr": r.optimizer.lr,
        "[optimizer] eps": r.optimizer.eps,
        "[optimizer] muon_lr": r.optimizer.muon_lr,
        "[schedule] gamma": r.schedule.gamma,
        "[distributed] shard_size": r.distributed.shard_size,
        "[distributed] timeout_minutes": r.distributed.timeout_minutes,
        "[checkpoint] every_steps": r.checkpoint.every_steps,
        "[checkpoint] keep_last": r.checkpoint.keep_last,
        "[checkpoint] keep_every": r.checkpoint.keep_every,
        "[eval] every_steps": r.eval.every_steps,
        "[eval] windows": r.eval.windows,
        "[eval] patience": r.eval.patience,
        "[eval] prompt_tokens": r.eval.prompt_tokens,
        "[guard] spike_sigma": r.guard.spike_sigma,
        "[guard] rollback_after": r.guard.rollback_after,
        "[log] every_steps": r.log.every_steps,
    }
    for name, value in positive.items():
        need(value is None or value > 0, f"{name} must be positive, not {value}")
        need(value is None or value < math.inf, f"{name} must be finite, not {value}")
    window = r.guard.spike_window
    need(
        8 <= window <= 100_000,
        f"[guard] spike_window must be at least 8 steps, not {window}, and at most 100,000",
    )
    minutes = r.distributed.timeout_minutes
    need(minutes <= 10_000, f"[distributed] timeout_minutes must be at most 10,000, not {minutes}")
    need(r.train.seed >= 0, f"[train] seed must not be negative, not {r.train.seed}")
    need(
        (r.train.steps is None) != (r.train.tokens is None),
        "[train] give the length once, as steps or as tokens",
    )
    micro = r.train.micro_batch_size
    if micro and micro > 0 and r.train.global_batch_size % micro:
        found.append(
            f"[train] global_batch_size {r.train.global_batch_size} is not a multiple of "
            f"micro_batch_size {micro}"
        )
    positions = r.model.max_position_embeddings
    need(
        positions is None or positions >= r.train.sequence_length,
        f"[train] sequence_length {r.train.sequence_length} is longer than [model] "
        f"max_position_embeddings {positions}",
    )
    for name, ratio in {
        "[schedule] min_lr_ratio": r.schedule.min_lr_ratio,
        "[schedule] decay_ratio": r.schedule.decay_ratio,
    }.items():
        need(0 <= ratio <= 1, f"{name} must lie in [0, 1], not {ratio}")
    for name, value in {
        "[optimizer] weight_decay": r.optimizer.weight_decay,
        "[optimizer] clip_norm": r.optimizer.clip_norm,  # 0: no clipping
        "[checkpoint] every_minutes": r.checkpoint.every_minutes,  # 0: never
    }.items():
        need(0 <= value < math.inf, f"{name} must be finite and not negative, not {value}")
    for name, beta in {
        "betas[0]": r.optimizer.betas[0],
        "betas[1]": r.optimizer.betas[1],
        "muon_momentum": r.optimizer.muon_momentum,
    }.items():
        need(0 <= beta < 1, f"[optimizer] {name} must lie in [0, 1), not {beta}")
    need(r.schedule.warmup_steps >= 0, "[schedule] warmup_steps must not be negative")
    need(
        (r.schedule.name == "step") == bool(r.schedule.milestones),
        "[schedule] name = step needs milestones, and other schedules have none",
    )
    need(min(r.schedule.milestones, default=0) >= 0, "[schedule] milestones must not be negative")
    if not found:
        need(
            r.schedule.warmup_steps <= r.total_steps,
            f"[schedule] warmup_steps {r.schedule.warmup_steps} is more than the "
            f"{r.total_steps} steps of the run",
        )
    need(
        r.data.path is not None or r.data.source is not None,
        "[data] path (a token dataset) or [data.source] (text to make one of) is missing",
    )
    if r.data.source is not None:
        source = r.data.source
        need(
            source.kind == "python-stdlib" or bool(source.path),
            f"[data.source] kind {source.kind} needs a path",
        )
        need(0 <= source.val_fraction < 1, "[data.source] val_fraction must lie in [0, 1)")
        if source.format == "instructions":
            need(
                source.kind in ("jsonl", "parquet", "huggingface"),
                f"[data.source] format instructions needs records: kind jsonl, parquet or "
                f"huggingface, not {source.kind}",
            )
            need(
                r.data.tokenizer is None or r.data.tokenizer.train_vocab is None,
                "[data.tokenizer] format instructions needs a tokenizer that is there: give path",
            )
        else:
            need(
                source.chat_template is None,
                "[data.source] chat_template is for format instructions",
            )
        tokenizer = r.data.tokenizer or DataTokenizer()
        brought = r.data.tokenizer is None and r.base is not None  # by what it starts from
        need(
            r.base is None or tokenizer.train_vocab is None,
            "[data.tokenizer] train_vocab: what the weights come from brings its own: leave it out",
        )
        need(
            brought or (tokenizer.path is None) != (tokenizer.train_vocab is None),
            "[data.tokenizer] give path or train_vocab",
        )
    return found
