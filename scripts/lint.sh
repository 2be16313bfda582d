#!/usr/bin/env bash
# Style, formatting and types. All three run, whatever the first ones say.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
failed=0
.venv/bin/ruff check . || failed=1
.venv/bin/ruff format --check . || failed=1
.venv/bin/mypy || failed=1
exit $failed
