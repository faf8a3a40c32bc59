"""``python worker.py FOLDER ACTION...``: a worker that does the action of its rank.

It leaves FOLDER/RANK.started with its process id, and FOLDER/RANK.saved with the signals it got.

    exit:CODE      end with this code
    raise          end by an uncaught exception
    die            end by SIGKILL
    sleep:SECONDS,CODE
    save:SECONDS   on a signal save for so long, then end with 75 or 130
    again          like save:0, but only at the second signal
    stay           ignore signals
    torch          like save:0, but first import torch, for a long time
"""

import os
import signal
import sys
import time
from pathlib import Path

from minigpt_cli.core.signals import SIGNALS
from minigpt_cli.distributed.join import follow_launcher

blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set(SIGNALS)
received: list[int] = []
for signum in SIGNALS:
    if signal.getsignal(signum) is not signal.SIG_IGN:
        signal.signal(signum, lambda number, _: received.append(number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
follow_launcher()
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
action, _, value = sys.argv[2 + rank].partition(":")


def leave(name: str, text: str) -> None:
    temporary = folder / f".{os.getpid()}.{name}"  # several launchers may share the folder
    temporary.write_text(text)
    temporary.rename(folder / f"{rank}.{name}")


leave("started", str(os.getpid()))
threads = os.environ.get("OMP_NUM_THREADS")
print(f"rank {rank} of {os.environ['WORLD_SIZE']}, {threads} threads, signals blocked: {blocked}")
if action == "exit":
    sys.exit(int(value))
if action == "sleep":
    time.sleep(float(value.split(",")[0]))
    sys.exit(int(value.split(",")[1]))
if action == "raise":
    raise RuntimeError("a bug")
if action == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if action == "torch":
    import torch  # noqa: F401
while len(received) < (2 if action == "again" else 1) or action == "stay":
    time.sleep(0.02)
time.sleep(float(value or 0))
leave("saved", " ".join(map(str, received)))
sys.exit(130 if received[0] == signal.SIGINT else 75)
