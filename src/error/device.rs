//! What can be wrong with a CUDA device, its driver or a launch.

/// Why a CUDA device cannot do what was asked, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceProblem {
    /// The library of the driver cannot be found.
    #[error(
        "no CUDA driver: libcuda cannot be loaded; install NVIDIA's driver (on Linux its library is \
         libcuda.so.1), or use the CPU"
    )]
    NoDriver,
    /// A driver older than the oldest that the calls and kernels work with.
    #[error(
        "the CUDA driver supports CUDA {}, nybble needs {}; install a newer driver",
        version(*found), version(*needed)
    )]
    OldDriver {
        /// What it supports, as the driver writes it: 12040 for 12.4.
        found: i32,
        /// What is needed, written the same way.
        needed: i32,
    },
    /// A driver without a function that every supported driver has.
    #[error(
        "the CUDA driver lacks {name}: the libcuda that is found is too old or incomplete (a stub, \
         perhaps); install a newer driver, or remove the other libcuda from the library path"
    )]
    MissingSymbol {
        /// The function.
        name: &'static str,
    },
    /// A driver that shows no device to this process.
    #[error(
        "there is a CUDA driver but no device for this process; check CUDA_VISIBLE_DEVICES and \
         nvidia-smi"
    )]
    NoDevice,
    /// A device that does not exist.
    #[error("CUDA device {asked} does not exist: this process has {count}, numbered from 0")]
    Ordinal {
        /// The number asked for.
        asked: i32,
        /// How many there are.
        count: i32,
    },
    /// A device that the embedded kernels do not run on, and that none could be compiled for.
    #[error("there are no CUDA kernels for compute capability {}.{}: {reason}", capability / 10, capability % 10)]
    Architecture {
        /// The device's compute capability, 90 for 9.0.
        capability: u32,
        /// What was tried and what to do.
        reason: String,
    },
    /// A kernel that exists but not for this device and element type.
    #[error("the kernel {kernel} does not exist for this device; {remedy}")]
    NoKernel {
        /// Its name.
        kernel: String,
        /// What to use instead.
        remedy: &'static str,
    },
    /// A call of the driver that failed.
    #[error("CUDA error {code} ({name}) in {call}: {text}")]
    Driver {
        /// The function of the driver.
        call: &'static str,
        /// Its result.
        code: u32,
        /// The name of the result.
        name: String,
        /// What the driver says about it.
        text: String,
    },
    /// A launch that failed.
    #[error(
        "the launch of {kernel} failed with CUDA error {code} ({name}): {text}; an error of an \
         earlier kernel can show here, CUDA_LAUNCH_BLOCKING=1 tells which"
    )]
    Launch {
        /// The kernel.
        kernel: String,
        /// The driver's result.
        code: u32,
        /// The name of the result.
        name: String,
        /// What the driver says about it.
        text: String,
    },
    /// Kernels that would have to be loaded while a graph is captured.
    #[error(
        "the kernels of CUDA device {ordinal} are not loaded yet and cannot be while its stream is \
         being captured; move the module to the device, or call nybble.cuda.warmup({ordinal}), \
         before the capture"
    )]
    Capturing {
        /// The device.
        ordinal: i32,
    },
    /// Device memory that a kernel cannot read.
    #[error(
        "{what} at {address:#x} is not aligned to {alignment} bytes; pass a tensor of its own \
         (`.clone()`) rather than a view into another"
    )]
    Misaligned {
        /// The argument.
        what: &'static str,
        /// Where it is.
        address: u64,
        /// What the kernel needs.
        alignment: u64,
    },
}

/// 13.2 from 13020.
fn version(number: i32) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_versions_as_people_write_them() {
        let old = DeviceProblem::OldDriver { found: 11040, needed: 12000 }.to_string();
        assert!(old.contains("CUDA 11.4") && old.contains("12.0"), "{old}");
        let unknown = DeviceProblem::Architecture { capability: 130, reason: "so".to_owned() };
        assert!(unknown.to_string().contains("13.0: so"));
    }
}
