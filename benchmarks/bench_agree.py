"""Measure what the agreement of the ranks costs per step, with waiting at once and at the end.

    python -m benchmarks.bench_agree

Real ranks of this machine (gloo on loopback) sleep in each step, as a host does whose GPU computes.
Ways alternate; the table has medians over all steps of rank 0, and the slope per rank.
"""

import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection

import torch

from minigpt_cli.commands.launching import join_ranks
from minigpt_cli.distributed.world import World, start_world
from tests.helpers.ranks import free_port, rank_environment

RANKS = (2, 4, 8, 16)
STEP = 0.05  # seconds that a step takes without the question
ROUNDS, STEPS = 5, 20
WAYS = ("no question", "asked and waited for", "asked with the step")


def step(world: World, way: str) -> None:
    answer = None
    if way == "asked with the step":
        answer = world.start_all_reduce_max(lambda: (0, 0))
    time.sleep(STEP)
    if way == "asked and waited for":
        world.all_reduce_max(0, 0)
    if answer is not None:
        answer()


def rank(number: int, ranks: int, port: int, sender: Connection) -> None:
    os.environ |= rank_environment(number, ranks, port)
    torch.set_num_threads(1)
    join_ranks()
    world = start_world()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way in WAYS:
            world.all_reduce_max(0)  # all begin together
            for _ in range(STEPS):
                began = time.perf_counter()
                step(world, way)
                seconds[way].append(time.perf_counter() - began)
    world.all_reduce_max(0)
    if number == 0:
        sender.send({way: statistics.median(times) for way, times in seconds.items()})
    time.sleep(1)  # rank 0 keeps the store
    os._exit(0)


def measure(ranks: int) -> dict[str, float]:
    """Return the median seconds of a step, by way."""
    context, port = multiprocessing.get_context("fork"), free_port()
    receiver, sender = context.Pipe(duplex=False)
    started = [
        context.Process(target=rank, args=(number, ranks, port, sender)) for number in range(ranks)
    ]
    for process in started:
        process.start()
    found: dict[str, float] = receiver.recv()
    for process in started:
        process.join()
    return found


def slope(points: list[tuple[int, float]]) -> float:
    """Fit a line through (ranks, milliseconds) by least squares."""
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def main() -> None:
    added: dict[str, list[tuple[int, float]]] = {way: [] for way in WAYS[1:]}
    print(f"| ranks | {WAYS[0]}, ms | " + " | ".join(f"{way}: adds, ms" for way in added) + " |")
    print("|---" * (2 + len(added)) + "|")
    for ranks in RANKS:
        found = measure(ranks)
        for way, points in added.items():
            points.append((ranks, 1000 * (found[way] - found[WAYS[0]])))
        cells = [f"{points[-1][1]:.2f}" for points in added.values()]
        print(f"| {ranks} | {1000 * found[WAYS[0]]:.2f} | " + " | ".join(cells) + " |", flush=True)
    slopes = [f"{slope(points):.3f}" for points in added.values()]
    print("| slope per rank | | " + " | ".join(slopes) + " |")


if __name__ == "__main__":
    main()
