"""What NVRTC makes of the kernels, for every GPU: names, registers, instructions, sizes.

No GPU and no driver: cubins are read, not run. Budgets are those of the plan for the H100: the
product with few tokens is bound by instructions above four a weight.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import build_kernels
import pytest
import sass
from build_kernels import BuildError, Image, Nvrtc
from params import Emulator

TENSOR_CORES_OF_BF16 = 80
SMALL, MID = "linear4_small", "linear4_mid"
# Of 65,536 registers, for two thread blocks of 256 threads; and for one of 1024.
REGISTERS, REGISTERS_OF_1024 = 128, 64
THREADS_1024 = ("mean_f32", "int8_outliers")
# For one thread block of 256: sums of linear4_mid, and shared memory of 7.5 for small ones.
REGISTERS_ALONE = 255


@pytest.fixture(scope="session")
def archive() -> bytes:
    """The archive of `make kernels`, or one made now; skips without NVRTC."""
    path = build_kernels.HERE / "kernels.bin"
    digest = build_kernels.source_hash(build_kernels.sources())
    if path.exists() and path.read_bytes()[8:40] == digest:
        return path.read_bytes()
    try:
        nvrtc = Nvrtc(build_kernels.find_nvrtc())
    except BuildError as error:
        pytest.skip(str(error))
    return build_kernels.pack(digest, build_kernels.build(nvrtc, build_kernels.sources()))


@pytest.fixture(scope="session")
def images(archive: bytes) -> list[Image]:
    return build_kernels.unpack(archive)[1]


@pytest.fixture(scope="session")
def kernels(
    images: list[Image], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[str, sass.Kernel]]:
    """Disassembled kernels by architecture and name."""
    if sass.nvdisasm() is None:
        pytest.skip("no nvdisasm (package nvidia-cuda-nvdisasm)")
    folder = tmp_path_factory.mktemp("sass")
    return {
        image.arch: {kernel.name: kernel for kernel in sass.disassemble(image.data, folder)}
        for image in images
        if image.kind == 0
    }


def test_the_archive_is_small_and_comes_back(archive: bytes, images: list[Image]) -> None:
    assert len(archive) <= build_kernels.LARGEST
    targets = [image.target for image in images]
    assert targets == [f"sm_{arch}" for arch in build_kernels.CUBINS] + [
        f"compute_{arch}" for arch in build_kernels.PTX
    ]
    assert build_kernels.pack(archive[8:40], images) == archive


@pytest.mark.parametrize("cut", [0, 20, 47, 60, 2000])
def test_an_archive_that_is_cut_off_is_refused(archive: bytes, cut: int) -> None:
    with pytest.raises(BuildError):
        build_kernels.unpack(archive[:cut])


def test_the_hash_covers_names_and_contents() -> None:
    files = build_kernels.sources()
    names = list(files)
    assert names == sorted(names)
    assert {"nybble.cu", "params.h", "device.cuh"} <= set(names)
    renamed = {f"{name}x": content for name, content in files.items()}
    changed = {**files, names[0]: files[names[0]] + b" "}
    digests = {build_kernels.source_hash(each) for each in (files, renamed, changed)}
    assert len(digests) == 3


def test_errors_in_the_sources_are_the_compilers_words() -> None:
    try:
        nvrtc = Nvrtc(build_kernels.find_nvrtc())
    except BuildError as error:
        pytest.skip(str(error))
    with pytest.raises(BuildError, match=r"nybble\.cu\(1\): error"):
        nvrtc.compile({"nybble.cu": b"int f( {}"}, 0, 80)


def test_no_nvrtc_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="install torch with CUDA"):
        build_kernels.find_nvrtc([str(tmp_path)])


def test_ptx_is_text_for_the_oldest_gpu_that_has_everything(images: list[Image]) -> None:
    (ptx,) = [image for image in images if image.kind == 1]
    assert b"\0" not in ptx.data
    assert b".target sm_80" in ptx.data
    assert b".version 8.0\n" in ptx.data  # CUDA 12.0


def test_the_text_has_nothing_that_the_oldest_driver_does_not_know(
    images: list[Image], tmp_path: Path
) -> None:
    ptxas = sass.tool("ptxas")
    if ptxas is None:
        pytest.skip("no ptxas (Triton has one)")
    (ptx,) = [image for image in images if image.kind == 1]
    (tmp_path / "kernels.ptx").write_bytes(ptx.data)
    command = [ptxas, "--gpu-name", "sm_80", str(tmp_path / "kernels.ptx")]
    # An assembler refuses what the version in the text does not have.
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "out")], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_gpu_has_the_kernels_that_the_emulator_has(
    kernels: dict[int, dict[str, sass.Kernel]], loaded: Emulator
) -> None:
    newest = set(kernels[max(kernels)])
    assert newest
    assert all(loaded.knows(name) for name in newest)
    assert len(newest) == loaded.count()
    for arch, found in kernels.items():
        missing = newest - set(found)
        if arch >= TENSOR_CORES_OF_BF16:
            assert not missing, arch
        else:
            small = {f"{SMALL}{tokens}_bf16" for tokens in (8, 16, 32)}
            assert missing == small | {f"{MID}_bf16"}


def test_nothing_spills_and_registers_are_within_budget(
    kernels: dict[int, dict[str, sass.Kernel]],
) -> None:
    for arch, found in kernels.items():
        for name, kernel in found.items():
            budget = REGISTERS_OF_1024 if name in THREADS_1024 else REGISTERS
            if name.startswith(MID) or (arch < TENSOR_CORES_OF_BF16 and name.startswith(SMALL)):
                budget = REGISTERS_ALONE
            assert kernel.count("STL", "LDL") == 0, f"{name} spills on sm_{arch}"
            assert 0 < kernel.registers <= budget, f"{name} on sm_{arch}: {kernel.registers}"


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_a_product_with_few_tokens_takes_four_instructions_a_weight(
    kernels: dict[int, dict[str, sass.Kernel]], arch: int, dtype: str
) -> None:
    loops = sass.innermost(kernels[arch][f"{SMALL}8_{dtype}"], "HMMA")
    # Plain and nested scales with blocks of at least 64, three kinds of scales with blocks of 32.
    assert len(loops) == 5
    whole = [loop for loop in loops if loop.count("LDG.E.NA.64")]
    assert sorted(bool(loop.count("LDG.E.U8")) for loop in whole) == [False, True]
    for loop in loops:
        assert loop.count("LDG.E.128"), sass.summary(loop)
        # A lane's 32 weights take four products.
        cost = len(loop.instructions) / (8 * loop.count("HMMA"))
        assert cost <= (4.0 if loop in whole else 5.5), sass.summary(loop)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize(("tokens", "plain", "nested"), [(16, 3.5, 4.5), (32, 5.0, 6.0)])
def test_a_product_with_more_tokens_takes_little_more(
    kernels: dict[int, dict[str, sass.Kernel]],
    arch: int,
    dtype: str,
    tokens: int,
    plain: float,
    nested: float,
) -> None:
    for loop in sass.innermost(kernels[arch][f"{SMALL}{tokens}_{dtype}"], "HMMA"):
        if loop.count("LDG.E.NA.64"):
            # Four products for a lane's 32 weights and each tile of eight tokens.
            cost = len(loop.instructions) / (8 * loop.count("HMMA") * 8 / tokens)
            assert cost <= (nested if loop.count("LDG.E.U8") else plain), sass.summary(loop)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_a_product_with_many_tokens_stays_below_decoding_and_multiplying(
    kernels: dict[int, dict[str, sass.Kernel]], arch: int, dtype: str
) -> None:
    loops = sass.innermost(kernels[arch][f"{MID}_{dtype}"], "HMMA")
    # Plain and nested scales with blocks of at least 64, three kinds of scales with blocks of 32.
    assert len(loops) == 5
    for loop in loops:
        # A lane's 64 weights meet eight tiles of tokens: what kernels.md counts with.
        assert loop.count("HMMA") == 64, sass.summary(loop)
        assert loop.count("LDS.128") == 16, sass.summary(loop)
        # The hardware copies x; no register has it.
        assert loop.count("LDGSTS.E.BYPASS.128") == 4, sass.summary(loop)
        assert loop.count("LDG.E.128") == 0, sass.summary(loop)
        whole = loop.count("LDG.E.NA.64") == 4
        cost, nested = len(loop.instructions) / 64, loop.count("LDG.E.U8") > 0
        assert cost <= (7.0 if whole else 8.0) + 2.0 * nested, sass.summary(loop)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_integers_are_multiplied_four_at_a_time(
    kernels: dict[int, dict[str, sass.Kernel]], arch: int, dtype: str
) -> None:
    loops = sass.innermost(kernels[arch][f"integer_linear4_{dtype}"], "IDP")
    (loop,) = loops
    # 32 weights of a lane and eight tokens.
    assert loop.count("IDP.4A") == 64, sass.summary(loop)
    assert loop.count("LDG.E.128") == 16, sass.summary(loop)
    assert len(loop.instructions) / 32 <= 10.0, sass.summary(loop)


def test_what_must_be_exact_has_no_fused_steps(
    kernels: dict[int, dict[str, sass.Kernel]],
) -> None:
    for arch, found in kernels.items():
        for name, kernel in found.items():
            if name.startswith(("dequantize4", "dequantize8", "int8_dequantize")):
                assert kernel.count("FFMA") == 0, f"{name} on sm_{arch}"


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_memory_is_read_and_written_in_wide_pieces(
    kernels: dict[int, dict[str, sass.Kernel]], dtype: str
) -> None:
    for found in kernels.values():
        assert found[f"dequantize4_{dtype}"].count("STG.E.128")
        assert found[f"quantize4_{dtype}"].count("LDG.E.NA.128", "LDG.E.128")
        assert found[f"linear4_gemv_{dtype}"].count("LDG.E.128")
        assert found[f"linear8_gemv_{dtype}"].count("LDG.E.NA.128", "LDG.E.128") >= 2
        # Converting integers has fewer units than what stands in for it.
        assert found[f"linear8_gemv_{dtype}"].count("I2F") == 0
