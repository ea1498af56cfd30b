//! The memory of a device that has its own: where it is, and how values get there and back.

use bytemuck::{Pod, Zeroable};

use super::DeviceError;

/// An address in device memory, as kernels take it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct DevicePtr(pub u64);

impl DevicePtr {
    /// What kernels take for "not there"; the default.
    pub const NULL: Self = Self(0);

    /// The address `bytes` further.
    pub fn offset(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

/// A range of device memory, aligned to 256 bytes. When dropped it becomes free for others, once the commands given
/// before have run.
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
