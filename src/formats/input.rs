//! Input files. All are opened in the same way. If one is not what was expected, the error says what it is.
//!
//! Only regular files are read: a pipe that nobody writes to would never end, nor would `/dev/zero`.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::Path;

use crate::system;

/// Longest text that is read whole, such as a vocabulary or a config.
const MAX_TEXT: u64 = 1 << 28;

/// The mark that some editors put before text in UTF-8.
pub const MARK: &[u8] = b"\xef\xbb\xbf";

/// What [`kind`] calls a safetensors file.
const SAFETENSORS: &str = "a safetensors file";

/// How many bytes [`kind`] looks at.
pub const HEAD: usize = 4096;

/// Opens a regular file for reading, without ever waiting for somebody to write.
///
/// # Errors
/// Whatever opening reports; [`io::ErrorKind::InvalidInput`] for anything but a regular file.
pub fn open(path: &Path) -> io::Result<File> {
    let file = system::open(path)?;
    match system::what_instead(&file)? {
        None => Ok(file),
        Some(what) => {
            let text = format!("it is {what}, not a regular file");
            Err(io::Error::new(io::ErrorKind::InvalidInput, text))
        }
    }
}

/// The first bytes of a file, as many as [`kind`] looks at or fewer.
///
/// # Errors
/// Whatever reading reports.
pub fn head(file: &File) -> io::Result<Vec<u8>> {
    let (mut file, mut bytes) = (file, Vec::new());
    Read::take(file, HEAD as u64).read_to_end(&mut bytes)?;
    file.rewind()?;
    Ok(bytes)
}

/// All bytes of a regular file that has no more than `most`.
///
/// # Errors
/// As [`open`]; a longer file.
pub fn read(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    at_most(open(path)?, most)
}

fn at_most(from: impl Read, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(most.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most {
        return Err(io::Error::other(format!("more than {most} bytes")));
    }
    Ok(bytes)
}

/// The text of a file in UTF-8, without the mark that some editors put before it.
///
/// # Errors
/// As [`read`]; or the bytes are no text, and the error says what they are.
pub fn text(path: &Path) -> io::Result<String> {
    text_of(open(path)?)
}

/// As [`text`], of what is open already.
///
/// # Errors
/// Whatever reading reports, and as [`text`].
pub fn text_of(from: impl Read) -> io::Result<String> {
    let mut bytes = at_most(from, MAX_TEXT)?;
    if let Some(kind) = kind(&bytes).filter(|kind| !kind.contains("JSON")) {
        return Err(io::Error::other(format!("it is {kind}")));
    }
    if bytes.starts_with(MARK) {
        bytes.drain(..MARK.len());
    }
    String::from_utf8(bytes).map_err(|_| io::Error::other("it is no text in UTF-8"))
}

/// Whether there is a safetensors file, as far as its first bytes tell.
pub fn is_safetensors(path: &Path) -> bool {
    open(path).and_then(|file| head(&file)).is_ok_and(|head| kind(&head) == Some(SAFETENSORS))
}

/// Whether a file begins like text, whatever the text says.
pub fn is_text(head: &[u8]) -> bool {
    !head.is_empty() && head.iter().take(HEAD).all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace())
}

/// What a file is, judged by its first bytes ([`HEAD`] are enough), with advice for where something else was expected.
/// None if the bytes do not tell.
pub fn kind(bytes: &[u8]) -> Option<&'static str> {
    let head = &bytes[..bytes.len().min(HEAD)];
    let has = |part: &[u8]| head.windows(part.len()).any(|window| window == part);
    let text = head.strip_prefix(MARK).unwrap_or(head).trim_ascii_start();
    let begins = |start: &[u8]| text.get(..start.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(start));
    Some(match head {
        [] => "empty",
        // This comes first, since the length that such a file begins with may look like anything.
        [_, _, _, _, _, 0, 0, 0, b'{', ..] => SAFETENSORS,
        _ if begins(b"version https://git-lfs") => {
            "a Git LFS pointer, not the file that it stands for; `git lfs pull` or a download fetches that"
        }
        _ if begins(b"<!doctype html") || begins(b"<html") || begins(b"<head") => {
            "a web page (HTML); the download gave it in place of the file"
        }
        [b'P', b'K', 3, 4, ..] if has(b"data.pkl") || has(b".pkl") => {
            "a PyTorch checkpoint (.pt, .ckpt); a network or an autoencoder of such a form is read as it is where one is expected"
        }
        [b'P', b'K', 3, 4, ..] if has(b".npy") => "a NumPy archive (.npz); save the one array as .npy",
        [b'P', b'K', 3 | 5, 4 | 6, ..] => "a zip archive; unpack it",
        [0x80, 2..=5, ..] => {
            "a Python pickle (.pkl, .pt, .ckpt); `edm2k import` reads NVIDIA's snapshots, and weights alone need none"
        }
        [0x93, b'N', b'U', b'M', b'P', b'Y', ..] => "a NumPy array (.npy)",
        [0x1f, 0x8b, ..]
        | [b'B', b'Z', b'h', ..]
        | [0x28, 0xb5, 0x2f, 0xfd, ..]
        | [0xfd, b'7', b'z', b'X', b'Z', ..] => "compressed (gzip, bzip2, zstd or xz); unpack it",
        [0x89, b'P', b'N', b'G', ..] => "an image (PNG)",
        [0xff, 0xd8, 0xff, ..] => "an image (JPEG)",
        [b'G', b'I', b'F', b'8', ..] => "an image (GIF)",
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => "an image (WebP)",
        [_, _, _, _, b'f', b't', b'y', b'p', b'a', b'v', b'i', b'f' | b's', ..] => "an image (AVIF)",
        [_, _, _, _, b'f', b't', b'y', b'p', b'h', b'e', b'i' | b'v', ..]
        | [_, _, _, _, b'f', b't', b'y', b'p', b'm', b'i' | b's', b'f', b'1', ..] => "an image (HEIF)",
        [_, _, _, _, b'f', b't', b'y', b'p', ..] => "a video (MP4 or QuickTime)",
        [0x89, b'H', b'D', b'F', ..] => "an HDF5 file",
        [b'P', b'A', b'R', b'1', ..] => "a Parquet table",
        [b'G', b'G', b'U', b'F', ..] => "a GGUF file",
        [b'%', b'P', b'D', b'F', ..] => "a PDF",
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => "text in UTF-16; save it as UTF-8",
        _ if head.get(257..262) == Some(b"ustar") => "a tar archive",
        // The version, and then a field of a model: the producer, the graph or another.
        [0x08, 1..=20, 0x12 | 0x1a | 0x22 | 0x28 | 0x32 | 0x3a | 0x42, ..] => "an ONNX file",
        [b'R', b'a', b'r', b'!', ..] | [b'7', b'z', 0xbc, 0xaf, ..] => "an archive (RAR, 7z); unpack it",
        [b'(', b'd' | b'l', b'p', ..] | [b'}', b'q', 0 | 1, ..] | [b'c', b'c', b'o', b'p', b'y', ..] => {
            "a Python pickle of an old protocol; save it as safetensors"
        }
        _ if begins(b"{") || begins(b"[") => "text in JSON",
        _ if begins(b"<?xml") => "XML; an error that the download gave in place of the file, perhaps",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_called_what_they_are() {
        for (bytes, part) in [
            (&b""[..], "empty"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n", "Git LFS"),
            (b"\xef\xbb\xbf\n<!DOCTYPE HTML><title>404</title>", "HTML"),
            (b"PK\x03\x04\x00\x00archive/data.pkl", "PyTorch"),
            (b"PK\x03\x04\x00\x00arr_0.npy", ".npz"),
            (b"PK\x03\x04", "zip"),
            (b"\x80\x04\x95", "pickle"),
            (b"\x93NUMPY\x01\x00", ".npy"),
            (b"\x1f\x8b\x08", "compressed"),
            (b"\x10\0\0\0\0\0\0\0{\"a\"", "safetensors"),
            (b"\xff\xfe{\0", "UTF-16"),
            (b" {\"a\": 1}", "JSON"),
            (b"\x08\x08\x12\x07pytorch", "ONNX"),
            (b"\x08\x0a\x3a\x40\x12\x07", "ONNX"),
            (b"\0\0\0\x18ftypmp42", "MP4"),
            (b"\0\0\0\x1cftypavif", "AVIF"),
            (b"\0\0\0\x18ftypheic", "HEIF"),
            (b"Rar!\x1a\x07\x01\x00", "RAR"),
            (b"(dp0\nVa\np1\n", "pickle"),
            (b"}q\x00X\x01", "pickle"),
        ] {
            assert!(kind(bytes).is_some_and(|kind| kind.contains(part)), "{part}: {:?}", kind(bytes));
        }
        assert_eq!(kind(b"cat, dog\n"), None);
    }
}
