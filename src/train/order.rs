//! Which image of the dataset each image of a run is.
//!
//! The images of a run are numbered from 0, and everything about one follows from the run's seed and its number. Which
//! image it is follows here; its noise, its mirroring and its condition in [`batch`](super::batch). So neither the size
//! of micro-batches, nor the number of ranks, nor a restart changes anything, and there is no state to save.
//!
//! Each epoch is a permutation of the dataset (Fisher-Yates with random numbers keyed by the epoch). An image with
//! `repeats` is in it so many times.
//!
//! **Several sizes.** A device takes images of one size at a time. So the images of one size, a *bucket*, have an order
//! of their own, epoch after epoch as above. A run's numbers are cut into *groups* of G images that follow each other
//! and are of one bucket. G is the largest divisor of `--batch` up to [`MAX_GROUP`], so that a step is a whole number
//! of groups. Group m of a bucket shows the bucket's next G images, which may be the last of an epoch and the first of
//! the next. If a bucket has fewer images than G, a group shows some of them more than once.
//!
//! Which bucket's group comes next is decided by times: group m of a bucket of n images has the time (m + u) / n, where
//! u in [0, 1) is drawn for (bucket, m). Groups come in the order of their times. So until the time t each bucket has
//! had n t groups, give or take one. Buckets come in proportion to their sizes, at random places. At any moment of a
//! run every image has been shown as often as any other, give or take one and the share of a group in its bucket's
//! epoch.
//!
//! **Micro-batches.** A rank's share of a step is sorted by bucket and cut into micro-batches of one bucket each. It
//! may be, since the sum of a step's gradients does not depend on the order of its images, up to rounding. After a
//! restart, finding the place of the first number means walking through all groups before it. With ten sizes that is
//! some 8 million groups a second on one core, or more than a hundred million images where G is 16.

use std::ops::Range;

use super::Settings;
use crate::data::dataset::Dataset;
use crate::rng::{Purpose, Stream};

/// The most images of a group. Fewer would make a step more even, and more would fill larger micro-batches.
pub const MAX_GROUP: u64 = 16;

/// An image of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shown {
    /// Its number in the run.
    pub number: u64,
    /// Its index in the dataset.
    pub image: usize,
}

/// The images of a run.
pub struct Order {
    seed: u64,
    /// G.
    group: u64,
    /// The buckets that have images.
    buckets: Vec<Bucket>,
    /// How many groups have been placed, and the last of them: its bucket, and its number there.
    placed: u64,
    last: (usize, u64),
}

/// The images of one size.
struct Bucket {
    /// Every image, as many times as an epoch shows it.
    images: Vec<u32>,
    /// The current epoch, and its permutation.
    epoch: Option<(u64, Vec<u32>)>,
    /// m of the next group that is to be placed; below it m + u, in units of 2^-32.
    groups: u64,
    due: u64,
}

impl Order {
    /// The order of a run on a training split with no more than 2^32 images.
    pub fn new(data: &Dataset, settings: &Settings) -> Self {
        let sizes = data.buckets();
        let mut images = vec![Vec::new(); sizes.len()];
        for i in 0..data.len() {
            let [height, width, _] = data.shape_of(i);
            let bucket = sizes.iter().position(|(size, _)| *size == [height, width]).unwrap_or(0);
            images[bucket].extend(std::iter::repeat_n(i as u32, data.repeats(i)));
        }
        images.retain(|images| !images.is_empty());
        let buckets = images.into_iter().map(|images| Bucket { images, epoch: None, groups: 0, due: 0 }).collect();
        let group = (1..=MAX_GROUP).rev().find(|&group| settings.batch.is_multiple_of(group)).unwrap_or(1);
        let mut order = Self { seed: settings.seed, group, buckets, placed: 0, last: (0, 0) };
        order.rewind();
        order
    }

    /// Goes back to the beginning, where no group has been placed.
    fn rewind(&mut self) {
        self.placed = 0;
        for (number, bucket) in self.buckets.iter_mut().enumerate() {
            bucket.groups = 0;
            bucket.due = due(self.seed, number, 0);
        }
    }

    /// The bucket of a group, and the group's number there.
    fn group(&mut self, group: u64) -> (usize, u64) {
        if group + 1 < self.placed {
            self.rewind();
        }
        while self.placed <= group {
            // Compares (m + u) / n without a division. Of two that are equal, the first bucket's counts.
            let time = |a: &Bucket, b: &Bucket| u128::from(a.due) * b.images.len() as u128;
            let earlier = |a: &usize, b: &usize| {
                let (a, b) = (&self.buckets[*a], &self.buckets[*b]);
                time(a, b).cmp(&time(b, a))
            };
            let next = (0..self.buckets.len()).min_by(earlier).unwrap_or(0);
            let bucket = &mut self.buckets[next];
            self.last = (next, bucket.groups);
            bucket.groups += 1;
            bucket.due = due(self.seed, next, bucket.groups);
            self.placed += 1;
        }
        self.last
    }

    /// The image of this number, and its bucket.
    fn at(&mut self, number: u64) -> (Shown, usize) {
        let (bucket, place) = match self.buckets.len() {
            1 => (0, number),
            _ => {
                let (bucket, group) = self.group(number / self.group);
                (bucket, group * self.group + number % self.group)
            }
        };
        let Bucket { images, epoch, .. } = &mut self.buckets[bucket];
        let (wanted, place) = (place / images.len() as u64, (place % images.len() as u64) as usize);
        let made = || {
            let stream = Stream { step: bucket as u32, ..Stream::new(self.seed, Purpose::Order, wanted) };
            (wanted, permutation(stream, images.len()))
        };
        let (_, order) = match epoch {
            Some(epoch) if epoch.0 == wanted => epoch,
            other => other.insert(made()),
        };
        (Shown { number, image: images[order[place] as usize] as usize }, bucket)
    }

    /// The images of these numbers in micro-batches of `most` at most, each of one size.
    pub fn micro_batches(&mut self, numbers: Range<u64>, most: u64) -> Vec<Vec<Shown>> {
        let mut by_bucket = vec![Vec::new(); self.buckets.len()];
        for number in numbers {
            let (shown, bucket) = self.at(number);
            by_bucket[bucket].push(shown);
        }
        by_bucket.iter().flat_map(|shown| shown.chunks(most as usize)).map(<[Shown]>::to_vec).collect()
    }
}

/// m + u of a bucket's group m, in units of 2^-32.
fn due(seed: u64, bucket: usize, group: u64) -> u64 {
    let stream = Stream { step: bucket as u32, ..Stream::new(seed, Purpose::Group, group) };
    (group << 32) + u64::from(stream.block(0)[0])
}

/// A random order of `len` images.
fn permutation(stream: Stream, len: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..len as u32).collect();
    for i in (1..len).rev() {
        let word = stream.block(i as u32 / 4)[i % 4];
        // The word is scaled to 0..=i. Its bias is below 2^-32 * len, which training cannot notice.
        order.swap(i, ((u64::from(word) * (i as u64 + 1)) >> 32) as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_shows_each_image_once_and_in_another_order_than_the_last() {
        let of = |seed, epoch| permutation(Stream::new(seed, Purpose::Order, epoch), 1001);
        let a = of(1, 0);
        let mut sorted = a.clone();
        sorted.sort_unstable();
        assert!(sorted.iter().enumerate().all(|(i, &x)| i == x as usize));
        for other in [of(1, 1), of(2, 0)] {
            // Two random permutations agree in one place on average.
            assert!(a.iter().zip(&other).filter(|(a, b)| a == b).count() < 10);
        }
    }
}
