"""Make the README's table of benchmarks, and the plots, from benchmarks/results.

    make bench-table

The README has markers around the table. tests/benchmarks compares it with the results.
"""

import sys
from pathlib import Path
from typing import Any

from benchmarks.plots import draw_all, plots_of
from benchmarks.results import FOLDER, ROOT, Row, read_results
from benchmarks.shapes import BATCH, TOKENS, product_flops, shape

BEGIN, END = "<!-- benchmarks: begin (make bench-table) -->", "<!-- benchmarks: end -->"
WHO = ("minigpt", "nanoGPT", "litgpt", "HF", "limit")
GPT2_PARAMETERS = 124_439_808
# work and unit of the rows -> the table's words, the decimals and the columns.
LINES = (
    ("gpt2", "ms", f"gpt2, 12.3 M, {BATCH} x {TOKENS}: ms per step", 0),
    ("llama", "ms", f"llama, 13.8 M, {BATCH} x {TOKENS}: ms per step", 0),
    ("sample, batch 1", "tokens/s", "GPT-2 124M sampling: tokens/s", 0),
    ("sample, batch 16", "tokens/s", "the same, batch 16", 0),
    ("tiny", "tokens/s", "recipes/tiny.toml: tokens/s", 0),
    ("tiny to its end", "s of training", "recipes/tiny.toml: s of training", 0),
    ("tiny to its end", "bits per byte", "its bits per byte", 3),
    ("shakespeare", "s of training", "tiny Shakespeare: s of training", 1),
    ("shakespeare", "bits per byte", "its bits per byte", 2),
    ("tokenize", "MB/s", "tokenize: MB/s", 1),
    ("startup", "ms", "start: ms", 0),
    ("save", "s", "training waits for a save of 100 M parameters: s", 2),
)  # fmt: skip


def limit_rows(rows: list[Row]) -> list[Row]:
    """Return what the machine's rates allow: rows for training steps and for sampling."""
    found = []
    if rates := [row.median for row in rows if row.work == "products"]:
        rate = 1e9 * max(rates)
        how = f"products at {rate / 1e9:.0f} GFLOP/s"
        for work in ("gpt2", "llama"):
            flops = product_flops(shape(work), TOKENS) * BATCH * TOKENS
            found.append(Row(work, "limit", how, "ms", [[1000 * flops / rate]]))
        tiny = rate / product_flops(*tiny_shape())
        found.append(Row("tiny", "limit", how, "tokens/s", [[tiny]]))
    for reads in (row for row in rows if row.work == "reads"):
        for dtype, size in (("float32", 4), ("bfloat16", 2)):  # each token reads all weights
            rate = 1e9 * reads.median / (size * GPT2_PARAMETERS)
            how = f"{dtype}, reads at {reads.median:.0f} GB/s"
            found.append(Row("sample, batch 1", "limit", how, "tokens/s", [[rate]]))
    return found


def tiny_shape() -> tuple[Any, int]:
    """Return the model of recipes/tiny.toml and its sequence length."""
    from minigpt_cli.model.config import config_from_recipe
    from minigpt_cli.recipe import load_recipe

    recipe = load_recipe(ROOT / "recipes" / "tiny.toml")
    assert recipe.data.tokenizer is not None
    assert recipe.data.tokenizer.train_vocab is not None
    config = config_from_recipe(recipe, recipe.data.tokenizer.train_vocab)
    return config, recipe.train.sequence_length


def table(head: dict[str, Any], rows: list[Row]) -> str:
    """Return the table in Markdown, with a line about the measurement above it."""
    rows = [*rows, *limit_rows(rows)]
    out = [describe(head), "", f"| work | {' | '.join(WHO)} |", "|---" * (1 + len(WHO)) + "|"]
    for work, unit, words, decimals in LINES:
        line = [row for row in rows if (row.work, row.unit) == (work, unit)]
        if not any(row.who == "minigpt" for row in line):
            continue
        cells = [_cell([row for row in line if row.who == who], decimals) for who in WHO]
        if work == "gpt2":
            cells = [cell or ("not measured" if who == "nanoGPT" else "") for who, cell in
                     zip(WHO, cells, strict=True)]  # fmt: skip
        out.append(f"| {words} | {' | '.join(cells)} |")
    for file, words in plots_of(rows).items():
        out += ["", f"![{words}](docs/images/{file})"]
    return "\n".join(out)


def _cell(rows: list[Row], decimals: int) -> str:
    return "; ".join(f"{row.median:,.{decimals}f} {row.how}".strip() for row in rows)


def describe(head: dict[str, Any]) -> str:
    """Return a sentence about the machine, the versions and the day."""
    machine, versions = head["machine"], head["versions"]
    peers = ", ".join(f"{name} {versions[name]}" for name in ("torch", "litgpt", "transformers")
                      if name in versions)  # fmt: skip
    busy = " **The machine was busy: compare nothing with these figures.**" if head["busy"] else ""
    changed = ", with uncommitted changes" if head["uncommitted_changes"] else ""
    return (
        f"Medians on {machine['cores']} cores of an {machine['cpu']} "
        f"({', '.join(machine['flags'])}), {peers}, {head['date'][:10]}, commit "
        f"{head['commit'][:7]}{changed}.{busy} Every sample: benchmarks/results."
    )


def put(page: str, text: str) -> str:
    """Return the page with the text between its markers."""
    before, found, rest = page.partition(BEGIN)
    assert found, f"no line {BEGIN}"
    _, found, after = rest.partition(END)
    assert found, f"no line {END}"
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def readme_table(folder: Path = FOLDER) -> str:
    """Return the table of ``bench.json`` and ``bench-full.json``, and the places of the plots."""
    if not (folder / "bench.json").exists():
        return "Not measured yet."
    head, rows = read_results(folder / "bench.json")
    full_head, more = full_results(folder)
    text = table(head, rows + more)
    if full_head is not None and (words := describe(full_head)) != describe(head):
        text += f"\n\nWhole runs, and the cost against sizes: {words}"
    return text


def full_results(folder: Path) -> tuple[dict[str, Any] | None, list[Row]]:
    """Return the facts and rows of what only ``make bench-full`` measures."""
    file = folder / "bench-full.json"
    return read_results(file) if file.exists() else (None, [])


def main() -> None:
    if not (FOLDER / "bench.json").exists():
        sys.exit("table: no benchmarks/results/bench.json: run make bench")
    readme = ROOT / "README.md"
    readme.write_text(put(readme.read_text(), readme_table()))
    draw_all(
        [*read_results(FOLDER / "bench.json")[1], *full_results(FOLDER)[1]], ROOT / "docs/images"
    )


if __name__ == "__main__":
    main()
