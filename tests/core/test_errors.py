"""Which errors are for the user to mend."""

import pytest
import torch

from minigpt_cli.core.errors import describe, exit_code_of


def test_out_of_memory():
    with pytest.raises(RuntimeError) as allocation:
        torch.empty(2**60, dtype=torch.uint8)
    wrapped = RuntimeError("the backend failed")
    wrapped.__cause__ = allocation.value
    for error in (allocation.value, wrapped, MemoryError()):
        assert exit_code_of(error) == 2
        assert describe(error).startswith("out of memory: ")
        assert "try in this order: a smaller train.micro_batch_size" in describe(error)
    assert "1,152,921,504.6 GB were asked for" in describe(wrapped)
    assert "asked for" not in describe(MemoryError())
    assert "activation_checkpointing=selective or true" in describe(MemoryError())
    # Not torch's allocator, but CUDA and cuBLAS beside it
    for text in (
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ):
        assert exit_code_of(RuntimeError(text)) == 2
    other = RuntimeError("a bug")
    assert exit_code_of(other) == 1
    assert describe(other).startswith("internal error: RuntimeError: a bug")
