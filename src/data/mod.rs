//! Images and their conditions on disk: made by [`prepare`](mod@prepare), read by [`dataset`].
//!
//! ```
//! use edm2k::data::dataset::{Dataset, Split};
//! use edm2k::data::{Purpose, Stream};
//!
//! let data = Dataset::open("tests/data/emoji".as_ref(), Split::Train)?;
//! let mut image = vec![0.0; data.shape().iter().product()];
//! data.image(0, Stream::new(0, Purpose::Latent, 0), &mut image)?;
//! println!("image {} shows {}", data.id(0), data.vocabulary().words(data.tags(0)));
//! assert!(image.iter().all(|x| x.abs() <= 1.0));
//! # Ok::<(), edm2k::data::dataset::DatasetError>(())
//! ```

pub mod dataset;
#[doc(hidden)]
#[allow(missing_debug_implementations)]
pub mod edm2;
pub mod features;
mod pending;
pub mod prepare;
#[doc(hidden)]
pub mod shard;

pub use crate::rng::{Purpose, Stream};
