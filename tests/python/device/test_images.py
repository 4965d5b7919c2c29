"""Which compiled kernels a device gets."""

from __future__ import annotations

from pathlib import Path

import fake
import pytest
from test_driver import warm_up

from nybble.cuda import place

NVRTC = place.nvrtc_library()
needs_nvrtc = pytest.mark.skipif(
    NVRTC is None or not NVRTC.endswith(".13"), reason="needs the NVRTC of a torch with CUDA 13"
)
# No machine code in this library fits it, and text for older devices is refused.
UNKNOWN = {"NYBBLE_FAKE_CAPABILITY": "110", "NYBBLE_FAKE_REFUSE": "ptx"}


def embedded(cache: Path) -> bool:
    """Whether this build has compiled kernels; without them everything is compiled here."""
    env = fake.environment(fake.libraries(), cache)
    code = "from nybble import _core; print(_core.cuda_devices(None)[1][0]['kernels'])"
    return fake.run(code, env).strip() == "sm_90"


@needs_nvrtc
def test_unknown_devices_are_compiled_for_once(tmp_path: Path) -> None:
    env = fake.environment(fake.libraries(), tmp_path, **UNKNOWN)
    assert warm_up(env) == "loaded sm_110, compiled at first use"
    (kept,) = (tmp_path / "nybble").iterdir()
    whole = kept.read_bytes()
    assert warm_up(env, nvrtc=None) == "loaded sm_110, compiled here before"
    # A file that was cut off is not believed, and is made again.
    kept.write_bytes(whole[:-100])
    assert warm_up(env, nvrtc=None).startswith("refused")
    assert warm_up(env) == "loaded sm_110, compiled at first use"
    assert kept.read_bytes() == whole


def test_without_a_compiler_an_unknown_device_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    settings = {"NYBBLE_FAKE_REFUSE": "cubin,ptx"}
    env = fake.environment(fake.libraries(), tmp_path, **settings)
    said = warm_up(env, nvrtc=None)
    assert said.startswith("refused there are no CUDA kernels for compute capability 9.0")
    assert "NVRTC is not installed" in said
    assert "install a torch with CUDA" in said


@needs_nvrtc
def test_a_device_that_nvrtc_does_not_know_is_an_error_that_names_it(tmp_path: Path) -> None:
    settings = {"NYBBLE_FAKE_CAPABILITY": "52", "NYBBLE_FAKE_REFUSE": "cubin,ptx"}
    said = warm_up(fake.environment(fake.libraries(), tmp_path, **settings))
    assert "compute capability 5.2" in said
    assert "NVRTC (" in said
    assert not (tmp_path / "nybble").exists()


def test_a_library_that_is_not_nvrtc_is_an_error(tmp_path: Path) -> None:
    env = fake.environment(fake.libraries(), tmp_path, NYBBLE_FAKE_REFUSE="cubin,ptx")
    directory = fake.libraries()
    said = warm_up(env, nvrtc=str(directory / "libcuda.so"))
    assert "NVRTC lacks nvrtcCreateProgram" in said
    said = warm_up(env, nvrtc=str(tmp_path / "absent.so"))
    assert "NVRTC cannot be loaded" in said


@needs_nvrtc
def test_an_image_that_the_driver_refuses_leads_to_the_next(tmp_path: Path, cache: Path) -> None:
    if not embedded(cache):
        pytest.skip("this build has no compiled kernels; `make kernels` first")
    refused = fake.environment(fake.libraries(), tmp_path, NYBBLE_FAKE_REFUSE="cubin")
    assert warm_up(refused) == "loaded PTX for 80, compiled by the driver"
    later = fake.environment(fake.libraries(), tmp_path, NYBBLE_FAKE_CAPABILITY="121")
    assert warm_up(later) == "loaded sm_120"


@needs_nvrtc
def test_ways_to_have_kernels_can_be_left_out(tmp_path: Path, cache: Path) -> None:
    def only(names: str) -> str:
        return warm_up(fake.environment(fake.libraries(), tmp_path, NYBBLE_CUDA_IMAGES=names))

    assert only("cached").startswith("refused there are no CUDA kernels for compute capability 9.0")
    assert only("compiled, cached") == "loaded sm_90, compiled at first use"
    assert only("cached") == "loaded sm_90, compiled here before"
    assert "NYBBLE_CUDA_IMAGES names none of cubin, ptx, cached and compiled" in only("fatbin")
    if embedded(cache):
        assert only("ptx") == "loaded PTX for 80, compiled by the driver"


@needs_nvrtc
def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    env = fake.environment(fake.libraries(), tmp_path / "file", **UNKNOWN)
    assert warm_up(env) == "loaded sm_110, compiled at first use"
