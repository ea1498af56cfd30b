//! What runs the kernels: a device with memory, behind one small interface.
//!
//! Three things implement it: [`Emulated`] (feature `emulator`), `Cuda` (feature `cuda`), and
//! [`Imagined`], which computes nothing and says how much memory a plan would need. Commands run in the
//! order in which they were given.

use std::cell::Cell;
use std::rc::Rc;

#[cfg(feature = "emulator")]
use super::emulated::Emulator;
use super::launch::{DevicePtr, Launch, Precision};
use super::tiles::Card;
use crate::backend::DeviceError;

/// One thing that a device does. Pointers are to live memory of that device, as large as whoever made the
/// command says.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Runs a kernel.
    Launch(Launch),
    /// Writes zeros.
    Zero {
        /// The first byte.
        at: DevicePtr,
        /// How many.
        bytes: usize,
    },
    /// Copies within device memory.
    Copy {
        /// The first byte to read.
        from: DevicePtr,
        /// The first byte to write.
        to: DevicePtr,
        /// How many; the ranges do not overlap.
        bytes: usize,
    },
}

impl From<Launch> for Command {
    fn from(launch: Launch) -> Self {
        Self::Launch(launch)
    }
}

/// How a bulk copy of a Hopper kernel finds its tile (`TensorMap` of kernels/hopper.cuh): opaque, made by
/// [`Runtime::tensor_map`] for the device's own kernels, part of a params struct.
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub struct TensorMap(pub(super) [u8; 128]);

/// What a [`TensorMap`] says. Tiles in shared memory have rows of 128 bytes, 64 elements, whose 16-byte chunks are
/// swizzled; what lies outside the tensor is zeros.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TensorMapSpec {
    /// Boxes of 64 columns of a matrix, for `tma_load_2d`.
    Tiled {
        /// The first element, aligned to 16 bytes.
        at: DevicePtr,
        /// Of its elements.
        precision: Precision,
        /// Columns and rows.
        size: [u32; 2],
        /// Bytes from row to row, a multiple of 16.
        stride: u64,
        /// Columns and rows of a box: 64, and at most 256.
        tile: [u32; 2],
    },
    /// Pixels of a batch of images, 64 channels of each, for `tma_load_im2col`.
    Im2col {
        /// The first element, aligned to 16 bytes.
        at: DevicePtr,
        /// Of its elements.
        precision: Precision,
        /// Channels, width, height, images.
        size: [u32; 4],
        /// Bytes from pixel to pixel, row to row, image to image; multiples of 16.
        strides: [u64; 3],
        /// Along width and height, the bases of pixels go from here,
        lower: [i32; 2],
        /// to the last pixel plus this: -1 and -1 for a 3x3 convolution, 0 and 0 for 1x1.
        upper: [i32; 2],
        /// Channels per pixel: 64.
        channels: u32,
        /// Pixels per column, which are the rows of the tile: at most 1024.
        pixels: u32,
    },
}

impl TensorMapSpec {
    /// Refuses what the driver refuses, and tiles that are not 128 bytes wide.
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        let (at, size, strides, tile, most) = match self {
            Self::Tiled { at, size, stride, tile, .. } => (at, &size[..], std::slice::from_ref(stride), *tile, 256),
            Self::Im2col { at, size, strides, channels, pixels, .. } => {
                (at, &size[..], &strides[..], [*channels, *pixels], 1024)
            }
        };
        let wrong = |what: String| Err(DeviceError::Unavailable(format!("tensor map: {what} in {self:?}")));
        if at.0 == 0 || at.0 % 16 != 0 {
            return wrong("the address is null or no multiple of 16".into());
        }
        if size.contains(&0) {
            return wrong("a size is 0".into());
        }
        if strides.iter().any(|&s| s == 0 || s % 16 != 0 || s >= 1 << 40) {
            return wrong("a stride is no multiple of 16 from 16 to 2^40 - 16".into());
        }
        if tile[0] != 64 || tile[1] == 0 || tile[1] > most {
            return wrong(format!("a tile of {} elements by {}, expected 64 by 1 to {most}", tile[0], tile[1]));
        }
        if let Self::Im2col { size, lower, upper, .. } = self {
            for i in 0..2 {
                let last = i64::from(size[1 + i]) - 1 + i64::from(upper[i]);
                if [lower[i], upper[i]].iter().any(|corner| !(-128..128).contains(corner)) || last < i64::from(lower[i])
                {
                    return wrong("the bounding box is empty, or a corner is not in -128..128".into());
                }
            }
        }
        Ok(())
    }
}

/// A range of device memory, aligned to 256 bytes; when dropped it is free for others, after the commands given before.
pub trait Memory {
    /// Its address.
    fn ptr(&self) -> DevicePtr;
    /// Its size.
    fn bytes(&self) -> usize;
    /// Copies to the device, `offset` bytes from the start, after the commands given before. `values` may be
    /// changed as soon as this returns.
    fn write(&self, offset: usize, values: &[u8]) -> Result<(), DeviceError>;
    /// Waits for the commands given before and copies from the device, `offset` bytes from the start.
    fn read(&self, offset: usize, values: &mut [u8]) -> Result<(), DeviceError>;
}

/// Commands made ready to run again and again.
pub trait Graph {
    /// Runs them once, after the commands given before.
    fn run(&self) -> Result<(), DeviceError>;
}

/// A device.
pub trait Runtime {
    /// What tiles are chosen for.
    fn card(&self) -> Card;
    /// Its name, for people.
    fn name(&self) -> String;
    /// Memory of any content (0 bytes are allowed).
    fn allocate(&self, bytes: usize, purpose: &'static str) -> Result<Rc<dyn Memory>, DeviceError>;
    /// Encodes how bulk copies find their tiles. The memory must live as long as kernels use the map.
    ///
    /// # Errors
    /// What the driver refuses: misaligned addresses and strides, boxes too large.
    fn tensor_map(&self, spec: &TensorMapSpec) -> Result<TensorMap, DeviceError>;
    /// Runs one command now.
    ///
    /// # Safety
    /// The command's pointers are valid, see [`Command`].
    unsafe fn run(&self, command: &Command) -> Result<(), DeviceError>;
    /// Makes commands ready; nothing runs yet. Kernels are looked up here, once.
    ///
    /// # Safety
    /// The commands' pointers are valid as long as the graph is run, see [`Command`].
    unsafe fn record(&self, commands: Vec<Command>) -> Result<Box<dyn Graph>, DeviceError>;
    /// Seconds that `work` takes, measured `repeats` times, each time after `before`, which is not counted.
    fn time(&self, work: &dyn Graph, before: &dyn Graph, repeats: usize) -> Result<Vec<f64>, DeviceError>;
}

/// Which option to lower when memory for a purpose does not suffice.
#[cfg(any(feature = "cuda", feature = "emulator"))]
pub(super) fn advice(purpose: &str) -> &'static str {
    match purpose {
        PARAMETERS => "take a smaller network, or fewer averages (--ema)",
        _ => "lower --batch-gpu (train) or --batch (sample)",
    }
}

/// The purpose of memory for weights, gradients, moments and averages.
pub(super) const PARAMETERS: &str = "parameters";

/// A device that is not there: it gives out addresses and computes nothing.
pub struct Imagined {
    card: Card,
    next: Cell<u64>,
}

impl Imagined {
    /// With the properties of a card.
    pub fn new(card: Card) -> Self {
        Self { card, next: Cell::new(1 << 40) }
    }
}

struct Nowhere(DevicePtr, usize);

impl Memory for Nowhere {
    fn ptr(&self) -> DevicePtr {
        self.0
    }

    fn bytes(&self) -> usize {
        self.1
    }

    fn write(&self, _: usize, _: &[u8]) -> Result<(), DeviceError> {
        Ok(())
    }

    fn read(&self, _: usize, values: &mut [u8]) -> Result<(), DeviceError> {
        values.fill(0);
        Ok(())
    }
}

struct Nothing;

impl Graph for Nothing {
    fn run(&self) -> Result<(), DeviceError> {
        Ok(())
    }
}

impl Runtime for Imagined {
    fn card(&self) -> Card {
        self.card
    }

    fn name(&self) -> String {
        "an imagined device".into()
    }

    fn allocate(&self, bytes: usize, _: &'static str) -> Result<Rc<dyn Memory>, DeviceError> {
        let at = self.next.get();
        self.next.set(at + bytes.next_multiple_of(256) as u64);
        Ok(Rc::new(Nowhere(DevicePtr(at), bytes)))
    }

    fn tensor_map(&self, spec: &TensorMapSpec) -> Result<TensorMap, DeviceError> {
        spec.check()?;
        Ok(TensorMap([0; 128]))
    }

    unsafe fn run(&self, _: &Command) -> Result<(), DeviceError> {
        Ok(())
    }

    unsafe fn record(&self, _: Vec<Command>) -> Result<Box<dyn Graph>, DeviceError> {
        Ok(Box::new(Nothing))
    }

    fn time(&self, _: &dyn Graph, _: &dyn Graph, repeats: usize) -> Result<Vec<f64>, DeviceError> {
        Ok(vec![0.0; repeats])
    }
}

/// The emulator as a device.
#[cfg(feature = "emulator")]
#[derive(Clone)]
pub struct Emulated {
    emulator: Emulator,
    limit: u64,
    used: Rc<Cell<u64>>,
}

#[cfg(feature = "emulator")]
mod emulated {
    use super::*;
    use crate::backend::gpu::emulated::{EmulatorError, Memory as Allocation, tensor_map};

    fn failed(e: EmulatorError) -> DeviceError {
        DeviceError::Failed { device: "emulator".into(), what: e.to_string() }
    }

    impl Emulated {
        /// A device of `limit` bytes.
        pub fn new(emulator: Emulator, limit: u64) -> Self {
            Self { emulator, limit, used: Rc::default() }
        }

        /// # Safety
        /// See [`Command`].
        unsafe fn launch(&self, command: &Command) -> Result<(), EmulatorError> {
            match command {
                // SAFETY: the caller's promise.
                Command::Launch(l) => unsafe { self.emulator.run(l) }.map(|_| ()),
                Command::Zero { at, bytes } => {
                    // SAFETY: the caller's promise; device memory is host memory here.
                    unsafe { std::ptr::write_bytes(at.0 as *mut u8, 0, *bytes) };
                    Ok(())
                }
                Command::Copy { from, to, bytes } => {
                    // SAFETY: the caller's promise.
                    unsafe { std::ptr::copy_nonoverlapping(from.0 as *const u8, to.0 as *mut u8, *bytes) };
                    Ok(())
                }
            }
        }
    }

    struct Room {
        allocation: Allocation,
        used: Rc<Cell<u64>>,
    }

    impl Drop for Room {
        fn drop(&mut self) {
            self.used.set(self.used.get() - self.allocation.bytes() as u64);
        }
    }

    impl Memory for Room {
        fn ptr(&self) -> DevicePtr {
            self.allocation.ptr()
        }

        fn bytes(&self) -> usize {
            self.allocation.bytes()
        }

        fn write(&self, offset: usize, values: &[u8]) -> Result<(), DeviceError> {
            self.allocation.upload(offset, values).map_err(failed)
        }

        fn read(&self, offset: usize, values: &mut [u8]) -> Result<(), DeviceError> {
            self.allocation.download(offset, values).map_err(failed)
        }
    }

    struct Recorded {
        device: Emulated,
        commands: Vec<Command>,
    }

    impl Graph for Recorded {
        fn run(&self) -> Result<(), DeviceError> {
            // SAFETY: promised to `record`.
            self.commands.iter().try_for_each(|c| unsafe { self.device.launch(c) }).map_err(failed)
        }
    }

    impl Runtime for Emulated {
        fn card(&self) -> Card {
            Card { sms: 4, capability: 90 }
        }

        fn name(&self) -> String {
            "the emulator".into()
        }

        fn allocate(&self, bytes: usize, purpose: &'static str) -> Result<Rc<dyn Memory>, DeviceError> {
            let (used, asked) = (self.used.get(), bytes as u64);
            if used + asked > self.limit {
                let (device, free, total) = (self.name(), self.limit - used, self.limit);
                return Err(DeviceError::OutOfMemory { device, asked, purpose, free, total, advice: advice(purpose) });
            }
            let allocation = self.emulator.alloc(bytes).map_err(failed)?;
            self.used.set(used + asked);
            Ok(Rc::new(Room { allocation, used: self.used.clone() }))
        }

        fn tensor_map(&self, spec: &TensorMapSpec) -> Result<TensorMap, DeviceError> {
            spec.check()?;
            Ok(tensor_map(spec))
        }

        unsafe fn run(&self, command: &Command) -> Result<(), DeviceError> {
            // SAFETY: the caller's promise.
            unsafe { self.launch(command) }.map_err(failed)
        }

        unsafe fn record(&self, commands: Vec<Command>) -> Result<Box<dyn Graph>, DeviceError> {
            Ok(Box::new(Recorded { device: self.clone(), commands }))
        }

        fn time(&self, work: &dyn Graph, before: &dyn Graph, repeats: usize) -> Result<Vec<f64>, DeviceError> {
            let mut seconds = Vec::new();
            for _ in 0..repeats {
                before.run()?;
                let begun = std::time::Instant::now();
                work.run()?;
                seconds.push(begun.elapsed().as_secs_f64());
            }
            Ok(seconds)
        }
    }
}
