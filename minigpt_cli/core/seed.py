"""One way to derive the seed of a random generator from names and numbers."""

import hashlib


def derived_seed(*parts: str | int) -> int:
    """Return a seed of 63 bits for ``torch.Generator``: the sha256 of the parts joined by colons.

    Parts that differ give unrelated streams, whatever the device or the number of ranks.
    """
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
