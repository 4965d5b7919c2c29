#!/usr/bin/env bash
# Runs the named steps in order and stops at the first that fails. Prints each step's seconds;
# where a step ran tests, the last line is `N passed, N failed, N skipped`.
#   scripts/check.sh STEP...       the steps are the functions below: step_clippy is `clippy`
source "$(dirname "$0")/lib.sh"

logs=target/check
counting=" rust-tests doctests pytest " # the steps whose tests are counted

step_venv() { scripts/setup_venv.sh; }

# Fails where Cargo.lock is not what Cargo.toml asks for, and downloads the crates.
step_fetch() { cargo fetch --locked; }

# Before the wheel, which embeds them. Without NVRTC (not on Linux) it embeds their sources only.
step_kernels() { "$PY" cuda/build_kernels.py --optional; }

step_rustfmt() { cargo fmt --all --check; }

step_clippy() {
  cargo clippy --all-targets -- -D warnings
  cargo clippy --all-targets --features python -- -D warnings
}

# nextest runs no doctests, cargo test would run them a second time: hence two steps.
step_rust-tests() {
  if cargo nextest --version >/dev/null 2>&1; then
    cargo nextest run --no-fail-fast
  else
    cargo test --no-fail-fast --lib --bins --tests --examples
  fi
}

step_doctests() { cargo test --doc; }

step_wheel() {
  rm -f dist/nybble-*.whl
  "$PY" -m maturin build --release --locked --interpreter "$PYO3_PYTHON" --out dist
  "$PY" scripts/check_wheel.py dist
}

step_install() {
  "$PY" -m pip install --quiet --no-index --no-deps --force-reinstall dist/nybble-*.whl
}

step_develop() { VIRTUAL_ENV="$PWD/.venv" "$PY" -m maturin develop --release; }

step_ruff() {
  "$PY" -m ruff check
  "$PY" -m ruff format --check
}

step_mypy() {
  "$PY" -m mypy --strict python/nybble
  "$PY" -m mypy --strict cuda/build_kernels.py
}

step_stubtest() {
  need_nybble
  "$PY" -m mypy.stubtest --mypy-config-file pyproject.toml nybble._core
}

step_pytest() {
  need_nybble
  "$PY" -m pytest --color=no tests/python
}

step_bench() {
  need_nybble
  cargo bench
  local file
  for file in benches/python/*.py; do
    [ ! -e "$file" ] || "$PY" "$file"
  done
}

need_nybble() {
  "$PY" -c 'import nybble._core' || die "$PY cannot import nybble._core; build it with \`make dev\`"
}

# closing_lines STEP: the lines of its log in which the test runner gives its totals.
closing_lines() {
  local log=$logs/$1.log
  [ -f "$log" ] || return 0
  case $1 in
    pytest) grep -E '^(=+ )?[0-9]+ [a-z]+.* in [0-9.]+s' "$log" | tail -n 1 ;;
    # A failed test's own output may hold libtest's line too, so nextest's comes first.
    *) grep -E '^ *Summary \[' "$log" || grep -E '^test result: ' "$log" ;;
  esac
}

# total WORDS: the sum of the numbers before one of the words, over all closing lines.
total() {
  local step
  for step in $counting; do closing_lines "$step" || true; done |
    { grep -oE "[0-9]+ ($1)\b" || true; } | awk '{ sum += $1 } END { print sum + 0 }'
}

# print_totals FAILED_STEP: a step that failed without a failed test counts as one failure,
# so that a broken run never reads "0 failed".
print_totals() {
  local failed
  failed=$(total 'failed|exec failed|timed out|errors?')
  [ -z "$1" ] || [ "$failed" -gt 0 ] || failed=1
  say "$(total 'passed|xpassed') passed, $failed failed, $(total 'skipped|ignored|xfailed') skipped"
}

[ $# -gt 0 ] || die "no step named; there are: $(compgen -A function step_ | sed 's/^step_//' | xargs)"
for step in "$@"; do
  declare -F "step_$step" >/dev/null || die "no step is called \`$step\`; run $0 alone for a list"
done

mkdir -p "$logs"
rm -f "$logs"/*.log
export CARGO_TERM_COLOR=never # the logs are read below
seconds="" failed=""
for step in "$@"; do
  say "== $step"
  start=$SECONDS
  # Not `step || ...`: inside a condition bash forgets `set -e`.
  set +e
  (set -e && "step_$step") 2>&1 | tee "$logs/$step.log"
  status=${PIPESTATUS[0]}
  set -e
  say "-- $step: $((SECONDS - start)) s"
  seconds+=" $step $((SECONDS - start)),"
  [ "$status" = 0 ] || { failed=$step && break; }
done

say "seconds:${seconds%,}; together $SECONDS"
[ -z "$failed" ] || say "FAILED at step \`$failed\` (exit status $status); its output: $logs/$failed.log"
for step in "$@"; do
  [[ $counting != *" $step "* ]] || { print_totals "$failed" && break; }
done
[ -z "$failed" ]
