//! The functions of the CUDA driver that launches need, and whether there is a driver.
//!
//! cudarc has the types and finds the library. Its own wrappers panic where the library or a symbol
//! is missing, and read results into an enum that newer drivers can return other values for; so the
//! few functions are looked up here and their results stay numbers.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys::{self, CUcontext, CUdevice, CUfunction, CUmodule, CUstream};

use crate::error::{DeviceProblem, Result};

/// The oldest driver: CUDA 12.0, which the compiled kernels need.
pub const OLDEST: i32 = 12_000;

/// The driver's results that are told apart here.
pub mod code {
    /// Nothing went wrong.
    pub const SUCCESS: u32 = 0;
    /// `CUDA_ERROR_NO_DEVICE`
    pub const NO_DEVICE: u32 = 100;
    /// `CUDA_ERROR_STREAM_CAPTURE_IMPLICIT`: the legacy stream was asked during a capture.
    pub const CAPTURE_IMPLICIT: u32 = 906;
    /// `CUDA_ERROR_NOT_FOUND`: a module has no such kernel.
    pub const NOT_FOUND: u32 = 500;
}

macro_rules! functions {
    ($( $field:ident $name:literal ( $($argument:ty),* ); )+) => {
        /// Functions of the driver by name without `cu`.
        struct Functions { $( $field: unsafe extern "C" fn($($argument),*) -> u32, )+ }

        impl Functions {
            fn find(library: &libloading::Library) -> Result<Self, DeviceProblem> {
                $(
                    // SAFETY: the type is the one that the driver's header gives this name.
                    let $field = unsafe {
                        library.get::<unsafe extern "C" fn($($argument),*) -> u32>($name.as_bytes())
                    };
                    let $field = *$field
                        .map_err(|_| DeviceProblem::MissingSymbol { name: $name })?;
                )+
                Ok(Self { $($field),+ })
            }
        }
    };
}

functions! {
    init "cuInit" (c_uint);
    driver_get_version "cuDriverGetVersion" (*mut c_int);
    device_get_count "cuDeviceGetCount" (*mut c_int);
    device_get "cuDeviceGet" (*mut CUdevice, c_int);
    device_get_name "cuDeviceGetName" (*mut c_char, c_int, CUdevice);
    device_get_attribute "cuDeviceGetAttribute" (*mut c_int, c_int, CUdevice);
    primary_ctx_retain "cuDevicePrimaryCtxRetain" (*mut CUcontext, CUdevice);
    ctx_get_current "cuCtxGetCurrent" (*mut CUcontext);
    ctx_set_current "cuCtxSetCurrent" (CUcontext);
    module_load_data "cuModuleLoadData" (*mut CUmodule, *const c_void);
    module_get_function "cuModuleGetFunction" (*mut CUfunction, CUmodule, *const c_char);
    func_set_attribute "cuFuncSetAttribute" (CUfunction, c_int, c_int);
    stream_is_capturing "cuStreamIsCapturing" (CUstream, *mut c_int);
    launch_kernel "cuLaunchKernel" (
        CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, CUstream,
        *mut *mut c_void, *mut *mut c_void
    );
    get_error_name "cuGetErrorName" (c_uint, *mut *const c_char);
    get_error_string "cuGetErrorString" (c_uint, *mut *const c_char);
}

/// A driver that has answered, and its devices.
pub struct Driver {
    functions: Functions,
    version: i32,
    count: i32,
}

/// The driver, found once for the life of the process.
pub fn driver() -> Result<&'static Driver> {
    static DRIVER: OnceLock<Result<Driver, DeviceProblem>> = OnceLock::new();
    Ok(DRIVER.get_or_init(Driver::find).as_ref().map_err(Clone::clone)?)
}

/// Whether the library of a driver is there, whatever it can do.
pub fn present() -> bool {
    // SAFETY: opens libraries by the names of the driver, and closes them again.
    unsafe { sys::is_culib_present() }
}

/// Whether there is a driver with a device; else why not.
pub fn available() -> Result<()> {
    driver().map(|_| ())
}

impl Driver {
    fn find() -> Result<Self, DeviceProblem> {
        if !present() {
            return Err(DeviceProblem::NoDriver);
        }
        // SAFETY: the library was there just now, so it is opened and stays open.
        let functions = Functions::find(unsafe { sys::culib() })?;
        let mut found = Self { functions, version: 0, count: 0 };
        let mut version = 0;
        // SAFETY: needs no context and no initialization; writes one number.
        let result = unsafe { (found.functions.driver_get_version)(&raw mut version) };
        found.check("cuDriverGetVersion", result)?;
        if version < OLDEST {
            return Err(DeviceProblem::OldDriver { found: version, needed: OLDEST });
        }
        // SAFETY: the only flag that exists is 0.
        let result = unsafe { (found.functions.init)(0) };
        if result == code::NO_DEVICE {
            return Err(DeviceProblem::NoDevice);
        }
        found.check("cuInit", result)?;
        let mut count = 0;
        // SAFETY: writes one number.
        let result = unsafe { (found.functions.device_get_count)(&raw mut count) };
        found.check("cuDeviceGetCount", result)?;
        if count < 1 {
            return Err(DeviceProblem::NoDevice);
        }
        (found.version, found.count) = (version, count);
        Ok(found)
    }

    /// The newest CUDA version that it supports, 12040 for 12.4.
    pub fn version(&self) -> i32 {
        self.version
    }

    /// The number of devices.
    pub fn count(&self) -> i32 {
        self.count
    }

    /// A failure as an error.
    pub(super) fn check(&self, call: &'static str, result: u32) -> Result<(), DeviceProblem> {
        if result == code::SUCCESS {
            return Ok(());
        }
        let (name, text) = self.describe(result);
        Err(DeviceProblem::Driver { call, code: result, name, text })
    }

    /// Name and description of a result.
    pub(super) fn describe(&self, result: u32) -> (String, String) {
        let text = |function: unsafe extern "C" fn(c_uint, *mut *const c_char) -> u32| {
            let mut text = std::ptr::null();
            // SAFETY: writes one pointer, null for a result that it does not know.
            unsafe { function(result, &raw mut text) };
            if text.is_null() {
                return "unknown".to_owned();
            }
            // SAFETY: texts of the driver end in NUL and live as long as the library.
            unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
        };
        (text(self.functions.get_error_name), text(self.functions.get_error_string))
    }

    /// The handle of a device.
    pub(super) fn device(&self, ordinal: i32) -> Result<CUdevice, DeviceProblem> {
        if !(0..self.count).contains(&ordinal) {
            return Err(DeviceProblem::Ordinal { asked: ordinal, count: self.count });
        }
        let mut device = 0;
        // SAFETY: writes one number.
        let result = unsafe { (self.functions.device_get)(&raw mut device, ordinal) };
        self.check("cuDeviceGet", result).map(|()| device)
    }

    /// The name of a device.
    pub(super) fn name(&self, device: CUdevice) -> Result<String, DeviceProblem> {
        let mut name = [0u8; 256];
        // SAFETY: writes at most 256 bytes, one of them NUL.
        let result = unsafe {
            (self.functions.device_get_name)(name.as_mut_ptr().cast(), name.len() as c_int, device)
        };
        self.check("cuDeviceGetName", result)?;
        let name = CStr::from_bytes_until_nul(&name).unwrap_or_default();
        Ok(name.to_string_lossy().into_owned())
    }

    /// The compute capability of a device, 90 for 9.0.
    pub(super) fn capability(&self, device: CUdevice) -> Result<u32, DeviceProblem> {
        use sys::CUdevice_attribute as Attribute;
        let major = Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR;
        let minor = Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR;
        Ok((10 * self.attribute(device, major)? + self.attribute(device, minor)?) as u32)
    }

    /// The number of multiprocessors of a device.
    pub(super) fn multiprocessors(&self, device: CUdevice) -> Result<u32, DeviceProblem> {
        let count = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        Ok(self.attribute(device, count)? as u32)
    }

    fn attribute(
        &self,
        device: CUdevice,
        attribute: sys::CUdevice_attribute,
    ) -> Result<c_int, DeviceProblem> {
        let mut value = 0;
        // SAFETY: writes one number.
        let result = unsafe {
            (self.functions.device_get_attribute)(&raw mut value, attribute as c_int, device)
        };
        self.check("cuDeviceGetAttribute", result).map(|()| value)
    }

    /// Retains the primary context, which torch uses too. It is never released: the order of that
    /// and torch's own end is not defined.
    pub(super) fn retain_primary(&self, device: CUdevice) -> Result<CUcontext, DeviceProblem> {
        let mut context = std::ptr::null_mut();
        // SAFETY: writes one pointer.
        let result = unsafe { (self.functions.primary_ctx_retain)(&raw mut context, device) };
        self.check("cuDevicePrimaryCtxRetain", result).map(|()| context)
    }

    /// The context of this thread; null without one.
    pub(super) fn current(&self) -> Result<CUcontext, DeviceProblem> {
        let mut context = std::ptr::null_mut();
        // SAFETY: writes one pointer.
        let result = unsafe { (self.functions.ctx_get_current)(&raw mut context) };
        self.check("cuCtxGetCurrent", result).map(|()| context)
    }

    /// Makes a context the one of this thread.
    pub(super) fn set_current(&self, context: CUcontext) -> Result<(), DeviceProblem> {
        // SAFETY: a primary context that is never released, the one that was current, or null.
        let result = unsafe { (self.functions.ctx_set_current)(context) };
        self.check("cuCtxSetCurrent", result)
    }

    /// Loads a cubin, or PTX that ends in NUL, into the current context.
    pub(super) fn load_module(&self, image: &[u8]) -> Result<CUmodule, DeviceProblem> {
        let mut module = std::ptr::null_mut();
        // SAFETY: an ELF image says its own length, which the archive's hash or the cache's has
        // confirmed; text ends in NUL.
        let result =
            unsafe { (self.functions.module_load_data)(&raw mut module, image.as_ptr().cast()) };
        self.check("cuModuleLoadData", result).map(|()| module)
    }

    /// A kernel of a module, if it has it.
    pub(super) fn function(
        &self,
        module: CUmodule,
        name: &CStr,
    ) -> Result<Option<CUfunction>, DeviceProblem> {
        let mut function = std::ptr::null_mut();
        // SAFETY: the module is loaded and never unloaded; writes one pointer.
        let result = unsafe {
            (self.functions.module_get_function)(&raw mut function, module, name.as_ptr())
        };
        if result == code::NOT_FOUND {
            return Ok(None);
        }
        self.check("cuModuleGetFunction", result).map(|()| Some(function))
    }

    /// Lets launches of a kernel ask for so many bytes of shared memory, more than every kernel has.
    pub(super) fn allow_shared(
        &self,
        function: CUfunction,
        bytes: u32,
    ) -> Result<(), DeviceProblem> {
        let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: a kernel of a module that is never unloaded; takes two numbers.
        let result =
            unsafe { (self.functions.func_set_attribute)(function, most as c_int, bytes as c_int) };
        self.check("cuFuncSetAttribute", result)
    }

    /// Whether a graph is being captured from a stream.
    pub(super) fn is_capturing(&self, stream: CUstream) -> Result<bool, DeviceProblem> {
        let mut status = 0;
        // SAFETY: the caller's stream; writes one number.
        let result = unsafe { (self.functions.stream_is_capturing)(stream, &raw mut status) };
        if result == code::CAPTURE_IMPLICIT {
            return Ok(true);
        }
        self.check("cuStreamIsCapturing", result).map(|()| status != 0)
    }

    /// Launches a kernel with one argument; the result is the driver's. `block` is its threads, and
    /// bytes of shared memory that it does not declare.
    ///
    /// # Safety
    /// - `function` belongs to the current context, and `stream` to the same device.
    /// - `argument` points to the struct that the kernel takes, and the addresses in it are valid
    ///   for what the kernel does.
    pub(super) unsafe fn launch(
        &self,
        function: CUfunction,
        grid: (u32, u32),
        block: (u32, u32),
        stream: CUstream,
        argument: *mut c_void,
    ) -> u32 {
        let mut arguments = [argument];
        // SAFETY: the caller's promise; the driver copies the argument before it returns.
        unsafe {
            (self.functions.launch_kernel)(
                function,
                grid.0,
                grid.1,
                1,
                block.0,
                1,
                1,
                block.1,
                stream,
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
    }
}
