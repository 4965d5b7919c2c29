//! The small files of a model beside its weights: tokenizer, generation config, licence.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use crate::checkpoint::shard::CONFIG;
use crate::error::{Error, Result};

/// Files that hold weights, or what belongs to a training run.
const WEIGHTS: &[&str] = &[
    "safetensors",
    "bin",
    "pt",
    "pth",
    "ckpt",
    "gguf",
    "ggml",
    "h5",
    "msgpack",
    "onnx",
    "ot",
    "npz",
    "pkl",
    "pickle",
    "tflite",
    "tar",
    "zip",
];

/// What is larger is no description of a model; a large tokenizer has 40 MB.
const LARGEST: u64 = 256 << 20;

/// The files of a directory that a copy of the model needs.
#[derive(Debug, Default)]
pub struct Sidecars {
    files: Vec<(PathBuf, u64)>,
    /// Files that were left out for their size.
    pub too_large: Vec<PathBuf>,
}

impl Sidecars {
    /// Looks through a directory. Links are followed, since the cache of Hugging Face consists of
    /// them; directories, weights and hidden files are left out.
    pub fn of(directory: &Path) -> Result<Self> {
        let io = |error| Error::io(directory, error);
        let mut found = Self::default();
        for entry in fs::read_dir(directory).map_err(io)? {
            let path = entry.map_err(io)?.path();
            let Some(name) = path.file_name() else { continue };
            let bytes = match fs::metadata(&path) {
                Ok(metadata) if metadata.is_file() => metadata.len(),
                _ => continue,
            };
            if name == CONFIG || name.as_encoded_bytes().starts_with(b".") || is_weights(name) {
                continue;
            }
            if bytes > LARGEST {
                found.too_large.push(path);
            } else {
                found.files.push((path, bytes));
            }
        }
        found.files.sort();
        Ok(found)
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|(_, bytes)| bytes).sum()
    }

    /// Copies the content; owner and mode are those of new files.
    pub fn copy_to(&self, directory: &Path) -> Result<()> {
        for (from, _) in &self.files {
            let Some(name) = from.file_name() else { continue };
            let to = directory.join(name);
            let source = File::open(from).map_err(|error| Error::io(from, error))?;
            let write = |error| Error::io(&to, error);
            let mut copy =
                OpenOptions::new().write(true).create_new(true).open(&to).map_err(write)?;
            io::copy(&mut source.take(LARGEST), &mut copy).map_err(write)?;
            copy.sync_all().map_err(write)?;
        }
        Ok(())
    }
}

/// By the extension, that of an index (`x.bin.index.json`) included.
fn is_weights(name: &OsStr) -> bool {
    let name = name.to_string_lossy().to_lowercase();
    let name = name.strip_suffix(".index.json").unwrap_or(&name);
    Path::new(name)
        .extension()
        .and_then(OsStr::to_str)
        .is_some_and(|extension| WEIGHTS.contains(&extension))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tokenizer_goes_along_and_weights_do_not() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for name in [
            "tokenizer.json",
            "tokenizer.model",
            "chat_template.jinja",
            "README.md",
            "config.json",
            "model.safetensors",
            "pytorch_model.bin.index.json",
            "model.safetensors.index.json",
            "x.gguf",
            "optimizer.PT",
            ".gitattributes",
        ] {
            fs::write(from.path().join(name), name).unwrap();
        }
        fs::create_dir(from.path().join("onnx")).unwrap();
        std::os::unix::fs::symlink(from.path().join("x.gguf"), from.path().join("LICENSE"))
            .unwrap();
        std::os::unix::fs::symlink("nowhere", from.path().join("dangling")).unwrap();
        let found = Sidecars::of(from.path()).unwrap();
        found.copy_to(to.path()).unwrap();
        let mut names: Vec<_> = fs::read_dir(to.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(
            names,
            ["LICENSE", "README.md", "chat_template.jinja", "tokenizer.json", "tokenizer.model"]
        );
        assert!(!to.path().join("LICENSE").is_symlink());
        assert_eq!(fs::read(to.path().join("README.md")).unwrap(), b"README.md");
    }
}
