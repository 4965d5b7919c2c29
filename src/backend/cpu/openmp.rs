//! The threads of the OpenMP runtime that torch has loaded, if it is GNU's.
//!
//! Torch's threads keep a processor busy for a while after each of its operations, waiting for the
//! next. Threads of our own would have to wait for them to give up, which takes longer than a
//! product with one token. Work that is given to the same runtime runs on those very threads.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// `GOMP_parallel(function, data, threads, flags)`: calls the function on each thread of a team,
/// the caller among them, and returns when all have (libgomp ABI, GCC 4.9 and later).
type Parallel = unsafe extern "C" fn(unsafe extern "C" fn(*mut Work), *mut Work, u32, u32);

/// What a team does.
struct Work {
    take: &'static (dyn Fn() + Sync),
    failed: AtomicBool,
}

/// Calls `take` on each of about `threads` threads of torch's team. False, without a call, where
/// there is none.
///
/// # Panics
/// If `take` does, once the team is done.
pub fn run(threads: usize, take: &(dyn Fn() + Sync)) -> bool {
    let (Some(parallel), Ok(threads)) = (parallel(), u32::try_from(threads)) else { return false };
    // SAFETY: only the lifetime is changed; the work outlives the team's use of it.
    let take = unsafe {
        std::mem::transmute::<&(dyn Fn() + Sync), &'static (dyn Fn() + Sync + 'static)>(take)
    };
    let mut work = Work { take, failed: AtomicBool::new(false) };
    // SAFETY: the function is what its name says; it returns when no thread uses `work` any more.
    unsafe { parallel(enter, &raw mut work, threads, 0) };
    assert!(!work.failed.load(Ordering::Relaxed), "a part of the work has failed");
    true
}

/// # Safety
/// `work` is what [`run`] made, shared by all threads of the team.
unsafe extern "C" fn enter(work: *mut Work) {
    // SAFETY: the caller's; all threads only read, or store to an atomic.
    let (take, failed) = unsafe { ((*work).take, &(*work).failed) };
    // Nothing may unwind into C.
    if std::panic::catch_unwind(std::panic::AssertUnwindSafe(take)).is_err() {
        failed.store(true, Ordering::Relaxed);
    }
}

/// The runtime's entry, in the process in which it was found first: a forked child has none of its
/// threads, and would wait for them forever.
#[cfg(target_os = "linux")]
fn parallel() -> Option<Parallel> {
    static FOUND: OnceLock<(u32, Parallel)> = OnceLock::new();
    let process = std::process::id();
    if FOUND.get().is_none() {
        // SAFETY: the name is a C string; nothing is loaded, only what is loaded already is searched.
        let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"GOMP_parallel".as_ptr()) };
        if address.is_null() {
            return None; // torch may come later
        }
        // SAFETY: a function of this name has this type.
        let parallel = unsafe { std::mem::transmute::<*mut libc::c_void, Parallel>(address) };
        let _ = FOUND.set((process, parallel));
    }
    FOUND.get().filter(|(found_in, _)| *found_in == process).map(|(_, parallel)| *parallel)
}

#[cfg(not(target_os = "linux"))]
fn parallel() -> Option<Parallel> {
    None
}
