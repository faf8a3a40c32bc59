"""The recipe of GPT-2 124M, 32 x 1,024 tokens, that several scripts train on the null GPU."""

RECIPE = """
[data]
path = "unused"
[model]
family = "gpt2"
hidden_size = 768
num_hidden_layers = 12
num_attention_heads = 12
[train]
steps = 2
global_batch_size = 32
sequence_length = 1024
deterministic = false
[optimizer]
lr = 3e-4
[precision]
dtype = "bf16"
compile = false
"""
