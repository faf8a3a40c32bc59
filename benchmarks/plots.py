"""Plots of the results as SVG files that can be read on white and on black."""

from pathlib import Path

from benchmarks.results import Row

# Greys and a blue with a contrast of at least 4.5 : 1 to white and of 4 : 1 to black.
INK, OURS, OTHERS = "#767676", "#1f77d0", "#767676"
# What growth.py varies -> the axis.
GROWTH = {
    "parameters": "parameters",
    "context": "tokens of context",
    "batch": "sequences in a batch",
    "dataset": "tokens in the dataset",
    "ranks": "ranks",
}


def plots_of(rows: list[Row]) -> dict[str, str]:
    """Return the names of the plots that can be drawn, and what each shows."""
    found = {}
    if any(row.work in ("gpt2", "llama") for row in rows):
        found["bench-steps.svg"] = "The time of a training step, by program"
    if any(row.work.startswith("growth: ") for row in rows):
        found["bench-growth.svg"] = "The cost of a step against sizes"
    return found


def draw_all(rows: list[Row], folder: Path) -> None:
    """Draw the plots of ``plots_of`` into a folder."""
    for name in plots_of(rows):
        {"bench-steps.svg": draw_steps, "bench-growth.svg": draw_growth}[name](rows, folder / name)


def draw_steps(rows: list[Row], file: Path) -> None:
    """Draw a bar for each program's training step."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.work in ("gpt2", "llama")]
    names = [f"{row.work}: {row.who}, {row.how}" for row in rows]
    times = [row.median for row in rows]
    colours = [OURS if row.who == "minigpt" else OTHERS for row in rows]
    figure = Figure(figsize=(8, 0.3 * len(rows) + 0.8), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, times, color=colours)
    axes.invert_yaxis()  # the first one on top
    for place, each in enumerate(times):
        axes.text(each, place, f" {each:,.0f}", va="center", color=INK)
    axes.set_xlabel("ms per training step")
    _save(figure, file)


def draw_growth(rows: list[Row], file: Path) -> None:
    """Draw the cost of a step against each size, on logarithmic axes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.work.startswith("growth: "):
            what = row.work.removeprefix("growth: ")
            found.setdefault(what, []).append((float(row.how), row.median))
    figure = Figure(figsize=(3.2 * len(found), 3), layout="constrained")
    for axes, (what, points) in zip(
        figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True
    ):
        x, y = zip(*sorted(points), strict=True)
        axes.loglog(x, y, "o-", color=OURS)
        axes.set_ylim(min(y) / 2, 2 * max(y))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        if max(x) < 100 * min(x):  # too narrow for powers of ten
            axes.set_xticks(x, [f"{each:g}" for each in x])
            axes.xaxis.set_minor_formatter("")
        axes.set_xlabel(GROWTH.get(what, what))
        axes.set_ylabel("s per step")
    _save(figure, file)


def _save(figure, file: Path) -> None:  # type: ignore[no-untyped-def]
    for axes in figure.axes:
        axes.tick_params(colors=INK, which="both")
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
        for name, spine in axes.spines.items():
            spine.set_visible(name in ("left", "bottom"))
            spine.set_color(INK)
    import matplotlib

    # No date and no random ids: the same results give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "minigpt", "svg.fonttype": "none"}):
        figure.savefig(file, transparent=True, metadata={"Date": None})
