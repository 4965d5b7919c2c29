#!/usr/bin/env bash
# Runs the tests of the kernels with AddressSanitizer, which sees every read and write outside of
# what was allocated. The compiler is the stable one; the variable lets it take the flag.
#   scripts/test_asan.sh [ARGS of cargo test...]
source "$(dirname "$0")/lib.sh"

target=$(rustc -vV | sed -n 's/^host: //p')
export RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/asan"
# Its own allocator does not know of leaks by design: a thread pool lives until the process ends.
export ASAN_OPTIONS=${ASAN_OPTIONS:-detect_leaks=0}
[ $# -gt 0 ] || set -- --test kernels --test products --test integer_products --test large
cargo test --release --target "$target" "$@"
