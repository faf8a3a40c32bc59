"""Constants that several layers share."""

IGNORE_INDEX = -100  # a target that the loss leaves out, as in torch.nn.functional.cross_entropy

SHARD_TOKENS = 100_000_000  # of one file of a token dataset, by default

# On a GPU: bytes of float32 logits that live at once (model/cross_entropy.py), and elements of the
# matrices that Muon orthogonalises together (train/muon.py). model/cost.py counts with both.
GPU_LOGITS_BYTES = 2**28
GPU_MUON_ELEMENTS = 2**26
