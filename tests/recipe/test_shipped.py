"""The first lines of the shipped recipes, compared with transformers, PEFT and arithmetic."""

import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minigpt_cli.core.errors import UserError
from minigpt_cli.model.config import ModelConfig, model_config
from minigpt_cli.model.cost import flops_per_token
from minigpt_cli.model.device_memory import device_memory_needed
from minigpt_cli.model.workload import Workload
from minigpt_cli.recipe import Recipe, load_recipe
from minigpt_cli.recipe.shipped import FACTS, ShippedRecipe, shipped_recipe, shipped_recipes

RECIPES = {each.name: each for each in shipped_recipes()}
COMPUTED = {name: each for name, each in RECIPES.items() if "arithmetic" in each.facts["Time"]}
H100 = 989e12  # FLOP/s in bf16 without sparsity, by its maker's data sheet
# The vocabularies of the tokenizers, as their makers give them.
VOCABULARIES = {"tiny": 4096, "shakespeare": 50_257, "shakespeare-speed": 1024}
# The shapes of models on the Hub, of their config.json.
BASES = {
    "HuggingFaceTB/SmolLM2-135M": model_config(
        family="llama", vocab_size=49_152, hidden_size=576, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
        max_position_embeddings=8192, rope_theta=1e5, tie_word_embeddings=True,
    ),
    "Qwen/Qwen3-0.6B-Base": model_config(
        family="qwen3", vocab_size=151_936, hidden_size=1024, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, intermediate_size=3072,
        max_position_embeddings=32_768, rope_theta=1e6, tie_word_embeddings=True,
    ),
}  # fmt: skip


def config_of(name: str) -> tuple[Recipe, ModelConfig]:
    from minigpt_cli.model.config import config_from_recipe, with_vocabulary

    recipe = load_recipe(RECIPES[name].file)
    if recipe.base in BASES:
        return recipe, BASES[recipe.base]
    if recipe.base is not None:
        assert recipe.base == "runs/shakespeare"
        return recipe, config_of("shakespeare")[1]
    size = VOCABULARIES.get(name, 1)
    return recipe, config_from_recipe(with_vocabulary(recipe, size), size)


def theirs(config: ModelConfig) -> torch.nn.Module:
    """transformers' model of this shape, without memory for its weights."""
    if config.family == "gpt2":
        sizes = {
            "n_embd": config.hidden_size, "n_layer": config.num_hidden_layers,
            "n_head": config.num_attention_heads, "n_positions": config.max_position_embeddings,
        }  # fmt: skip
    else:
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                 "head_dim", "intermediate_size", "tie_word_embeddings")  # fmt: skip
        sizes = {name: getattr(config, name) for name in names}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config.family, vocab_size=config.vocab_size, **sizes)
        )


@pytest.mark.parametrize("name", RECIPES)
def test_parameters(name: str):
    recipe, config = config_of(name)
    model = theirs(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    said = RECIPES[name].facts["Model"]
    if recipe.lora is None:
        assert said.startswith(f"{config.family}, {count:,} parameters")
    else:
        from peft import LoraConfig, get_peft_model

        adapted = get_peft_model(model, LoraConfig(r=recipe.lora.rank, target_modules="all-linear"))
        trained, _ = adapted.get_nb_trainable_parameters()
        assert said == f"LoRA, {trained:,} parameters on a frozen {config.family} of {count:,}"


def test_sizes_that_their_makers_published():
    """Of config.json on the Hub, and the parameters of safetensors' index there."""
    assert sum(p.numel() for p in theirs(config_of("llama-1b")[1]).parameters()) == 1_235_814_400
    for name, published, width in (
        ("gpt2-124m", 124_439_808, 768),
        ("gpt2-350m", 354_823_168, 1024),
        ("gpt2-1.5b", 1_557_611_200, 1600),
    ):
        assert RECIPES[name].parameters == published + (50_304 - 50_257) * width


def sizes(recipe: ShippedRecipe) -> tuple[int, float]:
    """The number of GPUs and the hours, as the recipe's first lines give them."""
    gpus = re.match(r"(\d) H100 \(80 GB\)", recipe.facts["Hardware"])
    time = re.match(r"([\d.]+) (hours|minutes), by arithmetic at an MFU of 40%",
                    recipe.facts["Time"])  # fmt: skip
    assert gpus is not None
    assert time is not None
    return int(gpus[1]), float(time[1]) / (60 if time[2] == "minutes" else 1)


@pytest.mark.parametrize("name", COMPUTED)
def test_time(name: str):
    shipped, (recipe, config) = RECIPES[name], config_of(name)
    gpus, hours = sizes(shipped)
    adapters = None if recipe.lora is None else shipped.parameters
    length = recipe.train.sequence_length
    flops = shipped.tokens * flops_per_token(config, length, adapters)
    assert hours == pytest.approx(flops / (0.4 * H100 * gpus * 3600), rel=0.04)


@pytest.mark.parametrize("name", COMPUTED)
def test_memory(name: str):
    shipped, (recipe, config) = RECIPES[name], config_of(name)
    gpus, _ = sizes(shipped)
    micro = recipe.train.micro_batch_size
    assert micro is not None
    accumulation = recipe.train.global_batch_size // (gpus * micro)
    assert recipe.train.global_batch_size == accumulation * gpus * micro
    strategy = "ddp" if gpus > 1 else "single"
    of_adapters = {}
    if recipe.lora is not None:
        if "adapter" not in Workload.__dataclass_fields__:
            pytest.skip("the arithmetic doesn't know adapters")
        of_adapters = {"adapter": recipe.lora.adapter, "packed": True}
    length = recipe.train.sequence_length
    work = Workload(strategy, gpus, micro, length, accumulation, **of_adapters)
    peak = device_memory_needed(config, work).peak / 1e9
    said = re.search(r"takes (\d+) GB of memory", shipped.facts["Hardware"])
    assert said is not None
    assert float(said[1]) == pytest.approx(peak, rel=0.05)
    assert peak < 0.9 * 80


@pytest.mark.parametrize("name", COMPUTED)
def test_twenty_tokens_for_each_parameter(name: str):
    shipped, recipe = RECIPES[name], load_recipe(RECIPES[name].file)
    if recipe.base is None:
        assert shipped.tokens / shipped.parameters == pytest.approx(20, rel=0.01)
    else:
        assert "tokens: " in shipped.file.read_text()  # its first lines say why


def test_each_says_what_is_measured():
    for shipped in RECIPES.values():
        assert tuple(shipped.facts) == FACTS
        assert re.search(r"measured|arithmetic", shipped.facts["Time"])
        assert "measured" in shipped.facts["Loss"]


def test_a_name_and_its_forms():
    for name in ("tiny", "tiny.toml", "recipes/tiny.toml"):
        found, content = shipped_recipe(name)
        assert found == RECIPES["tiny"]
        assert content == found.file.read_bytes()
    with pytest.raises(UserError, match="did you mean llama-1b"):
        shipped_recipe("llama1b")
    with pytest.raises(UserError, match="minigpt recipes lists all"):
        shipped_recipe("x")
