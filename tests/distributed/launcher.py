"""``python launcher.py '{"nproc": 2, ...}' COMMAND...``: what cli.main() does around launch().

It prints whether the launcher has imported torch, if COMMAND is worker.py.
"""

import json
import os
import signal
import sys
from pathlib import Path

from minigpt_cli.core.signals import SIGNALS
from minigpt_cli.distributed.launch import Timeouts, launch, launch_command

settings = json.loads(sys.argv[1])
timeouts = Timeouts(**settings.pop("timeouts", {}))
run = Path(settings.pop("run", "runs/x"))
if sys.argv[2] == "minigpt":
    code = launch(sys.argv[3:], run=run, **settings)
else:
    command = [sys.executable, *sys.argv[2:]]
    code = launch_command(command, run=run, timeouts=timeouts, **settings)
    print(f"torch in the launcher: {'torch' in sys.modules}")
for signum in SIGNALS:  # the exit code is decided: a signal changes nothing now
    os.kill(os.getpid(), signum)
assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
sys.exit(code)
