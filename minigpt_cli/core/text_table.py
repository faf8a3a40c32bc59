"""A table of plain text: columns as wide as their content, two spaces between them."""


def text_table(header: list[str], rows: list[list[str]], left: tuple[int, ...] = ()) -> str:
    """Return a header and rows as lines.

    Args:
        header: the names of the columns. A last column without a name holds notes.
        rows: as many cells each.
        left: the columns that start at the left, as names do. Numbers end at the right.
    """
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    left = (*left, *([len(header) - 1] if not header[-1] else []))
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
