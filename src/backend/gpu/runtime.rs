//! What runs the kernels: a device with memory, behind one small interface.
//!
//! Three things implement it: `Emulated` (feature `emulator`), `Cuda` (feature `cuda`), and
//! [`Imagined`], which computes nothing and says how much memory a plan would need. Commands run in the
//! order in which they were given.

use std::cell::Cell;
use std::ffi::c_void;
use std::rc::Rc;

use super::launch::{DevicePtr, Launch, TensorMap, TensorMapSpec};
use super::tables::TILED;
use super::tiles::{Card, Tuned};
use crate::backend::DeviceError;
pub use crate::backend::memory::Memory;

/// One thing that a device does. Its pointers must be to live memory of that device, as large as the maker of the
/// command documents.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // the variants say it
pub enum Command {
    /// Runs a kernel.
    Launch(Launch),
    /// Writes zeros.
    Zero { at: DevicePtr, bytes: usize },
    /// Copies within device memory, between ranges that do not overlap.
    Copy { from: DevicePtr, to: DevicePtr, bytes: usize },
}

impl From<Launch> for Command {
    fn from(launch: Launch) -> Self {
        Self::Launch(launch)
    }
}

/// Each command, and whether a launch comes right before it. If so, and if the command is a launch itself, it may begin
/// while that one ends.
#[cfg(any(feature = "cuda", feature = "emulator"))]
pub(super) fn behind_launches(commands: &[Command]) -> impl Iterator<Item = (&Command, bool)> {
    let launches = commands.iter().map(|command| matches!(command, Command::Launch(_)));
    commands.iter().zip(std::iter::once(false).chain(launches))
}

/// Commands made ready to run again and again.
pub trait Graph {
    /// Runs them once, after the commands given before.
    fn run(&self) -> Result<(), DeviceError>;
}

/// Card, driver and kernels with which times were measured. Times say nothing about another card, and little about
/// another driver or other kernels.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct MeasuredOn {
    /// The card's name, and how many multiprocessors it has.
    pub card: String,
    /// The driver's version.
    pub driver: String,
    /// Digest of the kernels' sources, and what compiled them.
    pub kernels: String,
}

impl MeasuredOn {
    pub(super) fn new(name: &str, card: Card, driver: String, compiled: &str) -> Self {
        let card = format!("{name}, {} multiprocessors", card.sms);
        Self { card, driver, kernels: format!("{TILED}, {compiled}") }
    }
}

/// A device.
pub trait Runtime {
    /// The properties for which tiles are chosen.
    fn card(&self) -> Card;
    /// Card, driver and kernels with which times on it are measured.
    fn origin(&self) -> MeasuredOn;
    /// Choices of tiles that were measured on it. Where there are none, a model chooses.
    fn tuned(&self) -> Option<Rc<Tuned>>;
    /// Its name, for people.
    fn name(&self) -> String;
    /// Whether it is a card: only these have queues [`beside`](Self::beside) theirs.
    fn is_card(&self) -> bool {
        false
    }
    /// An identifier that no other card has, on any machine; `None` if it is no card, or its driver does not say.
    fn uuid(&self) -> Option<String> {
        None
    }
    /// Bytes of memory that nobody uses; none if that is unknown.
    fn free(&self) -> Option<u64>;
    /// Memory of any content (0 bytes are allowed).
    fn allocate(&self, bytes: usize, purpose: &'static str) -> Result<Rc<dyn Memory>, DeviceError>;
    /// Gives memory back that was dropped and is kept for the next allocation of its size. Waits for all commands.
    fn give_back(&self) -> Result<(), DeviceError> {
        Ok(())
    }
    /// See [`Backend::pace`](crate::backend::Backend::pace).
    fn pace(&self) -> Result<(), DeviceError> {
        Ok(())
    }
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
    /// Makes commands ready; nothing runs yet. Kernels are looked up here, once. With `overlap` a launch may begin
    /// while the one before it ends, on cards that can (compute capability 9.0 and newer). It still waits for the
    /// results of the one before.
    ///
    /// # Safety
    /// The commands' pointers are valid as long as the graph is run, see [`Command`].
    unsafe fn record(&self, commands: Vec<Command>, overlap: bool) -> Result<Box<dyn Graph>, DeviceError>;
    /// A queue of commands beside this one; none where there is no CUDA.
    fn beside(&self) -> Result<Option<Box<dyn Beside>>, DeviceError> {
        Ok(None)
    }
    /// Seconds that `work` takes, measured `repeats` times, each time after `before`, which is not counted.
    fn time(&self, work: &dyn Graph, before: &dyn Graph, repeats: usize) -> Result<Vec<f64>, DeviceError>;
}

/// A queue of commands beside a device's, for libraries that give commands of their own. Both queues run at the same
/// time, except where one is told to wait for the other.
pub trait Beside {
    /// The CUDA stream, on a device that this thread uses from now on.
    fn stream(&self) -> Result<*mut c_void, DeviceError>;
    /// From here on, what this queue is given waits for all that the device was given.
    fn follow(&self) -> Result<(), DeviceError>;
    /// From here on, what the device is given waits for all that this queue was given.
    fn lead(&self) -> Result<(), DeviceError>;
}

/// What needs less when memory for a purpose does not suffice.
#[cfg(any(feature = "cuda", feature = "emulator"))]
pub(super) fn advice(purpose: &str) -> &'static str {
    match purpose {
        PARAMETERS => "a smaller network, or fewer averages, need less",
        _ => "fewer images at a time need less",
    }
}

/// The purpose of memory for weights, gradients, moments and averages.
pub const PARAMETERS: &str = "parameters";

/// A device that is not there: it gives out addresses and computes nothing.
pub struct Imagined {
    card: Card,
    tuned: Option<Rc<Tuned>>,
    next: Cell<u64>,
}

impl Imagined {
    /// An imagined device with the properties of this card.
    pub fn new(card: Card) -> Self {
        Self { card, tuned: None, next: Cell::new(1 << 40) }
    }

    /// The same, with choices as if they had been measured.
    #[must_use]
    pub fn tuned_by(self, tuned: Tuned) -> Self {
        Self { tuned: Some(Rc::new(tuned)), ..self }
    }

    /// A GeForce RTX 4090.
    pub fn rtx_4090() -> Self {
        Self::new(Card::new(128, 89))
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

    fn origin(&self) -> MeasuredOn {
        MeasuredOn::new("an imagined device", self.card, "none".into(), "not compiled")
    }

    fn tuned(&self) -> Option<Rc<Tuned>> {
        self.tuned.clone()
    }

    fn name(&self) -> String {
        "an imagined device".into()
    }

    fn free(&self) -> Option<u64> {
        None
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

    unsafe fn record(&self, _: Vec<Command>, _: bool) -> Result<Box<dyn Graph>, DeviceError> {
        Ok(Box::new(Nothing))
    }

    fn time(&self, _: &dyn Graph, _: &dyn Graph, repeats: usize) -> Result<Vec<f64>, DeviceError> {
        Ok(vec![0.0; repeats])
    }
}
