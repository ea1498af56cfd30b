//! Memory of a device: allocated, kept for its next owner, written through a ring and read.
//!
//! What [`Memory::write`] brings takes two steps, so that the transfer overlaps with the commands given before and yet
//! happens after them:
//!
//! ```text
//! caller's buffer --host--> pinned ring --upload stream--> ring on the device --command stream--> its place
//! ```
//!
//! The caller's buffer is free after the first step; the host waits for the device only when the ring is full.

use std::collections::VecDeque;
use std::rc::Rc;

use cudarc::driver::{DriverError, result, sys};
use rayon::prelude::*;

use super::CudaDevice;
use crate::backend::DeviceError;
use crate::backend::gpu::launch::DevicePtr;
use crate::backend::gpu::runtime::{Memory, advice};

/// Bytes of the ring of uploads. A write is cut into pieces of a quarter at most.
pub(super) const RING: usize = 32 << 20;
/// Pieces that may be under way. Small ones would take an event each until the ring is full.
const MOST_IN_FLIGHT: usize = 64;
/// Bytes that a thread copies into it at a time.
const PIECE: usize = 1 << 20;
/// Bytes of the pinned memory that reads pass through.
pub(super) const DOWNLOAD: usize = 8 << 20;
const OUT_OF_MEMORY: DriverError = DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY);
/// Allocations start at multiples of this.
const ALIGNMENT: usize = 256;

/// A range of the ring in use, until its event.
pub(super) struct InFlight {
    first: usize,
    end: usize,
    pub(super) left: sys::CUevent,
}

/// The path of data to the device.
pub(super) struct Ring {
    pub(super) pinned: *mut u8,
    pub(super) device: sys::CUdeviceptr,
    /// Where the next piece goes.
    pub(super) next: usize,
    pub(super) in_flight: VecDeque<InFlight>,
    /// Events to be used again.
    pub(super) events: Vec<sys::CUevent>,
}

impl CudaDevice {
    /// Device memory of at least 1 byte.
    pub(super) fn allocate(&self, bytes: usize, purpose: &'static str) -> Result<sys::CUdeviceptr, DeviceError> {
        self.bind()?;
        if let Some(at) = self.kept.borrow_mut().get_mut(&bytes).and_then(Vec::pop) {
            return Ok(at);
        }
        // SAFETY: memory of any content.
        self.with_memory(|| unsafe { result::malloc_sync(bytes) }, Some(bytes), purpose)
    }

    /// Calls `take`, which takes device memory, `bytes` if that is known. Where that does not suffice, it frees what is
    /// kept and tries again.
    pub(super) fn with_memory<T>(
        &self,
        take: impl Fn() -> Result<T, DriverError>,
        bytes: Option<usize>,
        purpose: &'static str,
    ) -> Result<T, DeviceError> {
        let mut got = take();
        if matches!(got, Err(OUT_OF_MEMORY)) {
            self.wait()?;
            self.free_kept();
            got = take();
        }
        if !matches!(got, Err(OUT_OF_MEMORY)) {
            return self.require(got);
        }
        let (free, total) = self.require(result::mem_get_info())?;
        let (asked, free, total) = (bytes.map(|bytes| bytes as u64), free as u64, total as u64);
        Err(DeviceError::OutOfMemory {
            device: self.info.label(),
            asked,
            purpose,
            free,
            total,
            advice: advice(purpose),
        })
    }

    /// Brings at most a quarter of the ring to device memory.
    ///
    /// # Safety
    /// There are as many bytes of live memory at `to`; and the device is bound.
    unsafe fn bring(&self, to: sys::CUdeviceptr, values: &[u8]) -> Result<(), DeviceError> {
        let mut ring = self.ring.borrow_mut();
        let length = values.len().next_multiple_of(ALIGNMENT);
        let first = if ring.next + length > RING { 0 } else { ring.next };
        let end = first + length;
        let overlaps = |ring: &Ring| ring.in_flight.iter().any(|piece| piece.first < end && first < piece.end);
        while ring.in_flight.len() >= MOST_IN_FLIGHT || overlaps(&ring) {
            let oldest = ring.in_flight.pop_front().expect("there is one");
            // SAFETY: an event of ours that was recorded.
            let left = unsafe { result::event::synchronize(oldest.left) };
            ring.events.push(oldest.left);
            self.require(left)?;
        }
        ring.next = end;
        let mut event = || match ring.events.pop() {
            Some(event) => Ok(event),
            None => result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING),
        };
        let (arrived, left) = (self.require(event())?, self.require(event())?);
        let place = ring.device + first as u64;
        // SAFETY: the range of the ring is within it and nobody's; both streams and events are live; the
        // destination is the caller's promise.
        let done = unsafe {
            let pinned = std::slice::from_raw_parts_mut(ring.pinned.add(first), values.len());
            let pieces = pinned.par_chunks_mut(PIECE).zip(values.par_chunks(PIECE));
            pieces.for_each(|(to, from)| to.copy_from_slice(from));
            result::memcpy_htod_async(place, pinned, self.uploads)
                .and_then(|()| result::event::record(arrived, self.uploads))
                .and_then(|()| {
                    let plainly = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
                    result::stream::wait_event(self.commands, arrived, plainly)
                })
                .and_then(|()| result::memcpy_dtod_async(to, place, values.len(), self.commands))
                .and_then(|()| result::event::record(left, self.commands))
        };
        // The wait has been given: the event may be recorded anew.
        ring.events.push(arrived);
        ring.in_flight.push_back(InFlight { first, end, left });
        self.require(done)
    }

    /// Frees what is kept; the commands given before must be done.
    pub(super) fn free_kept(&self) {
        for at in self.kept.borrow_mut().drain().flat_map(|(_, places)| places) {
            // SAFETY: allocated by us, and owned by none.
            let _ = unsafe { result::free_sync(at) };
        }
    }
}

pub(super) struct Allocation {
    device: Rc<CudaDevice>,
    at: sys::CUdeviceptr,
    bytes: usize,
    /// What was allocated.
    room: usize,
}

impl Allocation {
    pub(super) fn new(device: &Rc<CudaDevice>, bytes: usize, purpose: &'static str) -> Result<Self, DeviceError> {
        let room = bytes.max(1).next_multiple_of(ALIGNMENT);
        Ok(Self { device: device.clone(), at: device.allocate(room, purpose)?, bytes, room })
    }

    fn range(&self, offset: usize, bytes: usize) -> Result<sys::CUdeviceptr, DeviceError> {
        if offset.checked_add(bytes).is_none_or(|end| end > self.bytes) {
            let what = format!("copy of {bytes} bytes at {offset}, but the memory has {}", self.bytes);
            return Err(self.device.wrong(what));
        }
        Ok(self.at + offset as u64)
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        self.device.kept.borrow_mut().entry(self.room).or_default().push(self.at);
    }
}

impl Memory for Allocation {
    fn ptr(&self) -> DevicePtr {
        DevicePtr(self.at)
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    fn write(&self, offset: usize, values: &[u8]) -> Result<(), DeviceError> {
        let mut to = self.range(offset, values.len())?;
        self.device.bind()?;
        for piece in values.chunks(RING / 4) {
            // SAFETY: within this allocation.
            unsafe { self.device.bring(to, piece)? };
            to += piece.len() as u64;
        }
        Ok(())
    }

    fn read(&self, offset: usize, values: &mut [u8]) -> Result<(), DeviceError> {
        let mut from = self.range(offset, values.len())?;
        self.device.bind()?;
        for piece in values.chunks_mut(DOWNLOAD) {
            // SAFETY: within this allocation and within the pinned memory, which nothing else uses until the
            // wait is over.
            let (pinned, copied) = unsafe {
                let pinned = std::slice::from_raw_parts_mut(self.device.download, piece.len());
                let copied = result::memcpy_dtoh_async(pinned, from, self.device.commands);
                (pinned, copied)
            };
            self.device.require(copied)?;
            self.device.wait()?;
            piece.copy_from_slice(pinned);
            from += piece.len() as u64;
        }
        Ok(())
    }
}
