"""Seeds of independent random streams."""

import hashlib


def derived_seed(*parts: int | str) -> int:
    """Return a seed for one stream: the same parts give the same seed on every machine.

    Args:
        *parts: the stream's name, such as the run's seed and a parameter's name.

    Returns:
        The first 63 bits of the sha256 of the parts, joined by colons.
    """
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
