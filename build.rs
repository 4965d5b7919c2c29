//! Embeds the CUDA kernels: their sources, and what `cuda/build_kernels.py` compiled from them if
//! that is there and belongs to these sources.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

use sha2::{Digest, Sha256};

/// Where the hash of the sources stands in the archive (`cuda/archive.md`).
const HASH_AT: std::ops::Range<usize> = 8..40;

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=cuda");
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    let sources = sources(&root.join("cuda"))?;
    let hash = hash(&sources)?;
    let mut text = format!("pub const HASH: [u8; 32] = {hash:?};\n");
    text.push_str("pub static SOURCES: &[(&str, &str)] = &[\n");
    for (name, path) in &sources {
        let _ = writeln!(text, "    ({name:?}, include_str!({:?})),", path.to_string_lossy());
    }
    text.push_str("];\n");
    let archive = root.join("cuda/kernels.bin");
    let current = fs::read(&archive).is_ok_and(|bytes| bytes.get(HASH_AT) == Some(&hash));
    let embedded = format!("Some(include_bytes!({:?}))", archive.to_string_lossy());
    let archive = if current { &embedded } else { "None" };
    let _ = writeln!(text, "pub static ARCHIVE: Option<&[u8]> = {archive};");
    fs::write(out.join("cuda_kernels.rs"), text)
}

/// The sources by name, in the order of their hash.
fn sources(directory: &Path) -> io::Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let is_source = ["cu", "cuh", "h"].iter().any(|end| path.extension() == Some(end.as_ref()));
        if is_source && let Some(name) = path.file_name().and_then(|name| name.to_str()) {
            found.push((name.to_owned(), path));
        }
    }
    found.sort();
    Ok(found)
}

/// SHA-256 over name, a NUL, the length and the content of each.
fn hash(sources: &[(String, PathBuf)]) -> io::Result<[u8; 32]> {
    let mut hash = Sha256::new();
    for (name, path) in sources {
        let content = fs::read(path)?;
        hash.update(name.as_bytes());
        hash.update([0]);
        hash.update((content.len() as u64).to_le_bytes());
        hash.update(&content);
    }
    Ok(hash.finalize().into())
}
