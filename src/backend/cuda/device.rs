//! A device: its context, its kernels once they are loaded, and launching on a stream of it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock, PoisonError};

use cudarc::driver::sys::{CUcontext, CUdevice, CUfunction, CUstream};

use super::driver::{Driver, driver};
use super::image::{Candidate, ONLY, candidates, set_nvrtc};
use super::launch::{SLOTS, kernels};
use crate::error::{DeviceProblem, Result};

/// A handle of the driver.
#[derive(Clone, Copy)]
struct Handle<T>(*mut T);

// SAFETY: the driver's handles may be used by every thread.
unsafe impl<T> Send for Handle<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Handle<T> {}

type Context = Handle<cudarc::driver::sys::CUctx_st>;
type Function = Handle<cudarc::driver::sys::CUfunc_st>;

/// A device with its primary context, kept for the life of the process.
struct Device {
    ordinal: i32,
    capability: u32,
    multiprocessors: u32,
    context: Context,
    loaded: OnceLock<Loaded>,
    loading: Mutex<()>,
}

/// The kernels of a device, by slot. Kernels that the device's machine code lacks are None.
struct Loaded {
    functions: Vec<Option<Function>>,
    image: String,
}

/// What can be said of a device without using it.
#[derive(Clone, Debug)]
pub struct Facts {
    /// As the driver names it.
    pub name: String,
    /// Compute capability, 90 for 9.0.
    pub capability: u32,
    /// Which kernels it has or would get.
    pub kernels: String,
}

fn device(ordinal: i32) -> Result<&'static Device> {
    static DEVICES: Mutex<BTreeMap<i32, &'static Device>> = Mutex::new(BTreeMap::new());
    let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(device) = devices.get(&ordinal) {
        return Ok(device);
    }
    let driver = driver()?;
    let handle = driver.device(ordinal)?;
    let device = Device {
        ordinal,
        capability: driver.capability(handle)?,
        multiprocessors: driver.multiprocessors(handle)?,
        context: Handle(driver.retain_primary(handle)?),
        loaded: OnceLock::new(),
        loading: Mutex::new(()),
    };
    let device: &'static Device = Box::leak(Box::new(device)); // as long as its context
    devices.insert(ordinal, device);
    Ok(device)
}

impl Device {
    fn kernels(&self, stream: CUstream) -> Result<&Loaded> {
        if let Some(loaded) = self.loaded.get() {
            return Ok(loaded);
        }
        let _one_at_a_time = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(loaded) = self.loaded.get() {
            return Ok(loaded);
        }
        let driver = driver()?;
        let _current = Current::enter(driver, self.context.0)?;
        if driver.is_capturing(stream)? {
            return Err(DeviceProblem::Capturing { ordinal: self.ordinal }.into());
        }
        let loaded = self.load(driver)?;
        Ok(self.loaded.get_or_init(|| loaded))
    }

    /// Loads the first candidate that the driver takes: one from a newer compiler than an old
    /// driver knows is refused, for example.
    fn load(&self, driver: &Driver) -> Result<Loaded> {
        let mut reasons = Vec::new();
        for candidate in candidates(self.capability) {
            let loaded = candidate
                .image(self.capability)
                .and_then(|image| driver.load_module(&image).map_err(|error| error.to_string()));
            let module = match loaded {
                Ok(module) => module,
                Err(reason) => {
                    reasons.push(format!("{}: {reason}", candidate.describe(self.capability)));
                    continue;
                }
            };
            // All at once: a kernel that is looked up later may have to be loaded during a
            // capture.
            let mut functions = vec![None; SLOTS];
            for kernel in kernels() {
                let function = driver.function(module, &kernel.name)?;
                if let Some(function) = function.filter(|_| kernel.shared > 0) {
                    driver.allow_shared(function, kernel.shared)?;
                }
                functions[kernel.slot] = function.map(Handle);
            }
            return Ok(Loaded { functions, image: candidate.describe(self.capability) });
        }
        if reasons.is_empty() {
            reasons.push(format!("{ONLY} names none of cubin, ptx, cached and compiled"));
        }
        let reason = reasons.join("; ");
        Err(DeviceProblem::Architecture { capability: self.capability, reason }.into())
    }
}

/// Loads the kernels of a device, if they are not; says which. `nvrtc` is the library that
/// compiles them where none fit.
pub fn warmup(ordinal: i32, stream: u64, nvrtc: Option<PathBuf>) -> Result<String> {
    if let Some(path) = nvrtc {
        set_nvrtc(path);
    }
    Ok(device(ordinal)?.kernels(raw_stream(stream))?.image.clone())
}

/// What is known of each device. Uses none: no context is made, nothing is loaded.
pub fn facts(nvrtc: Option<PathBuf>) -> Result<Vec<Facts>> {
    if let Some(path) = nvrtc {
        set_nvrtc(path);
    }
    let driver = driver()?;
    (0..driver.count()).map(|ordinal| Ok(facts_of(driver, driver.device(ordinal)?)?)).collect()
}

fn facts_of(driver: &Driver, device: CUdevice) -> Result<Facts, DeviceProblem> {
    let capability = driver.capability(device)?;
    let first = candidates(capability).into_iter().find(|found| found.is_at_hand(capability));
    let none = || "none: no compiled kernels fit and NVRTC is not installed".to_owned();
    Ok(Facts {
        name: driver.name(device)?,
        capability,
        kernels: first.map_or_else(none, |found| Candidate::describe(found, capability)),
    })
}

fn raw_stream(stream: u64) -> CUstream {
    std::ptr::with_exposed_provenance_mut(stream as usize)
}

/// A device with loaded kernels, and a stream of it.
pub struct Cuda {
    driver: &'static Driver,
    device: &'static Device,
    loaded: &'static Loaded,
    stream: CUstream,
}

impl Cuda {
    /// The device of this number and the caller's stream: 0 is the legacy default stream. Loads
    /// the kernels if they are not.
    pub fn new(ordinal: i32, stream: u64) -> Result<Self> {
        let (driver, device, stream) = (driver()?, device(ordinal)?, raw_stream(stream));
        Ok(Self { driver, device, loaded: device.kernels(stream)?, stream })
    }

    /// Its compute capability, 90 for 9.0.
    pub fn capability(&self) -> u32 {
        self.device.capability
    }

    /// How many blocks of threads it runs at a time, if a multiprocessor has room for one.
    pub(super) fn multiprocessors(&self) -> u32 {
        self.device.multiprocessors
    }

    pub(super) fn driver(&self) -> &'static Driver {
        self.driver
    }

    pub(super) fn stream(&self) -> CUstream {
        self.stream
    }

    pub(super) fn function(&self, slot: usize) -> Option<CUfunction> {
        self.loaded.functions.get(slot).copied().flatten().map(|function| function.0)
    }

    /// Makes the device's context the thread's, until the result is dropped.
    pub(super) fn enter(&self) -> Result<Current> {
        Current::enter(self.driver, self.device.context.0)
    }
}

/// The context of this thread is a device's; the one before comes back at the end.
pub(super) struct Current {
    driver: &'static Driver,
    previous: Option<CUcontext>,
}

impl Current {
    fn enter(driver: &'static Driver, context: CUcontext) -> Result<Self> {
        let previous = driver.current()?;
        if previous == context {
            return Ok(Self { driver, previous: None });
        }
        driver.set_current(context)?;
        Ok(Self { driver, previous: Some(previous) })
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        if let Some(previous) = self.previous {
            // A context that was current a moment ago; there is nobody to tell if it is gone.
            let _ = self.driver.set_current(previous);
        }
    }
}
