//! Where a checkpoint is written: beside its final place, and moved there when it is whole.
//!
//! Everything goes to a hidden directory `.NAME.partial-PID` next to the destination. Only the
//! last step, a rename, makes it visible; an error removes the directory. A killed process
//! leaves it behind; the next run with the same destination finds that nobody holds its lock and
//! removes it.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with, statvfs};

use crate::checkpoint::shard::{CONFIG, INDEX, SINGLE};
use crate::error::{Error, Result};

const EXTENSION: &str = "safetensors";
const PARTIAL: &str = ".partial-";

/// A destination that is being written; dropping it removes what was written.
#[derive(Debug)]
pub struct Destination {
    target: PathBuf,
    parent: PathBuf,
    work: PathBuf,
    overwrite: bool,
    is_file: bool,
    /// Its lock tells other runs that the work directory is in use.
    _lock: File,
}

impl Destination {
    /// Checks that the destination may be written and makes a work directory.
    ///
    /// A path that ends in `.safetensors` is one file, any other a directory. What exists is
    /// replaced only with `overwrite`, and only what looks like a model.
    pub fn create(source: &Path, target: &Path, overwrite: bool) -> Result<Self> {
        let is_file = is_file(target);
        let (parent, name) = split(target)?;
        fs::create_dir_all(&parent).map_err(|error| Error::io(&parent, error))?;
        let target = Self::check(source, target)?;
        let parent = target.parent().unwrap_or(&parent).to_owned();
        replaceable(&target, overwrite, is_file)?;

        let work = partial(&parent, &name, &std::process::id().to_string());
        remove_abandoned(&parent, &name);
        fs::create_dir(&work).map_err(|error| Error::io(&work, error))?;
        let lock = File::open(&work).map_err(|error| Error::io(&work, error))?;
        // A file system without locks only means that nobody tidies up after a kill.
        let _ = flock(&lock, FlockOperation::NonBlockingLockExclusive);
        Ok(Self { target, parent, work, overwrite, is_file, _lock: lock })
    }

    /// Checks that source and destination are apart, without making anything; returns the whole
    /// path of the destination, as far as it exists.
    pub fn check(source: &Path, target: &Path) -> Result<PathBuf> {
        let (parent, name) = split(target)?;
        let parent = fs::canonicalize(&parent).unwrap_or(parent);
        let target = parent.join(name);
        apart(source, &target, is_file(&target))?;
        Ok(target)
    }

    /// Where to write.
    pub fn work(&self) -> &Path {
        &self.work
    }

    /// Fails where the disk has not enough room.
    pub fn check_space(&self, needed: u64) -> Result<()> {
        let found = statvfs(&self.parent).map_err(|e| Error::io(&self.parent, e.into()))?;
        let available = found.f_bavail.saturating_mul(found.f_frsize);
        if needed > available {
            return Err(Error::Memory {
                what: format!("the result on the disk of {}", self.parent.display()),
                needed,
                available,
                remedy: "free some space or choose another destination",
            });
        }
        Ok(())
    }

    /// Writes a small file.
    pub fn write(&self, name: &str, text: &[u8]) -> Result<()> {
        let path = self.work.join(name);
        let io = |error| Error::io(&path, error);
        let mut file = OpenOptions::new().write(true).create_new(true).open(&path).map_err(io)?;
        file.write_all(text).map_err(io)?;
        file.sync_all().map_err(io)
    }

    /// Moves the result to its place.
    pub fn commit(self) -> Result<()> {
        sync_directory(&self.work)?;
        let (from, flags) = if self.is_file {
            let flags = if self.overwrite { RenameFlags::empty() } else { RenameFlags::NOREPLACE };
            (self.work.join(SINGLE), flags)
        } else {
            (self.work.clone(), RenameFlags::empty())
        };
        let exists = fs::symlink_metadata(&self.target).is_ok();
        if !self.is_file && exists && !is_empty_directory(&self.target) {
            // `replaceable` has looked at it; swap, so that at no time nothing is there.
            self.swap()?;
        } else {
            rename(&from, &self.target, flags).map_err(|error| Error::io(&self.target, error))?;
        }
        sync_directory(&self.parent)
    }

    /// Exchanges the old directory with the new one; the old one goes with the work directory.
    fn swap(&self) -> Result<()> {
        let io = |error: io::Error| Error::io(&self.target, error);
        if !self.overwrite {
            return Err(exists(&self.target));
        }
        if renameat_with(CWD, &self.work, CWD, &self.target, RenameFlags::EXCHANGE).is_ok() {
            return Ok(());
        }
        // Not every file system can exchange: move the old one away first.
        let mut old = self.work.clone().into_os_string();
        old.push(".old");
        fs::rename(&self.target, &old).map_err(io)?;
        if let Err(error) = fs::rename(&self.work, &self.target) {
            let _ = fs::rename(&old, &self.target);
            return Err(io(error));
        }
        let old = PathBuf::from(old);
        fs::remove_dir_all(&old).map_err(|error| Error::io(&old, error))
    }
}

impl Drop for Destination {
    fn drop(&mut self) {
        // After a commit this is the old directory, or nothing.
        let _ = fs::remove_dir_all(&self.work);
    }
}

/// Whether a destination is one file.
pub fn is_file(target: &Path) -> bool {
    target.extension() == Some(OsStr::new(EXTENSION))
}

/// The parent and the last component of a path.
fn split(target: &Path) -> Result<(PathBuf, OsString)> {
    let name = target.file_name().ok_or_else(|| Error::Argument {
        what: "destination",
        got: target.display().to_string(),
        expected: "it must end in a name".to_owned(),
    })?;
    let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty());
    Ok((parent.unwrap_or(Path::new(".")).to_owned(), name.to_owned()))
}

fn partial(parent: &Path, name: &OsStr, process: &str) -> PathBuf {
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(PARTIAL);
    hidden.push(process);
    parent.join(hidden)
}

/// A checkpoint must not be written into itself.
fn apart(source: &Path, target: &Path, is_file: bool) -> Result<()> {
    let source = fs::canonicalize(source).map_err(|error| Error::io(source, error))?;
    let (root, what) = match source.parent() {
        Some(parent) if source.is_file() => (parent, "in the directory of the source"),
        _ => (source.as_path(), "the source or inside it"),
    };
    // One file may lie beside its source.
    let inside =
        if is_file && source.is_file() { target == source } else { target.starts_with(root) };
    if inside || source.starts_with(target) {
        return Err(Error::Argument {
            what: "destination",
            got: target.display().to_string(),
            expected: format!("it is {what}; choose another"),
        });
    }
    Ok(())
}

fn exists(target: &Path) -> Error {
    let found = io::Error::new(
        io::ErrorKind::AlreadyExists,
        "exists already; pass overwrite=True (--overwrite) to replace it",
    );
    Error::io(target, found)
}

/// Whether what is at the destination may be replaced.
fn replaceable(target: &Path, overwrite: bool, is_file: bool) -> Result<()> {
    let Ok(found) = fs::symlink_metadata(target) else { return Ok(()) };
    let refuse = |problem: &str| Err(Error::checkpoint(target, problem));
    if found.is_symlink() {
        return refuse("a symbolic link is not written through; give the real path");
    }
    if found.is_dir() && !is_file && is_empty_directory(target) {
        return Ok(());
    }
    if !overwrite {
        return Err(exists(target));
    }
    if found.is_dir() == is_file {
        return refuse(if is_file {
            "is a directory, and a file was asked for; remove it or choose another name"
        } else {
            "is a file, and a directory was asked for; remove it or choose another name"
        });
    }
    if is_file || is_model(target) {
        return Ok(());
    }
    refuse("does not look like a model that may be replaced (it has directories or no model files)")
}

/// Whether a directory holds files only, some of a model among them. Replacing it removes all.
fn is_model(directory: &Path) -> bool {
    let Ok(entries) = fs::read_dir(directory) else { return false };
    let mut has_model = false;
    for entry in entries {
        let Ok(entry) = entry else { return false };
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            return false;
        }
        let name = entry.file_name();
        has_model |= name == CONFIG
            || name == INDEX
            || Path::new(&name).extension() == Some(OsStr::new(EXTENSION));
    }
    has_model
}

fn is_empty_directory(path: &Path) -> bool {
    fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none())
}

/// Removes work directories of this destination whose process is gone.
fn remove_abandoned(parent: &Path, name: &OsStr) {
    let start = partial(Path::new(""), name, "");
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(process) =
            name.as_encoded_bytes().strip_prefix(start.as_os_str().as_encoded_bytes())
        else {
            continue;
        };
        let alive = std::str::from_utf8(process).is_ok_and(|process| {
            process != std::process::id().to_string() && Path::new("/proc").join(process).exists()
        });
        let locked = File::open(entry.path()).is_ok_and(|directory| {
            flock(&directory, FlockOperation::NonBlockingLockExclusive).is_err()
        });
        if !alive && !locked {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn rename(from: &Path, to: &Path, flags: RenameFlags) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, flags) {
        // Some file systems know no flags.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => fs::rename(from, to),
        other => other.map_err(io::Error::from),
    }
}

fn sync_directory(path: &Path) -> Result<()> {
    let directory = File::open(path).map_err(|error| Error::io(path, error))?;
    directory.sync_all().map_err(|error| Error::io(path, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let source = directory.path().join("source");
        fs::create_dir(&source).unwrap();
        (directory, source)
    }

    fn names(directory: &Path) -> Vec<OsString> {
        let mut names: Vec<_> =
            fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    }

    #[test]
    fn nothing_is_visible_before_commit_or_left_after_an_error() {
        let (directory, source) = source();
        let target = directory.path().join("deep/out");
        let destination = Destination::create(&source, &target, false).unwrap();
        destination.write("config.json", b"{}").unwrap();
        assert!(!target.exists());
        drop(destination);
        assert!(names(&directory.path().join("deep")).is_empty());

        let destination = Destination::create(&source, &target, false).unwrap();
        destination.write("config.json", b"{}").unwrap();
        destination.commit().unwrap();
        assert_eq!(names(&directory.path().join("deep")), ["out"]);
        assert_eq!(names(&target), ["config.json"]);
    }

    #[test]
    fn what_exists_is_replaced_only_when_asked_and_only_a_model() {
        let (directory, source) = source();
        let target = directory.path().join("out");
        fs::create_dir(&target).unwrap();
        Destination::create(&source, &target, false).unwrap().commit().unwrap();
        fs::write(target.join("thesis.txt"), "").unwrap();
        assert!(matches!(Destination::create(&source, &target, false), Err(Error::Io { .. })));
        assert!(Destination::create(&source, &target, true).is_err(), "no model");
        fs::write(target.join("config.json"), "old").unwrap();
        fs::create_dir(target.join("photos")).unwrap();
        assert!(Destination::create(&source, &target, true).is_err(), "directories");
        fs::remove_dir(target.join("photos")).unwrap();
        let destination = Destination::create(&source, &target, true).unwrap();
        assert_eq!(fs::read(target.join("config.json")).unwrap(), b"old");
        destination.write("config.json", b"new").unwrap();
        destination.commit().unwrap();
        assert_eq!(names(&target), ["config.json"]);
        assert_eq!(fs::read(target.join("config.json")).unwrap(), b"new");
        assert_eq!(names(directory.path()), ["out", "source"]);
    }

    #[test]
    fn a_checkpoint_is_not_written_into_itself_or_through_a_link() {
        let (directory, source) = source();
        let file = source.join("model.safetensors");
        fs::write(&file, "").unwrap();
        let beside = source.join("other.safetensors");
        let refused =
            |source: &Path, target: &Path| Destination::create(source, target, true).is_err();
        assert!(refused(&source, &source));
        assert!(refused(&source, &source.join("out")));
        assert!(refused(&source, &source.join("../source/out")));
        assert!(refused(&source, directory.path()));
        assert!(refused(&source, &beside));
        assert!(refused(&file, &file));
        assert!(!refused(&file, &beside));
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(directory.path().join("elsewhere"), &link).unwrap();
        assert!(refused(&source, &link));
    }

    #[test]
    fn one_file_replaces_one_file() {
        let (directory, source) = source();
        let target = directory.path().join("out.safetensors");
        for overwrite in [false, true] {
            let destination = Destination::create(&source, &target, overwrite).unwrap();
            destination.write(SINGLE, b"x").unwrap();
            destination.commit().unwrap();
            assert_eq!(names(directory.path()), ["out.safetensors", "source"]);
        }
        assert!(Destination::create(&source, &target, false).is_err());
    }

    #[test]
    fn what_a_killed_run_left_is_removed_and_a_running_one_is_not() {
        let (directory, source) = source();
        let abandoned = directory.path().join(".out.partial-999999999");
        fs::create_dir(&abandoned).unwrap();
        let other = directory.path().join(".other.partial-999999999");
        fs::create_dir(&other).unwrap();
        let running = directory.path().join(".out.partial-999999998");
        fs::create_dir(&running).unwrap();
        let lock = File::open(&running).unwrap();
        flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
        drop(Destination::create(&source, &directory.path().join("out"), false).unwrap());
        assert_eq!(
            names(directory.path()),
            [".other.partial-999999999", ".out.partial-999999998", "source"]
        );
    }

    #[test]
    fn a_full_disk_is_an_error_beforehand() {
        let (directory, source) = source();
        let target = directory.path().join("out");
        let destination = Destination::create(&source, &target, false).unwrap();
        assert!(destination.check_space(1).is_ok());
        assert!(matches!(destination.check_space(u64::MAX), Err(Error::Memory { .. })));
    }
}
