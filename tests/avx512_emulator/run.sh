#!/bin/bash
# run.sh [OPTIONS] BINARY [ARGS...]     runs an x86-64 Linux binary on an emulated CPU with AVX-512
#   -t SECONDS   time limit, on this machine's clock (default 600); 124 is the exit status past it
#   -f PATH      also take this file or folder along, at its absolute path (may be repeated)
#   -e NAME=VAL  set an environment variable for the binary (may be repeated)
#   -C DIR       working directory in the machine (default: here; made there, empty but for what -f takes along)
#   -g           take debug information along (dropped by default, for less to copy)
# The binary's stdout and stderr come out here as such; the exit status is the binary's
# (128+N if signal N ended it; 98, 99: the emulator's own failure). stdin is /dev/null.
here=$(cd "$(dirname "$(readlink -f "$0")")" && pwd)
D=${AVX512EMU:-$here/../../target/avx512_emulator}
[ ! -d "$here/state" ] || D=${AVX512EMU:-$here}
D=$(realpath -m "$D")
limit=600 files=() envs=() cwd=$PWD debug=
while getopts t:f:e:C:g o; do case $o in
  t) limit=$OPTARG;; f) files+=("$(realpath -s "$OPTARG")");; e) envs+=("$OPTARG");; C) cwd=$OPTARG;; g) debug=1;; *) exit 2;; esac; done
shift $((OPTIND - 1))
[ $# -ge 1 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ -d "$D/state" ] || { echo "run.sh: no $D/state: run setup.sh first" >&2; exit 99; }
bin=$(realpath -s "$1") || exit 99; shift
[ -x "$bin" ] || { echo "run.sh: $bin isn't executable" >&2; exit 99; }
W=$(mktemp -d "${TMPDIR:-/tmp}/avx512emu.XXXXXX") || exit 99
pid=
trap '[ -n "$pid" ] && kill $pid 2>/dev/null; rm -rf "$W"' EXIT
trap 'exit 130' INT; trap 'exit 143' TERM
R=$W/r
mkdir -p "$R/job" "$R$(dirname "$bin")" "$R$cwd" || exit 99
if [ -n "$debug" ] || ! strip -g -o "$R$bin" "$bin" 2>/dev/null; then cp -L "$bin" "$R$bin"; fi
chmod 755 "$R$bin"
# its shared libraries, and the loader, at the paths where they are here
{ ldd "$bin" 2>/dev/null | grep -oE '/[^ ]+' | sort -u; } | while read -r l; do
  mkdir -p "$R$(dirname "$l")"; cp -L "$l" "$R$l"; done
for f in "${files[@]}"; do mkdir -p "$R$(dirname "$f")"; cp -aL "$f" "$R$(dirname "$f")/"; done
{ for v in "${envs[@]}"; do printf 'export %s=%q\n' "${v%%=*}" "${v#*=}"; done
  printf 'export PATH=/bin:/usr/bin HOME=/tmp TMPDIR=/tmp\ncd %q\nexec %q' "$cwd" "$bin"
  [ $# -eq 0 ] || printf ' %q' "$@"; echo; } > "$R/job/cmd"
tar -C "$R" --owner=0 --group=0 -cf "$W/job.tar" . && { stat -c %s "$W/job.tar"; cat "$W/job.tar"; } > "$W/job" && rm -rf "$R" "$W/job.tar" || exit 99
cd "$W" || exit 99
exec 3>&1 4>&2
timeout "$limit" nice "$D/bochs/bin/bochs" -q -r "$D/state" 5< job > bochs.out 2>&1 < /dev/null &
pid=$!; wait $pid; rc=$?; pid=
if [ $rc = 124 ]; then echo "run.sh: ended after the limit of $limit s" >&2
elif grep -q 'Bochs is exiting' bochs.out; then
  { echo "run.sh: the emulator ended:"; grep -A3 'Bochs is exiting' bochs.out; tail -n 15 serial.log 2>/dev/null; } >&2; rc=99; fi
exit $rc
