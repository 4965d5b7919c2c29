//! The files of one model: a single safetensors file, or shards with an index.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use crate::checkpoint::json::{UniqueMap, explain, from_python, read_capped};
use crate::checkpoint::safetensors::{TensorFile, TensorInfo};
use crate::error::{Error, Result};

/// The one file of a model that is not sharded.
pub const SINGLE: &str = "model.safetensors";

/// Says which shard has which tensor.
pub const INDEX: &str = "model.safetensors.index.json";

/// The model's description.
pub const CONFIG: &str = "config.json";

const EXTENSION: &str = ".safetensors";
const MAX_INDEX: u64 = 100_000_000;
pub(crate) const MAX_CONFIG: u64 = 16_000_000;
const MAX_REF: u64 = 256;

/// All tensors of a model, wherever they lie; headers are read, data are not.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    files: Vec<TensorFile>,
    located: HashMap<String, (usize, usize)>,
    stray: Vec<(usize, String)>,
    config: Option<Value>,
}

impl Source {
    /// Opens a safetensors file, or a directory that holds [`SINGLE`] or [`INDEX`] with its
    /// shards. A directory's [`CONFIG`] is read too. A model's directory in the Hugging Face
    /// cache stands for its snapshot.
    pub fn open(path: &Path) -> Result<Self> {
        let metadata = fs::metadata(path).map_err(|source| Error::io(path, source))?;
        if !metadata.is_dir() {
            return Self::new(path, vec![TensorFile::open(path)?], None, None);
        }
        // `exists` follows links and would hide a broken one.
        let has = |name: &str| fs::symlink_metadata(path.join(name)).is_ok();
        if !has(SINGLE) && !has(INDEX) {
            return match snapshot(path) {
                Some(snapshot) => Self::open(&snapshot),
                None => Err(Error::checkpoint(path, nothing_to_open(path))),
            };
        }
        let config = read_config(path)?;
        if has(SINGLE) {
            let file = TensorFile::open(&path.join(SINGLE))?;
            return Self::new(path, vec![file], None, config);
        }
        let index = path.join(INDEX);
        let mut shards = BTreeMap::new();
        for (tensor, shard) in read_weight_map(&index)? {
            if !is_plain_file_name(&shard) {
                let problem = format!("'{shard}' is not the plain name of a {EXTENSION} file");
                return Err(Error::tensor(&index, &tensor, problem));
            }
            shards.entry(shard).or_insert_with(Vec::new).push(tensor);
        }
        let files = shards
            .keys()
            .map(|shard| TensorFile::open(&path.join(shard)))
            .collect::<Result<_>>()?;
        let names: Vec<_> = shards.into_values().collect();
        Self::new(path, files, Some((&index, &names)), config)
    }

    /// Finds every tensor; an index gives the names that each file is to have.
    fn new(
        path: &Path,
        files: Vec<TensorFile>,
        index: Option<(&Path, &[Vec<String>])>,
        config: Option<Value>,
    ) -> Result<Self> {
        let mut wanted: Option<HashMap<&str, usize>> = index.map(|(_, names)| {
            names.iter().enumerate().flat_map(|(file, names)| pairs(file, names)).collect()
        });
        let (mut located, mut stray) = (HashMap::new(), Vec::new());
        for (file, opened) in files.iter().enumerate() {
            for (at, info) in opened.header().tensors().iter().enumerate() {
                let name = info.name.as_str();
                match &mut wanted {
                    Some(wanted) if wanted.get(name) != Some(&file) => {
                        stray.push((file, name.to_owned()));
                        continue;
                    }
                    Some(wanted) => wanted.remove(name),
                    None => None,
                };
                located.insert(name.to_owned(), (file, at));
            }
        }
        // The first by name, so that the message does not depend on the hash.
        let missing = wanted.into_iter().flatten().min();
        if let (Some((name, file)), Some((index, _))) = (missing, index) {
            let shard = files.get(file).map_or(Path::new(""), TensorFile::path);
            let problem = format!("the index places it in {}, which lacks it", shard.display());
            return Err(Error::tensor(index, name, problem));
        }
        Ok(Self { path: path.to_owned(), files, located, stray, config })
    }

    /// The file or directory that was opened; a snapshot where its cache was asked for.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files, in the order of their names.
    pub fn files(&self) -> &[TensorFile] {
        &self.files
    }

    /// The content of `config.json`; none where a single file was opened.
    pub const fn config(&self) -> Option<&Value> {
        self.config.as_ref()
    }

    /// Every tensor with the number of its file, in the order of the data.
    pub fn tensors(&self) -> impl Iterator<Item = (usize, &TensorInfo)> {
        self.files.iter().enumerate().flat_map(move |(file, opened)| {
            let tensors = opened.header().tensors().iter().enumerate();
            tensors.filter_map(move |(at, info)| {
                (self.located.get(&info.name) == Some(&(file, at))).then_some((file, info))
            })
        })
    }

    /// Tensors that lie in a shard but not in the index, with the number of their file.
    pub fn stray(&self) -> &[(usize, String)] {
        &self.stray
    }

    /// The file and the description of a tensor.
    pub fn find(&self, name: &str) -> Option<(&TensorFile, &TensorInfo)> {
        let (file, at) = self.located.get(name)?;
        let file = self.files.get(*file)?;
        Some((file, file.header().tensors().get(*at)?))
    }

    /// Fills `out` with the bytes of a tensor from `first` on.
    pub fn read(&self, name: &str, first: u64, out: &mut [u8]) -> Result<()> {
        let (file, info) =
            self.find(name).ok_or_else(|| Error::tensor(&self.path, name, "no such tensor"))?;
        file.read(info, first, out)
    }

    /// All bytes of a tensor that is expected to be small.
    pub fn read_all(&self, name: &str, cap: u64) -> Result<Vec<u8>> {
        let (file, info) =
            self.find(name).ok_or_else(|| Error::tensor(&self.path, name, "no such tensor"))?;
        if info.bytes > cap {
            let problem = format!("{} bytes, at most {cap} make sense", info.bytes);
            return Err(Error::tensor(file.path(), name, problem));
        }
        let mut bytes = vec![0; info.bytes as usize];
        file.read(info, 0, &mut bytes)?;
        Ok(bytes)
    }
}

fn pairs(file: usize, names: &[String]) -> impl Iterator<Item = (&str, usize)> {
    names.iter().map(move |name| (name.as_str(), file))
}

/// The description of a model, if the directory has one.
pub fn read_config(directory: &Path) -> Result<Option<Value>> {
    let path = directory.join(CONFIG);
    if fs::symlink_metadata(&path).is_err() {
        return Ok(None);
    }
    let text = read_capped(&path, MAX_CONFIG)?;
    match serde_json::from_slice(&from_python(&text)) {
        Ok(config @ Value::Object(_)) => Ok(Some(config)),
        Ok(_) => Err(Error::checkpoint(&path, "not a JSON object")),
        Err(error) => Err(Error::checkpoint(
            &path,
            format!("not JSON (which has no NaN or Infinity): {error}"),
        )),
    }
}

fn read_weight_map(path: &Path) -> Result<Vec<(String, String)>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: UniqueMap<String>,
    }
    let text = read_capped(path, MAX_INDEX)?;
    let index: Index = serde_json::from_slice(&text).map_err(|error| {
        Error::checkpoint(path, format!("not an index: {}", explain(&text, &error)))
    })?;
    Ok(index.weight_map.0)
}

/// One component that is a name: no separator of any system, no `..`, nothing absolute.
fn is_plain_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let plain = matches!(components.next(), Some(Component::Normal(only)) if only == name);
    plain
        && components.next().is_none()
        && !name.contains(['/', '\\', ':', '\0'])
        && name.len() > EXTENSION.len()
        && name.ends_with(EXTENSION)
}

/// The snapshot that a model's directory in the Hugging Face cache stands for: that of `main`, or
/// the only one.
fn snapshot(directory: &Path) -> Option<PathBuf> {
    let snapshots = directory.join("snapshots");
    let main = read_capped(&directory.join("refs").join("main"), MAX_REF).ok();
    let main = main.and_then(|text| String::from_utf8(text).ok());
    if let Some(revision) = main.as_deref().map(str::trim) {
        let plain = revision.bytes().all(|byte| byte.is_ascii_alphanumeric());
        let found = snapshots.join(revision);
        return (plain && !revision.is_empty()).then_some(found).filter(|path| is_snapshot(path));
    }
    let mut found = fs::read_dir(snapshots).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    let only = found.next()?;
    found.next().is_none().then_some(only).filter(|path| is_snapshot(path))
}

/// A directory, and not a cache itself, since a link could nest those for ever.
fn is_snapshot(path: &Path) -> bool {
    path.is_dir() && !path.join("snapshots").exists()
}

/// Why a directory cannot be opened, from what lies in it.
fn nothing_to_open(directory: &Path) -> String {
    let mut names: Vec<String> = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    names.sort();
    let first = |extensions: &[&str]| {
        names.iter().find(|name| extensions.iter().any(|extension| name.ends_with(extension)))
    };
    let nothing = format!("neither {SINGLE} nor {INDEX} here");
    if let Some(name) = first(&[EXTENSION]) {
        format!("{nothing}; to open {name} alone, give its path")
    } else if let Some(name) = first(&[".bin", ".pt", ".pth", ".ckpt"]) {
        format!("{nothing}; {name} is pickled and could run code, convert it to safetensors first")
    } else if let Some(name) = first(&[".gguf"]) {
        format!("{nothing}; this version does not read GGUF yet ({name})")
    } else {
        nothing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shard_is_one_plain_file_name() {
        assert!(is_plain_file_name("model-00001-of-00002.safetensors"));
        for name in [
            "",
            ".safetensors",
            "..",
            "../x.safetensors",
            "/etc/x.safetensors",
            "a/b.safetensors",
            "a\\b.safetensors",
            "C:x.safetensors",
            "x.safetensors/",
            "./x.safetensors",
            "x.bin",
            "x\0.safetensors",
        ] {
            assert!(!is_plain_file_name(name), "{name}");
        }
    }
}
