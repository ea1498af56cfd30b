//! Tensors of the CPU backend: a shape and shared values, whose memory returns to a pool.

use crate::backend::Shape;
use crate::real::Real;
use crate::system::advise_huge_pages;
use bytemuck::{cast_slice, cast_slice_mut};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// Freed buffers. They are used again because fresh pages cost more than the arithmetic on them.
#[derive(Default)]
pub struct Pool<T>(Mutex<Freed<T>>);

debug!(Pool<T> {} [T]);

#[derive(Default)]
struct Freed<T> {
    by_length: BTreeMap<usize, Vec<Vec<T>>>,
    /// Values in them.
    values: usize,
    /// Values of the tensors that are in use, and the most that were at once.
    live: usize,
    most: usize,
}

impl<T> Freed<T> {
    /// The smallest buffer that holds `length` values and not more than twice as many.
    fn take(&mut self, length: usize) -> Option<Vec<T>> {
        let found = self.by_length.range(length..=2 * length).next().map(|(&found, _)| found);
        let buffer = found.and_then(|found| {
            let buffers = self.by_length.get_mut(&found)?;
            let buffer = buffers.pop();
            if buffers.is_empty() {
                self.by_length.remove(&found);
            }
            buffer
        });
        self.values -= buffer.as_ref().map_or(0, Vec::len);
        self.live += buffer.as_ref().map_or(length, Vec::len);
        self.most = self.most.max(self.live);
        buffer
    }

    fn put(&mut self, buffer: Vec<T>) {
        self.live -= buffer.len();
        // What one size of images leaves is about as much as it had in use. More is left by other sizes, which may never
        // come again.
        if self.values + buffer.len() > 2 * self.most {
            self.clear();
        }
        self.values += buffer.len();
        self.by_length.entry(buffer.len()).or_default().push(buffer);
    }

    fn clear(&mut self) {
        (self.by_length, self.values, self.most) = (BTreeMap::new(), 0, self.live);
    }
}

impl<T> Pool<T> {
    /// Gives the freed buffers back to the system.
    pub fn clear(&self) {
        if let Ok(mut freed) = self.0.lock() {
            freed.clear();
        }
    }
}

struct Buffer<T: Real> {
    values: Vec<T>,
    pool: Arc<Pool<T>>,
}

impl<T: Real> Drop for Buffer<T> {
    fn drop(&mut self) {
        let values = std::mem::take(&mut self.values);
        if let Ok(mut freed) = self.pool.0.lock() {
            freed.put(values);
        }
    }
}

/// Buffers of at least so many bytes are asked for in large pages.
const HUGE: usize = 4 << 20;

/// Values in NHWC order. Clones share the memory.
#[derive(Clone)]
pub struct Tensor<T: Real> {
    shape: Shape,
    buffer: Arc<Buffer<T>>,
}

debug!(Tensor<T> { shape } [T: Real]);

impl<T: Real> Tensor<T> {
    /// A tensor with arbitrary values. Whoever asks for it must write all of them.
    pub fn uninit(pool: &Arc<Pool<T>>, shape: Shape) -> Self {
        let len = shape.iter().product();
        let freed = pool.0.lock().ok().and_then(|mut freed| freed.take(len));
        let values = freed.unwrap_or_else(|| {
            let mut fresh = vec![T::zero(); len];
            if size_of_val(&fresh[..]) >= HUGE {
                advise_huge_pages(&mut fresh);
            }
            fresh
        });
        Self { shape, buffer: Arc::new(Buffer { values, pool: pool.clone() }) }
    }

    /// Its shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Its values.
    pub fn values(&self) -> &[T] {
        &self.buffer.values[..self.shape.iter().product()]
    }

    /// Its values, to be changed; copies them first if another tensor shares them.
    pub fn values_mut(&mut self) -> &mut [T] {
        if Arc::get_mut(&mut self.buffer).is_none() {
            let mut copy = Self::uninit(&self.buffer.pool, self.shape);
            copy.values_mut().copy_from_slice(self.values());
            *self = copy;
        }
        let buffer = Arc::get_mut(&mut self.buffer).expect("the only owner");
        &mut buffer.values[..self.shape.iter().product()]
    }
}

/// Values of 16 bits from the beginning of a cache line on, in a tensor's memory. `T` must be f32.
pub struct Halves<T: Real> {
    memory: Tensor<T>,
    len: usize,
}

debug!(Halves<T> { len } [T: Real]);

/// Bytes of a cache line.
const LINE: usize = 64;

impl<T: Real> Halves<T> {
    /// Arbitrary values.
    pub fn uninit(pool: &Arc<Pool<T>>, len: usize) -> Self {
        Self { memory: Tensor::uninit(pool, [1, 1, 1, (2 * len + LINE) / 4 + 1]), len }
    }

    /// The values.
    pub fn values(&self) -> &[u16] {
        let all: &[u16] = cast_slice(T::as_f32(self.memory.values()).expect("f32"));
        &all[all.as_ptr().align_offset(LINE)..][..self.len]
    }

    /// The values, to be changed.
    pub fn values_mut(&mut self) -> &mut [u16] {
        let all: &mut [u16] = cast_slice_mut(T::as_f32_mut(self.memory.values_mut()).expect("f32"));
        let skipped = all.as_ptr().align_offset(LINE);
        &mut all[skipped..][..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_do_not_come_again_leave_nothing_behind() {
        let pool = Arc::<Pool<f32>>::default();
        let freed = || {
            let freed = pool.0.lock().unwrap();
            let values: usize = freed.by_length.iter().map(|(length, buffers)| length * buffers.len()).sum();
            assert_eq!((values, freed.live), (freed.values, 0));
            values
        };
        for side in 1..=100 {
            let _both = [1, 2].map(|n| Tensor::uninit(&pool, [n, side, side, 1]));
        }
        assert!(freed() <= 2 * 3 * 100 * 100, "{} values", freed());

        let place = || Tensor::uninit(&pool, [1, 100, 100, 1]).values().as_ptr();
        let first = place();
        assert!((0..1000).all(|_| place() == first), "a size that does come again has its memory again");
        pool.clear();
        assert_eq!(freed(), 0);
    }

    #[test]
    fn a_tensor_in_a_larger_buffer_has_its_own_length() {
        let pool = Arc::<Pool<f32>>::default();
        let tensor = |len| Tensor::uninit(&pool, [1, 1, 1, len]);
        let place = tensor(150).values().as_ptr();
        assert_ne!(tensor(70).values().as_ptr(), place, "less than half of it");
        let mut part = tensor(100);
        part.values_mut().fill(3.0);
        assert_eq!((part.values().as_ptr(), part.values()), (place, &[3.0; 100][..]));
        let mut copy = part.clone();
        copy.values_mut()[99] = 4.0;
        assert_eq!((part.values()[99], copy.values().len()), (3.0, 100));
        drop((part, copy));
        assert_eq!(pool.0.lock().unwrap().live, 0);
    }
}
