//! Kernel launches as values: what the typed functions beside this file make, a plan records, and a
//! device runs. A kernel takes one argument, the params struct of its family.

use super::emulated::{Arg, DevicePtr, Emulator, EmulatorError};
use bytemuck::{NoUninit, Zeroable};

/// The 16-bit type of activations and effective weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// IEEE half, 11 significant bits, up to 65504.
    F16,
    /// bfloat16, 8 significant bits, the range of f32.
    Bf16,
}

impl Precision {
    /// Of a kernel's two instances: [f16, bf16].
    pub fn pick(self, kernels: [&'static str; 2]) -> &'static str {
        kernels[self as usize]
    }
}

/// The address that kernels take for "not there".
pub fn null() -> DevicePtr {
    DevicePtr::zeroed()
}

/// One launch, complete.
#[derive(Clone, Debug)]
pub struct Launch {
    /// Name of the kernel.
    pub kernel: &'static str,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    params: Box<[u8]>,
}

impl Launch {
    /// A launch whose kernel takes `params`.
    pub fn new<P: NoUninit>(kernel: &'static str, grid: [u32; 3], block: u32, shared: u32, params: &P) -> Self {
        Self { kernel, grid, block, shared, params: bytemuck::bytes_of(params).into() }
    }

    /// One thread for each of `items`, in blocks of `block`.
    pub fn over<P: NoUninit>(kernel: &'static str, items: usize, block: u32, params: &P) -> Self {
        Self::new(kernel, [items.div_ceil(block as usize) as u32, 1, 1], block, 0, params)
    }

    /// The bytes of the params struct.
    pub fn params(&self) -> &[u8] {
        &self.params
    }
}

/// Something that runs launches in order.
pub trait Run {
    /// Why it could not.
    type Error;
    /// Runs one launch.
    ///
    /// # Safety
    ///
    /// The pointers in the launch's params point to live memory of this device, as large as the
    /// function that made the launch says.
    unsafe fn run(&self, launch: &Launch) -> Result<(), Self::Error>;
}

impl Run for Emulator {
    type Error = EmulatorError;

    unsafe fn run(&self, l: &Launch) -> Result<(), EmulatorError> {
        if l.shared > 48 << 10 {
            self.allow_shared(l.kernel, l.shared as usize)?;
        }
        // SAFETY: the caller's promise.
        unsafe { self.launch(l.kernel, l.grid, [l.block, 1, 1], l.shared, &[Arg::bytes(&l.params)]) }.map(|_| ())
    }
}
