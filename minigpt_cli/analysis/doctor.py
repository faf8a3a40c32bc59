"""Look at this machine: what training needs and can use, and the command that mends a lack."""

from pathlib import Path

from minigpt_cli.analysis.compiler import compiler_finding, trial_compilation
from minigpt_cli.analysis.disk_speed import disk_finding
from minigpt_cli.analysis.finding import Finding
from minigpt_cli.analysis.hardware import hardware_findings
from minigpt_cli.analysis.software import software_findings, torch_finding


def diagnose(directory: Path) -> list[Finding]:
    """Look at everything that training needs or can use; it takes some seconds.

    Args:
        directory: whose disk is measured.
    """
    with trial_compilation() as trial:  # meanwhile the rest is looked at
        findings = software_findings()
        if all(each.what != "torch" for each in findings):  # else it is too old
            findings.insert(2, torch := torch_finding())
            if torch.state == "ok":
                findings[3:3] = [*hardware_findings(), compiler_finding(trial)]
    findings.append(disk_finding(directory))  # last: nothing else uses the disk then
    return findings
