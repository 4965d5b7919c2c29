#!/bin/sh
# patch.sh BOCHS_SOURCE: adds the host port to bochs 3.0's source
set -e
here=$(cd "$(dirname "$0")" && pwd); cd "$1"
cp "$here/hostport.h" iodev/hostport.h
grep -q hostport iodev/unmapped.cc || {
sed -i 's|^#include "bx_debug/debug.h"|&\n#define HOSTPORT_DEVICE\n#include "hostport.h"|
s|^  Bit32u retval;|&\n  if (hostport_read(address, io_len, \&retval)) return retval;|
s|^  // are not mapped to any device handler. Writes to an unmapped|  hostport_write(address, value, io_len);\n&|' iodev/unmapped.cc
}
grep -q hostport gui/nogui.cc || {
sed -i 's|^#include "icon_bochs.h"|&\n#include "iodev/hostport.h"|
/^void bx_nogui_gui_c::handle_events(void)/,/^}/ s|^{|{\n  if (hostport_save_wanted) {\n    const char *to = getenv("HOSTPORT_SAVE");\n    _exit(to != NULL \&\& SIM->save_state(to) ? 0 : 99);\n  }|' gui/nogui.cc
}
grep -q hostport_write iodev/unmapped.cc; grep -q hostport_read iodev/unmapped.cc; grep -q HOSTPORT_SAVE gui/nogui.cc
# restoring: read the saved memory where it lies (pages as they are first touched), not a copy of all of it
sed -i '0,/if (\*fpp != NULL) {/{s|\*fpp = tmpfile64();|*fpp = fopen(devdata, "rb");|;s|if (\*fpp != NULL) {|if (0) {|}' gui/siminterface.cc
grep -q 'fpp = fopen(devdata, "rb");' gui/siminterface.cc
# VCVTNE2PS2BF16: the second half of the result comes from the start of its operand, not from behind its end
sed -i '/::VCVTNE2PS2BF16/,/^}/ s|op1.vmm32u(n))|op1.vmm32u(n - DWORD_ELEMENTS(len)))|' cpu/avx/avx512_bf16.cc
grep -q 'op1.vmm32u(n - DWORD_ELEMENTS(len))' cpu/avx/avx512_bf16.cc
# VDPBF16PS: a short displacement counts whole vectors, not dwords
sed -i '/EVEX_VDPBF16PS/ s|OP_mVdq32|OP_mVdq|' cpu/decoder/ia_opcodes_evex.def
grep -q 'VDPBF16PS.*OP_mVdq,' cpu/decoder/ia_opcodes_evex.def
