"""Constants that several layers share."""

IGNORE_INDEX = -100  # a target that the loss leaves out, as in torch.nn.functional.cross_entropy

SHARD_TOKENS = 100_000_000  # of one file of a token dataset, by default

# Bytes of float32 logits that live at once (model/cross_entropy.py), and elements of the matrices
# that Muon orthogonalises together (train/muon.py). model/device_memory.py counts with both. On a
# CPU they should stay in cache, on a GPU they should be large enough to fill the device.
LOGITS_BYTES = {"cpu": 2**22, "cuda": 2**30}
MUON_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
