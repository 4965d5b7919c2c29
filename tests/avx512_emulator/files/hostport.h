// A host <-> guest channel on five I/O ports, for bochs 3.0 (included by iodev/unmapped.cc and gui/nogui.cc).
//   in  0x8910  next byte(s) of the job, read from host fd 5 (zero after its end)
//   out 0x8911  bytes for host fd 3 (the job's stdout)     out 0x8912  bytes for host fd 4 (its stderr)
//   out 0x8914  flush both and end bochs with this exit status
//   out 0x8915  save the machine's state into $HOSTPORT_SAVE and end bochs
//   in  0x8915  1 in a machine restored from such a state, else 0
#ifndef HOSTPORT_H
#define HOSTPORT_H
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

extern bool hostport_save_wanted;
#ifdef HOSTPORT_DEVICE
bool hostport_save_wanted = false;
static unsigned char hp_in[1 << 16], hp_out[2][1 << 16];
static size_t hp_pos = 0, hp_len = 0, hp_n[2] = {0, 0};

static void hp_flush(int w)
{
  size_t at = 0;
  while (at < hp_n[w]) {
    ssize_t k = write(3 + w, hp_out[w] + at, hp_n[w] - at);
    if (k <= 0) break;
    at += (size_t)k;
  }
  hp_n[w] = 0;
}

static Bit32u hp_next(void)
{
  if (hp_pos == hp_len) {
    ssize_t k = read(5, hp_in, sizeof hp_in);
    hp_pos = 0;
    hp_len = k > 0 ? (size_t)k : 0;
    if (k <= 0) return 0;
  }
  return hp_in[hp_pos++];
}

static bool hostport_read(Bit32u address, unsigned io_len, Bit32u *v)
{
  if (address == 0x8910) {
    *v = 0;
    for (unsigned i = 0; i < io_len; i++) *v |= hp_next() << (8 * i);
    return true;
  }
  if (address == 0x8915) {
    *v = SIM->get_param_bool(BXPN_RESTORE_FLAG)->get() ? 1 : 0;
    return true;
  }
  return false;
}

static void hostport_write(Bit32u address, Bit32u value, unsigned io_len)
{
  switch (address) {
    case 0x8911: case 0x8912: {
      int w = address - 0x8911;
      for (unsigned i = 0; i < io_len; i++) {
        hp_out[w][hp_n[w]++] = (unsigned char)(value >> (8 * i));
        if (hp_n[w] == sizeof hp_out[w]) hp_flush(w);
      }
      break;
    }
    case 0x8913: hp_flush(0); hp_flush(1); break;
    case 0x8914: hp_flush(0); hp_flush(1); _exit(value & 255);
    case 0x8915: hostport_save_wanted = true; break;
  }
}
#endif
#endif
