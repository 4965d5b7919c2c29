//! Which compiled form of the kernels a device gets.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use super::archive::{Archive, Entry, Kind};
use super::cache::{self, Key};
use super::{embedded, nvrtc};

/// One way to have the kernels on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Candidate {
    /// From the archive in this library.
    Embedded(Entry),
    /// Compiled on this machine before.
    Cached,
    /// Compiled now.
    Compiled,
}

/// The library of NVRTC, which only Python can find.
static NVRTC: Mutex<Option<PathBuf>> = Mutex::new(None);

/// Says where NVRTC is.
pub fn set_nvrtc(path: PathBuf) {
    *NVRTC.lock().unwrap_or_else(PoisonError::into_inner) = Some(path);
}

/// What may run on a device of this compute capability, best first: machine code for just it,
/// then for a lower minor version, text for the latest version that is not above it, and what is
/// compiled from the sources.
///
/// `NYBBLE_CUDA_IMAGES` leaves out all but those that it names: `cubin`, `ptx`, `cached` (compiled on
/// this machine before) and `compiled` (now), with commas between them.
pub fn candidates(capability: u32) -> Vec<Candidate> {
    let named = std::env::var(ONLY);
    let named = named.as_deref().ok().map(|text| text.split(',').map(str::trim));
    let wanted = |candidate: &Candidate| {
        named.clone().is_none_or(|mut names| names.any(|name| name == candidate.kind()))
    };
    all(capability).into_iter().filter(wanted).collect()
}

/// The variable of the environment that [`candidates`] reads.
pub const ONLY: &str = "NYBBLE_CUDA_IMAGES";

fn all(capability: u32) -> Vec<Candidate> {
    let embedded = archive().map(|archive| suitable(archive.entries(), capability));
    let embedded = embedded.unwrap_or_default().into_iter().map(Candidate::Embedded);
    embedded.chain([Candidate::Cached, Candidate::Compiled]).collect()
}

fn archive() -> Result<Archive<'static>, String> {
    let bytes = embedded::ARCHIVE.ok_or("this build has no compiled kernels")?;
    Archive::parse(bytes)
}

fn suitable(entries: &[Entry], capability: u32) -> Vec<Entry> {
    let fits = |entry: &Entry| match entry.kind {
        Kind::Cubin => entry.arch / 10 == capability / 10 && entry.arch <= capability,
        Kind::Ptx => entry.arch <= capability,
    };
    let mut fitting: Vec<_> = entries.iter().copied().filter(fits).collect();
    fitting.sort_by_key(|entry| (entry.kind, std::cmp::Reverse(entry.arch)));
    fitting
}

impl Candidate {
    /// The name by which it is asked for.
    fn kind(&self) -> &'static str {
        match self {
            Candidate::Embedded(Entry { kind: Kind::Cubin, .. }) => "cubin",
            Candidate::Embedded(Entry { kind: Kind::Ptx, .. }) => "ptx",
            Candidate::Cached => "cached",
            Candidate::Compiled => "compiled",
        }
    }

    /// The image, as the driver takes it.
    ///
    /// # Errors
    /// Why there is none.
    pub fn image(self, capability: u32) -> Result<Vec<u8>, String> {
        let key = Key { sources: embedded::HASH, arch: capability };
        match self {
            Candidate::Embedded(entry) => archive()?.unpack(entry),
            Candidate::Cached => {
                let directory = cache::directory().ok_or("there is no home directory")?;
                key.read(&directory).ok_or_else(|| "none is in the cache".to_owned())
            }
            Candidate::Compiled => {
                let path = NVRTC.lock().unwrap_or_else(PoisonError::into_inner).clone();
                let path = path.ok_or(
                    "NVRTC is not installed, which compiles kernels for new devices; install a \
                     torch with CUDA, or nvidia-cuda-nvrtc",
                )?;
                let image = nvrtc::compile(&path, embedded::SOURCES, capability)?;
                if let Some(directory) = cache::directory() {
                    // Without a place to keep it, the next process compiles again.
                    let _ = key.write(&directory, &image);
                }
                Ok(image)
            }
        }
    }

    /// For people.
    pub fn describe(self, capability: u32) -> String {
        match self {
            Candidate::Embedded(Entry { kind: Kind::Cubin, arch, .. }) => format!("sm_{arch}"),
            Candidate::Embedded(Entry { kind: Kind::Ptx, arch, .. }) => {
                format!("PTX for {arch}, compiled by the driver")
            }
            Candidate::Cached => format!("sm_{capability}, compiled here before"),
            Candidate::Compiled => format!("sm_{capability}, compiled at first use"),
        }
    }

    /// Whether it could be had now, without compiling anything to find out.
    pub fn is_at_hand(self, capability: u32) -> bool {
        match self {
            Candidate::Embedded(_) => true,
            Candidate::Cached => self.image(capability).is_ok(),
            Candidate::Compiled => NVRTC.lock().unwrap_or_else(PoisonError::into_inner).is_some(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(kind: Kind, arch: u32) -> Entry {
        Entry::at(kind, arch)
    }

    fn chosen(capability: u32) -> Vec<(Kind, u32)> {
        let cubins = [75, 80, 86, 89, 90, 100, 120].map(|arch| entry(Kind::Cubin, arch));
        let entries = [&cubins[..], &[80, 120].map(|arch| entry(Kind::Ptx, arch))].concat();
        suitable(&entries, capability).iter().map(|entry| (entry.kind, entry.arch)).collect()
    }

    #[test]
    fn machine_code_runs_on_its_generation_and_text_on_later_ones() {
        use Kind::{Cubin, Ptx};
        assert_eq!(chosen(90), [(Cubin, 90), (Ptx, 80)]);
        assert_eq!(chosen(87), [(Cubin, 86), (Cubin, 80), (Ptx, 80)]);
        assert_eq!(chosen(75), [(Cubin, 75)]);
        assert_eq!(chosen(121), [(Cubin, 120), (Ptx, 120), (Ptx, 80)]);
        assert_eq!(chosen(130), [(Ptx, 120), (Ptx, 80)]);
        assert_eq!(chosen(70), []);
    }
}
