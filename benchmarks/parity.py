"""Compare logits with those of transformers and PEFT, by family: ``python -m benchmarks.parity``.

Random models of each shape, float32, on a CPU. Each column is the largest difference of any logit.
"""

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from minigpt_cli.generate.engine import generate
from minigpt_cli.generate.sampling import SamplingOptions
from minigpt_cli.huggingface.adapter import LoadedAdapter, merge
from minigpt_cli.huggingface.base_model import open_base
from minigpt_cli.huggingface.export import export_adapter, export_model
from minigpt_cli.huggingface.load import load_model
from minigpt_cli.model import lora
from minigpt_cli.model.gpt import GPT
from minigpt_cli.prepare.sources import Source
from minigpt_cli.prepare.tokenize import tokenize
from tests.helpers.adapters import KINDS, peft_adapter, randomize
from tests.helpers.models import SHAPES, saved_model
from tests.helpers.processes import ROOT

CPU = torch.device("cpu")
IDS = torch.randint(0, 320, (4, 64), generator=torch.Generator().manual_seed(1))


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


@torch.no_grad()
def row(shape: str, folder: Path, data: Path) -> list[str]:
    theirs, directory = saved_model(shape, folder / "in", data)
    base = open_base(directory)
    ours = load_model(directory, CPU, []).model
    cells = [f"{theirs(IDS).logits.abs().max():.0f}", f"{far(ours(IDS), theirs(IDS).logits):.0e}"]
    steps = generate(ours, [1, 2, 3], SamplingOptions(temperature=0.0), max_new_tokens=50)
    expected = theirs.generate(
        torch.tensor([[1, 2, 3]]), max_new_tokens=50, min_new_tokens=50, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )[0, 3:].tolist()  # fmt: skip
    tokens = [step[0] for step in steps]
    cells.append(str(sum(a == b for a, b in zip(tokens, expected, strict=True))))
    out = export_model(base, folder / "out", files={"README.md": ""}).path
    before, after = (load_file(place / "model.safetensors") for place in (directory, out))
    same = before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    cells.append("yes" if same else "NO")
    for number, kind in enumerate(KINDS.values()):
        place = folder / f"adapter-{number}"
        made = peft_adapter(directory, place / "theirs", kind)
        mine = load_model(directory, CPU, [place / "theirs"]).model
        read = far(mine(IDS), made(IDS).logits)
        model = GPT(base.config)
        lora.attach(model, kind)
        adapter = LoadedAdapter("", kind, randomize(model))
        export_adapter(base, adapter, place / "ours", files={"README.md": ""})
        mine = load_model(place / "ours", CPU, []).model
        loaded: Any = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(directory), place / "ours"
        )
        written = far(mine(IDS), loaded.eval()(IDS).logits)
        merged = export_model(merge(base, adapter), place / "merged", files={"README.md": ""}).path
        cells.append(f"{read:.0e} / {written:.0e}")
        cells.append(f"{far(load_model(merged, CPU, []).model(IDS), mine(IDS)):.0e}")
    return cells


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    head = ["shape", "largest logit", "logits", "of 50 greedy tokens", "export bit-equal"]
    head += [each for kind in KINDS for each in (f"{kind}: PEFT's / ours", "merged")]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        tokenize(Source("files", (str(ROOT / "LICENSE"),)), data, train_vocab=320, workers=1)
        for shape in SHAPES:
            print(f"| {' | '.join([shape, *row(shape, Path(folder) / shape, data)])} |", flush=True)


if __name__ == "__main__":
    main()
