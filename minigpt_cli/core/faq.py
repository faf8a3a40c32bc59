"""Where a message sends its reader."""


def faq(section: str) -> str:
    """Return the place in docs/faq.md that explains a problem, to end a message with.

    Args:
        section: A heading of docs/faq.md, in small letters, with hyphens for spaces.
    """
    return f"(docs/faq.md: {section})"
