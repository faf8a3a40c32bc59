"""A disk that takes no more, by a limit of this process."""

import resource


def limit_files(size: int | None) -> None:
    """Let this process write no file beyond so many bytes; None: no limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))
