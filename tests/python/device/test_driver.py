"""What drivers and devices can do wrong, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fake
import pytest

from nybble.cuda.place import nvrtc_library

NVRTC = nvrtc_library()

# Loads the kernels of device 0 and says which, or what is wrong. Without torch, which is slow.
WARM_UP = """
from nybble import _core, errors
try:
    print("loaded", _core.cuda_warmup((0, 7), {nvrtc!r}))
except errors.DeviceError as error:
    print("refused", error)
"""


def warm_up(env: dict[str, str], nvrtc: str | None = NVRTC) -> str:
    return fake.run(WARM_UP.format(nvrtc=nvrtc), env).strip()


def test_without_a_driver_everything_but_cuda_works(cache: Path) -> None:
    code = """
import torch, nybble as nb, nybble.cuda
q = nb.quantize(torch.randn(8, 64))
print(nb.linear(torch.randn(2, 64), q).shape[1], nybble.cuda.is_available())
for call in (nybble.cuda.warmup, nybble.cuda.devices):
    try:
        call()
    except nb.DeviceError as error:
        print(error)
"""
    env = fake.environment(None, cache)
    available = "from nybble.cuda import is_available; print(is_available())"
    if fake.run(available, env).strip() == "True":
        pytest.skip("this machine has a driver")
    lines = fake.run(code, env).splitlines()
    assert lines[0] == "8 False"
    assert len(lines) == 3
    assert all("no CUDA driver" in line and "install" in line for line in lines[1:])


def test_a_torch_without_cuda_is_said_to_be_one(cache: Path) -> None:
    code = """
import torch, nybble as nb, nybble.cuda
print(nybble.cuda.is_available())
torch.version.cuda = None
print(nybble.cuda.is_available())
try:
    nybble.cuda.warmup(0)
except nb.DeviceError as error:
    print(error)
"""
    lines = fake.run(code, fake.environment(fake.libraries(), cache)).splitlines()
    assert lines[:2] == ["True", "False"]
    assert "built without CUDA" in lines[2]
    assert "install a torch with CUDA" in lines[2]


def test_importing_nybble_does_not_touch_the_driver(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    env = fake.environment(fake.libraries(), cache, NYBBLE_FAKE_LOG=str(log))
    code = """
import nybble, torch, nybble.nn, nybble.cuda
def found():
    return "nybble-fake" in open("/proc/self/maps").read()
nybble.quantize(torch.ones(64))
print(found())
nybble.cuda.is_available()
print(found())
"""
    assert fake.run(code, env).split() == ["False", "True"]
    assert not log.exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"NYBBLE_FAKE_DEVICES": "0"}, "CUDA_VISIBLE_DEVICES"),
        ({"NYBBLE_FAKE_VERSION": "11080"}, "supports CUDA 11.8, nybble needs 12.0"),
        ({"NYBBLE_FAKE_FAIL": "cuInit:3"}, "CUDA_ERROR_NOT_INITIALIZED) in cuInit"),
        # A result that this build has no name for.
        ({"NYBBLE_FAKE_FAIL": "cuInit:4711"}, "CUDA error 4711 (unknown) in cuInit"),
        ({"NYBBLE_FAKE_FAIL": "cuDevicePrimaryCtxRetain:2"}, "in cuDevicePrimaryCtxRetain"),
        ({"NYBBLE_FAKE_FAIL": "cuFuncSetAttribute:1"}, "in cuFuncSetAttribute"),
        ({"NYBBLE_FAKE_CAPTURING": "7"}, "nybble.cuda.warmup(0)"),
    ],
)
def test_what_is_wrong_is_said_with_a_remedy(
    settings: dict[str, str], says: str, cache: Path
) -> None:
    said = warm_up(fake.environment(fake.libraries(), cache, **settings))
    assert said.startswith("refused")
    assert says in said


def test_a_driver_without_a_function_is_an_error_that_names_it(cache: Path, tmp_path: Path) -> None:
    fake.libraries()  # skips without g++
    directory = fake.driver(tmp_path, "-DWITHOUT_CAPTURING")
    said = warm_up(fake.environment(directory, cache))
    assert said.startswith("refused the CUDA driver lacks cuStreamIsCapturing")


def test_a_library_that_is_no_driver_is_an_error(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "libcuda.so").write_bytes(b"not a library")
    env = fake.environment(tmp_path, cache)
    if "True" in fake.run("from nybble.cuda import is_available as a; print(a())", env):
        pytest.skip("this machine has a driver")
    assert "no CUDA driver" in warm_up(env)


def test_a_device_that_does_not_exist_is_an_error(cache: Path) -> None:
    env = fake.environment(fake.libraries(), cache, NYBBLE_FAKE_DEVICES="2")
    code = """
from nybble import _core, errors
for ordinal in (2, -1):
    try:
        _core.cuda_warmup((ordinal, 0))
    except errors.DeviceError as error:
        print(error)
"""
    said = fake.run(code, env).splitlines()
    assert len(said) == 2
    assert all("this process has 2" in line for line in said)


def test_the_context_before_a_launch_is_the_one_after_it(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    directory = fake.libraries()
    settings = {"NYBBLE_FAKE_DEVICES": "2", "NYBBLE_FAKE_LOG": str(log)}
    env = fake.environment(directory, cache, **settings)
    code = f"""
import ctypes, torch, nybble as nb
from nybble import _core, cuda
from nybble.cuda import place
driver = ctypes.CDLL({str(directory / "libcuda.so")!r})
library = place.nvrtc_library()
q = nb.quantize(torch.randn(8, 64))
for before in (-1, 0, 1):
    for device in (0, 1):
        driver.nybble_fake_make_current(before)
        _core.cuda_warmup((device, 5), library)
        place.where = lambda tensor: (device, 5)
        out = cuda.ops.dequantize(*q.parts, *q.how, torch.float32)
        assert torch.equal(out, q.dequantize())
        assert driver.nybble_fake_current() == before
driver.nybble_fake_make_current(1)
import os
os.environ["NYBBLE_FAKE_FAIL"] = "cuLaunchKernel:719"
try:
    cuda.ops.dequantize(*q.parts, *q.how, torch.float32)
except nb.DeviceError as error:
    print(error)
print(driver.nybble_fake_current())
"""
    said = fake.run(code, env).splitlines()
    assert "the launch of dequantize4_f32 failed with CUDA error 719" in said[0]
    assert "CUDA_LAUNCH_BLOCKING" in said[0]
    assert said[1] == "1"
    lines = log.read_text().splitlines()
    # Each device once, however many launches.
    assert sorted(line for line in lines if line.startswith("retain")) == ["retain 0", "retain 1"]
    assert len([line for line in lines if line.startswith("load")]) == 2
    devices = [line.split()[-1] for line in lines if line.startswith("launch")]
    assert devices == ["0", "1"] * 3


def test_threads_load_the_kernels_once(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    env = fake.environment(fake.libraries(), cache, NYBBLE_FAKE_LOG=str(log))
    code = """
import threading, torch, nybble as nb
from nybble import _core, cuda
from nybble.cuda import place
library = place.nvrtc_library()
q = nb.quantize(torch.randn(64, 64))
wrong = []
def work(stream):
    _core.cuda_warmup((0, stream), library)
    weight = place.weight(*q.parts, *q.how)
    out = torch.empty(64, 64)
    weight.dequantize((out.data_ptr(), out.numel(), "float32"), 0, (0, stream))
    wrong.extend([] if torch.equal(out, q.dequantize()) else [stream])
threads = [threading.Thread(target=work, args=(stream,)) for stream in range(1, 9)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(wrong)
"""
    assert fake.run(code, env).strip() == "[]"
    lines = log.read_text().splitlines()
    assert len([line for line in lines if line.startswith("load")]) == 1
    streams = {line.split()[-3] for line in lines if line.startswith("launch")}
    assert streams == {str(stream) for stream in range(1, 9)}


def doctor(env: dict[str, str]) -> str:
    command = [sys.executable, "-m", "nybble", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_doctor_names_driver_devices_and_kernels(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    settings = {"NYBBLE_FAKE_DEVICES": "2", "NYBBLE_FAKE_LOG": str(log)}
    shown = doctor(fake.environment(fake.libraries(), cache, **settings))
    assert "driver for 12.4, 2 devices" in shown
    assert "Emulated device 1 (9.0), kernels: sm_90" in shown
    assert not log.exists()  # no context was made, nothing was loaded


def test_doctor_says_why_a_driver_cannot_be_used(cache: Path) -> None:
    shown = doctor(fake.environment(fake.libraries(), cache, NYBBLE_FAKE_VERSION="11080"))
    assert "a driver that cannot be used" in shown
    assert "hint: the CUDA driver supports CUDA 11.8, nybble needs 12.0" in shown
