#!/usr/bin/env bash
# Runs tests/kernels.rs on an emulated CPU with AVX-512; builds the emulator the first time.
#   scripts/test_avx512.sh [ARGS of the test binary...]
source "$(dirname "$0")/lib.sh"

emulator=tests/avx512_emulator
[ -d target/avx512_emulator/state ] || "$emulator/setup.sh"
binary=$(cargo test --release --test kernels --no-run --message-format=json |
  sed -n 's/.*"executable":"\([^"]*kernels-[^"]*\)".*/\1/p' | tail -n 1)
[ -n "$binary" ] || die "cargo built no test binary for tests/kernels.rs"
"$emulator/run.sh" -t 1500 -e "PROPTEST_CASES=${PROPTEST_CASES:-20}" -e PROPTEST_FAILURE_PERSISTENCE=off \
  "$binary" "$@"
