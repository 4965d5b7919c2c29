"""Compile the CUDA kernels for all current GPUs into one archive, `cuda/kernels.bin`.

Needs NVRTC and nothing else: no toolkit, no host compiler, no driver, no GPU. torch's CUDA wheels
bring it, and so does the package nvidia-cuda-nvrtc-cu12. `archive.md` describes the archive.

    python cuda/build_kernels.py [--nvrtc libnvrtc.so.N] [--out cuda/kernels.bin]
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import lzma
import os
import re
import struct
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
MAIN = "nybble.cu"
PATTERNS = ("*.cu", "*.cuh", "*.h")

# Cubins for each generation from 7.5 on. A cubin runs on later GPUs of its major number.
CUBINS = (75, 80, 86, 89, 90, 100, 120)
# PTX for what comes later. Nothing newer than 8.0 has is in use, so newer PTX would gain nothing.
PTX = (80,)

# What the text says that it needs: CUDA 12.0, the oldest driver that nybble takes. A newer compiler
# writes its own version, which older drivers refuse unread, though it uses nothing newer; the tests
# assemble the text to see that this stays so.
PTX_VERSION = b"8.0"

# No fused steps but those that are written as such: quantization is exact.
OPTIONS = ("--std=c++17", "--fmad=false")

MAGIC = b"NYBCUDA2"
LARGEST = 1 << 20

# LZMA2 without a container takes half of what deflate takes. Instructions are 16 bytes long, which
# the last three say.
FILTERS = [
    {
        "id": lzma.FILTER_LZMA2,
        "preset": 9 | lzma.PRESET_EXTREME,
        "dict_size": 1 << 20,
        "lc": 0,
        "lp": 3,
        "pb": 4,
    }
]


class BuildError(Exception):
    """The kernels could not be compiled."""


class NoNvrtcError(BuildError):
    """There is no compiler."""


@dataclass(frozen=True)
class Image:
    """One compiled module."""

    kind: int  # 0 cubin, 1 PTX
    arch: int
    data: bytes

    @property
    def target(self) -> str:
        """The name that NVRTC knows it by."""
        return f"{'compute' if self.kind else 'sm'}_{self.arch}"


def sources(directory: Path = HERE) -> dict[str, bytes]:
    """The source files by name, in the order in which they are hashed."""
    paths = {path for pattern in PATTERNS for path in directory.glob(pattern)}
    return {path.name: path.read_bytes() for path in sorted(paths, key=lambda path: path.name)}


def source_hash(files: dict[str, bytes]) -> bytes:
    """SHA-256 over name, NUL, length and content of each file."""
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(name.encode() + b"\0" + struct.pack("<Q", len(content)) + content)
    return digest.digest()


def find_nvrtc(directories: Iterable[str] | None = None) -> Path:
    """NVRTC of the packages that this interpreter sees.

    Raises:
        NoNvrtcError: There is none.
    """
    for directory in sys.path if directories is None else directories:
        # nvidia/cu13/lib since CUDA 13, nvidia/cuda_nvrtc/lib before.
        found = sorted(Path(directory or ".").glob("nvidia/*/lib/libnvrtc.so.*"))
        found = [path for path in found if re.fullmatch(r"libnvrtc\.so\.\d+", path.name)]
        if found:
            return found[-1]
    raise NoNvrtcError(
        "no NVRTC: install torch with CUDA or nvidia-cuda-nvrtc-cu12, or name it with --nvrtc"
    )


class Nvrtc:
    """NVIDIA's run-time compiler."""

    def __init__(self, path: Path) -> None:
        """Load the library, and first what it would look for by bare name."""
        try:
            for builtins in sorted(path.parent.glob("libnvrtc-builtins.so.*")):
                ctypes.CDLL(str(builtins))
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise BuildError(f"cannot load {path}: {error}") from error

    def version(self) -> tuple[int, int]:
        """The version of CUDA that it belongs to."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return major.value, minor.value

    def compile(self, files: dict[str, bytes], kind: int, arch: int) -> Image:
        """Compile all kernels for one target.

        Raises:
            BuildError: With what the compiler said.
        """
        headers = {name: text for name, text in files.items() if name != MAIN}
        program = ctypes.c_void_p()
        self._call(
            "nvrtcCreateProgram",
            ctypes.byref(program),
            files[MAIN],
            MAIN.encode(),
            len(headers),
            _strings(list(headers.values())),
            _strings([name.encode() for name in headers]),
        )
        try:
            image = Image(kind, arch, b"")
            options = [*OPTIONS, f"--gpu-architecture={image.target}"]
            encoded = _strings([option.encode() for option in options])
            status = self._library.nvrtcCompileProgram(program, len(options), encoded)
            if status:
                log = self._read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
                raise BuildError(f"{image.target}:\n{log}")
            data = self._read(program, "PTX" if kind else "CUBIN")
            return Image(kind, arch, _text(data) if kind else data)
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise BuildError(f"{name} failed with status {status}")


def _text(ptx: bytes) -> bytes:
    """PTX for the oldest driver, without the NUL that NVRTC counts."""
    text, found = re.subn(rb"(?m)^\.version \d+\.\d+", b".version " + PTX_VERSION, ptx, count=1)
    if not found:
        raise BuildError("NVRTC gave text that does not say its version")
    return text.rstrip(b"\0")


def _strings(values: Sequence[bytes]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(values))(*values)


def pack(digest: bytes, images: Sequence[Image]) -> bytes:
    """The archive of `archive.md`."""
    images = sorted(images, key=lambda image: (image.kind, image.arch))
    stored = [lzma.compress(image.data, lzma.FORMAT_RAW, filters=FILTERS) for image in images]
    offset = len(MAGIC) + len(digest) + 8 + 32 * len(images)
    table = b""
    for image, data in zip(images, stored, strict=True):
        table += struct.pack("<IIQQQ", image.kind, image.arch, offset, len(data), len(image.data))
        offset += len(data)
    return MAGIC + digest + struct.pack("<II", len(images), 0) + table + b"".join(stored)


def unpack(archive: bytes) -> tuple[bytes, list[Image]]:
    """The hash of the sources and the images of an archive.

    Raises:
        BuildError: It is not an archive, or cut off.
    """
    if archive[:8] != MAGIC or len(archive) < 48:
        raise BuildError("not an archive of kernels")
    (count, _) = struct.unpack_from("<II", archive, 40)
    images = []
    for i in range(count):
        try:
            kind, arch, offset, stored, length = struct.unpack_from("<IIQQQ", archive, 48 + 32 * i)
            packed = archive[offset : offset + stored]
            data = lzma.decompress(packed, lzma.FORMAT_RAW, filters=FILTERS)
        except (struct.error, lzma.LZMAError) as error:
            raise BuildError(f"image {i} of {count} is cut off or damaged: {error}") from error
        if len(data) != length:
            raise BuildError(f"image {i} has {len(data)} bytes, not {length}")
        images.append(Image(kind, arch, data))
    return archive[8:40], images


def build(nvrtc: Nvrtc, files: dict[str, bytes]) -> list[Image]:
    """All images."""
    targets = [(0, arch) for arch in CUBINS] + [(1, arch) for arch in PTX]
    return [nvrtc.compile(files, kind, arch) for kind, arch in targets]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the archive; does nothing where it is that of the sources already."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nvrtc", type=Path, default=os.environ.get("NYBBLE_NVRTC"))
    parser.add_argument("--out", type=Path, default=HERE / "kernels.bin")
    parser.add_argument("--force", action="store_true", help="compile even so")
    parser.add_argument(
        "--optional", action="store_true", help="without NVRTC: warn, and leave it at that"
    )
    options = parser.parse_args(arguments)
    files = sources()
    digest = source_hash(files)
    if not options.force and options.out.exists() and options.out.read_bytes()[8:40] == digest:
        print(f"{options.out}: up to date")
        return 0
    start = time.monotonic()
    try:
        nvrtc = Nvrtc(Path(options.nvrtc) if options.nvrtc else find_nvrtc())
        images = build(nvrtc, files)
    except NoNvrtcError as error:
        print(f"{'warning' if options.optional else 'error'}: {error}", file=sys.stderr)
        return 0 if options.optional else 1
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    archive = pack(digest, images)
    if len(archive) > LARGEST:
        print(f"error: {len(archive)} bytes are more than {LARGEST}", file=sys.stderr)
        return 1
    whole = options.out.with_suffix(".tmp")
    whole.write_bytes(archive)
    whole.replace(options.out)
    raw = sum(len(image.data) for image in images)
    print(
        f"{options.out}: {len(images)} images, {raw} bytes stored as {len(archive)},"
        f" NVRTC {'.'.join(map(str, nvrtc.version()))}, {time.monotonic() - start:.1f} s"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
