"""How fast is `tokenize` beside bare `encode_batch_fast`, and how much memory does it take?

    python benchmarks/bench_tokenize.py --megabytes 1000

Generates a corpus of JSON lines (the standard library's source recombined, and pseudo-text with a
natural distribution of word lengths and frequencies), times the tokenizer alone (batches, all
cores, ids dropped, reading not counted), times the whole of `tokenize` as a process, from its start
to its end with the shards on disk, and samples the memory (PSS) of the process and its workers.
Prints one JSON line.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from minigpt_cli.data.dataset_manifest import read_dataset_manifest  # noqa: E402
from minigpt_cli.data.tokenizer import load_tokenizer  # noqa: E402
from minigpt_cli.prepare.bpe import train_bpe  # noqa: E402
from minigpt_cli.prepare.sources import Source, source_files  # noqa: E402

TOKENIZE = """
import sys
from minigpt_cli.prepare.sources import Source
from minigpt_cli.prepare.tokenize import tokenize
corpus, out, tokenizer, workers = sys.argv[1:]
tokenize(Source("jsonl", (corpus,)), out, tokenizer_path=tokenizer, workers=int(workers) or None)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument(
        "--tokenizer", help="default: a BPE of 16,384 trained on the standard library"
    )
    parser.add_argument("--workers", type=int, default=0, help="default: one per core")
    parser.add_argument("--folder", help="keep the corpus here and use it again")
    parser.add_argument("--phase", choices=("generate", "bare", "tokenize", "all"), default="all")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        corpus = folder / f"corpus-{arguments.megabytes}.jsonl"
        tokenizer = Path(arguments.tokenizer or folder / "tokenizer.json")
        if not corpus.exists():
            generate(corpus, arguments.megabytes)
        if not tokenizer.exists():
            texts = (file.read_text(errors="replace") for file in _stdlib())
            train_bpe(texts, 16_384).save(str(tokenizer))
        result: dict[str, object] = {"megabytes": arguments.megabytes, "cores": os.cpu_count()}
        if arguments.phase in ("bare", "all"):
            result |= bare(corpus, tokenizer)
        if arguments.phase in ("tokenize", "all"):
            result |= whole(corpus, tokenizer, folder, arguments.workers)
        if arguments.phase == "all":
            result["ratio"] = round(
                float(str(result["mb_per_second"])) / float(str(result["bare_mb_per_second"])), 3
            )
        print(json.dumps(result))


def generate(corpus: Path, megabytes: int) -> None:
    """Write JSON lines with ``megabytes`` (10^6 bytes) of text in documents of about 1 to 20 kB."""
    draw = random.Random(0)
    lines = [
        line for file in _stdlib() for line in file.read_text(errors="replace").splitlines(True)
    ]
    letters = "eeeeeetttttaaaaooooiiiinnnnsssshhhrrrddllccuummwwffggyyppbbvk"
    words = ["".join(draw.choices(letters, k=draw.randint(1, 11))) for _ in range(200_000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]  # Zipf
    pool = draw.choices(words, weights, k=2_000_000)
    left = megabytes * 1_000_000
    with corpus.open("w") as stream:
        while left > 0:
            if draw.random() < 0.5:  # passages of code
                parts = []
                for _ in range(draw.randint(2, 20)):
                    start = draw.randrange(len(lines))
                    parts += lines[start : start + draw.randint(5, 30)]
                text = "".join(parts)
            else:
                start, count = draw.randrange(len(pool)), draw.randint(200, 3000)
                some = pool[start : start + count]
                for index in range(draw.randint(5, 20), len(some), draw.randint(8, 25)):
                    some[index] += draw.choice((".", ",", ".\n\n", "?"))
                text = " ".join(some).capitalize()
            stream.write(json.dumps({"text": text}) + "\n")
            left -= len(text.encode())


def bare(corpus: Path, tokenizer_file: Path) -> dict[str, object]:
    """Time `encode_batch_fast` alone on batches of 1,000 documents."""
    tokenizer = load_tokenizer(tokenizer_file)
    size = tokens = 0
    seconds = 0.0
    for texts in _batches(corpus, 1000):
        began = time.perf_counter()
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        seconds += time.perf_counter() - began
        tokens += sum(map(len, encodings))
        size += sum(len(text.encode()) for text in texts)
        del encodings
    return {
        "bare_seconds": round(seconds, 2),
        "bare_mb_per_second": round(size / 1e6 / seconds, 2),
        "bare_tokens": tokens,
    }


def whole(corpus: Path, tokenizer_file: Path, folder: Path, workers: int) -> dict[str, object]:
    """Time `tokenize` as a process of its own and sample what it and its children hold."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-c", TOKENIZE, str(corpus), out, str(tokenizer_file), str(workers)],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, _tree_memory(process.pid))
            time.sleep(0.1)
        seconds = time.perf_counter() - began
        assert process.returncode == 0, process.returncode
        splits = read_dataset_manifest(Path(out)).splits.values()
    size = sum(split.bytes for split in splits)
    return {
        "seconds": round(seconds, 2),
        "mb_per_second": round(size / 1e6 / seconds, 2),
        "tokens": sum(split.tokens for split in splits),
        "documents": sum(split.documents for split in splits),
        "peak_mb": round(peak / 1e6),
    }


def _tree_memory(pid: int) -> int:
    """Return the proportional set size, in bytes, of a process and all its descendants."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(
                _tree_memory(int(child)) for child in (task / "children").read_text().split()
            )
    except OSError:
        pass  # ended in the meantime
    return total


def _batches(corpus: Path, size: int) -> Iterator[list[str]]:
    texts = []
    with corpus.open() as stream:
        for line in stream:
            texts.append(json.loads(line)["text"])
            if len(texts) == size:
                yield texts
                texts = []
    if texts:
        yield texts


def _stdlib() -> list[Path]:
    return source_files(Source("python-stdlib"))


if __name__ == "__main__":
    main()
