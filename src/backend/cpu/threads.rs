//! The threads that large tensors are split over.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

use super::openmp;

/// A pool and what it was made for.
struct Made {
    process: u32,
    threads: usize,
    pool: Arc<ThreadPool>,
}

static POOL: Mutex<Option<Made>> = Mutex::new(None);

/// The number of threads to use when the caller names none: `NYBBLE_NUM_THREADS`, else
/// `OMP_NUM_THREADS`, else what the machine has. Asked once: the answer takes files to read, which
/// costs more than to decode a small tensor.
pub fn default_threads() -> usize {
    static THREADS: OnceLock<usize> = OnceLock::new();
    *THREADS.get_or_init(|| {
        ["NYBBLE_NUM_THREADS", "OMP_NUM_THREADS"]
            .iter()
            .filter_map(|name| std::env::var(name).ok()?.parse().ok())
            .find(|threads| *threads > 0)
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
    })
}

/// Runs `work` with rayon's parallel iterators spread over `threads` threads.
///
/// The pool is kept. A forked child (a data loader's worker) has none of its parent's threads
/// and makes its own pool; where the system gives no threads, `work` runs on this one. One thread
/// is a pool too: outside of any, rayon takes one of its own, with a thread for each processor,
/// which a forked child would wait for forever.
pub fn spread<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
    if rayon::current_thread_index().is_some() {
        return work(); // part of what is spread already
    }
    match pool(threads, false) {
        Some(pool) => pool.install(work),
        None => work(),
    }
}

/// Calls `work` once for each of `parts` numbers, on at most `threads` threads.
///
/// Parts are taken one after the other by whoever is free, this thread included: it does not
/// wait for the others to wake up, and a thread that is held up delays one part. The others are
/// torch's where it is loaded (see [`super::openmp`]), else those of our pool.
pub fn share(threads: usize, parts: usize, work: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    let take = || {
        loop {
            let part = next.fetch_add(1, Ordering::Relaxed);
            if part >= parts {
                break;
            }
            work(part);
        }
    };
    let threads_of_use = threads.min(parts);
    if threads_of_use <= 1 || rayon::current_thread_index().is_some() {
        return take();
    }
    // The team has the size that torch gives its own, so that it is not made anew.
    if openmp::run(threads, &take) {
        return;
    }
    match pool(threads, true) {
        Some(pool) => pool.in_place_scope(|scope| {
            for _ in 1..threads_of_use {
                scope.spawn(|_| take());
            }
            take();
        }),
        None => take(),
    }
}

/// As [`share`], but each thread walks through parts that follow one another: what lies in memory
/// in their order is read as one stream for each thread, which the processor fetches ahead. A
/// thread that is done helps another from the far end of its run.
pub fn share_runs(threads: usize, parts: usize, work: impl Fn(usize) + Sync) {
    share_runs_with(threads, parts, || (), |(), part| work(part));
}

/// As [`share_runs`], with something that each thread has for all its parts.
pub fn share_runs_with<S>(
    threads: usize,
    parts: usize,
    own: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, usize) + Sync,
) {
    let count = threads.min(parts).max(1);
    if count == 1 {
        let mut own = own();
        return (0..parts).for_each(|part| work(&mut own, part));
    }
    let runs: Vec<Run> =
        (0..count).map(|i| Run::new(parts * i / count, parts * (i + 1) / count)).collect();
    share(threads, count, |run| {
        let mut own = own();
        while let Some(part) = runs[run].first() {
            work(&mut own, part);
        }
        for other in (run + 1..count).chain(0..run) {
            while let Some(part) = runs[other].last() {
                work(&mut own, part);
            }
        }
    });
}

/// Numbers that are left, taken from both ends. Each has lines of the cache to itself: threads take
/// from their own far more often than from those of others.
#[repr(align(128))]
struct Run(AtomicU64);

impl Run {
    fn new(start: usize, end: usize) -> Self {
        Self(AtomicU64::new(pack(start as u64, end as u64)))
    }

    fn first(&self) -> Option<usize> {
        let taken = self.take(|start, end| (start + 1, end))?;
        Some(taken.0 as usize)
    }

    fn last(&self) -> Option<usize> {
        let taken = self.take(|start, end| (start, end - 1))?;
        Some(taken.1 as usize - 1)
    }

    /// The limits before they were changed.
    fn take(&self, change: impl Fn(u64, u64) -> (u64, u64)) -> Option<(u64, u64)> {
        let next = |limits: u64| {
            let (start, end) = (limits >> 32, limits & u64::from(u32::MAX));
            (start < end).then(|| {
                let (start, end) = change(start, end);
                pack(start, end)
            })
        };
        let limits = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).ok()?;
        Some((limits >> 32, limits & u64::from(u32::MAX)))
    }
}

const fn pack(start: u64, end: u64) -> u64 {
    start << 32 | end
}

/// Calls `work` for each item, on at most `threads` threads; results are in the order of the items.
pub fn share_items<I: Send, R: Send>(
    threads: usize,
    items: impl ExactSizeIterator<Item = I> + Send,
    work: impl Fn(I) -> R + Sync,
) -> Vec<R> {
    let count = items.len();
    if threads <= 1 || count <= 1 {
        return items.map(work).collect();
    }
    let items = Mutex::new(items.enumerate());
    let done = Mutex::new(Vec::with_capacity(count));
    share(threads, count, |_| {
        let item = items.lock().unwrap_or_else(PoisonError::into_inner).next();
        if let Some((i, item)) = item {
            let result = work(item);
            done.lock().unwrap_or_else(PoisonError::into_inner).push((i, result));
        }
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_unstable_by_key(|(i, _)| *i);
    done.into_iter().map(|(_, result)| result).collect()
}

/// A pool of `threads` threads; of more will do if they are `enough`.
fn pool(threads: usize, enough: bool) -> Option<Arc<ThreadPool>> {
    let process = std::process::id();
    let mut slot = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(made) = slot.as_ref()
        && made.process == process
        && (made.threads == threads || (enough && made.threads > threads))
    {
        return Some(Arc::clone(&made.pool));
    }
    let pool = Arc::new(ThreadPoolBuilder::new().num_threads(threads).build().ok()?);
    let made = Made { process, threads, pool: Arc::clone(&pool) };
    if let Some(old) = slot.replace(made)
        && old.process != process
    {
        // Its threads live in the parent: dropping it here would wait for them forever.
        std::mem::forget(old);
    }
    Some(pool)
}

#[cfg(test)]
mod tests {
    use rayon::prelude::*;

    use super::*;

    #[test]
    fn work_is_spread_over_the_threads_asked_for() {
        for threads in [1, 2, 3] {
            let sum: u64 = spread(threads, || (0..1000u64).into_par_iter().sum());
            assert_eq!(sum, 499_500);
        }
        for threads in [1, 3] {
            assert_eq!(spread(threads, rayon::current_num_threads), threads);
        }
        let inside = || spread(1, rayon::current_num_threads);
        assert_eq!(spread(3, inside), 3);
    }

    #[test]
    fn every_part_is_done_once() {
        for (threads, parts) in [(1, 5), (2, 1), (3, 100), (2, 0)] {
            let done: Vec<AtomicUsize> = (0..parts).map(|_| AtomicUsize::new(0)).collect();
            share(threads, parts, |part| {
                done[part].fetch_add(1, Ordering::Relaxed);
            });
            assert!(done.iter().all(|done| done.load(Ordering::Relaxed) == 1));
            share_runs(threads, parts, |part| {
                done[part].fetch_add(1, Ordering::Relaxed);
            });
            assert!(done.iter().all(|done| done.load(Ordering::Relaxed) == 2));
        }
    }

    #[test]
    fn a_run_is_taken_from_both_ends() {
        let run = Run::new(3, 6);
        assert_eq!([run.first(), run.last(), run.first()], [Some(3), Some(5), Some(4)]);
        assert_eq!([run.first(), run.last()], [None, None]);
    }

    #[test]
    fn results_come_in_the_order_of_the_items() {
        for threads in [1, 2, 5] {
            let squares = share_items(threads, 0..1000usize, |i| i * i);
            assert!(squares.iter().enumerate().all(|(i, square)| *square == i * i));
        }
    }
}
