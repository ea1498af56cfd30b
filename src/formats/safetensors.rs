//! Safetensors files: tensors by name, memory-mapped for reading, replaced atomically
//! when written.
//!
//! Layout: 8 bytes with the header's length (little-endian), the header as JSON
//! `{"__metadata__": {string: string}, name: {"dtype", "shape", "data_offsets": [begin, end]}}`,
//! then the tensors' bytes, little-endian, row-major, without holes.
//!
//! Opening reads the header only. Nothing in it is believed before it has been checked against the file's length. So a
//! truncated or hostile file is an error, never a panic or an allocation as large as the file claims to be. Writing
//! sorts tensors by the size of their elements (then as given) and metadata by key: the same content always makes the
//! same bytes, and every tensor is aligned.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use serde_json::{Map, Value, json};

pub use safetensors::Dtype;

use super::mapped::Mapped;
use super::pickle::PickleError;
use super::{At, AtomicFile, FileError, input};
use crate::formats::fingerprint::Fingerprint;

/// Longest header that is read, as in the reference implementation.
const MAX_HEADER: u64 = 100_000_000;

/// The most tensors of a file, and the most sides of a tensor. A checkpoint of the largest network has 20,000 tensors.
const MAX_TENSORS: usize = 1 << 17;
const MAX_SIDES: usize = 64;

/// Key of the header's strings.
const METADATA: &str = "__metadata__";

/// What can be wrong with a safetensors file, or with a request to it.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum SafeError {
    #[error("{0}")]
    Io(#[from] FileError),
    #[error("{}: not a whole safetensors file: {what}", path.display())]
    Malformed { path: PathBuf, what: String },
    #[error("{}: not a file of weights: {why}; `edm2k import` reads NVIDIA's snapshots", path.display())]
    Torch { path: PathBuf, why: Box<PickleError> },
    #[error("{}: tensor {name}: {what}", path.display())]
    Tensor { path: PathBuf, name: String, what: String },
    #[error("{}: tensor {name} is missing{}", path.display(), nearest(hint))]
    Missing { path: PathBuf, name: String, hint: Option<String> },
    #[error("{}: tensor {name}: found {found}, expected {expected}", path.display())]
    Unexpected { path: PathBuf, name: String, found: String, expected: String },
}

fn nearest(hint: &Option<String>) -> String {
    hint.as_ref().map(|name| format!(" (the file has {name})")).unwrap_or_default()
}

/// Result of this module.
pub type Result<T> = std::result::Result<T, SafeError>;

/// One tensor to write: name, element type, shape, and its bytes, little-endian and
/// row-major.
pub type TensorOut<'a> = (&'a str, Dtype, &'a [usize], &'a [u8]);

/// A tensor of a file of another format: name, element type, shape and bytes.
pub type TensorIn = (String, Dtype, Vec<usize>, Content);

/// The bytes of a tensor's elements, little-endian and row-major.
#[derive(Debug)]
pub enum Content {
    /// They lie so in the file.
    Within(Range<usize>),
    /// They were brought into that order.
    Gathered(Vec<u8>),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Info {
    dtype: Dtype,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

/// An open, checked, memory-mapped safetensors file.
///
/// The file must not be changed in place while it is open; files written by [`write()`] are replaced. If it is
/// truncated, the process ends with an error that names it ([`Mapped`]).
pub struct SafeFile {
    path: PathBuf,
    metadata: HashMap<String, String>,
    tensors: BTreeMap<String, Tensor>,
}

struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Bytes,
}

enum Bytes {
    Mapped(Arc<Mapped>, Range<usize>),
    Owned(Vec<u8>),
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map, range) => &map[range.clone()],
            Self::Owned(bytes) => bytes,
        }
    }
}

impl fmt::Debug for SafeFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SafeFile({}, {} tensors)", self.path.display(), self.tensors.len())
    }
}

impl SafeFile {
    /// Maps `path` and checks its header: lengths, JSON, element types, and that the
    /// tensors cover the rest of the file without holes or overlaps.
    ///
    /// # Errors
    /// [`SafeError::Io`], [`SafeError::Malformed`], [`SafeError::Tensor`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = input::open(path).map_err(|cause| match cause.kind() {
            io::ErrorKind::InvalidInput => SafeError::Malformed { path: path.into(), what: cause.to_string() },
            _ => FileError { path: path.into(), cause }.into(),
        })?;
        Self::opened(path, &file)
    }

    /// As [`SafeFile::open`], of a file that is open already.
    pub(super) fn opened(path: &Path, file: &File) -> Result<Self> {
        let path = path.to_path_buf();
        let malformed = |what: String| SafeError::Malformed { path: path.clone(), what };
        let length = file.metadata().at(&path)?.len();
        if let Some(kind) = input::kind(&input::head(file).at(&path)?).filter(|_| length < 8) {
            return Err(malformed(format!("it is {kind}")));
        }
        if length < 8 {
            return Err(malformed(format!("{length} bytes, expected a header of 8 at least")));
        }
        // SAFETY: that nobody changes the file in place meanwhile is the documented condition of this type (all of
        // this crate's writers rename).
        let map = unsafe { Mapped::new(file, &path) }.at(&path)?;
        let (prefix, rest) =
            map.split_first_chunk::<8>().ok_or_else(|| malformed("it shrank while it was opened".into()))?;
        if let Some(kind) = input::kind(&map).filter(|kind| !kind.contains("safetensors file")) {
            return Err(malformed(format!("it is {kind}")));
        }
        if input::is_text(prefix) {
            return Err(malformed("it is text; an error that the download gave in place of the file, perhaps".into()));
        }
        let header_length = u64::from_le_bytes(*prefix);
        if header_length > MAX_HEADER || header_length > rest.len() as u64 {
            return Err(malformed(format!(
                "it claims a header of {header_length} bytes, but only {} bytes follow",
                rest.len()
            )));
        }
        let (header, data) = rest.split_at(header_length as usize);
        let SafeHeader { metadata, tensors } =
            super::json::read(header).map_err(|error| malformed(format!("its header: {error}")))?;
        for (name, info) in &tensors {
            let wrong = |what: String| SafeError::Tensor { path: path.clone(), name: name.clone(), what };
            let (begin, end) = info.data_offsets;
            let bytes = byte_length(info.dtype, &info.shape)
                .ok_or_else(|| wrong(format!("impossible shape {:?} of {}", info.shape, info.dtype)))?;
            if begin > end || end > data.len() {
                return Err(wrong(format!(
                    "bytes {begin}..{end} do not lie in the file's {} bytes of data (truncated?)",
                    data.len()
                )));
            }
            if end - begin != bytes {
                return Err(wrong(format!(
                    "{} bytes, expected {bytes} for {} {:?}",
                    end - begin,
                    info.dtype,
                    info.shape
                )));
            }
        }

        let mut by_place: Vec<_> = tensors.iter().collect();
        by_place.sort_by_key(|(_, info)| info.data_offsets);
        let mut end = 0;
        for (name, info) in by_place {
            if info.data_offsets.0 != end {
                return Err(SafeError::Tensor {
                    path,
                    name: name.clone(),
                    what: format!("begins at byte {}, expected {end}", info.data_offsets.0),
                });
            }
            end = info.data_offsets.1;
        }
        if end != data.len() {
            return Err(malformed(format!("its tensors end at byte {end}, its data at byte {}", data.len())));
        }
        let (data_start, map) = (8 + header_length as usize, Arc::new(map));
        let mapped = |(name, Info { dtype, shape, data_offsets: (begin, end) })| {
            let bytes = Bytes::Mapped(map.clone(), data_start + begin..data_start + end);
            (name, Tensor { dtype, shape, bytes })
        };
        Ok(Self { path, metadata, tensors: tensors.into_iter().map(mapped).collect() })
    }

    /// The tensors of a mapped file of another format, as if they were in one of this format. If several have one name,
    /// the last counts.
    ///
    /// # Errors
    /// [`SafeError::Tensor`]: bytes that do not make the shape.
    pub(super) fn of(
        path: &Path,
        map: Mapped,
        tensors: Vec<TensorIn>,
        metadata: HashMap<String, String>,
    ) -> Result<Self> {
        let (mut known, map) = (BTreeMap::new(), Arc::new(map));
        for (name, dtype, shape, content) in tensors {
            let bytes = match content {
                Content::Within(range) => Bytes::Mapped(map.clone(), range),
                Content::Gathered(bytes) => Bytes::Owned(bytes),
            };
            if byte_length(dtype, &shape) != Some(bytes.len()) {
                let what = format!("{} bytes for {dtype} {shape:?}", bytes.len());
                return Err(SafeError::Tensor { path: path.into(), name, what });
            }
            known.insert(name, Tensor { dtype, shape, bytes });
        }
        Ok(Self { path: path.into(), metadata, tensors: known })
    }

    /// The same file with other names. Tensors for which `name` returns none are left out, and their memory is freed.
    #[must_use]
    pub fn renamed(mut self, name: impl Fn(&str) -> Option<String>) -> Self {
        let old = std::mem::take(&mut self.tensors);
        self.tensors = old.into_iter().filter_map(|(old, tensor)| Some((name(&old)?, tensor))).collect();
        self
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The strings of the header's `__metadata__`; empty if it has none.
    pub fn metadata(&self) -> &HashMap<String, String> {
        &self.metadata
    }

    /// Names of all tensors, in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| {
            let hint = self
                .tensors
                .keys()
                .map(|known| (strsim::jaro_winkler(known, name), known))
                .filter(|(score, _)| *score > 0.8)
                .max_by(|a, b| a.0.total_cmp(&b.0))
                .map(|(_, known)| known.clone());
            SafeError::Missing { path: self.path.clone(), name: name.into(), hint }
        })
    }

    /// Shape of a tensor; empty for a scalar.
    ///
    /// # Errors
    /// [`SafeError::Missing`].
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.tensor(name)?.shape)
    }

    /// Element type of a tensor.
    ///
    /// # Errors
    /// [`SafeError::Missing`].
    pub fn dtype(&self, name: &str) -> Result<Dtype> {
        Ok(self.tensor(name)?.dtype)
    }

    /// Bytes of a tensor as they lie in the file: little-endian, row-major, of any
    /// alignment.
    ///
    /// # Errors
    /// [`SafeError::Missing`].
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        Ok(&self.tensor(name)?.bytes)
    }

    /// The [`fingerprint`] of a tensor.
    ///
    /// # Errors
    /// [`SafeError::Missing`].
    pub fn fingerprint(&self, name: &str) -> Result<Fingerprint> {
        Ok(fingerprint(self.dtype(name)?, self.shape(name)?, self.bytes(name)?))
    }

    /// A tensor of F16, BF16, F32 or F64 as f32, row-major.
    ///
    /// # Errors
    /// [`SafeError::Missing`]; [`SafeError::Unexpected`] for other element types.
    pub fn f32(&self, name: &str) -> Result<Vec<f32>> {
        self.floats(name, |x| x, |x| x as f32)
    }

    /// As [`SafeFile::f32`], where all values must be finite.
    ///
    /// # Errors
    /// As [`SafeFile::f32`]; [`SafeError::Unexpected`] for an infinity or a NaN.
    pub fn finite_f32(&self, name: &str) -> Result<Vec<f32>> {
        let values = self.f32(name)?;
        match not_finite(&values) {
            Some(at) => Err(self.unexpected(name, format!("{} at {at}", values[at]), "finite numbers")),
            None => Ok(values),
        }
    }

    /// A tensor of F16, BF16, F32 or F64 as f64, row-major.
    pub fn f64(&self, name: &str) -> Result<Vec<f64>> {
        self.floats(name, f64::from, |x| x)
    }

    fn floats<T: Clone + Default + Send>(
        &self,
        name: &str,
        single: impl Fn(f32) -> T + Sync,
        double: impl Fn(f64) -> T + Sync,
    ) -> Result<Vec<T>> {
        let bytes = self.bytes(name)?;
        Ok(match self.dtype(name)? {
            Dtype::F16 => shared_out(bytes, |b, to| halves(b, to, f16::from_le_bytes, &single)),
            Dtype::BF16 => shared_out(bytes, |b, to| halves(b, to, bf16::from_le_bytes, &single)),
            Dtype::F32 => shared_out(bytes, |b, to| each(b, to, |b| single(f32::from_le_bytes(b)))),
            Dtype::F64 => shared_out(bytes, |b, to| each(b, to, |b| double(f64::from_le_bytes(b)))),
            other => return Err(self.unexpected(name, other, "F16, BF16, F32 or F64")),
        })
    }

    /// Checks the shape of a tensor.
    ///
    /// # Errors
    /// [`SafeError::Missing`], [`SafeError::Unexpected`].
    pub fn expect_shape(&self, name: &str, expected: &[usize]) -> Result<()> {
        match self.shape(name)? {
            shape if shape == expected => Ok(()),
            shape => Err(self.unexpected(name, format!("shape {shape:?}"), format!("{expected:?}"))),
        }
    }

    /// A tensor of I64, I32 or U8 as i64, row-major.
    ///
    /// # Errors
    /// [`SafeError::Missing`]; [`SafeError::Unexpected`] for other element types.
    pub fn i64(&self, name: &str) -> Result<Vec<i64>> {
        let bytes = self.bytes(name)?;
        Ok(match self.dtype(name)? {
            Dtype::I64 => shared_out(bytes, |b, to| each(b, to, i64::from_le_bytes)),
            Dtype::I32 => shared_out(bytes, |b, to| each(b, to, |b| i64::from(i32::from_le_bytes(b)))),
            Dtype::U8 => bytes.iter().map(|&b| i64::from(b)).collect(),
            other => return Err(self.unexpected(name, other, "I64, I32 or U8")),
        })
    }

    /// The error for a tensor that is not what the caller needs.
    pub fn unexpected(&self, name: &str, found: impl fmt::Display, expected: impl fmt::Display) -> SafeError {
        SafeError::Unexpected {
            path: self.path.clone(),
            name: name.into(),
            found: found.to_string(),
            expected: expected.to_string(),
        }
    }
}

/// The place of the first value that is not finite.
pub fn not_finite(values: &[f32]) -> Option<usize> {
    // Without an early exit this becomes SIMD code, and there is nearly never a value to stop at.
    let finite = |values: &[f32]| values.iter().fold(true, |all, x| all & x.is_finite());
    match values.par_chunks(SHARE).all(finite) {
        true => None,
        false => values.iter().position(|x| !x.is_finite()),
    }
}

/// Elements that a thread converts at a time.
const SHARE: usize = 1 << 15;

/// The values of elements of `N` bytes, by shares on all threads.
fn shared_out<const N: usize, T: Clone + Default + Send>(
    bytes: &[u8],
    convert: impl Fn(&[[u8; N]], &mut [T]) + Sync,
) -> Vec<T> {
    let elements = bytes.as_chunks::<N>().0;
    let mut values = vec![T::default(); elements.len()];
    values.par_chunks_mut(SHARE).zip(elements.par_chunks(SHARE)).for_each(|(to, from)| convert(from, to));
    values
}

fn each<const N: usize, T>(from: &[[u8; N]], to: &mut [T], convert: impl Fn([u8; N]) -> T) {
    to.iter_mut().zip(from).for_each(|(to, &from)| *to = convert(from));
}

/// Writes f16 values, little-endian and of any alignment, as f32.
pub fn widen(f16s: &[u8], to: &mut [f32]) {
    halves(f16s.as_chunks().0, to, f16::from_le_bytes, |x| x);
}

/// Widens values of 16 bits many at a time, as the machine has instructions for that.
fn halves<H: Copy + Default, T>(from: &[[u8; 2]], to: &mut [T], half: impl Fn([u8; 2]) -> H, single: impl Fn(f32) -> T)
where
    [H]: HalfFloatSliceExt,
{
    let (mut narrow, mut wide) = ([H::default(); 256], [0.0; 256]);
    for (from, to) in from.chunks(256).zip(to.chunks_mut(256)) {
        let (narrow, wide) = (&mut narrow[..from.len()], &mut wide[..from.len()]);
        each(from, narrow, &half);
        narrow.convert_to_f32_slice(wide);
        to.iter_mut().zip(wide).for_each(|(to, &mut x)| *to = single(x));
    }
}

/// Bytes of a tensor; `None` if that overflows or ends within a byte.
fn byte_length(dtype: Dtype, shape: &[usize]) -> Option<usize> {
    let bits =
        shape.iter().try_fold(1usize, |product, &side| product.checked_mul(side))?.checked_mul(dtype.bitsize())?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

/// The header. It is read straight into what is kept of it, so that a hostile one costs little more than its own size.
/// A repeated key is an error: a plain map would keep the last one, and two readers could disagree on the content.
#[derive(Default)]
struct SafeHeader {
    metadata: HashMap<String, String>,
    tensors: BTreeMap<String, Info>,
}

impl<'de> Deserialize<'de> for SafeHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = SafeHeader;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<SafeHeader, A::Error> {
                let mut header = SafeHeader::default();
                let mut about = false;
                while let Some(name) = map.next_key::<String>()? {
                    let twice = match &*name {
                        METADATA => std::mem::replace(&mut about, true),
                        name => header.tensors.contains_key(name),
                    };
                    if twice {
                        return Err(A::Error::custom(format!("{name} occurs twice")));
                    }
                    if name == METADATA {
                        let strings = map.next_value();
                        header.metadata = strings.map_err(|e| A::Error::custom(format!("its {METADATA}: {e}")))?;
                    } else {
                        let info = map.next_value::<Info>();
                        let info = info.map_err(|e| A::Error::custom(format!("tensor {name}: {e}")))?;
                        let sides = info.shape.len();
                        if sides > MAX_SIDES {
                            let what = format!("tensor {name}: {sides} sides, expected {MAX_SIDES} at most");
                            return Err(A::Error::custom(what));
                        }
                        if header.tensors.len() == MAX_TENSORS {
                            return Err(A::Error::custom(format!("more than {MAX_TENSORS} tensors")));
                        }
                        header.tensors.insert(name, info);
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// Fingerprint of a tensor: of its element type, shape and bytes.
pub fn fingerprint(dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Fingerprint {
    Fingerprint::of([dtype.to_string().as_bytes(), format!("{shape:?}").as_bytes(), bytes])
}

/// Writes a safetensors file atomically (see [`AtomicFile`]). The same tensors and
/// metadata always make the same bytes.
///
/// # Errors
/// [`SafeError::Unexpected`] if the bytes do not fit the shape, [`SafeError::Malformed`]
/// if a name occurs twice, [`SafeError::Io`] if writing fails; then `path` keeps its old
/// content.
pub fn write(path: impl AsRef<Path>, tensors: &[TensorOut], metadata: &HashMap<String, String>) -> Result<()> {
    let mut sorted = tensors.to_vec();
    sorted.sort_by_key(|(_, dtype, ..)| std::cmp::Reverse(dtype.bitsize()));
    let infos: Vec<_> = sorted.iter().map(|&(name, dtype, shape, _)| (name, dtype, shape)).collect();
    let mut writer = Writer::create(path, &infos, metadata)?;
    sorted.iter().try_for_each(|(.., bytes)| writer.write(bytes))?;
    writer.finish()
}

/// Writes a safetensors file tensor by tensor, in the order announced, so that memory need not hold them all.
/// The file is there once [`finish`](Self::finish) has returned.
pub struct Writer {
    path: PathBuf,
    file: AtomicFile,
    /// The tensors that are still to come, the next one last: name, type and shape in words, bytes.
    expected: Vec<(String, String, usize)>,
}

impl Writer {
    /// Writes the header of a file with these tensors: name, element type, shape.
    ///
    /// # Errors
    /// [`SafeError::Tensor`] for a shape that no memory could hold, [`SafeError::Malformed`] if a name occurs
    /// twice, [`SafeError::Io`].
    pub fn create(
        path: impl AsRef<Path>,
        tensors: &[(&str, Dtype, &[usize])],
        metadata: &HashMap<String, String>,
    ) -> Result<Self> {
        let path = path.as_ref();
        let mut header = Map::new();
        let by_key: BTreeMap<_, _> = metadata.iter().collect();
        header.insert(METADATA.into(), json!(by_key));
        let mut end = 0;
        let mut expected = Vec::with_capacity(tensors.len());
        for &(name, dtype, shape) in tensors {
            let what = format!("{dtype} {shape:?}");
            let bytes = byte_length(dtype, shape).ok_or_else(|| SafeError::Tensor {
                path: path.into(),
                name: name.into(),
                what: format!("impossible shape: {what}"),
            })?;
            let begin = end;
            end += bytes;
            let info = json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]});
            if header.insert(name.into(), info).is_some() {
                return Err(SafeError::Malformed { path: path.into(), what: format!("two tensors named {name}") });
            }
            expected.push((name.to_owned(), what, bytes));
        }
        expected.reverse();
        let mut header = Value::Object(header).to_string();
        // Spaces up to a multiple of 8, so that the data begins aligned.
        header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));

        let mut file = AtomicFile::create(path).at(path)?;
        file.writer().write_all(&(header.len() as u64).to_le_bytes()).at(path)?;
        file.writer().write_all(header.as_bytes()).at(path)?;
        Ok(Self { path: path.into(), file, expected })
    }

    /// Writes the next tensor's bytes, little-endian and row-major.
    ///
    /// # Errors
    /// [`SafeError::Unexpected`] if they do not fit its shape, [`SafeError::Malformed`] if no tensor is left,
    /// [`SafeError::Io`].
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let path = self.path.clone();
        let Some((name, what, length)) = self.expected.pop() else {
            return Err(SafeError::Malformed { path, what: "more tensors than announced".into() });
        };
        if bytes.len() != length {
            let (found, expected) = (format!("{} bytes", bytes.len()), format!("the size of {what}"));
            return Err(SafeError::Unexpected { path, name, found, expected });
        }
        Ok(self.file.writer().write_all(bytes).at(path)?)
    }

    /// Puts the file in its place.
    ///
    /// # Errors
    /// [`SafeError::Malformed`] if a tensor is missing, [`SafeError::Io`]; then the path keeps its old content.
    pub fn finish(self) -> Result<()> {
        let Self { path, file, expected } = self;
        if let Some((name, ..)) = expected.last() {
            return Err(SafeError::Malformed { path, what: format!("tensor {name} was not written") });
        }
        Ok(file.commit().at(path)?)
    }
}
