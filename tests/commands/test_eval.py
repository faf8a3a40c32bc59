import gzip
import json
import lzma
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.helpers.commands import finished, refused


def test_dataset_and_text(run: Path, tmp_path: Path):
    result = json.loads(finished("eval", run, "--json"))
    assert result.keys() == {"loss", "perplexity", "bits_per_byte", "tokens", "checkpoint"}
    assert result["checkpoint"] == str(run / "checkpoints/step-00000012")
    (tmp_path / "a.txt").write_text("import os\n\n\ndef f(x):\n    return x\n" * 20)
    text = finished("eval", run / "checkpoints/step-00000012", "--text", tmp_path / "a.txt")
    assert "bits per byte" in text
    for name, compress in (("a.txt.gz", gzip.compress), ("a.txt.xz", lzma.compress)):
        (tmp_path / name).write_bytes(compress((tmp_path / "a.txt").read_bytes()))
        same = finished("eval", run / "checkpoints/step-00000012", "--text", tmp_path / name)
        assert same == text


def test_device_and_dtype(run: Path):
    default = json.loads(finished("eval", run, "--json"))
    on_cpu = json.loads(finished("eval", run, "--device", "cpu", "--json"))
    assert on_cpu["loss"] == pytest.approx(default["loss"], rel=1e-2)
    assert on_cpu == default or torch.cuda.is_available()
    exact, rounded = (
        json.loads(finished("eval", run, "--dtype", dtype, "--json"))["loss"]
        for dtype in ("fp32", "bf16")
    )
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=1e-2)


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_tasks_without_the_harness(run: Path):
    refused(2, "pip install 'lm-eval>=0.4.13'", "eval", run, "--tasks", "hellaswag")


@pytest.mark.parametrize(
    ("part", "arguments"),
    [
        ("--device toaster: no such device; give cpu, cuda or cuda:N", ("--device", "toaster")),
        (f"this machine has {torch.cuda.device_count()} CUDA GPUs", ("--device", "cuda:99")),
        ("--data and --text can't be combined", ("--text", "a.txt", "--data", "b")),
        ("--text nowhere.txt can't be read: No such file", ("--text", "nowhere.txt")),
        ("--text {folder}/latin.txt is not UTF-8 text", ("--text", "{folder}/latin.txt")),
        ("--text -: standard input can't be read", ("--text", "-")),
        ("pipe is a pipe or a device", ("--text", "{folder}/pipe")),
        ("torn.gz can't be read: it is damaged or cut off", ("--text", "{folder}/torn.gz")),
        ("binary.txt holds NUL bytes", ("--text", "{folder}/binary.txt")),
        ("{folder}/empty.txt: the file is empty", ("--text", "{folder}/empty.txt")),
        ("has no split tset, but train, val", ("--split", "tset")),
        ("--num-fewshot and --chat need --tasks NAME", ("--limit", "3")),
        ("--tasks can't be combined with --data or --text", ("--tasks", "a", "--text", "b")),
    ],
)
def test_bad_options(run: Path, tmp_path: Path, part: str, arguments: tuple[str, ...]):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "torn.gz").write_bytes(gzip.compress(b"text " * 99)[:-4])
    (tmp_path / "binary.txt").write_bytes(b"a\0b")
    os.mkfifo(tmp_path / "pipe")
    filled = (each.format(folder=tmp_path) for each in arguments)
    refused(2, part.format(folder=tmp_path), "eval", run, *filled)
