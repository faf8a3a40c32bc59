"""The settings of a recipe, section by section: type, default, range and meaning of each.

After a change run ``python scripts/recipe_table.py``, which puts them into docs/recipe.md.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

# Where a value comes from. "base": the config.json of the model that the run starts from.
Origin = Literal["default", "recipe", "command line", "base"]
TrackerName = Literal["tensorboard", "wandb", "trackio"]


@dataclass(frozen=True)
class Range:
    """The numbers that a setting accepts, beside its type. None: no bound on that side."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            not (isinstance(value, float) and not math.isfinite(value))
            and (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )

    def __str__(self) -> str:
        words = {"at_least": "of at least", "at_most": "at most"}
        bounds = [
            f"{words.get(name, name)} {bound:{',' if isinstance(bound, int) else 'g'}}"
            for name in ("above", "at_least", "below", "at_most")
            if (bound := getattr(self, name)) is not None
        ]
        return " and ".join(bounds)


POSITIVE = Range(above=0)
NOT_NEGATIVE = Range(at_least=0)
# Far above every model, so that a slip of the pen is told as such and not as too little memory.
WIDTH, LAYERS = Range(above=0, at_most=1_000_000), Range(above=0, at_most=10_000)
LENGTH, VOCABULARY = Range(above=0, at_most=10**9), Range(above=0, at_most=10_000_000)
PROBABILITY = Range(at_least=0, below=1)
RATIO = Range(at_least=0, at_most=1)
FROM_BASE = "must be given, unless a base model has it"


def setting(
    help: str, default: Any = dataclasses.MISSING, range: Range | None = None, unset: str = ""
) -> Any:
    """Declare a field of a section. Checks, messages and the table in docs/recipe.md use this.

    Args:
        help: the meaning, in Markdown.
        default: left out for a setting that a recipe must give.
        range: the numbers that are accepted; None: all.
        unset: what holds where the default is None, in Markdown.
    """
    metadata = {"help": help, "range": range, "unset": unset}
    if default is dataclasses.MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class DataSource:
    """The text that the dataset is made from, when ``[data] path`` doesn't exist yet."""

    kind: Literal["files", "jsonl", "parquet", "huggingface", "python-stdlib"] = setting(
        "where documents come from"
    )
    path: tuple[str, ...] = setting(
        "files, directories, globs, a dataset's directory or its id on the Hub; not for "
        "`python-stdlib`",
        (),
    )
    field: str = setting("the field or column that holds the text", "text")
    split: str = setting("`huggingface` only: the split to read", "train")
    config: str | None = setting("`huggingface` only: the dataset's configuration", None)
    val_fraction: float = setting(
        "share of the text's bytes for validation, within a tenth: whole documents chosen by a "
        "hash, or each document's end (docs/data.md); with `instructions`, of the examples",
        0.05,
        PROBABILITY,
    )
    format: Literal["text", "instructions"] = setting(
        "`instructions`: records with `prompt` and `completion`, or `messages`; the loss is on the "
        "answers (docs/finetune.md)",
        "text",
    )
    chat_template: str | None = setting(
        "`instructions` only: a file, or `chatml`", None, unset="the tokenizer's own"
    )


@dataclass(frozen=True)
class DataTokenizer:
    """Exactly one of the two."""

    path: str | None = setting(
        "a `tokenizer.json`, or a directory with it or with GPT-2's `vocab.json` and `merges.txt`",
        None,
        unset="the base model's",
    )
    train_vocab: int | None = setting(
        "instead of `path`: train a byte-level BPE with this many entries", None, VOCABULARY
    )


@dataclass(frozen=True)
class DataSettings:
    path: str | None = setting("the token dataset", None, unset="`data/<recipe's name>`")
    source: DataSource | None = None
    tokenizer: DataTokenizer | None = None
    verify: bool = setting("compare every shard's sha256 before training (about 1 s per GB)", True)


@dataclass(frozen=True)
class RopeScaling:
    """Rotary angles for contexts longer than a model was first trained on."""

    rope_type: Literal["linear", "llama3"] = setting("how the angles are scaled")
    factor: float = setting("how many times longer the context is", range=POSITIVE)
    low_freq_factor: float | None = setting(
        "`llama3` only, required there: below this frequency angles are scaled", None, POSITIVE
    )
    high_freq_factor: float | None = setting(
        "`llama3` only, required there: above this frequency they are not", None, POSITIVE
    )
    original_max_position_embeddings: int | None = setting(
        "`llama3` only, required there: the context before scaling", None, POSITIVE
    )


@dataclass(frozen=True)
class ModelSettings:
    """model/config.py checks that the sizes fit together."""

    family: Literal["gpt2", "llama", "qwen3"] | None = setting(
        "the architecture", None, unset=FROM_BASE
    )
    hidden_size: int | None = setting("width of the residual stream", None, WIDTH, FROM_BASE)
    num_hidden_layers: int | None = setting("number of blocks", None, LAYERS, FROM_BASE)
    num_attention_heads: int | None = setting("number of query heads", None, WIDTH, FROM_BASE)
    num_key_value_heads: int | None = setting(
        "fewer than the query heads: grouped-query attention", None, WIDTH,
        unset="`num_attention_heads`",
    )  # fmt: skip
    head_dim: int | None = setting(
        "size of a head", None, WIDTH, unset="`hidden_size / num_attention_heads`"
    )
    intermediate_size: int | None = setting(
        "width inside the MLP", None, WIDTH,
        unset="4 h (gpt2), or 8/3 h rounded up to a multiple of 64",
    )  # fmt: skip
    max_position_embeddings: int | None = setting(
        "the longest context", None, LENGTH, unset="`train.sequence_length`"
    )
    vocab_size: int | None = setting(
        "more than the tokenizer has: the rest is padding, never sampled", None, VOCABULARY,
        unset="the tokenizer's",
    )  # fmt: skip
    rope_theta: float | None = setting(
        "base of the rotary angles (llama and qwen3)", None, POSITIVE, unset="10000"
    )
    norm_eps: float | None = setting(
        "added to the variance in norms", None, POSITIVE, unset="1e-5, qwen3 1e-6"
    )
    tie_word_embeddings: bool | None = setting(
        "input and output embeddings are one matrix", None, unset="`true` for gpt2 only"
    )
    attention_bias: bool | None = setting(
        "biases in attention", None, unset="`false`; gpt2 always has them"
    )
    mlp_bias: bool | None = setting(
        "biases in the MLP (not qwen3)", None, unset="`false`; gpt2 always has them"
    )
    initializer_range: float = setting("standard deviation of the initial weights", 0.02, POSITIVE)
    dropout: float = setting(
        "of embeddings, attention weights and residual branches", 0.0, PROBABILITY
    )
    rope_scaling: RopeScaling | None = None
    init_from: str | None = setting(
        "a Hugging Face directory, a name on the Hub or a run, whose weights and shape to start "
        "from; then leave out `family` and sizes",
        None,
    )


@dataclass(frozen=True)
class TrainSettings:
    """The length is given once: as ``steps`` or as ``tokens``."""

    global_batch_size: int = setting("sequences per optimizer step, over all devices", range=LENGTH)
    sequence_length: int = setting("tokens per sequence", range=LENGTH)
    steps: int | None = setting(
        "optimizer steps", None, POSITIVE, unset="give this or `train.tokens`"
    )
    tokens: int | None = setting(
        "tokens to train on", None, POSITIVE, unset="give this or `train.steps`"
    )
    micro_batch_size: int | None = setting(
        "sequences per forward pass on a device; gradients are accumulated, the result stays the "
        "same",
        None,
        POSITIVE,
        unset="all of a rank's",
    )
    seed: int = setting("of weights, data order and dropout", 1337, NOT_NEGATIVE)
    activation_checkpointing: Literal[True, False, "selective"] = setting(
        "recompute each block in the backward pass: less memory, a third more work; `selective`: "
        "keep the results of matrix products and attention, so that almost no work is added",
        False,
    )
    deterministic: bool = setting(
        "the same bits every time, also where a GPU or a compiled model needs slower kernels for "
        "it",
        True,
    )


@dataclass(frozen=True)
class OptimizerSettings:
    lr: float = setting("the peak learning rate", range=POSITIVE)
    name: Literal["adamw", "muon"] = setting(
        "`muon`: Muon for the matrices inside the blocks, AdamW for the rest", "adamw"
    )
    weight_decay: float = setting(
        "of matrices and embeddings; with Muon, of its matrices only", 0.1, NOT_NEGATIVE
    )
    betas: tuple[float, float] = setting("of AdamW", (0.9, 0.95), PROBABILITY)
    eps: float = setting("of AdamW", 1e-8, POSITIVE)
    clip_norm: float = setting(
        "largest norm of the whole gradient; 0: no clipping", 1.0, NOT_NEGATIVE
    )
    muon_lr: float | None = setting("peak rate of Muon's matrices", None, POSITIVE, unset="`lr`")
    muon_momentum: float = setting("of Muon", 0.95, PROBABILITY)


@dataclass(frozen=True)
class ScheduleSettings:
    name: Literal["cosine", "linear", "constant", "wsd", "step"] = setting(
        "how the rate falls after its peak", "cosine"
    )
    warmup_steps: int = setting("steps in which the rate rises to its peak", 0, NOT_NEGATIVE)
    min_lr_ratio: float = setting("the lowest rate, as a share of the peak", 0.1, RATIO)
    decay_ratio: float = setting("`wsd`: share of all steps in which the rate falls", 0.2, RATIO)
    milestones: tuple[int, ...] = setting(
        "`step`: after each of these steps the rate is multiplied by `gamma`; with several, set a "
        "lower `min_lr_ratio`",
        (),
        NOT_NEGATIVE,
    )
    gamma: float = setting("`step`: the factor at each milestone", 0.1, POSITIVE)


@dataclass(frozen=True)
class PrecisionSettings:
    dtype: Literal["auto", "bf16", "fp16", "fp32", "fp64"] = setting(
        "of matrix products; `auto`: bf16 where the device has it, else fp16 on a GPU and fp32 on "
        "a CPU; fp16 scales the loss; fp64 is for checks",
        "auto",
    )
    compile: Literal[True, False, "auto"] = setting(
        "torch.compile for each block; eager with a warning where there is no compiler; `auto`: "
        "on a GPU",
        "auto",
    )
    tf32: bool = setting(
        'with `dtype = "fp32"`: a GPU multiplies 10 bits of a number instead of 23, several '
        "times as fast; a CPU ignores it",
        False,
    )


@dataclass(frozen=True)
class DistributedSettings:
    strategy: Literal["auto", "ddp", "zero2", "fsdp", "hsdp"] = setting(
        "on several ranks: `ddp` (a whole copy on each), `zero2` (sharded, gathered from forward "
        "to backward), `fsdp` (sharded, gathered block by block), `hsdp` (sharded within groups, "
        "copied across); `auto`: `ddp` where 16 bytes a parameter (4 for a frozen one) are at most "
        "40% of a rank's memory, else `fsdp`",
        "auto",
    )
    shard_size: int | None = setting(
        "`hsdp`: ranks that share one copy", None, POSITIVE, unset="those of a machine"
    )
    timeout_minutes: float = setting(
        "how long to wait for a rank that doesn't answer", 10.0, Range(above=0, at_most=10_000)
    )


@dataclass(frozen=True)
class CheckpointSettings:
    every_steps: int | None = setting("save at multiples of this step", None, POSITIVE)
    every_minutes: float = setting(
        "save when this many minutes have passed since the last save; 0: never", 15.0, NOT_NEGATIVE
    )
    keep_last: int = setting("how many of the newest checkpoints to keep", 2, POSITIVE)
    keep_best: bool = setting("also keep the one with the lowest validation loss", True)
    keep_every: int | None = setting("also keep those at multiples of this step", None, POSITIVE)
    asynchronous: bool = setting(
        "train on while a copy in memory is written; `false` saves that memory (the size of a "
        "rank's checkpoint)",
        True,
    )


@dataclass(frozen=True)
class EvalSettings:
    every_steps: int | None = setting(
        "evaluate at multiples of this step, and at the end", None, POSITIVE, unset="at the end"
    )
    windows: int = setting("number of validation sequences, the same each time", 64, POSITIVE)
    patience: int | None = setting(
        "stop after this many evaluations without a new best", None, POSITIVE
    )
    prompts: tuple[str, ...] = setting("completed at each evaluation, greedily", ())
    prompt_tokens: int = setting("tokens to add to each prompt", 48, LENGTH)


@dataclass(frozen=True)
class GuardSettings:
    """Loss and gradient spikes; by default they are not looked for."""

    spike_sigma: float | None = setting(
        "skip the update of a step whose loss or gradient norm is more than this many standard "
        "deviations above the mean; 6 is usual",
        None,
        POSITIVE,
    )
    spike_window: int = setting(
        "number of recent ordinary steps that give the mean and the deviation; no step is a spike "
        "until half of them exist",
        128,
        Range(at_least=8, at_most=100_000),
    )
    rollback_after: int = setting(
        "after this many such steps in a row, go back to the last checkpoint and skip the data "
        "since then",
        3,
        POSITIVE,
    )


@dataclass(frozen=True)
class LogSettings:
    every_steps: int = setting("log at multiples of this step", 10, POSITIVE)
    trackers: tuple[TrackerName, ...] = setting(
        "where metrics go beside `metrics.jsonl` (docs/trackers.md); each needs its extra", ()
    )


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Low-rank adapters (Hu et al. 2021), in PEFT's terms."""

    rank: int = setting("rows of A, columns of B", 16, WIDTH)
    alpha: float = setting("the adapter's output is multiplied by alpha / rank", 32.0, POSITIVE)
    dropout: float = setting("of the adapter's input", 0.0, PROBABILITY)
    target_modules: tuple[str, ...] = setting(
        "or the ends of layers' names, as in PEFT: `q_proj`, `attn.c_proj`", ("all-linear",)
    )
    use_rslora: bool = setting("scale by alpha / sqrt(rank) (Kalajdzievski 2023)", False)
    use_dora: bool = setting("also train the length of each row (Liu et al. 2024)", False)

    @property
    def scale(self) -> float:
        """The factor of an adapter's output."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclass(frozen=True, kw_only=True)
class LoraSettings(AdapterSettings):
    """An adapter, and the base model that it is trained on."""

    base: str = setting(
        "the model that the adapters are for: a Hugging Face directory, a name on the Hub or a "
        "run; then leave out `[model]`"
    )

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
