//! Tensors in device memory, and the workspace in which a plan places them.
//!
//! A plan's tensors share one allocation. The network drops a handle when nothing reads the tensor any more, and its
//! place is then free for the next one. So the order of calls is the liveness analysis, and the highest address that
//! was in use says how much memory the plan needs.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use super::launch::DevicePtr;
use super::runtime::Memory;
use crate::backend::Shape;

/// Alignment of every tensor, in bytes.
const ALIGN: usize = 256;

/// Places within one allocation. While its size is not yet known, its address is an assumed one.
pub struct Workspace {
    base: DevicePtr,
    /// Free ranges below `end`: where each begins, and its length.
    free: RefCell<BTreeMap<usize, usize>>,
    end: Cell<usize>,
    peak: Cell<usize>,
}

impl Workspace {
    /// An empty workspace at an address.
    pub fn new(base: DevicePtr) -> Rc<Self> {
        Rc::new(Self { base, free: RefCell::default(), end: Cell::new(0), peak: Cell::new(0) })
    }

    /// Bytes that all places so far needed.
    pub fn peak(&self) -> usize {
        self.peak.get()
    }

    /// A place for so many bytes: the smallest gap that holds them, else the end.
    pub fn place(self: &Rc<Self>, bytes: usize) -> Place {
        let bytes = bytes.max(1).next_multiple_of(ALIGN);
        let mut free = self.free.borrow_mut();
        let gap = free.iter().filter(|(_, length)| **length >= bytes).min_by_key(|(_, length)| **length);
        let offset = match gap.map(|(&offset, &length)| (offset, length)) {
            Some((offset, length)) => {
                free.remove(&offset);
                if length > bytes {
                    free.insert(offset + bytes, length - bytes);
                }
                offset
            }
            None => {
                let offset = self.end.get();
                self.end.set(offset + bytes);
                self.peak.set(self.peak.get().max(offset + bytes));
                offset
            }
        };
        Place { workspace: self.clone(), offset, bytes }
    }

    fn release(&self, mut offset: usize, mut bytes: usize) {
        let mut free = self.free.borrow_mut();
        if let Some(after) = free.remove(&(offset + bytes)) {
            bytes += after;
        }
        if let Some((&before, &length)) = free.range(..offset).next_back()
            && before + length == offset
        {
            free.remove(&before);
            (offset, bytes) = (before, length + bytes);
        }
        if offset + bytes == self.end.get() {
            self.end.set(offset);
        } else {
            free.insert(offset, bytes);
        }
    }
}

/// A range of a workspace, free for others when dropped.
pub struct Place {
    workspace: Rc<Workspace>,
    offset: usize,
    bytes: usize,
}

impl Place {
    fn ptr(&self) -> DevicePtr {
        self.workspace.base.offset(self.offset)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.workspace.release(self.offset, self.bytes);
    }
}

/// Where a tensor lies.
pub enum Buffer {
    /// In memory of its own.
    Own(Rc<dyn Memory>),
    /// In a plan's workspace.
    Place(Place),
    /// In another tensor, so many bytes behind its beginning.
    Part(Tensor, usize),
}

/// How values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// f32, [n, h, w, c]: images, noise levels, conditions, the embedding and its scales.
    F32,
    /// 16 bits, [n, h, w, c padded with zeros to a multiple of 8]: activations and their gradients.
    Half,
    /// As `Half`, but the channels are those of q, k and v of so many heads in the kernels' order
    /// ([`super::attention::row_of`]).
    Qkv {
        /// Attention heads.
        heads: usize,
    },
}

/// A handle of a tensor on the device. Clones share the memory.
#[derive(Clone)]
pub struct Tensor(Rc<Inner>);

struct Inner {
    shape: Shape,
    format: Format,
    number: Option<usize>,
    buffer: Buffer,
    active: RefCell<Option<(f64, Tensor)>>,
}

impl Tensor {
    /// A tensor in a buffer of [`bytes_of`]; `number` tells tensors of a plan apart.
    pub fn new(shape: Shape, format: Format, number: Option<usize>, buffer: Buffer) -> Self {
        Self(Rc::new(Inner { shape, format, number, buffer, active: RefCell::default() }))
    }

    /// Its shape, without padding.
    pub fn shape(&self) -> Shape {
        self.0.shape
    }

    /// How it is stored.
    pub fn format(&self) -> Format {
        self.0.format
    }

    /// Its number in its plan, if its activation may be asked for.
    pub fn number(&self) -> Option<usize> {
        self.0.number
    }

    /// Its address.
    pub fn ptr(&self) -> DevicePtr {
        match &self.0.buffer {
            Buffer::Own(memory) => memory.ptr(),
            Buffer::Place(place) => place.ptr(),
            Buffer::Part(of, offset) => of.ptr().offset(*offset),
        }
    }

    /// Its memory, and where it begins there, unless it lies in a workspace.
    pub fn memory(&self) -> Option<(&Rc<dyn Memory>, usize)> {
        match &self.0.buffer {
            Buffer::Own(memory) => Some((memory, 0)),
            Buffer::Place(_) => None,
            Buffer::Part(of, offset) => of.memory().map(|(memory, first)| (memory, first + offset)),
        }
    }

    /// `parts` tensors of equally many images, one after the other in this one. None if one would begin where kernels
    /// cannot read 16 bytes.
    pub fn parts(&self, parts: usize) -> Option<Vec<Self>> {
        let [n, h, w, c] = self.shape();
        let (shape, bytes) = ([n / parts, h, w, c], self.bytes() / parts);
        let part = |i| Self::new(shape, self.format(), None, Buffer::Part(self.clone(), i * bytes));
        bytes.is_multiple_of(16).then(|| (0..parts).map(part).collect())
    }

    /// Whether the other one has its shape and format.
    pub fn is_like(&self, other: &Self) -> bool {
        (self.0.shape, self.0.format) == (other.0.shape, other.0.format)
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        bytes_of(self.0.shape, self.0.format)
    }

    /// Whether nobody else holds it, so that it may be overwritten.
    pub fn is_unique(&self) -> bool {
        Rc::strong_count(&self.0) == 1 && !matches!(self.0.buffer, Buffer::Part(..))
    }

    /// mp_silu(scale x), where x is this tensor, if it was made already.
    pub fn active(&self, scale: f64) -> Option<Tensor> {
        self.0.active.borrow().as_ref().filter(|(made, _)| *made == scale).map(|(_, t)| t.clone())
    }

    /// Keeps mp_silu(scale x) for as long as x lives.
    pub fn set_active(&self, scale: f64, active: Tensor) {
        *self.0.active.borrow_mut() = Some((scale, active));
    }
}

impl DevicePtr {
    /// The address of a tensor, or what kernels take for "not there".
    pub fn of(tensor: Option<&Tensor>) -> Self {
        tensor.map_or(Self::NULL, Tensor::ptr)
    }
}

/// Channels as stored.
pub fn padded(channels: usize) -> usize {
    channels.next_multiple_of(8)
}

/// Size of a tensor in device memory.
pub fn bytes_of([n, h, w, c]: Shape, format: Format) -> usize {
    match format {
        Format::F32 => n * h * w * c * 4,
        Format::Half | Format::Qkv { .. } => n * h * w * padded(c) * 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn places_in_use_never_overlap(steps in proptest::collection::vec((0usize..5000, 0usize..8), 1..300)) {
            let workspace = Workspace::new(DevicePtr(4096));
            let mut live: Vec<Place> = Vec::new();
            let mut most = 0;
            for (bytes, drop) in steps {
                if drop < live.len() {
                    live.swap_remove(drop);
                }
                live.push(workspace.place(bytes));
                let mut ranges: Vec<_> = live.iter().map(|p| (p.offset, p.offset + p.bytes)).collect();
                ranges.sort_unstable();
                prop_assert!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0));
                prop_assert!(ranges.iter().all(|r| r.0 % ALIGN == 0 && r.1 <= workspace.peak()));
                most = most.max(ranges.iter().map(|r| r.1 - r.0).sum());
            }
            drop(live);
            prop_assert!(workspace.peak() >= most);
            prop_assert_eq!((workspace.end.get(), workspace.free.borrow().len()), (0, 0));
        }
    }
}
