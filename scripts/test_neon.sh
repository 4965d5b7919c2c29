#!/usr/bin/env bash
# Runs the Rust tests for aarch64 on an emulated processor with NEON; nothing is installed.
#   scripts/test_neon.sh [ARGS of cargo test...]     without: `--release --lib --tests`
#   scripts/test_neon.sh wheel                       builds a wheel for aarch64 instead
#
# The first run takes from Debian's packages, into target/neon: qemu, a linker and a C library for
# aarch64 from this machine's suite, and from Debian's testing suite a Rust compiler with standard
# libraries for both architectures (rustup's own would do as well, where its server is reachable).
source "$(dirname "$0")/lib.sh"

target=aarch64-unknown-linux-gnu
home=$(mkdir -p "${CARGO_TARGET_DIR:-target}/neon" && cd "${CARGO_TARGET_DIR:-target}/neon" && pwd)

# mirror: the mirror that this system uses for Debian.
mirror() {
  grep -hvE '^ *#' /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null |
    grep -oE 'https?://[^] ]+/debian/?( |$)' | head -n 1 | tr -d ' '
}

# use_suite SUITE: an apt of its own for one suite, which believes that nothing is installed.
use_suite() {
  local apt=$home/apt-$1
  mkdir -p "$apt/lists/partial" "$apt/archives/partial"
  : >"$apt/status"
  printf 'deb [signed-by=%s] %s %s main\n' \
    /usr/share/keyrings/debian-archive-keyring.gpg "$(mirror)" "$1" >"$apt/sources.list"
  cat >"$apt/conf" <<F
Dir::Etc::sourcelist "$apt/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::State::lists "$apt/lists";
Dir::State::status "$apt/status";
Dir::Cache "$apt";
APT::Architectures { "amd64"; "arm64"; };
APT::Install-Recommends "0";
APT::Sandbox::User "root";
Acquire::Languages "none";
F
  export APT_CONFIG=$apt/conf
  apt-get -qq update
  packages=$apt/archives
}

# unpack FOLDER: all packages that the suite's apt has fetched.
unpack() {
  local package
  rm -rf "$home/$1.new"
  mkdir "$home/$1.new"
  for package in "$packages"/*.deb; do dpkg-deb -x "$package" "$home/$1.new"; done
  rm -rf "$(dirname "$packages")"
  mv "$home/$1.new" "$home/$1"
}

set_up() {
  [ -n "$(mirror)" ] || die "no Debian mirror in /etc/apt; this script runs on Debian"
  [ "$(uname -m)" = x86_64 ] || die "this script runs on x86-64"
  if [ ! -d "$home/linker" ]; then
    # shellcheck source=/dev/null
    use_suite "$(. /etc/os-release && echo "$VERSION_CODENAME")"
    apt-get -qq install --download-only gcc-aarch64-linux-gnu libc6-dev-arm64-cross >/dev/null
    (cd "$packages" && apt-get -qq download qemu-user-static)
    unpack linker
  fi
  if [ ! -d "$home/rust" ]; then
    use_suite testing
    # The compiler's libraries with all that they need, but not the C compiler that it links with.
    apt-get -qq install --download-only libstd-rust-dev >/dev/null
    (cd "$packages" && apt-get -qq download rustc libstd-rust-dev:arm64)
    unpack rust
  fi
  # Through its own loader, since its C library may be newer than this machine's.
  wrapper rustc "$home/rust/usr/lib64/ld-linux-x86-64.so.2" \
    --library-path "$home/rust/usr/lib/x86_64-linux-gnu" \
    "$home/rust/usr/bin/rustc" --sysroot "$home/rust/usr"
  local tools=$home/linker/usr
  wrapper cc env "LD_LIBRARY_PATH=$tools/lib/x86_64-linux-gnu" \
    "$tools/bin/aarch64-linux-gnu-gcc" "--sysroot=$home/linker" \
    -isystem "$tools/aarch64-linux-gnu/include"
  wrapper ar env "LD_LIBRARY_PATH=$tools/lib/x86_64-linux-gnu" "$tools/bin/aarch64-linux-gnu-ar"
  wrapper emulator "$tools/bin/qemu-aarch64-static" -L "$tools/aarch64-linux-gnu"
}

# wrapper NAME COMMAND...: a program that runs the command with its own arguments behind it.
wrapper() {
  { printf '#!/bin/sh\nexec' && printf ' "%s"' "${@:2}" && printf ' "$@"\n'; } >"$home/$1.new"
  chmod +x "$home/$1.new"
  mv "$home/$1.new" "$home/$1"
}

set_up
unset APT_CONFIG
export PROPTEST_CASES=${PROPTEST_CASES:-8}
export RUSTC=$home/rustc CARGO_TARGET_DIR=$home/build
export CC_aarch64_unknown_linux_gnu=$home/cc AR_aarch64_unknown_linux_gnu=$home/ar
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=$home/cc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER=$home/emulator
if [ "$*" = wheel ]; then
  unset PYO3_PYTHON # abi3 needs no Python of the target, and this one is none
  "$PY" -m maturin build --release --locked --target "$target" --out "$home/wheels"
else
  [ $# -gt 0 ] || set -- --release --lib --tests
  cargo test --target "$target" "$@"
fi
