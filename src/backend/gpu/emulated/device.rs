//! The emulator behind the interface that a GPU has.

use std::cell::Cell;
use std::rc::Rc;

use super::{EmulatedMemory, Emulator, EmulatorError, tensor_map};
use crate::backend::DeviceError;
use crate::backend::gpu::launch::{DevicePtr, TensorMap, TensorMapSpec};
use crate::backend::gpu::runtime::{Command, Graph, MeasuredOn, Memory, Runtime, advice, behind_launches};
use crate::backend::gpu::tiles::{Card, Tuned};

/// The emulator as a device.
#[derive(Clone)]
pub struct Emulated {
    emulator: Emulator,
    limit: u64,
    used: Rc<Cell<u64>>,
    tuned: Option<Rc<Tuned>>,
}

fn failed(e: EmulatorError) -> DeviceError {
    DeviceError::Failed { device: "emulator".into(), what: e.to_string() }
}

impl Emulated {
    /// A device of `limit` bytes.
    pub fn new(emulator: Emulator, limit: u64) -> Self {
        Self { emulator, limit, used: Rc::default(), tuned: None }
    }

    /// The same, with these choices of tiles.
    #[must_use]
    pub fn tuned_by(self, tuned: Tuned) -> Self {
        Self { tuned: Some(Rc::new(tuned)), ..self }
    }

    /// Runs a command; if `beside`, as a launch that may begin while the last one still runs.
    ///
    /// # Safety
    /// See [`Command`].
    unsafe fn launch(&self, command: &Command, beside: bool) -> Result<(), EmulatorError> {
        match command {
            // SAFETY: the caller's promise.
            Command::Launch(l) => unsafe { self.emulator.clone().with_launches_beside(beside).run(l) }.map(|_| ()),
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
    allocation: EmulatedMemory,
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
        let run = |(command, beside)| unsafe { self.device.launch(command, beside) };
        behind_launches(&self.commands).try_for_each(run).map_err(failed)
    }
}

impl Runtime for Emulated {
    fn card(&self) -> Card {
        Card::new(4, 90)
    }

    fn origin(&self) -> MeasuredOn {
        MeasuredOn::new("the emulator", self.card(), "none".into(), "for the CPU")
    }

    fn tuned(&self) -> Option<Rc<Tuned>> {
        self.tuned.clone()
    }

    fn name(&self) -> String {
        "the emulator".into()
    }

    fn free(&self) -> Option<u64> {
        (self.limit < u64::MAX).then(|| self.limit - self.used.get())
    }

    fn allocate(&self, bytes: usize, purpose: &'static str) -> Result<Rc<dyn Memory>, DeviceError> {
        let (used, asked) = (self.used.get(), bytes as u64);
        if used + asked > self.limit {
            let (device, free, total) = (self.name(), self.limit - used, self.limit);
            let (asked, advice) = (Some(asked), advice(purpose));
            return Err(DeviceError::OutOfMemory { device, asked, purpose, free, total, advice });
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
        unsafe { self.launch(command, false) }.map_err(failed)
    }

    unsafe fn record(&self, commands: Vec<Command>, _: bool) -> Result<Box<dyn Graph>, DeviceError> {
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
