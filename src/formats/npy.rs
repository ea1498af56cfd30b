//! NumPy's `.npy` files, in which conditions and their ids are often kept.
//!
//! Layout: `\x93NUMPY`, version (2 bytes), length of the header (2 bytes, from version 2 on 4), the header
//! `{'descr': '<f4', 'fortran_order': False, 'shape': (3, 1024), }` in ASCII, then the values.

use std::path::{Path, PathBuf};

use half::f16;

use super::{At, FileError, input};

/// Longest file that is read: 16 GiB.
const MAX_BYTES: u64 = 1 << 34;

/// What can be wrong with such a file.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum NpyError {
    #[error("{0}")]
    Io(#[from] FileError),
    #[error("{}: not a usable .npy file: {what}", path.display())]
    Malformed { path: PathBuf, what: String },
}

/// Reads an array of numbers: its shape, and its values row by row.
///
/// # Errors
/// [`NpyError`]; anything but little-endian floats of 2, 4 or 8 bytes in C order is one.
pub fn read(path: &Path) -> Result<(Vec<usize>, Vec<f32>), NpyError> {
    read_as(path, floats)
}

/// An array of numbers out of a file's bytes: its shape, and its values row by row.
///
/// # Errors
/// What is wrong with it, as in [`read`].
pub fn floats(bytes: &[u8]) -> Result<(Vec<usize>, Vec<f32>), String> {
    array(bytes, "'<f2', '<f4' or '<f8'", |kind, data| {
        Some(match kind {
            "<f2" => elements(data, |b| f16::from_le_bytes(b).to_f32()),
            "<f4" => elements(data, f32::from_le_bytes),
            "<f8" => elements(data, |b| f64::from_le_bytes(b) as f32),
            _ => return None,
        })
    })
}

/// The shape of an array, by its header.
///
/// # Errors
/// The header is damaged.
pub fn shape(bytes: &[u8]) -> Result<Vec<usize>, String> {
    Ok(parse(bytes)?.1)
}

/// Reads an array of whole numbers: its shape, and its values row by row.
///
/// # Errors
/// [`NpyError`]; anything but little-endian signed integers of 4 or 8 bytes in C order is one.
pub fn read_i64(path: &Path) -> Result<(Vec<usize>, Vec<i64>), NpyError> {
    read_as(path, |bytes| {
        array(bytes, "'<i4' or '<i8'", |kind, data| {
            Some(match kind {
                "<i4" => elements(data, |b| i32::from_le_bytes(b).into()),
                "<i8" => elements(data, i64::from_le_bytes),
                _ => return None,
            })
        })
    })
}

/// Whole elements, and the number of bytes left over.
fn elements<const N: usize, T>(data: &[u8], convert: impl Fn([u8; N]) -> T) -> (Vec<T>, usize) {
    let (chunks, rest) = data.as_chunks::<N>();
    (chunks.iter().map(|&b| convert(b)).collect(), rest.len())
}

fn read_as<T>(path: &Path, parse: impl FnOnce(&[u8]) -> Result<T, String>) -> Result<T, NpyError> {
    let bytes = input::read(path, MAX_BYTES).at(path)?;
    parse(&bytes).map_err(|what| NpyError::Malformed { path: path.into(), what })
}

fn array<T>(
    bytes: &[u8],
    expected: &str,
    convert: impl FnOnce(&str, &[u8]) -> Option<(Vec<T>, usize)>,
) -> Result<(Vec<usize>, Vec<T>), String> {
    let (kind, shape, data) = parse(bytes)?;
    let (values, rest) =
        convert(kind, data).ok_or_else(|| format!("elements of type {kind:?}, expected {expected}"))?;
    let count = shape.iter().try_fold(1, |product: usize, &side| product.checked_mul(side));
    if count != Some(values.len()) || rest > 0 {
        return Err(format!("{} bytes of values do not make the shape {shape:?}", data.len()));
    }
    Ok((shape, values))
}

/// Element type, shape, and the values' bytes.
fn parse(bytes: &[u8]) -> Result<(&str, Vec<usize>, &[u8]), String> {
    let other =
        || input::kind(bytes).map_or("it does not begin with \\x93NUMPY".into(), |kind| format!("it is {kind}"));
    let rest = bytes.strip_prefix(b"\x93NUMPY").ok_or_else(other)?;
    let truncated = || "it ends within its header".to_owned();
    let (length, rest) = match rest {
        [1, _, a, b, rest @ ..] => (usize::from(u16::from_le_bytes([*a, *b])), rest),
        [2 | 3, _, a, b, c, d, rest @ ..] => (u32::from_le_bytes([*a, *b, *c, *d]) as usize, rest),
        [major, _, ..] if !(1..=3).contains(major) => return Err(format!("version {major}, expected 1 to 3")),
        _ => return Err(truncated()),
    };
    let (header, data) = rest.split_at_checked(length).ok_or_else(truncated)?;
    let header = str::from_utf8(header).map_err(|_| "its header is not text".to_owned())?;
    let (descr, order, shape) = (field(header, "descr")?, field(header, "fortran_order")?, field(header, "shape")?);
    if !order.starts_with("False") {
        return Err("it is in Fortran order, expected C order".into());
    }
    let shape = shape.strip_prefix('(').and_then(|s| s.split_once(')')).ok_or("its shape is not a tuple")?.0;
    let sides = shape.split(',').map(str::trim).filter(|side| !side.is_empty());
    let shape: Vec<usize> = sides
        .map(|side| side.parse().map_err(|_| format!("its shape has a side {side:?}")))
        .collect::<Result<_, _>>()?;
    Ok((descr.get(1..4).filter(|_| descr.starts_with(['\'', '"'])).unwrap_or(descr), shape, data))
}

/// What follows `'name':` in the header.
fn field<'a>(header: &'a str, name: &str) -> Result<&'a str, String> {
    let missing = || format!("its header has no {name}");
    let after = ["'", "\""].iter().find_map(|quote| Some(header.split_once(&format!("{quote}{name}{quote}"))?.1));
    Ok(after.and_then(|rest| rest.trim_start().strip_prefix(':')).ok_or_else(missing)?.trim_start())
}
