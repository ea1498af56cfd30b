//! PNG files that carry the parameters they were made with as text chunks.
//!
//! Text is stored as iTXt (UTF-8, so any prompt survives) before the pixels; `exiftool`,
//! ImageMagick's `identify -verbose` and Python's PIL show it. [`PARAMETERS`] is tEXt where that has all its letters.
//!
//! ```
//! use edm2k::pictures::Picture;
//! use edm2k::pictures::png::read_text;
//!
//! # let path = std::env::temp_dir().join(format!("edm2k-{}.png", std::process::id()));
//! Picture::new(1, 1, vec![255; 3]).save(&path, &[("seed", "7")])?;
//! assert_eq!(read_text(&path)?, [("seed".to_owned(), "7".to_owned())]);
//! # std::fs::remove_file(path)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::{Picture, plain};
use crate::formats::{At, FileError, input, write_atomically, write_new};

/// The keyword under which AUTOMATIC1111's web UI, and the viewers and galleries that know it, look for parameters. Some of
/// them know tEXt alone.
pub const PARAMETERS: &str = "parameters";

/// What can go wrong with a PNG file.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum PngError {
    #[error("{0}")]
    Io(#[from] FileError),
    #[error("{}: not a readable PNG: {what}", path.display())]
    Format { path: PathBuf, what: String },
}

impl Picture {
    /// The picture as a PNG file in memory: the bytes that [`Picture::save`] writes.
    ///
    /// # Errors
    /// An empty picture, or a keyword that PNG does not allow.
    pub fn png(&self, text: &[(&str, &str)]) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.encode(&mut bytes, text)?;
        Ok(bytes)
    }

    /// Writes the picture as a PNG file, atomically, with text chunks of (keyword, text).
    /// A keyword has 1 to 79 Latin-1 characters.
    ///
    /// # Errors
    /// [`PngError::Io`]; then `path` keeps its old content. An empty picture, or a keyword
    /// that PNG does not allow, is one too.
    pub fn save(&self, path: &Path, text: &[(&str, &str)]) -> Result<(), PngError> {
        Ok(write_atomically(path, |out| self.encode(out, text)).at(path)?)
    }

    /// As [`Picture::save`], unless there is something at `path` by then.
    ///
    /// # Errors
    /// As there; [`PngError::Io`] of [`io::ErrorKind::AlreadyExists`].
    pub fn save_new(&self, path: &Path, text: &[(&str, &str)]) -> Result<(), PngError> {
        Ok(write_new(path, |out| self.encode(out, text)).at(path)?)
    }

    fn encode(&self, out: impl Write, text: &[(&str, &str)]) -> io::Result<()> {
        let too_large = |_| io::Error::new(io::ErrorKind::InvalidInput, "too large for a PNG");
        let width = u32::try_from(self.width).map_err(too_large)?;
        let height = u32::try_from(self.height).map_err(too_large)?;
        let mut encoder = png::Encoder::new(out, width, height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        // This makes files a few hundredths larger than the usual level does, in an eighth of the time or less.
        encoder.set_compression(png::Compression::Fast);
        for (keyword, text) in text {
            let latin1 = text.chars().all(|letter| u32::from(letter) < 0x100);
            match *keyword == PARAMETERS && latin1 {
                true => encoder.add_text_chunk((*keyword).into(), (*text).into())?,
                false => encoder.add_itxt_chunk((*keyword).into(), (*text).into())?,
            }
        }
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&self.rgb)?;
        Ok(writer.finish()?)
    }
}

/// Whether a PNG file ends as one does, so that nothing was cut off.
pub fn is_whole(path: &Path) -> bool {
    let last = || -> io::Result<[u8; 8]> {
        let (mut file, mut last) = (input::open(path)?, [0; 8]);
        file.seek(SeekFrom::End(-8))?;
        file.read_exact(&mut last)?;
        Ok(last)
    };
    // The type and the checksum of the last chunk, which holds nothing.
    last().is_ok_and(|last| last == *b"IEND\xae\x42\x60\x82")
}

/// Most bytes of a compressed text chunk.
const MAX_TEXT: usize = 1 << 20;

/// The text chunks (keyword, text) that stand before a PNG file's pixels, where
/// [`Picture::save`] puts them; iTXt first, then tEXt.
///
/// # Errors
/// [`PngError::Io`] if the file cannot be opened, [`PngError::Format`] if it is no PNG.
pub fn read_text(path: &Path) -> Result<Vec<(String, String)>, PngError> {
    let file = input::open(path).at(path)?;
    let format = |error: png::DecodingError| PngError::Format { path: path.into(), what: plain(&error.to_string()) };
    let reader = png::Decoder::new(BufReader::new(file)).read_info().map_err(format)?;
    let info = reader.info();
    let mut found = Vec::new();
    for chunk in &info.utf8_text {
        let mut chunk = chunk.clone();
        // Ours are not compressed. Another program's may be damaged, or grow without end.
        if chunk.decompress_text_with_limit(MAX_TEXT).is_ok() {
            found.push((chunk.keyword.clone(), chunk.get_text().map_err(format)?));
        }
    }
    for chunk in &info.uncompressed_latin1_text {
        found.push((chunk.keyword.clone(), chunk.text.clone()));
    }
    Ok(found)
}
