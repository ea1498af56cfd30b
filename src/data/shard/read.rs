//! A shard, opened and checked.

use std::ops::RangeInclusive;
use std::path::Path;

use rayon::prelude::*;

use super::checksums::Checksums;
use super::{Header, ShardError, VocabularyPrint};
use crate::condition::vocabulary::Vocabulary;
use crate::formats::fingerprint::Fingerprint;
use crate::formats::safetensors::{Dtype, SafeError, SafeFile};

/// An open shard, checked.
pub(in crate::data) struct Shard {
    pub file: SafeFile,
    pub header: Header,
    /// Fingerprint of its tensors; none if it is of an older version, which kept no checksums.
    pub content: Option<Fingerprint>,
    /// Whether the summary beside it knows it.
    pub vouched: bool,
    pub ids: Vec<i64>,
    pub flips: Vec<u8>,
    pub repeats: Vec<u8>,
    /// The size of each image, as its place in [`Header::all_sizes`].
    pub shapes: Vec<u8>,
    /// The row of each image in the tensor of its size.
    rows: Vec<u32>,
    /// Names of these tensors.
    pixels: Vec<String>,
    tag_offsets: Vec<usize>, // [N + 1]
    tag_indices: Vec<u32>,
}

impl Shard {
    /// Opens a shard whose tags are places in this vocabulary.
    ///
    /// # Errors
    /// See [`ShardError`]; the message names the file, the tensor, what was found and what was expected.
    pub fn open(path: &Path, vocabulary: &Vocabulary) -> Result<Self, ShardError> {
        let file = SafeFile::open(path)?;
        let missing = || ShardError::Header { path: path.into(), what: "it is missing".into() };
        let header = Header::of(&file)?.ok_or_else(missing)?;
        let (found, made_with) = (VocabularyPrint::of(vocabulary), header.vocabulary);
        if let Some(made_with) = made_with.filter(|made_with| made_with.counts != found.counts) {
            let (found, expected) = (found.counts, made_with.counts);
            return Err(ShardError::OtherVocabulary { shard: path.into(), found, expected });
        }
        Self::checked(file, header, vocabulary.len())
    }

    fn checked(file: SafeFile, header: Header, tags: usize) -> Result<Self, ShardError> {
        let (n, pixels) = (header.count, header.pixels());
        let bytes_of = |name: &str, allowed, expected: &str| bytes(&file, name, n, allowed, expected);
        let shapes = match header.sizes.len() {
            0 => None,
            sizes => Some(bytes_of("shapes", 0..=sizes as u8 - 1, &format!("places among {sizes} sizes"))?),
        };
        let mut counts = vec![0; pixels.len()];
        let mut row = |&shape: &u8| {
            counts[usize::from(shape)] += 1;
            counts[usize::from(shape)] - 1
        };
        let rows: Option<Vec<u32>> = shapes.as_ref().map(|shapes| shapes.iter().map(&mut row).collect());
        for (shape, (name, [planes, height, width])) in pixels.iter().enumerate() {
            let images = if shapes.is_some() { counts[shape] as usize } else { n };
            expect(&file, name, header.kind.tensor().1, &[images, *planes, *height, *width])?;
        }
        expect(&file, "conditions", Dtype::F16, &[n, header.condition_dim])?;
        expect(&file, "ids", Dtype::I64, &[n])?;
        expect(&file, "tag_offsets", Dtype::I64, &[n.saturating_add(1)])?;

        let sums = Checksums::read(&file)?;
        if let Some(sums) = &sums {
            let small = |name: &&str| pixels.iter().all(|(pixels, _)| pixels != name);
            file.names().filter(small).try_for_each(|name| sums.check(&file, name))?;
        }
        let content = sums.map(|sums| sums.content());

        expect_finite(&file, header.condition_dim)?;
        let tag_indices = tag_indices(&file, tags)?;
        let tag_offsets = tag_offsets(&file, tag_indices.len())?;
        let flips = if file.contains("flips") { bytes_of("flips", 0..=1, "0 or 1")? } else { vec![0; n] };
        let all = 1..=u8::MAX;
        let repeats = if file.contains("repeats") { bytes_of("repeats", all, "1 to 255")? } else { vec![1; n] };
        let ids = file.i64("ids")?;
        let shapes = shapes.unwrap_or_else(|| vec![0; n]);
        let rows = rows.unwrap_or_else(|| (0..n as u32).collect());
        let pixels = pixels.into_iter().map(|(name, _)| name).collect();
        let vouched = false;
        Ok(Self { file, header, content, vouched, ids, flips, repeats, shapes, rows, pixels, tag_offsets, tag_indices })
    }

    /// Places in the vocabulary of the tags of image `i` of this shard.
    pub fn tags(&self, i: usize) -> &[u32] {
        &self.tag_indices[self.tag_offsets[i]..self.tag_offsets[i + 1]]
    }

    /// [`Row::image`](super::ShardImage::image) of image `i`.
    pub fn image(&self, i: usize) -> &[u8] {
        let name = &self.pixels[usize::from(self.shapes[i])];
        self.row(name, self.rows[i] as usize)
    }

    /// The condition of image `i`, `[D]` in f16.
    pub fn condition(&self, i: usize) -> &[u8] {
        self.row("conditions", i)
    }

    fn row(&self, tensor: &str, i: usize) -> &[u8] {
        // Names and sizes were checked when the shard was opened.
        let bytes = self.file.bytes(tensor).unwrap_or_default();
        let length = bytes.len() / self.file.shape(tensor).map_or(1, |shape| shape[0]);
        &bytes[i * length..][..length]
    }
}

fn expect(file: &SafeFile, name: &str, dtype: Dtype, shape: &[usize]) -> Result<(), SafeError> {
    let found = (file.dtype(name)?, file.shape(name)?);
    if found == (dtype, shape) {
        return Ok(());
    }
    Err(file.unexpected(name, format!("{} {:?}", found.0, found.1), format!("{dtype} {shape:?}")))
}

/// A byte for each of `n` images.
fn bytes(
    file: &SafeFile,
    name: &str,
    n: usize,
    allowed: RangeInclusive<u8>,
    expected: &str,
) -> Result<Vec<u8>, SafeError> {
    expect(file, name, Dtype::U8, &[n])?;
    let bytes = file.bytes(name)?;
    match bytes.iter().position(|b| !allowed.contains(b)) {
        Some(at) => Err(file.unexpected(name, format!("{} at {at}", bytes[at]), expected)),
        None => Ok(bytes.to_vec()),
    }
}

/// Checks that all conditions are numbers.
fn expect_finite(file: &SafeFile, condition_dim: usize) -> Result<(), SafeError> {
    // Exponent bits all set: infinite or not a number.
    let bad = file
        .bytes("conditions")?
        .par_chunks(2 * condition_dim)
        .position_any(|row| row.as_chunks::<2>().0.iter().any(|b| b[1] & 0x7c == 0x7c));
    match bad {
        Some(row) => Err(file.unexpected("conditions", format!("a NaN or infinity in row {row}"), "finite numbers")),
        None => Ok(()),
    }
}

/// Places in a vocabulary of so many `tags`.
fn tag_indices(file: &SafeFile, tags: usize) -> Result<Vec<u32>, SafeError> {
    let places = file.i64("tag_indices")?;
    expect(file, "tag_indices", Dtype::I32, &[places.len()])?;
    let place = |(at, place)| match u32::try_from(place) {
        Ok(place) if (place as usize) < tags => Ok(place),
        _ => {
            let expected = format!("places in a vocabulary of {tags}");
            Err(file.unexpected("tag_indices", format!("{place} at {at}"), expected))
        }
    };
    places.into_iter().enumerate().map(place).collect()
}

/// Where the tags of each image begin and end, among so many of all images.
fn tag_offsets(file: &SafeFile, all: usize) -> Result<Vec<usize>, SafeError> {
    let offsets = file.i64("tag_offsets")?;
    let ordered = offsets.windows(2).all(|pair| pair[0] <= pair[1]);
    let ends = (offsets.first(), offsets.last());
    if !ordered || ends != (Some(&0), Some(&(all as i64))) {
        let found = if ordered { format!("ends {ends:?}") } else { "a decrease".into() };
        return Err(file.unexpected("tag_offsets", found, format!("offsets rising from 0 to {all}")));
    }
    Ok(offsets.into_iter().map(|offset| offset as usize).collect())
}
