"""``python launcher.py '{"nproc": 2, ...}' COMMAND...``: what cli.main() does around launch()."""

import json
import os
import sys

from minigpt_cli.core.errors import Stopped, UserError
from minigpt_cli.distributed.launch import launch, run
from minigpt_cli.distributed.watch import SIGNALS
from minigpt_cli.distributed.workers import Patience

settings = json.loads(sys.argv[1])
patience = Patience(**settings.pop("patience", {}))
try:
    if sys.argv[2] == "minigpt":
        code = launch(sys.argv[3:], **settings)
    else:
        code = run([sys.executable, *sys.argv[2:]], **settings, patience=patience)
except (UserError, Stopped) as error:
    print(f"minigpt: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
for signum in SIGNALS:  # how it ends is decided: one that comes now changes nothing
    os.kill(os.getpid(), signum)
sys.exit(code)
