"""The tiny recipe that most tests train."""

TINY = """
[data]
path = "{data}"
[model]
family = "llama"
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
[train]
steps = 12
global_batch_size = 8
micro_batch_size = 4
sequence_length = 32
[optimizer]
lr = 3e-3
[schedule]
warmup_steps = 3
[checkpoint]
every_steps = 4
keep_last = 100
[eval]
every_steps = 4
windows = 8
[log]
every_steps = 1
"""
