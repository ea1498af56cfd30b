//! The driver, loaded when a device is asked for, and the cards that it finds.

use std::ffi::c_int;

use cudarc::driver::{DriverError, result, sys};

use crate::backend::DeviceError;
use crate::backend::gpu::tiles::Card;
use crate::system;

use sys::CUdevice_attribute as Attribute;

/// The first driver version with all functions called here, as the driver counts: CUDA 12.4.
const OLDEST_DRIVER: i32 = 12040;
/// The functions that are called here; cudarc panics where one is missing. The first four serve to ask for the version.
/// Those for tensor maps are not listed: cards that need them have drivers with them.
#[rustfmt::skip]
const FUNCTIONS: [&str; 45] = [
    "cuInit", "cuDriverGetVersion", "cuGetErrorName", "cuGetErrorString", "cuCtxSetCurrent", "cuDeviceGet",
    "cuDeviceGetAttribute", "cuDeviceGetCount", "cuDeviceGetName", "cuDeviceGetUuid_v2",
    "cuDevicePrimaryCtxRelease_v2", "cuDevicePrimaryCtxRetain", "cuDeviceTotalMem_v2", "cuEventCreate",
    "cuEventDestroy_v2", "cuEventElapsedTime", "cuEventRecord", "cuEventSynchronize", "cuFuncGetAttribute", "cuFuncGetParamInfo",
    "cuFuncSetAttribute", "cuGraphDestroy", "cuGraphExecDestroy", "cuGraphInstantiateWithFlags",
    "cuGraphLaunch", "cuGraphUpload", "cuLaunchKernelEx", "cuMemAlloc_v2", "cuMemFreeHost", "cuMemFree_v2",
    "cuMemGetInfo_v2", "cuMemHostAlloc", "cuMemcpyDtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async", "cuModuleGetFunction", "cuModuleLoadData", "cuModuleUnload", "cuStreamBeginCapture_v2",
    "cuStreamCreate", "cuStreamDestroy_v2", "cuStreamEndCapture", "cuStreamSynchronize", "cuStreamWaitEvent",
];

/// What a device is.
#[derive(Clone, Debug, PartialEq)]
pub struct CardInfo {
    /// N of `cuda:N`.
    pub ordinal: usize,
    /// Its maker's name for it.
    pub name: String,
    /// Compute capability, (9, 0) for sm_90.
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub sms: usize,
    /// Bytes of memory.
    pub memory: u64,
    /// Most bytes of shared memory of a block.
    pub shared: u32,
    /// Bytes of shared memory of a multiprocessor.
    pub shared_of_sm: u32,
}

impl CardInfo {
    /// What tiles are chosen for. Cards that are sold for games multiply at half the rate with f32 sums. Of the
    /// workstation and server cards with the same chips, two do so too, according to their data sheets.
    pub(super) fn card(&self) -> Card {
        let usual = Card::new(self.sms, self.capability.0 * 10 + self.capability.1);
        let halves = self.name.contains("GeForce") || ["NVIDIA L40", "NVIDIA A10G"].contains(&&*self.name);
        let halves_f32_sums = usual.halves_f32_sums && halves;
        Card { halves_f32_sums, shared: self.shared_of_sm as usize, ..usual }
    }

    /// For people: name and ordinal.
    pub(super) fn label(&self) -> String {
        format!("{} (cuda:{})", self.name, self.ordinal)
    }

    /// Whether it runs the kernels of a file. Of `*_hopper.cu` there is code for sm_90a alone, and the driver of another card
    /// refuses to load that.
    pub(super) fn runs(&self, file: &str) -> bool {
        self.capability == (9, 0) || !file.ends_with("_hopper")
    }

    /// Whether this program has code for the card, whose `archs` are 80 for sm_80 and so on.
    pub(super) fn check(&self, archs: &[u32]) -> Result<(), DeviceError> {
        let (major, minor) = self.capability;
        let unavailable = |what| Err(DeviceError::Unavailable(format!("{}: {what}", self.label())));
        if major < 8 {
            return unavailable(format!("compute capability {major}.{minor}, needs 8.0 or newer (RTX 30, A100)"));
        }
        let lowest = archs.iter().min().copied().unwrap_or(u32::MAX);
        if major * 10 + minor < lowest {
            let what = format!("compute capability {major}.{minor}, this edm2k was compiled for {lowest} and newer");
            return unavailable(what + " (EDM2K_CUDA_ARCHS)");
        }
        Ok(())
    }
}

/// Text of a driver's error: its name and meaning.
pub(super) fn describe(error: DriverError) -> String {
    let text = |s: Result<&std::ffi::CStr, DriverError>| s.ok().map(|s| s.to_string_lossy().into_owned());
    match (text(error.error_name()), text(error.error_string())) {
        (Some(name), Some(meaning)) => format!("{name}, {meaning}"),
        _ => format!("driver error {}", error.0 as u32),
    }
}

/// Loads the driver, once.
fn start_driver() -> Result<(), DeviceError> {
    let unavailable = |what: String| Err(DeviceError::Unavailable(what));
    // SAFETY: opens the library as any of cudarc's functions would, which panic where it is missing.
    if !unsafe { sys::is_culib_present() } {
        return match system::why_not_loaded(system::CUDA_DRIVER) {
            Some(why) => unavailable(format!("the NVIDIA driver does not load: {why}")),
            None => Err(DeviceError::NoDriver { library: system::CUDA_DRIVER }),
        };
    }
    // SAFETY: it loads, as was seen above.
    let library = unsafe { sys::culib() };
    // SAFETY: what is found is not called.
    let lacks = |name: &&&str| unsafe { library.get::<fn()>(name.as_bytes()) }.is_err();
    let has_all = |names: &[&str]| match names.iter().find(lacks) {
        Some(name) => unavailable(format!("the NVIDIA driver does not load: its library has no function {name}")),
        None => Ok(()),
    };
    let (first, others) = FUNCTIONS.split_at(4);
    has_all(first)?;
    match result::init() {
        Ok(()) => {}
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => {
            return Err(DeviceError::Absent("no NVIDIA GPU found".into()));
        }
        Err(e) => return unavailable(format!("the NVIDIA driver does not start: {}", describe(e))),
    }
    let version = driver_version();
    if version < OLDEST_DRIVER {
        let [found, needed] = [version, OLDEST_DRIVER].map(in_words);
        return unavailable(format!("the NVIDIA driver is for CUDA {found}, needs {needed} or newer"));
    }
    has_all(others)
}

/// The newest CUDA that the driver knows, as it counts; 0 if it does not say.
pub(super) fn driver_version() -> c_int {
    let mut version: c_int = 0;
    // SAFETY: writes one integer; the library is loaded, and has the function.
    let told = unsafe { sys::cuDriverGetVersion(&mut version) }.result();
    told.map_or(0, |()| version)
}

/// CUDA's version as people write it.
pub(super) fn in_words(version: c_int) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

pub(super) fn card_info(ordinal: usize) -> Result<(sys::CUdevice, CardInfo), DriverError> {
    let device = result::device::get(ordinal as c_int)?;
    // SAFETY: `device` is one.
    let attribute = |which| unsafe { result::device::get_attribute(device, which) }.map(|value| value.max(0) as u32);
    let info = CardInfo {
        ordinal,
        name: result::device::get_name(device)?,
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        sms: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
        // SAFETY: `device` is one.
        memory: unsafe { result::device::total_mem(device)? } as u64,
        shared: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        shared_of_sm: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?,
    };
    Ok((device, info))
}

/// The GPUs of this machine, in the driver's order, of any age.
///
/// # Errors
/// `NoDriver`; `Absent`: the driver finds none; `Unavailable`: it does not start.
pub fn devices() -> Result<Vec<CardInfo>, DeviceError> {
    start_driver()?;
    let count = result::device::get_count();
    let list = count.and_then(|n| (0..n as usize).map(|i| Ok(card_info(i)?.1)).collect::<Result<Vec<_>, _>>());
    list.map_err(|e| DeviceError::Unavailable(format!("the NVIDIA driver lists no devices: {}", describe(e))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card(capability: (u32, u32)) -> CardInfo {
        let (ordinal, name) = (1, "NVIDIA Test 1".into());
        CardInfo { ordinal, name, capability, sms: 1, memory: 0, shared: 0, shared_of_sm: 0 }
    }

    #[test]
    fn code_for_hopper_alone_is_loaded_on_hopper_alone() {
        for capability in [(8, 0), (8, 6), (8, 9), (10, 0), (12, 0)] {
            assert!(card(capability).runs("conv_fprop") && !card(capability).runs("conv_hopper"), "{capability:?}");
        }
        assert!(card((9, 0)).runs("conv_fprop") && card((9, 0)).runs("limits_hopper"));
    }

    #[test]
    fn sums_are_in_two_levels_on_cards_that_halve_the_rate_of_f32() {
        let halves = |name: &str, capability| CardInfo { name: name.into(), ..card(capability) }.card().halves_f32_sums;
        for (name, capability) in [
            ("GeForce RTX 3090", (8, 6)),
            ("GeForce RTX 4060 Ti", (8, 9)),
            ("GeForce RTX 5090", (12, 0)),
            ("L40", (8, 9)),
        ] {
            assert!(halves(&format!("NVIDIA {name}"), capability), "{name}");
        }
        for (name, capability) in
            [("RTX A6000", (8, 6)), ("L40S", (8, 9)), ("RTX 6000 Ada Generation", (8, 9)), ("H100 80GB HBM3", (9, 0))]
        {
            assert!(!halves(&format!("NVIDIA {name}"), capability), "{name}");
        }
    }

    #[test]
    fn the_driver_is_asked_for_all_functions_that_the_emulators_has() {
        let source = include_str!("../../../../tests/driver.cpp");
        let words = source.split(|c: char| !(c.is_alphanumeric() || c == '_'));
        let of_the_driver =
            |word: &&str| word.strip_prefix("cu").is_some_and(|rest| rest.starts_with(char::is_uppercase));
        let defined: std::collections::BTreeSet<_> = words.filter(of_the_driver).collect();
        assert_eq!(defined, FUNCTIONS.into());
    }

    #[test]
    fn cards_without_code_are_named_with_what_they_are_and_what_is_needed() {
        let message = |capability, archs| card(capability).check(archs).unwrap_err().to_string();
        let too_old = "NVIDIA Test 1 (cuda:1): compute capability 7.5, needs 8.0 or newer (RTX 30, A100)";
        assert_eq!(message((7, 5), &[80, 89]), too_old);
        let no_code = "NVIDIA Test 1 (cuda:1): compute capability 8.6, this edm2k was compiled for 89 and newer \
                       (EDM2K_CUDA_ARCHS)";
        assert_eq!(message((8, 6), &[89, 90]), no_code);
        for capability in [(8, 9), (9, 0), (10, 3), (12, 0)] {
            assert_eq!(card(capability).check(&[89, 120]), Ok(()));
        }
    }
}
