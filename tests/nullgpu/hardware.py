"""Print what the doctor finds of the hardware, as JSON."""

import json
from dataclasses import asdict

from minigpt_cli.analysis.hardware import hardware_findings

print(json.dumps([asdict(each) for each in hardware_findings()]))
