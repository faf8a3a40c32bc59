import pytest
import torch

from minigpt_cli.distributed.device import use_tf32


def test_tf32_is_for_gpus(capsys: pytest.CaptureFixture[str]):
    before = torch.get_float32_matmul_precision()
    try:
        use_tf32(torch.device("cpu"), True)
        assert torch.get_float32_matmul_precision() == before
        assert "warning: precision.tf32 is ignored" in capsys.readouterr().err
        for wanted, precision in ((True, "high"), (False, "highest")):
            use_tf32(torch.device("cuda"), wanted)
            assert torch.get_float32_matmul_precision() == precision
        assert capsys.readouterr().err == ""
    finally:
        torch.set_float32_matmul_precision(before)
