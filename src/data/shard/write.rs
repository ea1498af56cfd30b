//! A shard that is being made.

use std::iter::repeat;
use std::num::NonZeroU8;
use std::path::Path;

use half::f16;
use serde_json::json;

use super::checksums::Checksums;
use super::notes::Notes;
use super::{CHECKSUMS, HEADER, Header};
use crate::formats::safetensors::{self, Dtype, SafeError, TensorOut};

/// What a shard will hold for one image.
pub(in crate::data) struct ShardImage<'a> {
    pub id: i64,
    /// Pixels `[C, H, W]` in u8, or moments of latents [2C, H, W] in f16.
    pub image: &'a [u8],
    /// Its size, as a place in [`Header::all_sizes`].
    pub shape: u8,
    /// `[D]`.
    pub condition: &'a [f32],
    /// Places in the vocabulary, ascending.
    pub tags: &'a [u32],
    pub flip: bool,
    pub repeats: NonZeroU8,
}

/// The images of a shard that is being made.
#[derive(Default)]
pub(in crate::data) struct ShardImages {
    /// The bytes of the images of each size.
    images: Vec<Vec<u8>>,
    shapes: Vec<u8>,
    conditions: Vec<u8>,
    ids: Vec<u8>,
    flips: Vec<u8>,
    repeats: Vec<u8>,
    tag_ends: Vec<u8>,
    tag_indices: Vec<u8>,
}

impl ShardImages {
    /// Adds an image.
    pub fn push(&mut self, row: &ShardImage) {
        let shape = usize::from(row.shape);
        self.images.resize_with(self.images.len().max(shape + 1), Vec::new);
        self.images[shape].extend(row.image);
        self.shapes.push(row.shape);
        self.conditions.extend(row.condition.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()));
        self.ids.extend(row.id.to_le_bytes());
        self.flips.push(row.flip.into());
        self.repeats.push(row.repeats.get());
        self.tag_indices.extend(row.tags.iter().flat_map(|&tag| (tag as i32).to_le_bytes()));
        self.tag_ends.extend((self.tag_indices.len() as i64 / 4).to_le_bytes());
    }

    /// Writes the shard, atomically, with the checksums of all that is in it; `header.count` is taken from the rows.
    ///
    /// # Errors
    /// [`SafeError::Io`].
    pub fn write(&self, path: &Path, header: &Header, notes: &Notes) -> Result<(), SafeError> {
        let n = self.flips.len();
        let header = Header { count: n, ..header.clone() };
        let of_shape = |(shape, (name, [planes, height, width])): (u8, (String, [usize; 3]))| {
            let images = self.shapes.iter().filter(|&&of| of == shape).count();
            (name, [images, planes, height, width])
        };
        let pixels: Vec<(String, [usize; 4])> = (0..).zip(header.pixels()).map(of_shape).collect();
        let images = self.images.iter().map(Vec::as_slice).chain(repeat(&[][..]));
        let offsets = [&0i64.to_le_bytes(), &self.tag_ends[..]].concat();
        let (count, ends, conditions) = ([n], [n + 1], [n, header.condition_dim]);
        let indices = [self.tag_indices.len() / 4];
        let mut tensors: Vec<TensorOut> = pixels
            .iter()
            .zip(images)
            .map(|((name, shape), images)| (&**name, header.kind.tensor().1, &shape[..], images))
            .collect();
        tensors.extend::<[TensorOut; 6]>([
            ("conditions", Dtype::F16, &conditions, &self.conditions),
            ("ids", Dtype::I64, &count, &self.ids),
            ("tag_offsets", Dtype::I64, &ends, &offsets),
            ("tag_indices", Dtype::I32, &indices, &self.tag_indices),
            ("flips", Dtype::U8, &count, &self.flips),
            ("repeats", Dtype::U8, &count, &self.repeats),
        ]);
        if !header.sizes.is_empty() {
            tensors.push(("shapes", Dtype::U8, &count, &self.shapes));
        }
        let mut metadata = notes.metadata();
        metadata.insert(HEADER.into(), json!(header).to_string());
        let sum =
            |&(name, dtype, shape, bytes): &TensorOut| (name.into(), safetensors::fingerprint(dtype, shape, bytes));
        let sums =
            Checksums { metadata: Checksums::of_metadata(&metadata), tensors: tensors.iter().map(sum).collect() };
        metadata.insert(CHECKSUMS.into(), json!(sums).to_string());
        safetensors::write(path, &tensors, &metadata)
    }
}
