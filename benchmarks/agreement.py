"""Compare losses with those of one process, by strategy and number of ranks.

    python -m benchmarks.agreement

Train a small model on LICENSE for 50 steps in each way, on real ranks of this machine (gloo), and
print a Markdown table of the largest relative difference of any step's loss.
"""

import tempfile
from pathlib import Path
from typing import Any

from minigpt_cli.prepare.sources import Source
from minigpt_cli.prepare.tokenize import tokenize
from minigpt_cli.report import metrics
from tests.helpers.parallel_settings import COMMON, SETTINGS, STRATEGIES
from tests.helpers.processes import ROOT
from tests.helpers.ranks import train_many
from tests.helpers.recipes import TINY


def worst(run: Path, reference: Path) -> float:
    losses = [
        [line["loss"] for line in metrics.read(each) if "loss" in line] for each in (run, reference)
    ]
    return max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=True))


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    data = folder / "data"
    tokenize(Source("files", (str(ROOT / "LICENSE"),)), data, train_vocab=320, val_fraction=0.2)
    (folder / "tiny.toml").write_text(TINY.format(data=data))

    def job(setting: str, name: str, *overrides: str) -> dict[str, Any]:
        return {
            "recipe": str(folder / "tiny.toml"),
            "out": str(folder / f"{setting}-{name}"),
            "overrides": [*COMMON, *SETTINGS[setting][0], *overrides],
        }

    whole = "train.micro_batch_size=8"  # COMMON accumulates 4 micro-batches of 2
    jobs = [job(setting, "accumulated") for setting in SETTINGS]
    jobs += [job(setting, "whole", whole) for setting in SETTINGS]
    train_many(1, jobs, folder)
    for ranks in (2, 4):
        jobs = [
            job(setting, f"{strategy}-{ranks}", f"distributed.strategy={strategy}",
                "distributed.shard_size=2")
            for setting in SETTINGS
            for strategy in STRATEGIES
        ]  # fmt: skip
        train_many(ranks, jobs, folder)
    print("| | " + " | ".join(SETTINGS) + " |")
    print("|---" * (1 + len(SETTINGS)) + "|")
    names = [("one process, whole batch", "whole")]
    names += [(f"{s}, {n} ranks", f"{s}-{n}") for n in (2, 4) for s in STRATEGIES]
    for title, name in names:
        # Dropout's masks depend on the micro-batch size, so without accumulation it is another run.
        cells = [
            "n/a"
            if name == "whole" and "model.dropout=0.1" in SETTINGS[setting][0]
            else f"{worst(folder / f'{setting}-{name}', folder / f'{setting}-accumulated'):.1e}"
            for setting in SETTINGS
        ]
        print(f"| {title} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
