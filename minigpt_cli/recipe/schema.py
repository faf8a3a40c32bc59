"""The settings of a recipe, section by section: type, default, range and meaning of each."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

# Where a value comes from. "base": the config.json of the model that the run starts from.
Origin = Literal["default", "recipe", "command line", "base"]


@dataclass(frozen=True)
class Range:
    """The numbers that a setting accepts, beside its type. None: no bound on that side."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )

    def __str__(self) -> str:
        names = {"above": "above", "at_least": "at least", "below": "below", "at_most": "at most"}
        bounds = [
            f"{words} {bound:g}"
            for name, words in names.items()
            if (bound := getattr(self, name)) is not None
        ]
        return "number " + " and ".join(bounds)


POSITIVE = Range(above=0)
NOT_NEGATIVE = Range(at_least=0)
PROBABILITY = Range(at_least=0, below=1)
RATIO = Range(at_least=0, at_most=1)


def setting(help: str, default: Any = dataclasses.MISSING, range: Range | None = None) -> Any:
    """Declare a field of a section.

    Args:
        help: the meaning, for people.
        default: left out for a setting that a recipe must give.
        range: the numbers that are accepted; None: all.
    """
    metadata = {"help": help, "range": range}
    if default is dataclasses.MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class DataSource:
    """The text that the dataset is made from, when ``[data] path`` doesn't exist yet."""

    kind: Literal["files", "jsonl", "parquet", "huggingface", "python-stdlib"] = setting(
        "where documents come from"
    )
    path: tuple[str, ...] = setting("files, globs, a dataset's directory or its Hub id", ())
    field: str = setting("the field or column that holds the text", "text")
    split: str = setting("huggingface only: the split to read", "train")
    config: str | None = setting("huggingface only: the dataset's configuration", None)
    val_fraction: float = setting("share of the documents for validation", 0.05, PROBABILITY)
    format: Literal["text", "instructions"] = setting(
        "instructions: records with prompt and completion, or messages; the loss is on the answers",
        "text",
    )
    chat_template: str | None = setting(
        "instructions only: a file, or chatml; default: the tokenizer's own", None
    )


@dataclass(frozen=True)
class DataTokenizer:
    """Exactly one of the two."""

    path: str | None = setting("a tokenizer.json, or a directory with a tokenizer", None)
    train_vocab: int | None = setting("train a byte-level BPE with so many entries", None, POSITIVE)


@dataclass(frozen=True)
class DataSettings:
    path: str | None = setting("the token dataset; default: data/<recipe's name>", None)
    source: DataSource | None = None
    tokenizer: DataTokenizer | None = None
    verify: bool = setting("compare every shard's sha256 before training", True)


@dataclass(frozen=True)
class RopeScaling:
    """Rotary angles for contexts longer than a model was first trained on."""

    rope_type: Literal["linear", "llama3"] = setting("how the angles are scaled")
    factor: float = setting("how many times longer the context is")
    low_freq_factor: float | None = setting("llama3 only, required there", None)
    high_freq_factor: float | None = setting("llama3 only, required there", None)
    original_max_position_embeddings: int | None = setting("llama3 only, required there", None)


@dataclass(frozen=True)
class ModelSettings:
    """The first four are required, unless ``init_from`` or ``[lora] base`` brings them.

    model/config.py checks that the sizes fit together.
    """

    family: Literal["gpt2", "llama", "qwen3"] | None = setting("the architecture", None)
    hidden_size: int | None = setting("width of the residual stream", None)
    num_hidden_layers: int | None = setting("number of blocks", None)
    num_attention_heads: int | None = setting("number of query heads", None)
    num_key_value_heads: int | None = setting("default: num_attention_heads", None)
    head_dim: int | None = setting("default: hidden_size / num_attention_heads", None)
    intermediate_size: int | None = setting("default: 4 h (gpt2) or 8/3 h", None)
    max_position_embeddings: int | None = setting("default: [train] sequence_length", None)
    vocab_size: int | None = setting("default: the tokenizer's; more is padding", None)
    rope_theta: float | None = setting("base of the rotary angles; default: 10000", None)
    norm_eps: float | None = setting("default: 1e-5, qwen3 1e-6", None)
    tie_word_embeddings: bool | None = setting("default: true for gpt2 only", None)
    attention_bias: bool | None = setting("llama and qwen3; default: false", None)
    mlp_bias: bool | None = setting("llama; default: false", None)
    initializer_range: float = setting("standard deviation of the initial weights", 0.02)
    dropout: float = setting("of embeddings, attention weights and residual branches", 0.0)
    rope_scaling: RopeScaling | None = None
    init_from: str | None = setting("a Hugging Face directory, Hub id or run to start from", None)


@dataclass(frozen=True)
class TrainSettings:
    """The length is given once: as ``steps`` or as ``tokens``."""

    global_batch_size: int = setting(
        "sequences per optimizer step, over all devices", range=POSITIVE
    )
    sequence_length: int = setting("tokens per sequence", range=POSITIVE)
    steps: int | None = setting("optimizer steps", None, POSITIVE)
    tokens: int | None = setting("tokens to train on, instead of steps", None, POSITIVE)
    micro_batch_size: int | None = setting(
        "sequences per forward pass; default: all of a rank's", None, POSITIVE
    )
    seed: int = setting("of weights, data order and dropout", 1337, NOT_NEGATIVE)
    activation_checkpointing: bool = setting("recompute blocks in the backward pass", False)
    deterministic: bool = setting("the same bits every time, also with slower kernels", True)


@dataclass(frozen=True)
class OptimizerSettings:
    lr: float = setting("the peak learning rate", range=POSITIVE)
    name: Literal["adamw", "muon"] = setting("muon: for the matrices in the blocks", "adamw")
    weight_decay: float = setting("of matrices only", 0.1, NOT_NEGATIVE)
    betas: tuple[float, float] = setting("of AdamW", (0.9, 0.95), PROBABILITY)
    eps: float = setting("of AdamW", 1e-8, POSITIVE)
    clip_norm: float = setting("of the whole gradient; 0: no clipping", 1.0, NOT_NEGATIVE)
    muon_lr: float | None = setting("peak rate of Muon's matrices; default: lr", None, POSITIVE)
    muon_momentum: float = setting("of Muon", 0.95, PROBABILITY)


@dataclass(frozen=True)
class ScheduleSettings:
    name: Literal["cosine", "linear", "constant", "wsd", "step"] = setting(
        "how the rate falls", "cosine"
    )
    warmup_steps: int = setting("steps in which the rate rises to its peak", 0, NOT_NEGATIVE)
    min_lr_ratio: float = setting("the lowest rate, as a share of the peak", 0.1, RATIO)
    decay_ratio: float = setting("wsd: share of all steps in which the rate falls", 0.2, RATIO)
    milestones: tuple[int, ...] = setting(
        "step: where the rate is multiplied by gamma", (), NOT_NEGATIVE
    )
    gamma: float = setting("step: the factor at each milestone", 0.1, POSITIVE)


@dataclass(frozen=True)
class PrecisionSettings:
    dtype: Literal["auto", "bf16", "fp16", "fp32", "fp64"] = setting(
        "of matrix products; auto: bf16 where the device has it", "auto"
    )
    compile: bool = setting("torch.compile for each block", False)


@dataclass(frozen=True)
class DistributedSettings:
    strategy: Literal["auto", "ddp", "zero2", "fsdp", "hsdp"] = setting(
        "auto: ddp where the training state fits a rank, else fsdp", "auto"
    )
    shard_size: int | None = setting(
        "hsdp: ranks that share one copy; default: those of a machine", None, POSITIVE
    )
    timeout_minutes: float = setting(
        "how long to wait for a rank that doesn't answer", 10.0, Range(above=0, at_most=10_000)
    )


@dataclass(frozen=True)
class CheckpointSettings:
    every_steps: int | None = setting("save at multiples of this step", None, POSITIVE)
    every_minutes: float = setting("save after so many minutes; 0: never", 15.0, NOT_NEGATIVE)
    keep_last: int = setting("keep so many of the newest checkpoints", 2, POSITIVE)
    keep_best: bool = setting("keep the one with the lowest validation loss", True)
    keep_every: int | None = setting("keep those at multiples of this step", None, POSITIVE)
    asynchronous: bool = setting("train on while a copy in memory is written", True)


@dataclass(frozen=True)
class EvalSettings:
    every_steps: int | None = setting("default: only at the end", None, POSITIVE)
    windows: int = setting("validation sequences, the same ones every time", 64, POSITIVE)
    patience: int | None = setting(
        "stop after so many evaluations without a new best", None, POSITIVE
    )
    prompts: tuple[str, ...] = setting("completed at each evaluation", ())
    prompt_tokens: int = setting("tokens to add to each prompt", 48, POSITIVE)


@dataclass(frozen=True)
class GuardSettings:
    """Loss and gradient spikes; by default they are not looked for."""

    spike_sigma: float | None = setting(
        "a spike lies so many standard deviations above the mean", None, POSITIVE
    )
    spike_window: int = setting(
        "mean and deviation are of so many ordinary steps", 128, Range(at_least=8, at_most=100_000)
    )
    rollback_after: int = setting(
        "so many spikes in a row: back to the last checkpoint", 3, POSITIVE
    )


@dataclass(frozen=True)
class LogSettings:
    every_steps: int = setting("log at multiples of this step", 10, POSITIVE)


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Low-rank adapters (Hu et al. 2021), in PEFT's terms."""

    rank: int = setting("rows of A, columns of B", 16, POSITIVE)
    alpha: float = setting("the adapter's output is multiplied by alpha / rank", 32.0, POSITIVE)
    dropout: float = setting("of the adapter's input", 0.0, PROBABILITY)
    target_modules: tuple[str, ...] = setting("or names as q_proj, attn.c_proj", ("all-linear",))
    use_rslora: bool = setting("alpha / sqrt(rank) instead (Kalajdzievski 2023)", False)
    use_dora: bool = setting("also train the length of each row (Liu et al. 2024)", False)

    @property
    def scale(self) -> float:
        """The factor of an adapter's output."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclass(frozen=True, kw_only=True)
class LoraSettings(AdapterSettings):
    """An adapter, and the base model that it is trained on."""

    base: str = setting("a Hugging Face directory, a Hub id or a run")

    @property
    def adapter(self) -> AdapterSettings:
        names = [f.name for f in dataclasses.fields(AdapterSettings)]
        return AdapterSettings(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole recipe: one field for each section, its name, and each value's origin."""

    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    train: TrainSettings
    optimizer: OptimizerSettings
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    precision: PrecisionSettings = field(default_factory=PrecisionSettings)
    distributed: DistributedSettings = field(default_factory=DistributedSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    guard: GuardSettings = field(default_factory=GuardSettings)
    log: LogSettings = field(default_factory=LogSettings)
    lora: LoraSettings | None = None  # finetune-lora only
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
        """The model that the weights come from; None: they are drawn from the seed."""
        return self.lora.base if self.lora is not None else self.model.init_from

    @property
    def data_path(self) -> str:
        assert self.data.path is not None  # parse_recipe() fills it in
        return self.data.path
