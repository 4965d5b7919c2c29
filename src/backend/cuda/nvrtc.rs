//! Compiling the kernels on this machine, with the NVRTC that torch brings.
//!
//! For devices newer than this build, and builds without compiled kernels.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fs;
use std::path::Path;

use libloading::Library;

/// The translation unit; the other sources are its headers.
const MAIN: &str = "nybble.cu";

/// Options other than the architecture. `cuda/build_kernels.py` has the same.
const OPTIONS: [&CStr; 2] = [c"--std=c++17", c"--fmad=false"];

type Program = *mut c_void;

macro_rules! functions {
    ($( $field:ident $name:literal ( $($argument:ty),* ); )+) => {
        /// Functions of NVRTC by name without `nvrtc`.
        struct Nvrtc { $( $field: unsafe extern "C" fn($($argument),*) -> c_int, )+ _library: Library }

        impl Nvrtc {
            fn find(library: Library) -> Result<Self, String> {
                $(
                    // SAFETY: the type is the one that NVRTC's header gives this name.
                    let $field = *unsafe {
                        library.get::<unsafe extern "C" fn($($argument),*) -> c_int>($name.as_bytes())
                    }
                    .map_err(|error| format!("NVRTC lacks {}: {error}", $name))?;
                )+
                Ok(Self { $($field,)+ _library: library })
            }
        }
    };
}

functions! {
    create "nvrtcCreateProgram" (
        *mut Program, *const c_char, *const c_char, c_int, *const *const c_char,
        *const *const c_char
    );
    compile "nvrtcCompileProgram" (Program, c_int, *const *const c_char);
    cubin_size "nvrtcGetCUBINSize" (Program, *mut usize);
    cubin "nvrtcGetCUBIN" (Program, *mut c_char);
    log_size "nvrtcGetProgramLogSize" (Program, *mut usize);
    log "nvrtcGetProgramLog" (Program, *mut c_char);
    destroy "nvrtcDestroyProgram" (*mut Program);
}

/// Compiles sources for a compute capability to a cubin.
///
/// # Errors
/// Why it could not be done.
pub fn compile(
    library: &Path,
    sources: &[(&str, &str)],
    capability: u32,
) -> Result<Vec<u8>, String> {
    let text = |text: &str| CString::new(text).map_err(|_| "a source has a NUL".to_owned());
    let main = sources.iter().find(|(name, _)| *name == MAIN);
    let main = text(main.ok_or("this build has no sources of kernels")?.1)?;
    let headers = sources.iter().filter(|(name, _)| *name != MAIN);
    let headers = headers.map(|(name, source)| Ok((text(name)?, text(source)?)));
    let headers = headers.collect::<Result<Vec<_>, String>>()?;
    let architecture = text(&format!("--gpu-architecture=sm_{capability}"))?;

    let nvrtc = open(library)?;
    let mut program = Started { nvrtc: &nvrtc, program: std::ptr::null_mut() };
    let names: Vec<_> = headers.iter().map(|(name, _)| name.as_ptr()).collect();
    let contents: Vec<_> = headers.iter().map(|(_, content)| content.as_ptr()).collect();
    // SAFETY: all texts end in NUL and outlive the call, which copies them; both lists have as
    // many entries as the count says.
    let result = unsafe {
        (nvrtc.create)(
            &raw mut program.program,
            main.as_ptr(),
            c"nybble.cu".as_ptr(),
            headers.len() as c_int,
            contents.as_ptr(),
            names.as_ptr(),
        )
    };
    if result != 0 {
        return Err(format!("NVRTC could not begin (error {result})"));
    }
    let mut options = OPTIONS.map(CStr::as_ptr).to_vec();
    options.push(architecture.as_ptr());
    // SAFETY: the program was made by this NVRTC; options end in NUL and outlive the call.
    let result =
        unsafe { (nvrtc.compile)(program.program, options.len() as c_int, options.as_ptr()) };
    if result != 0 {
        let log = program.read(nvrtc.log_size, nvrtc.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let first: String = log.trim_end_matches('\0').trim().chars().take(400).collect();
        return Err(format!(
            "NVRTC ({}) failed with error {result}: {first}; a newer torch brings a newer NVRTC",
            library.display()
        ));
    }
    program
        .read(nvrtc.cubin_size, nvrtc.cubin)
        .filter(|image| !image.is_empty())
        .ok_or_else(|| "NVRTC gave no machine code".to_owned())
}

/// Loads NVRTC. It opens its sibling by bare name, which only works if that is loaded already.
fn open(path: &Path) -> Result<Nvrtc, String> {
    let beside = path.parent().and_then(|directory| fs::read_dir(directory).ok());
    let is_sibling = |name: &std::ffi::OsStr| {
        name.to_str().is_some_and(|name| {
            name.starts_with("libnvrtc-builtins.so") || name.starts_with("nvrtc-builtins64")
        })
    };
    for entry in beside.into_iter().flatten().flatten().filter(|e| is_sibling(&e.file_name())) {
        // SAFETY: NVIDIA's library, which only defines data.
        if let Ok(library) = unsafe { Library::new(entry.path()) } {
            std::mem::forget(library); // NVRTC uses it as long as the process lives
        }
    }
    // SAFETY: NVIDIA's library, whose initializers do nothing that others see.
    let library = unsafe { Library::new(path) }
        .map_err(|error| format!("NVRTC cannot be loaded: {error}"))?;
    Nvrtc::find(library)
}

/// A program that is destroyed at the end.
struct Started<'a> {
    nvrtc: &'a Nvrtc,
    program: Program,
}

impl Started<'_> {
    fn read(
        &self,
        size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
        content: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    ) -> Option<Vec<u8>> {
        let mut bytes = 0;
        // SAFETY: the program was made by this NVRTC; writes one number.
        if unsafe { size(self.program, &raw mut bytes) } != 0 {
            return None;
        }
        let mut buffer = vec![0u8; bytes];
        // SAFETY: writes as many bytes as it said.
        let result = unsafe { content(self.program, buffer.as_mut_ptr().cast()) };
        (result == 0).then_some(buffer)
    }
}

impl Drop for Started<'_> {
    fn drop(&mut self) {
        if !self.program.is_null() {
            // SAFETY: made by this NVRTC, and not used again.
            unsafe { (self.nvrtc.destroy)(&raw mut self.program) };
        }
    }
}
