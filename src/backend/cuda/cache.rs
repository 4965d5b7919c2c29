//! Kernels that were compiled on this machine, kept in the user's cache.
//!
//! A file is believed only if it says that it is what was asked for and its hash is right: a file
//! that was cut off or made by another version is compiled again.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::{env, fs, io};

use sha2::{Digest, Sha256};

const MAGIC: &[u8; 8] = b"NYBCUBN1";
/// Magic, hash of the sources, architecture, hash of the image.
const HEADER: usize = 8 + 32 + 4 + 32;
/// The largest file that is read.
const MAX_FILE: u64 = 1 << 27;

/// What an image was compiled from and for.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// Hash of the sources.
    pub sources: [u8; 32],
    /// 90 for compute capability 9.0.
    pub arch: u32,
}

/// Where images are kept: `nybble` in `XDG_CACHE_HOME` if that is an absolute path, else in the
/// `.cache` of the home directory; None without a home.
pub fn directory() -> Option<PathBuf> {
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = absolute("XDG_CACHE_HOME").or_else(|| {
        env::home_dir().filter(|home| home.is_absolute()).map(|home| home.join(".cache"))
    });
    cache.map(|cache| cache.join("nybble"))
}

impl Key {
    fn path(self, directory: &Path) -> PathBuf {
        use std::fmt::Write as _;
        let mut name = String::new();
        for byte in &self.sources[..16] {
            let _ = write!(name, "{byte:02x}");
        }
        directory.join(format!("{name}-{}.cubin", self.arch))
    }

    fn header(self, image: &[u8]) -> Vec<u8> {
        let mut header = MAGIC.to_vec();
        header.extend(self.sources);
        header.extend(self.arch.to_le_bytes());
        header.extend(Sha256::digest(image));
        header
    }

    /// The image that is kept, if it is whole and the right one.
    pub fn read(self, directory: &Path) -> Option<Vec<u8>> {
        let path = self.path(directory);
        if fs::metadata(&path).ok()?.len() > MAX_FILE {
            return None;
        }
        let bytes = fs::read(path).ok()?;
        let (header, image) = bytes.split_at_checked(HEADER)?;
        (header == self.header(image)).then(|| image.to_vec())
    }

    /// Keeps an image. It appears under its name only when it is whole, so that other processes
    /// may write the same one meanwhile.
    pub fn write(self, directory: &Path, image: &[u8]) -> io::Result<()> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        fs::create_dir_all(directory)?;
        let path = self.path(directory);
        let unique = format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let hidden = path.with_extension(format!("{unique}.part"));
        let mut bytes = self.header(image);
        bytes.extend(image);
        let done = fs::write(&hidden, bytes).and_then(|()| fs::rename(&hidden, path));
        if done.is_err() {
            let _ = fs::remove_file(hidden);
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_image_of_the_same_sources_and_architecture_is_believed() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        let key = Key { sources: [1; 32], arch: 103 };
        assert_eq!(key.read(directory), None);
        key.write(directory, b"image").unwrap();
        assert_eq!(key.read(directory), Some(b"image".to_vec()));
        assert_eq!(Key { arch: 90, ..key }.read(directory), None);
        // The name has half of the hash; the file has all of it.
        let mut sources = [1; 32];
        sources[31] = 2;
        assert_eq!(Key { sources, ..key }.read(directory), None);
        let path = key.path(directory);
        let whole = fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            assert_eq!(key.read(directory), None, "cut at {cut}");
        }
        let mut other = whole.clone();
        *other.last_mut().unwrap() ^= 1;
        fs::write(&path, other).unwrap();
        assert_eq!(key.read(directory), None);
        assert_eq!(fs::read_dir(directory).unwrap().count(), 1, "hidden files are left");
    }
}
