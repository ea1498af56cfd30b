//! The third stage: the pictures of a shard, decoded, cropped and resized, encoded, and the conditions that go with
//! them.

use std::sync::mpsc::sync_channel;
use std::thread;

use half::f16;
use rayon::prelude::*;
use serde_json::{Map, Value};

use super::records::{Listing, Record};
use super::report::{Event, PrepareError, Report};
use super::settings::{ConditionInput, Settings};
use crate::codec::{Autoencoder, CodecError, CodecFile, LATENTS};
use crate::condition::tagger::Tagger;
use crate::condition::vocabulary::Vocabulary;
use crate::condition::{Conditioning, unit_norm};
use crate::data::features::Features;
use crate::data::shard::{DropReason, DroppedRecord, Notes, ShardImage, ShardImages, Unapplied};
use crate::device::{Device, Encode};
use crate::formats::fingerprint::Fingerprint;
use crate::formats::transposed;
use crate::pictures::decode::{Decoded, decode};
use crate::pictures::{Picture, PictureError, fit};

/// Images that are decoded at a time.
pub(super) const CHUNK: usize = 64;

/// Makes latents of pictures, on whichever device.
pub struct LatentEncoder {
    /// What its latents are of.
    pub(super) autoencoder: Autoencoder,
    /// Pixels for a latent, in each direction.
    pub(super) factor: usize,
    encode: Box<Encode>,
}

debug!(LatentEncoder { autoencoder, factor });

impl LatentEncoder {
    /// An autoencoder on a device.
    ///
    /// # Errors
    /// The autoencoder has no encoder, or its weights are damaged; or the device's.
    pub fn open(device: &Device, file: &CodecFile) -> Result<Self, CodecError> {
        let encode = device.encoder(file)?;
        let autoencoder = file.autoencoder()?.ok_or_else(|| file.half("decoder", "encoder"))?;
        Ok(Self { autoencoder, factor: file.factor(), encode })
    }
}

/// What conditions are made of.
pub(super) enum Conditions {
    Tags,
    Known(Box<Features>),
    Tagger(Tagger),
}

impl Conditions {
    pub fn open(source: &ConditionInput) -> Result<Self, PrepareError> {
        Ok(match source {
            ConditionInput::Tags => Self::Tags,
            ConditionInput::Features { path, ids } => Self::Known(Features::open(path, ids.as_deref())?.into()),
            ConditionInput::Tagger { path, node } => Self::Tagger(Tagger::open(path, node.as_deref())?),
        })
    }

    /// Drops the records of which no condition is known.
    pub fn select(&self, listing: &mut Listing) {
        if let Self::Known(features) = self {
            let before = listing.records.len();
            listing.records.retain(|record| features.contains(record.id));
            (listing.records.len()..before).for_each(|_| listing.dropped.add(DropReason::NoFeature));
        }
    }

    /// Width of features.
    pub fn width(&self) -> Option<usize> {
        match self {
            Self::Tags => None,
            Self::Known(features) => Some(features.width()),
            Self::Tagger(tagger) => Some(tagger.network().width()),
        }
    }

    pub fn conditioning(&self) -> Conditioning {
        match self {
            Self::Tags => Conditioning::Tags,
            Self::Known(features) => features.conditioning().clone(),
            Self::Tagger(tagger) => tagger.conditioning(),
        }
    }
}

/// An image that can be kept.
struct Ready {
    /// The picture at its target's size.
    picture: Picture,
    /// Which of the target sizes that is.
    shape: u8,
    /// Whether it was smaller before.
    enlarged: bool,
    /// See [`Decoded`].
    unapplied: Option<String>,
    /// Places of its tags in the vocabulary, ascending.
    tags: Vec<u32>,
    condition: Vec<f32>,
}

/// A feature as a condition.
pub(super) fn feature(mut feature: Vec<f32>) -> Result<Vec<f32>, LeftOut> {
    match unit_norm(&mut feature) {
        true => Ok(feature),
        false => Err((DropReason::NoFeature, "its feature is zero or not finite".into())),
    }
}

/// Why an image is left out, and that in words.
type LeftOut = (DropReason, String);

/// The fingerprint of a picture's file; for an unreadable file, that of no bytes.
pub(super) fn print(file: &Result<Vec<u8>, String>) -> Fingerprint {
    Fingerprint::of([file.as_deref().unwrap_or_default()])
}

/// Makes the content of shards.
pub(super) struct Renderer<'a> {
    pub settings: &'a Settings,
    /// Whether pictures that are smaller than the target are taken.
    pub enlarge: bool,
    pub vocabulary: &'a Vocabulary,
    /// See [`Listing::places`].
    pub places: &'a [Option<u32>],
    pub conditions: &'a Conditions,
    pub made_with: &'a Map<String, Value>,
}

impl Renderer<'_> {
    /// Makes what a shard of these records holds. If the disk fails, that says nothing of a picture, so it stops
    /// everything.
    pub fn render(
        &self,
        members: &[&Record],
        mut codec: Option<&mut LatentEncoder>,
        report: Report,
    ) -> Result<(ShardImages, Notes), PrepareError> {
        let mut rows = ShardImages::default();
        let (mut dropped, mut unapplied, mut enlarged) = (Vec::new(), Vec::new(), 0);
        let mut pictures = Vec::with_capacity(members.len());
        let picture_ids = members.iter().map(|record| record.id).collect();
        thread::scope(|scope| -> Result<(), PrepareError> {
            // The next images are decoded while a codec works on these.
            let (sender, chunks) = sync_channel(1);
            scope.spawn(move || {
                let ready = |record: &&Record| -> Result<_, PrepareError> {
                    let file = record.read()?;
                    let print = print(&file);
                    let ready = file.map_err(|why| (DropReason::Unreadable, why));
                    Ok((print, ready.and_then(|bytes| self.made_of(record, &bytes))))
                };
                let all = |chunk: &[&Record]| chunk.par_iter().map(ready).collect::<Vec<_>>();
                members.chunks(CHUNK).find(|chunk| sender.send(all(chunk)).is_err());
            });
            for (record, ready) in members.iter().zip(chunks.into_iter().flatten()) {
                let (print, ready) = ready?;
                pictures.push(print);
                let made = match (ready, &mut codec) {
                    (Err(refusal), _) => Err(refusal),
                    (Ok(ready), None) => Ok((transposed(ready.picture.rgb(), 3).collect(), ready)),
                    (Ok(ready), Some(codec)) => latents(codec, &ready.picture)?.map(|latents| (latents, ready)),
                };
                report(Event::Done(1));
                let file = || record.file.clone();
                match made {
                    Ok((image, ready)) => {
                        let &&Record { id, flip, repeats, .. } = record;
                        let (image, condition, tags): (&Vec<u8>, _, _) = (&image, &ready.condition, &ready.tags);
                        let shape = ready.shape;
                        rows.push(&ShardImage { id, image, shape, condition, tags, flip, repeats });
                        enlarged += usize::from(ready.enlarged);
                        unapplied.extend(ready.unapplied.map(|profile| Unapplied { file: file(), profile }));
                    }
                    Err((drop, why)) => dropped.push(DroppedRecord { id: record.id, file: file(), drop, why }),
                }
            }
            Ok(())
        })?;
        Ok((rows, Notes { settings: self.made_with.clone(), pictures, picture_ids, dropped, unapplied, enlarged }))
    }

    fn made_of(&self, record: &Record, bytes: &[u8]) -> Result<Ready, LeftOut> {
        let Settings { sizes, background, max_crop, .. } = self.settings;
        let unreadable = |why: PictureError| (DropReason::Unreadable, why.to_string());
        let Decoded { picture: image, unapplied } = decode(bytes, *background).map_err(unreadable)?;
        let (shape, crop) = fit::choose(image.size(), sizes);
        let size = sizes[shape];
        if !crop.within(*max_crop) {
            let lost = 100.0 * crop.lost;
            let why = format!("{} loses {lost:.1} % by cropping to {size}", image.size());
            return Err((DropReason::Cropped, why));
        }
        if crop.enlarged && !self.enlarge {
            return Err((DropReason::Small, format!("{} is smaller than {size}", image.size())));
        }
        let tags = record.places(self.places);
        let condition = match self.conditions {
            Conditions::Tags => self.vocabulary.multi_hot(&tags),
            Conditions::Known(features) => feature(features.get(record.id).unwrap_or_default())?,
            Conditions::Tagger(tagger) => {
                let other = (*background != Tagger::BACKGROUND).then(|| decode(bytes, Tagger::BACKGROUND));
                let other = other.transpose().map_err(unreadable)?;
                let shown = other.as_ref().map_or(&image, |other| &other.picture);
                let made = tagger.features(shown, &record.file);
                feature(made.map_err(|why| (DropReason::NoFeature, why.to_string()))?)?
            }
        };
        let picture = fit::fit(image, crop, size).map_err(unreadable)?;
        Ok(Ready { picture, shape: shape as u8, enlarged: crop.enlarged, unapplied, tags, condition })
    }
}

/// Mean and standard deviation of a picture's latents, [2C, h, w] in f16.
fn latents(codec: &mut LatentEncoder, picture: &Picture) -> Result<Result<Vec<u8>, LeftOut>, CodecError> {
    let moments = (codec.encode)(picture)?;
    let halves: Vec<f16> = moments.iter().flat_map(|values| transposed(values, LATENTS)).map(f16::from_f32).collect();
    Ok(match halves.iter().all(|x| x.is_finite()) {
        true => Ok(halves.iter().flat_map(|x| x.to_le_bytes()).collect()),
        false => Err((DropReason::Unreadable, "the codec makes numbers of it that are not finite in f16".into())),
    })
}
