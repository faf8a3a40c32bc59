"""Constants that several layers share."""

IGNORE_INDEX = -100  # a target that the loss leaves out, as in torch.nn.functional.cross_entropy
