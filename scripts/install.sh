#!/usr/bin/env bash
# scripts/install.sh VENV ARGUMENTS…: install into an environment what pip's arguments say. uv does it, several times
# faster; pip does where uv finds less (it knows nothing of pip's own settings: indexes, folders, certificates).
set -euo pipefail
python=$1/bin/python
shift
"$python" -m uv --version >/dev/null 2>&1 || "$python" -m pip install -qq "uv>=0.8,<1" || true
"$python" -m uv pip install -q --python "$python" "$@" 2>/dev/null || exec "$python" -m pip install -qq "$@"
