//! Tensors of the CPU backend: a shape and shared values, whose memory returns to a pool.

use crate::backend::Shape;
use crate::real::Real;
use crate::system::advise_huge_pages;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

/// Freed buffers by length. They are used again because fresh pages cost more than the arithmetic on them.
#[derive(Default)]
pub struct Pool<T>(Mutex<HashMap<usize, Vec<Vec<T>>>>);

debug!(Pool<T> {} [T]);

impl<T> Pool<T> {
    /// Gives the freed buffers back to the system.
    pub fn clear(&self) {
        if let Ok(mut free) = self.0.lock() {
            free.clear();
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
        if let Ok(mut free) = self.pool.0.lock() {
            free.entry(values.len()).or_default().push(values);
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
        let free = pool.0.lock().ok().and_then(|mut free| free.get_mut(&len).and_then(Vec::pop));
        let values = free.unwrap_or_else(|| {
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
        &self.buffer.values
    }

    /// Its values, to be changed; copies them first if another tensor shares them.
    pub fn values_mut(&mut self) -> &mut [T] {
        if Arc::get_mut(&mut self.buffer).is_none() {
            let mut copy = Self::uninit(&self.buffer.pool, self.shape);
            copy.values_mut().copy_from_slice(self.values());
            *self = copy;
        }
        &mut Arc::get_mut(&mut self.buffer).expect("the only owner").values
    }
}
