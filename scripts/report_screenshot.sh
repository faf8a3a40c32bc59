#!/usr/bin/env bash
# Make docs/images/report.png: a real run of recipes/shakespeare.toml, its report, and Chromium's picture of it.
# Needs chromium, and the text and tokenizer that the recipe names. Takes about 2 minutes on 2 idle cores.
set -euo pipefail
cd "$(dirname "$0")/.."
run=${1:-runs/shakespeare}
if [[ ! -d $run ]]; then
    .venv/bin/minigpt pretrain recipes/shakespeare.toml -o "$run" --set train.steps=400 --set log.every_steps=2 \
        --set eval.every_steps=50 --set checkpoint.every_steps=100 --set checkpoint.keep_last=3
fi
page=$(mktemp -d)/report.html
.venv/bin/minigpt report "$run" -o "$page"
chromium --headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars \
    --window-size=1280,1460 --screenshot=docs/images/report.png "file://$page" 2>/dev/null
rm -r "$(dirname "$page")"
