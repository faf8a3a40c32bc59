"""FLOPs and peaks against figures from elsewhere. Parameter counts are in test_gpt.py."""

import pytest

from minigpt_cli.model.config import model_config
from minigpt_cli.model.cost import flops_per_token, peak_flops


def gpt2_124m(**changes):
    return model_config(
        family="gpt2",
        vocab_size=50257,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=1024,
        **changes,
    )


def test_flops_of_gpt2_are_nanogpts():
    """nanoGPT's estimate_mfu: 6 N + 12 L H Q T with N without the position embeddings."""
    n = 124_439_808 - 1024 * 768
    expected = 6 * n + 12 * 12 * 12 * 64 * 1024
    assert flops_per_token(gpt2_124m(), 1024) == expected
    assert expected == pytest.approx(855e6, rel=1e-3)


def test_flops_count_the_matrix_products():
    """Two FLOPs a weight and token forward, twice that backward; attention's are T H each for
    scores and values, without the causal half."""
    config = model_config(
        family="llama",
        vocab_size=1000,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=160,
        max_position_embeddings=128,
    )
    per_layer = 64 * 128 + 2 * 64 * 64 + 128 * 64 + 3 * 64 * 160
    matrices = 3 * per_layer + 1000 * 64  # the head; the untied embedding is only looked up
    norms = (2 * 3 + 1) * 64
    attention = 3 * 2 * (2 * 100 * 128)
    assert flops_per_token(config, 100) == 3 * (2 * (matrices + norms) + attention)


def test_tying_the_head_changes_no_flops():
    tied, untied = gpt2_124m(), gpt2_124m(tie_word_embeddings=False)
    assert flops_per_token(tied, 512) == flops_per_token(untied, 512)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("Tesla T4", 65e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("AMD Instinct MI300X", 1307e12),
    ],
)
def test_peaks_are_dense(name, peak):
    assert peak_flops(name) == peak


@pytest.mark.parametrize("name", ["cpu", "Intel(R) Xeon(R) Platinum 8480+", "Apple M3", "", "GPU"])
def test_unknown_devices_have_no_peak(name):
    assert peak_flops(name) is None


def test_cards_of_a_similar_name_have_no_known_peak():
    for name in ("NVIDIA RTX A1000 Laptop GPU", "NVIDIA RTX A4000", "NVIDIA T400",
                 "NVIDIA GeForce RTX 4090 Laptop GPU"):  # fmt: skip
        assert peak_flops(name) is None
    assert peak_flops("NVIDIA GeForce RTX 4090") == 165.2e12
    assert peak_flops("NVIDIA H200") == 989e12
