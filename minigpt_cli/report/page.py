"""Runs -> one HTML page with everything in it: styles, scripts, data. It asks no host for anything.

Whatever a run's files hold is text on the page: Jinja escapes it, and control characters are shown
as \\xNN. Its Content-Security-Policy names the two scripts by their sha256, so that no other runs,
and forbids everything else that a page could load or send.
"""

import base64
import hashlib
import time
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import minigpt_cli
from minigpt_cli.core.console import printable
from minigpt_cli.report import page_data
from minigpt_cli.report.numbers import numbers_of
from minigpt_cli.report.run_contents import RunContents

ASSETS = Path(__file__).with_name("assets")
MARKER = b'<meta name="generator" content="minigpt report">'  # only such a file is replaced
MARKER_WITHIN = 1024  # bytes from the page's beginning


def render_page(runs: list[RunContents]) -> str:
    """Return the report of one or several runs as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    summaries = [numbers_of(run) for run in runs]
    facts = [page_data.facts(run, each) for run, each in zip(runs, summaries, strict=True)]
    scripts = [_asset("uPlot.iife.min.js").strip(), _asset("report.js")]
    styles = _asset("uPlot.min.css").strip() + "\n" + _asset("report.css")
    return environment.get_template("page.html.jinja").render(
        title=", ".join(run.name for run in runs[:4]) + (", ..." if len(runs) > 4 else ""),
        version=minigpt_cli.__version__,
        made=time.strftime("%Y-%m-%d %H:%M %Z"),
        runs=runs,
        summaries=summaries,
        facts=facts,
        fact_table=page_data.fact_table(facts),
        settings=[page_data.settings(run) for run in runs],
        differences=page_data.recipe_differences(runs),
        environments=page_data.environments(runs),
        datasets=page_data.datasets(runs),
        checkpoints=[page_data.checkpoint_rows(run) for run in runs],
        policy=_policy(scripts, styles),
        license=Markup(_asset("uPlot.LICENSE.txt")),
        styles=Markup(styles),
        scripts=[Markup(script) for script in scripts],
        data=Markup(page_data.chart_json(runs, summaries)),
    )


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _policy(scripts: list[str], styles: str) -> str:
    """Return the Content-Security-Policy that allows just these inline scripts and styles."""
    hashes = " ".join(f"'{_csp_hash(script)}'" for script in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src '{_csp_hash(styles)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _csp_hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _printable(value: Any) -> Any:
    """Show control characters and half surrogate pairs, which UTF-8 can't hold, as \\xNN."""
    return value if isinstance(value, Markup) else printable(str(value), keep="\n")
