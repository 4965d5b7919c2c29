#!/usr/bin/env bash
# Makes .venv and installs the lock files into it; does nothing when .venv matches them already.
#   scripts/setup_venv.sh [--force]     --force: install again even so
#   PYTHON=/path/to/python              the interpreter for a new .venv (default: the first that fits)
source "$(dirname "$0")/lib.sh"

min_python=3.10
# The locked torch, transformers and numpy ask for this; below it pip chooses older ones.
locked_python=3.11
min_cargo=$(sed -n 's/^rust-version *= *"\(.*\)"/\1/p' Cargo.toml)
stamp=.venv/.lock-stamp

# python_version INTERPRETER: "3.11.7", or nothing where it does not run.
python_version() { "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null || true; }

check_cargo() {
  local have
  have=$(cargo --version 2>/dev/null | cut -d ' ' -f 2) || true
  [ -n "$have" ] || die "cargo $min_cargo or newer is needed, none was found on PATH; install Rust with rustup"
  at_least "$min_cargo" "$have" ||
    die "cargo $min_cargo or newer is needed, found $have; run \`rustup update stable\`"
}

find_python() {
  local name have seen=()
  for name in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python3.10 python}; do
    have=$(python_version "$name")
    [ -n "$have" ] || continue
    if at_least "$min_python" "$have"; then say "$name" && return; fi
    seen+=("$name is $have")
  done
  die "Python $min_python or newer is needed, found: $(IFS=,; say "${seen[*]:-none}")." \
    "Install one, or name it: PYTHON=/path/to/python scripts/setup_venv.sh"
}

make_venv() {
  local have python
  have=$(python_version .venv/bin/python)
  if [ -n "$have" ]; then
    at_least "$min_python" "$have" ||
      die ".venv has Python $have, $min_python or newer is needed; delete .venv and run again"
    return
  fi
  python=$(find_python)
  say "making .venv with $python ($(python_version "$python"))"
  "$python" -m venv --clear .venv ||
    die "\`$python -m venv .venv\` failed; on Debian and Ubuntu the package python3-venv has what it needs"
}

# The state that .venv should be in, as one line.
fingerprint() {
  .venv/bin/python - requirements/dev.in requirements/*.lock <<'PYTHON'
import hashlib, pathlib, platform, sys

content = b"".join(pathlib.Path(name).read_bytes() for name in sys.argv[1:])
print("sha256", hashlib.sha256(content).hexdigest(), "python", platform.python_version())
PYTHON
}

install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }

# The stamp's first line is the fingerprint; each further line names an optional file left out.
report_missing() {
  local file
  tail -n +2 "$stamp" | while read -r file; do
    warn "$file is not installed; what needs it is skipped. Try again with scripts/setup_venv.sh --force"
  done
}

check_cargo
make_venv
if [ "${1:-}" != --force ] && [ "$(head -n 1 "$stamp" 2>/dev/null)" = "$(fingerprint)" ]; then
  report_missing
  exit 0
fi

rm -f "$stamp"
file=requirements/dev.lock
if ! at_least "$locked_python" "$(python_version .venv/bin/python)"; then
  file=requirements/dev.in
  warn "the lock needs Python $locked_python; installing the newest versions that this one can have"
fi
say "installing $file into .venv (the first time 1 to 5 minutes, 6 GB on Linux)"
# pip first: measured, it needs 61 s for the rest where the one of Python 3.11 needs 100.
{ install "$(grep '^pip==' requirements/dev.lock)" && install -r "$file"; } ||
  die "pip could not install $file, its reason stands above;" \
    "it needs a package index, $(.venv/bin/python --version) wheels and 6 GB of disk. Then run again: make venv"

missing=()
for file in requirements/demo.lock requirements/parity.lock; do
  install --no-deps -r "$file" || missing+=("$file")
done
printf '%s\n' "$(fingerprint)" ${missing[@]+"${missing[@]}"} >"$stamp"
report_missing
