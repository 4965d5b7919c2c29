#!/bin/bash
# Builds the emulated AVX-512 machine from Debian packages, without installing anything into this system.
#   setup.sh [DIR]      DIR defaults to target/avx512_emulator; the files agent.c, hostport.h, patch.sh lie beside it in files/
# Needs: apt-get, gcc, g++, make, gzip, libc6-dev (libc.a). MEM=MiB of guest memory (1024), JOBS=2.
set -euo pipefail
src=$(cd "$(dirname "$0")" && pwd)
D=${1:-$src/../../target/avx512_emulator}
D=$(mkdir -p "$D" && cd "$D" && pwd)
MEM=${MEM:-1024} JOBS=${JOBS:-2}
cd "$D"
mkdir -p pkg apt/lists/partial apt/cache/archives/partial

# 1. packages: the kernel etc. from bookworm, bochs 3.0's source and ROM images from trixie
# The mirrors are those that this system uses for Debian and for its security updates.
mirror() {
  # One of these may be missing, which is no harm.
  { grep -hvE '^ *#' /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null || true; } |
    grep -oE "https?://[^] ]+/$1/?( |\$)" | head -n 1 | tr -d ' '
}
debian=$(mirror debian) security=$(mirror debian-security)
[ -n "$debian" ] || { echo "setup.sh: no Debian mirror in /etc/apt; this script runs on Debian" >&2; exit 1; }
key="[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]"
cat > apt/sources.list <<F
deb $key $debian bookworm main
deb $key ${security:-$debian-security} bookworm-security main
deb $key $debian trixie main
deb-src $key $debian trixie main
F
cat > apt/conf <<F
Dir::Etc::sourcelist "$D/apt/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::State::lists "$D/apt/lists";
Dir::Cache "$D/apt/cache";
APT::Sandbox::User "root";
APT::Default-Release "bookworm";
Acquire::Languages "none";
F
export APT_CONFIG=$D/apt/conf
apt-get -qq update
if [ ! -d root ]; then
  kernel=$(apt-cache depends linux-image-cloud-amd64/bookworm-security | awk '/Depends: linux-image/{print $2; exit}')
  (cd pkg; rm -f ./*.deb
   apt-get -qq download bochsbios/trixie vgabios busybox-static cpio isolinux syslinux-common \
     xorriso libisoburn1 libburn4 libisofs6 libjte2 "$kernel")
  mkdir root.new; for p in pkg/*.deb; do dpkg-deb -x "$p" root.new; done; mv root.new root
fi

# 2. bochs 3.0: no debugger, no GUI, plus the host port. (The .dsc isn't on every mirror, so an error
#    about it is no harm: apt has checked the tarball against the signed index.)
if [ ! -x bochs/bin/bochs ]; then
  mkdir -p build; cd build; rm -rf bochs-3.0
  apt-get -qq source --download-only bochs/trixie 2>apt.log || true
  [ -s bochs_3.0+dfsg.orig.tar.xz ] || { cat apt.log >&2; exit 1; }
  tar xf bochs_3.0+dfsg.orig.tar.xz
  sh "$src/files/patch.sh" bochs-3.0
  cd bochs-3.0
  CFLAGS=-O2 CXXFLAGS=-O2 nice ./configure --prefix="$D/bochs" --with-nogui --disable-docbook \
    --enable-all-optimizations --enable-x86-64 --enable-cpu-level=6 --enable-fpu --enable-avx --enable-evex \
    --enable-amx --enable-cet --enable-uintr --enable-protection-keys --enable-memtype --enable-vmx=2 --enable-pci \
    --enable-repeat-speedups --disable-debugger --disable-plugins > ../configure.log 2>&1
  nice make -j"$JOBS" > ../make.log 2>&1
  mkdir -p "$D/bochs/bin"; cp bochs "$D/bochs/bin/"; strip "$D/bochs/bin/bochs"
  cd "$D"
fi

# 3. the boot image: isolinux, kernel, an initramfs of busybox and the agent
rm -rf img; mkdir -p img/initrd/bin img/iso/isolinux
gcc -O2 -static -s -w -o img/initrd/init "$src/files/agent.c"
cp root/bin/busybox img/initrd/bin/
for a in sh cat ls mkdir cp mv rm ln chmod env sleep echo uname dmesg mount nproc grep head tail wc cmp sha256sum test true false tar; do
  ln -s busybox img/initrd/bin/$a; done
mkdir -p img/initrd/usr; ln -s ../bin img/initrd/usr/bin
(cd img/initrd; find . | "$D/root/bin/cpio" -o -H newc --quiet | gzip -9 > ../iso/isolinux/initrd.gz)
cp root/boot/vmlinuz-* img/iso/isolinux/vmlinuz
cp root/usr/lib/ISOLINUX/isolinux.bin root/usr/lib/syslinux/modules/bios/ldlinux.c32 img/iso/isolinux/
# clearcpuid=580 is FSRM: bochs leaves MISC_ENABLE.FAST_STRING off, so the kernel drops ERMS, and its memmove
# is wrong with FSRM but no ERMS. acpi=off: going into ACPI mode is an SMI, which ends bochs with this CPU model.
cat > img/iso/isolinux/isolinux.cfg <<F
DEFAULT l
PROMPT 0
TIMEOUT 0
LABEL l
  KERNEL vmlinuz
  APPEND initrd=initrd.gz console=ttyS0,115200 loglevel=4 nokaslr mitigations=off nopti tsc=reliable no_timer_check panic=-1 nowatchdog audit=0 apparmor=0 random.trust_cpu=on acpi=off clearcpuid=580
F
LD_LIBRARY_PATH=root/usr/lib/x86_64-linux-gnu root/usr/bin/xorriso -as mkisofs -quiet -o img/boot.iso \
  -b isolinux/isolinux.bin -c isolinux/boot.cat -no-emul-boot -boot-load-size 4 -boot-info-table img/iso 2>/dev/null

# 4. boot once, and save the machine at the point where the agent waits for a job
cat > img/bochsrc <<F
config_interface: textconfig
display_library: nogui
cpu: model=sapphire_rapids, count=1, ips=200000000, reset_on_triple_fault=0, ignore_bad_msrs=1, exclude_features="amx, amx_int8, amx_bf16"
memory: host=$MEM, guest=$MEM
romimage: file=$D/root/usr/share/bochs/BIOS-bochs-latest, options=fastboot
vgaromimage: file=$D/root/usr/share/vgabios/vgabios.bin
pci: enabled=1, chipset=i440fx
boot: cdrom
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path=$D/img/boot.iso, status=inserted
com1: enabled=1, mode=file, dev=serial.log
clock: sync=none, time0=utc
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
log: bochs.log
F
rm -rf state state.new; mkdir state.new
(cd img; HOSTPORT_SAVE=$D/state.new timeout 600 nice "$D/bochs/bin/bochs" -q -f bochsrc 3>/dev/null 4>/dev/null 5</dev/null > bochs.out 2>&1) ||
  { echo "the boot failed:"; tail -n 20 img/bochs.out img/bochs.log img/serial.log; exit 1; } >&2
# (the saved configuration leaves exclude_features out)
sed -i 's/^cpu: .*/&, exclude_features="amx, amx_int8, amx_bf16"/' state.new/config
mv state.new state
[ "$D" = "$src" ] || cp "$src/run.sh" "$D/"
echo "ready: $D/run.sh BINARY [ARGS...]"
