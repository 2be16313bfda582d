#!/usr/bin/env bash
# Lint, and the tests once per lane. Every step runs; the exit code says whether all of them passed.
#   LANES      hooked (TransformerLens 3.9), bridge (4.x), or both
#   TEST_ARGS  further arguments for pytest
#   WORKERS    test processes
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

logs=.cache/test-logs
mkdir -p "$logs"
workers=${WORKERS:-1}
# One thread: tiny models gain nothing from more, and a run and its resumption are compared bit for bit, which only the
# same number of threads gives. tests/conftest.py sets the same for the tests' own process.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
eval "pytest_args=(${TEST_ARGS:-})" # so that quotes work: TEST_ARGS='-k "a or b"'
# Neighbouring tests go to the same process, so that what a file prepares is prepared once.
[ "$workers" -gt 1 ] && pytest_args+=(-n "$workers" --dist worksteal)

failed=0
summary=()

closing() { # the line that says how it went: pytest's, behind which libraries may still write, or else the last one
  grep -E '^=+ .*(passed|failed|error|no tests).* =+$' "$1" | tail -n 1 | grep . || grep . "$1" | tail -n 1
}

step() { # step NAME COMMAND…: run it, keep its closing line
  local name=$1 start=$SECONDS verdict=passed
  shift
  printf '\n== %s\n' "$name"
  if ! "$@" </dev/null 2>&1 | tee "$logs/$name.log"; then
    verdict=FAILED
    failed=1
  fi
  summary+=("$(printf '%-7s %-12s %4d s  %s' "$verdict" "$name" $((SECONDS - start)) "$(closing "$logs/$name.log")")")
}

# What multiplies by other code where newer instructions are missing. PyTorch and oneDNN use nothing beyond AVX2 here.
without_newer=(env ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2)
multiplying=(tests/generation/test_{generate,slots}.py tests/subspaces/test_{extract,projection}.py
  tests/models/test_{onednn,attention,parity}.py tests/evaluation/test_{choices,teacher_forced}.py
  tests/training/test_{length_groups,loss}.py)

# What TransformerLens decides. The rest is tested in the first lane: the second has the same torch and transformers.
with_lens=(tests/analysis/test_{directions,drift,heads}.py tests/generation/test_{engines,generate}.py
  tests/models/test_{load,matrix,memory,neutral,parity,processed,proof,sync,untouched}.py
  tests/runs/test_{experiment,model_check,pipeline}.py
  tests/subspaces/test_{extract,projection,reference_protocol,subspace}.py
  tests/test_{artefacts,interoperation,notebooks}.py
  tests/test_smollm2.py::test_hooks_and_fold_agree_on_logits_and_greedy_tokens)
# And the other way round: TransformerBridge in half precision is tried by the second lane alone.
[ "${LANES:-hooked bridge}" = "hooked bridge" ] && export SPD_LENS_BOTH_LANES=1

scripts/lint.sh </dev/null >"$logs/lint.out" 2>&1 & # beside the tests; its step is the last
lint=$!
docs=
if [ -z "${TEST_ARGS:-}" ] && .venv/bin/python -c "import sphinx" 2>/dev/null; then
  make -s docs </dev/null >"$logs/docs.out" 2>&1 &
  docs=$!
fi
for lane in ${LANES:-hooked bridge}; do
  case $lane in
    hooked) python=.venv/bin/python ;;
    bridge) python=.venv-bridge/bin/python ;;
    *)
      echo "unknown lane '$lane': choose from hooked, bridge" >&2
      exit 2
      ;;
  esac
  [ "$lane${TEST_ARGS:-}" = bridge ] && [ "${LANES:-}" != bridge ] && pytest_args+=("${with_lens[@]}")
  step "tests-$lane" "$python" -m pytest ${pytest_args[@]+"${pytest_args[@]}"}
  if [ "$lane" = hooked ] && [ -z "${TEST_ARGS:-}" ] && [ "$(uname -m)" = x86_64 ]; then
    step tests-avx2 "${without_newer[@]}" "$python" -m pytest ${pytest_args[@]+"${pytest_args[@]}"} "${multiplying[@]}"
  fi
done

wait "$lint"
lint_code=$?
linted() { cat "$logs/lint.out" && return "$lint_code"; }
step lint linted
if [ -n "$docs" ]; then
  wait "$docs"
  docs_code=$?
  built() { cat "$logs/docs.out" && return "$docs_code"; }
  step docs built
fi

printf '\n== summary (%s torch threads, %s workers)\n' "$OMP_NUM_THREADS" "$workers"
printf '%s\n' "${summary[@]}"
exit $failed
