"""The settings of a recipe, section by section, with their defaults."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal


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
class DataSettings:
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
class ModelSettings:
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
class TrainSettings:
    global_batch_size: int  # sequences per optimizer step, over all devices
    sequence_length: int
    steps: int | None = None
    tokens: int | None = None  # instead of steps
    micro_batch_size: int | None = None  # sequences per forward pass; default: all at once
    seed: int = 1337
    activation_checkpointing: bool = False
    deterministic: bool = True  # the same bits every time, also where a device needs slower kernels


@dataclass(frozen=True)
class OptimizerSettings:
    lr: float
    name: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.1  # of matrices only
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip_norm: float = 1.0  # 0 switches clipping off
    muon_lr: float | None = None  # of the hidden matrices under Muon; default: lr
    muon_momentum: float = 0.95


@dataclass(frozen=True)
class ScheduleSettings:
    name: Literal["cosine", "linear", "constant", "wsd", "step"] = "cosine"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.1
    decay_ratio: float = 0.2  # wsd: the share of all steps in which the rate falls
    milestones: tuple[int, ...] = ()  # step: where the rate is multiplied by gamma
    gamma: float = 0.1


@dataclass(frozen=True)
class PrecisionSettings:
    dtype: Literal["auto", "bf16", "fp16", "fp32", "fp64"] = "auto"
    compile: bool = False


@dataclass(frozen=True)
class DistributedSettings:
    strategy: Literal["auto", "ddp", "zero2", "fsdp", "hsdp"] = "auto"
    shard_size: int | None = None  # hsdp: ranks that share one copy; default: those of a machine
    timeout_minutes: float = 10.0  # how long to wait for a rank that doesn't answer


@dataclass(frozen=True)
class CheckpointSettings:
    every_steps: int | None = None
    every_minutes: float = 15.0  # 0: never
    keep_last: int = 2
    keep_best: bool = True  # the one with the lowest validation loss
    keep_every: int | None = None  # keep for good each checkpoint at a multiple of this step
    asynchronous: bool = True  # training goes on while a copy is written; takes memory for the copy


@dataclass(frozen=True)
class EvalSettings:
    every_steps: int | None = None  # default: only at the end
    windows: int = 64  # validation windows of sequence_length tokens, the same ones every time
    patience: int | None = None  # stop after this many evaluations without a new best
    prompts: tuple[str, ...] = ()  # completed at each evaluation
    prompt_tokens: int = 48


@dataclass(frozen=True)
class GuardSettings:
    """What to do about spikes of the loss or the gradient's norm; by default nothing."""

    spike_sigma: float | None = None  # a spike: so many standard deviations above the mean ...
    spike_window: int = 128  # ... of so many ordinary steps
    rollback_after: int = 3  # so many spikes in a row: back to the last checkpoint


@dataclass(frozen=True)
class LogSettings:
    every_steps: int = 10


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
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
class LoraSettings(AdapterSettings):
    """An adapter, and what it is trained on."""

    base: str  # a Hugging Face directory, a Hub id, or a run of minigpt's

    @property
    def adapter(self) -> AdapterSettings:
        names = [f.name for f in dataclasses.fields(AdapterSettings)]
        return AdapterSettings(**{name: getattr(self, name) for name in names})


# "base": from the config.json of what the run started from.
Origin = Literal["default", "recipe", "command line", "base"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
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
    lora: LoraSettings | None = None  # finetune-lora
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
