"""Messages name sections of docs/faq.md; each must be there."""

import re

from tests.helpers.processes import ROOT


def sections() -> set[str]:
    """The headings of docs/faq.md, as a site makes anchors of them."""
    lines = (ROOT / "docs/faq.md").read_text().splitlines()
    return {line[3:].lower().replace(" ", "-") for line in lines if line.startswith("## ")}


def test_each_section_that_a_message_names_exists():
    named = {
        name
        for path in (ROOT / "minigpt_cli").rglob("*.py")
        for name in re.findall(r"""["']([a-z-]+)["']""", " ".join(
            re.findall(r"faq\(([^()]*)\)", path.read_text())
        ))
    }  # fmt: skip
    assert named <= sections()
    assert named >= {"loss-is-nan", "loss-spikes", "out-of-memory", "it-hangs"}  # the search works


def test_the_faq_has_a_section_for_each_symptom():
    assert sections() >= {
        "loss-is-nan", "loss-is-stuck", "loss-oscillates", "loss-spikes", "out-of-memory",
        "training-is-slow", "it-hangs", "differs-after-a-resume",
    }  # fmt: skip
