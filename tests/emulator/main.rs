//! The emulator's checks each catch a planted bug and pass its clean twin; `ptx.cuh` computes what
//! plain loops compute; the 16-bit types have CUDA's bits; two real kernels are right. What Hopper adds is in
//! hopper.rs, and what docs/first-kernel.md says of the emulator in first_kernel.rs.

mod first_kernel;
mod hopper;

use std::sync::Once;
use std::time::Duration;

use edm2k::backend::gpu::emulated::{Arg, Build, Counters, EmulatedMemory, Emulator, EmulatorError, ThreadOrder};
use edm2k::backend::gpu::launch::DevicePtr;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

const ORDERS: [ThreadOrder; 3] = [ThreadOrder::Forward, ThreadOrder::Reversed, ThreadOrder::Random(7)];
const BUILDS: [Build; 2] = [Build::Normal, Build::Checked];

/// Loads a device; one OS thread, so that errors and counts are the same in every run. Ends the
/// process if the tests hang: a barrier that waits for ever must fail them.
fn device(build: Build, order: ThreadOrder) -> Emulator {
    static WATCHDOG: Once = Once::new();
    WATCHDOG.call_once(|| {
        std::thread::spawn(|| {
            std::thread::sleep(Duration::from_secs(900));
            eprintln!("the emulator's tests hang");
            std::process::abort();
        });
    });
    Emulator::new(build).unwrap().with_order(order).with_threads(1)
}

/// xorshift64*: values that differ from each other, the same in every run.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    /// Uniform in [-1, 1).
    fn float(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
    fn halves(&mut self, n: usize) -> Vec<f16> {
        (0..n).map(|_| f16::from_f32(self.float())).collect()
    }
}

fn filled<T: bytemuck::NoUninit>(device: &Emulator, values: &[T]) -> EmulatedMemory {
    let memory = device.alloc(size_of_val(values)).unwrap();
    memory.upload(0, values).unwrap();
    memory
}

fn read<T: bytemuck::Pod>(memory: &EmulatedMemory) -> Vec<T> {
    let mut values = vec![T::zeroed(); memory.bytes() / size_of::<T>()];
    memory.download(0, &mut values).unwrap();
    values
}

fn launch(
    d: &Emulator,
    kernel: &str,
    grid: u32,
    block: u32,
    shared: u32,
    args: &[Arg],
) -> Result<Counters, EmulatorError> {
    // SAFETY: the tests' kernels stay within their arguments, or are planted to be caught.
    unsafe { d.launch(kernel, [grid, 1, 1], [block, 1, 1], shared, args) }
}

// ---- planted bugs ---------------------------------------------------------------------------------

/// `struct Plant` of selftest.cu.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Plant {
    out: DevicePtr,
    input: DevicePtr,
    scratch: DevicePtr,
    ticket: DevicePtr,
    n: i32,
    zero: i32,
    one: i32,
    padding: i32,
}

/// How a planted bug shows.
#[derive(Clone, Copy, Debug)]
enum Shows {
    /// Not at all in this build.
    Nowhere,
    /// As an error that contains these words.
    Error(&'static str),
    /// As a wrong result.
    Result,
    /// As NaN, the poison, in the result.
    Poison,
    /// As bank conflicts, so many.
    Conflicts(u64),
}

/// What the launch said, whether the result was right, and whether there was NaN in it.
fn run_plant(d: &Emulator, kernel: &str) -> (Result<Counters, EmulatorError>, bool, bool) {
    // 250 floats end within the last 256-byte unit of their allocation.
    let n: usize = if kernel.contains("by_one") { 250 } else { 256 };
    let shared = match kernel {
        k if k.contains("ldmatrix") => 1024,
        k if k.contains("dynamic") => 256,
        _ => 0,
    };
    let input: Vec<f32> = (0..n).map(|i| 1.0 + i as f32).collect();
    let (out, x, scratch) = (d.alloc(4 * n).unwrap(), filled(d, &input), d.alloc(4 * n).unwrap());
    if kernel.starts_with("block_race") {
        scratch.upload(0, &[0f32]).unwrap();
    }
    let ticket = filled(d, &[0i32]);
    let [out_at, input_at, scratch_at, ticket_at] = [&out, &x, &scratch, &ticket].map(EmulatedMemory::ptr);
    let plant = Plant {
        out: out_at,
        input: input_at,
        scratch: scratch_at,
        ticket: ticket_at,
        n: n as i32,
        zero: 0,
        one: 1,
        padding: 0,
    };
    let d = d.clone().with_clusters_of(if kernel.starts_with("cluster") { 4 } else { 1 });
    let result = launch(&d, kernel, 4, 64, shared, &[Arg::of(&plant)]);
    let y: Vec<f32> = read(&out);
    let right = y.iter().zip(&input).all(|(y, x)| *y == 2.0 * x);
    (result, right, y.iter().any(|y| y.is_nan()))
}

#[test]
fn each_planted_bug_is_caught_and_its_clean_twin_passes_in_all_thread_orders() {
    use Shows::*;
    #[rustfmt::skip]
    let bugs: &[(&str, Shows, Shows)] = &[
        // kernel                   normal build                     checked build
        ("unwritten_shared",        Poison,                          Error("read of shared memory that nobody has written")),
        ("unwritten_global",        Poison,                          Poison),
        ("global_overrun",          Error("256 bytes past the end of an allocation of 1024 bytes"), Error("write of 4 bytes, 256 bytes past the end")),
        ("global_overrun_by_one",   Nowhere,                         Error("write of 4 bytes, 0 bytes past the end of an allocation of 1000 bytes")),
        ("global_underrun",         Nowhere,                         Error("read of 4 bytes, 4 bytes before an allocation of 1024 bytes")),
        ("null_pointer",            Error("a null pointer"),         Error("a null pointer")),
        ("shared_overrun",          Nowhere,                         Error("index out of the array's bounds")),
        ("shared_overrun_by_pointer", Nowhere,                       Error("write of 4 bytes, 0 bytes past the end of the shared array s of 256 bytes")),
        ("dynamic_shared_overrun",  Error("past the end of dynamic shared memory of 256 bytes"), Error("past the end of dynamic shared memory of 256 bytes")),
        ("missing_barrier",         Poison,                          Error("shared memory")),
        ("overwritten_too_early",   Result,                          Error("race:")),
        ("missing_syncwarp",        Poison,                          Error("shared memory")),
        ("write_write_race",        Nowhere,                         Error("race: write of byte ")),
        ("one_way_race",            Nowhere,                         Error("race: ")),
        ("one_way_race_in_warp",    Nowhere,                         Error("race: ")),
        ("block_race",              Nowhere,                         Error("race between blocks: read of bytes 0..+4")),
        ("atomic_race",             Nowhere,                         Error("race: ")),
        ("missing_wait",            Poison,                          Error("that a cp.async is still writing")),
        ("missing_commit",          Error("left the kernel with this cp.async in flight"), Error("that a cp.async is still writing")),
        ("copy_from_outside",       Error("0 bytes past the end of an allocation"), Error("read of 4 bytes, 0 bytes past the end of an allocation")),
        ("misaligned_copy",         Error("cp.async of 16 bytes: the destination is not aligned"), Error("cp.async of 16 bytes: the destination is not aligned")),
        ("misaligned_ldmatrix",     Error("not a multiple of 16"),   Error("not a multiple of 16")),
        ("misaligned_vector",       Error("past the end"),           Error("misaligned access")),
        ("divergent_barrier",       Error("divergent __syncthreads: waits for thread"), Error("divergent __syncthreads: waits for thread")),
        ("mixed_barriers",          Error("mixed barriers: thread"), Error("mixed barriers: thread")),
        ("exited_thread",           Error("waits for thread (63,0,0), which has left the kernel"), Error("waits for thread (63,0,0), which has left the kernel")),
        ("exited_lanes",            Error("reads lane 24, which has left the kernel"), Error("reads lane 24, which has left the kernel")),
        ("same_place_store",        Result,                          Result),
        ("store_in_turns",          Nowhere,                         Error("race: write of byte ")),
        ("no_fence",                Nowhere,                         Error("race between blocks: read of bytes ")),
        ("fence_too_early",         Nowhere,                         Error("race between blocks: read of bytes ")),
        ("poison_in_maximum",       Poison,                          Poison),
        ("half_poison_in_maximum",  Poison,                          Poison),
        ("poison_in_every_extreme", Poison,                          Poison),
        ("missing_lanes",           Error("divergent shuffle: waits for thread"), Error("divergent shuffle: waits for thread")),
        ("mixed_collectives",       Error("mixed collectives: "),    Error("mixed collectives: ")),
        ("lane_not_in_mask",        Error("lane 3 is not in its mask 0xfffffff7"), Error("lane 3 is not in its mask 0xfffffff7")),
        ("shuffle_from_absent_lane",Error("reads lane 16, which is not in the mask"), Error("reads lane 16, which is not in the mask")),
        ("shift_too_far",           Nowhere,                         Error("shift by")),
        ("cast_out_of_range",       Nowhere,                         Error("float to integer conversion out of range")),
        ("division_by_zero",        Error("integer division by zero"), Error("integer division by zero")),
        ("stack_overflow",          Error("stack overflow"),         Error("stack overflow")),
        ("trap",                    Error("__trap() was called"),    Error("__trap() was called")),
        // 4 blocks x 32 loads of a column, 31 wavefronts too many each.
        ("bank_conflicts",          Nowhere,                         Conflicts(4 * 32 * 31)),
        // 4 blocks x 2 warps, 8 rows in one bank group.
        ("ldmatrix_bank_conflicts", Conflicts(4 * 2 * 7),            Conflicts(4 * 2 * 7)),
        ("cluster_read_too_early",  Poison,                          Error("read of shared memory that nobody has written, byte ")),
        ("cluster_overwritten_too_early", Result,                    Error("race between blocks of a cluster: ")),
        ("cluster_block_leaves",    Error("of the cluster, which has ended"), Error("of the cluster, which has ended")),
        ("cluster_block_leaves_early", Error("has ended"),           Error("has ended")),
        ("cluster_meeting_to_come", Nowhere,                         Error("read of ")),
        ("cluster_rank_beyond",     Error("rank 4, but the cluster has 4 blocks"), Error("rank 4, but the cluster has 4 blocks")),
        ("cluster_load_beyond",     Error("0 bytes past the end of the shared array s of 256 bytes"), Error("0 bytes past the end of the shared array s of 256 bytes")),
        ("cluster_misaligned_load", Error("not a multiple of 16"),   Error("not a multiple of 16")),
        ("cluster_arrives_twice",   Error("the thread has arrived before"), Error("the thread has arrived before")),
        ("cluster_wait_alone",      Error("cluster_wait: the thread has not arrived"), Error("cluster_wait: the thread has not arrived")),
        ("cluster_mixed_arrivals",  Error("another thread of the warp arrives by another cluster_arrive"), Error("another thread of the warp arrives by another cluster_arrive")),
        ("cluster_exited_thread",   Error("waits for thread (63,0,0) of block (2,0,0), which has left"), Error("waits for thread (63,0,0) of block (2,0,0), which has left")),
        ("cluster_divergent",       Error("waits for thread (32,0,0) of block (2,0,0), which is in __syncthreads"), Error("waits for thread (32,0,0) of block (2,0,0), which is in __syncthreads")),
    ];
    let source = std::fs::read_to_string("kernels/emulator/selftest.cu").unwrap();
    assert_eq!(source.matches("\nPLANT(").count(), bugs.len(), "every planted bug is in the table");

    for (b, build) in BUILDS.into_iter().enumerate() {
        for order in ORDERS {
            let d = device(build, order);
            for (name, normal, checked) in bugs {
                // That a barrier waits for those who have left is no rule of CUDA's, but one that can be asked for.
                let strict = ["exited_thread", "divergent_barrier", "cluster_exited_thread"];
                let d = d.clone().with_strict_exits(strict.contains(name));
                let shows = [normal, checked][b];
                let (result, right, nan) = run_plant(&d, &format!("{name}_bug"));
                let context =
                    format!("{name}_bug, {build:?}, {order:?}, expected {shows:?}: {result:?}, right: {right}");
                match (shows, &result) {
                    (Nowhere, Ok(_)) => {}
                    (Result, Ok(_)) => assert!(!right, "{context}"),
                    (Poison, Ok(_)) => assert!(nan, "{context}"),
                    (Conflicts(n), Ok(c)) => assert!(right && c.bank_conflicts == *n, "{context}"),
                    (Error(words), Err(EmulatorError::Fault(message))) => {
                        assert!(message.contains(words), "{context}");
                        let place = format!("kernel {name}_bug, block (");
                        assert!(message.starts_with(&place) && message.contains(", thread ("), "{context}");
                        assert_eq!(blamed(message), body(&source, name), "{context}");
                    }
                    _ => panic!("{context}"),
                }
                let (result, right, _) = run_plant(&d, &format!("{name}_ok"));
                let conflicts = result.as_ref().map_or(1, |c| c.bank_conflicts);
                assert!(right && conflicts == 0, "{name}_ok, {build:?}, {order:?}: {result:?}, right: {right}");
            }
        }
    }

    /// The kernel in selftest.cu whose line the message names.
    fn blamed(message: &str) -> String {
        let source = std::fs::read_to_string("kernels/emulator/selftest.cu").unwrap();
        // Of several lines that of the kernel, who called the others.
        let (_, at) =
            message.rsplit_once("kernels/emulator/selftest.cu:").unwrap_or_else(|| panic!("no line: {message}"));
        let line: usize = at.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap();
        let before: Vec<&str> = source.lines().take(line).collect();
        let header = before.iter().rev().find(|l| l.starts_with("template <bool BUG>")).unwrap();
        header.to_string()
    }
    /// The first line of a planted kernel.
    fn body(source: &str, name: &str) -> String {
        source.lines().find(|l| l.contains(&format!(" {name}(Plant p)"))).unwrap().to_string()
    }
}

#[test]
fn barriers_do_not_wait_for_threads_that_have_left() {
    for (build, order) in BUILDS.into_iter().flat_map(|b| ORDERS.map(|o| (b, o))) {
        let (result, right, _) = run_plant(&device(build, order), "exited_thread_bug");
        assert!(right && result.is_ok(), "{build:?}, {order:?}: {result:?}");
    }
}

/// Small allocations where a large one was: what lies behind one is its guard page, not what was freed.
#[test]
fn what_was_freed_hides_no_overrun_of_what_came_after() {
    for build in BUILDS {
        let d = device(build, ThreadOrder::Forward);
        drop(d.alloc(1 << 24).unwrap());
        let mut kept = Vec::new();
        for _ in 0..32 {
            let error = run_plant(&d, "global_overrun_bug").0.unwrap_err().to_string();
            assert!(error.contains("past the end of an allocation of 1024 bytes"), "{build:?}: {error}");
            kept.extend((0..32).map(|_| d.alloc(1024).unwrap()));
        }
    }
}

#[test]
fn a_report_names_the_helper_and_who_calls_it() {
    let source = std::fs::read_to_string("kernels/emulator/selftest.cu").unwrap();
    let line = |text: &str| 1 + source.lines().position(|l| l.starts_with(text)).unwrap();
    let error = run_plant(&device(Build::Checked, ThreadOrder::Forward), "null_pointer_bug").0.unwrap_err().to_string();
    let caller = format!(", called at kernels/emulator/selftest.cu:{}: ", line("PLANT(null_pointer)"));
    assert!(error.contains(&caller), "{error}");
}

/// The product on its own: `simt-check`, without this crate, on kernels that know nothing of either.
#[test]
fn simt_check_runs_other_peoples_kernels_unchanged() {
    let here = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"));
    let tool = here.join("simt-check");
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let words = ["-std=c++17", "-O1", "simt/src/simt-check.cpp", "-pthread", "-ldl", "-o"];
    let made = std::process::Command::new(compiler).args(words).arg(&tool).status().unwrap();
    let simt = std::path::absolute("simt").unwrap();
    let mut run = std::process::Command::new("simt/tests/run");
    let run = run.arg(&tool).env("SIMT_HOME", simt).env("KEEP", here.join("simt-check.d")).output().unwrap();
    let said = String::from_utf8_lossy(&run.stdout);
    assert!(made.success() && run.status.success(), "{said}");
}

#[test]
fn the_checked_build_refuses_host_memory() {
    let d = device(Build::Checked, ThreadOrder::Forward);
    let (out, host) = (d.alloc(1024).unwrap(), vec![1f32; 256]);
    let input: DevicePtr = bytemuck::cast(host.as_ptr() as u64);
    let plant =
        Plant { out: out.ptr(), input, scratch: out.ptr(), ticket: out.ptr(), n: 256, zero: 0, one: 1, padding: 0 };
    let error = launch(&d, "trap_ok", 4, 64, 0, &[Arg::of(&plant)]).unwrap_err().to_string();
    assert!(error.contains("which is no memory of this device"), "{error}");
}

#[test]
fn launches_are_refused_that_a_device_would_refuse() {
    for build in BUILDS {
        let d = device(build, ThreadOrder::Forward);
        let x = filled(&d, &[0u8; 64]);
        let args = [x.arg(), x.arg(), Arg::of(&8i32)];
        let refused = |kernel, grid: [u32; 3], block: [u32; 3], shared, args: &[Arg], words: &str| {
            // SAFETY: refused before it runs.
            let error = unsafe { d.launch(kernel, grid, block, shared, args) }.unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        };
        let one = [1, 1, 1];
        refused("no_such_kernel", one, one, 0, &args, "no kernel named no_such_kernel");
        refused("softmax", one, [1025, 1, 1], 0, &args, "1025x1x1 threads; at most 1024");
        refused("softmax", one, [32, 33, 1], 0, &args, "32x33x1 threads");
        refused("softmax", one, [1, 1, 65], 0, &args, "1x1x65 threads");
        refused("softmax", one, [0, 1, 1], 0, &args, "0x1x1 threads");
        refused("softmax", [0, 1, 1], one, 0, &args, "0x1x1 blocks");
        refused("softmax", [1, 65536, 1], one, 0, &args, "1x65536x1 blocks");
        refused("softmax", one, one, (48 << 10) + 1, &args, "49153 bytes of dynamic shared memory, 49152 allowed");
        refused("softmax", one, one, 0, &args[..2], "arguments of [8, 8] bytes, expected [8, 8, 4]");
        let error = d.allow_shared("softmax", (99 << 10) + 1).unwrap_err().to_string();
        assert!(error.contains("at most 101376"), "{error}");
        let error = launch(&d, "softmax", 1, 128, 48 << 10, &args).unwrap_err().to_string();
        assert!(error.contains("32 bytes of static and 49152 of dynamic shared memory, more than 48 KB"), "{error}");
        launch(&d, "softmax", 1, 128, (48 << 10) - 32, &args).unwrap();
        d.allow_shared("softmax", 99 << 10).unwrap();
        let error = launch(&d, "softmax", 1, 128, 99 << 10, &args).unwrap_err().to_string();
        assert!(error.contains("32 bytes of static and 101376 of dynamic shared memory, more than 99 KB"), "{error}");
        launch(&d, "softmax", 1, 128, 64 << 10, &args).unwrap();
        for (blocks, cluster) in [(4, 3), (16, 16), (4, 0)] {
            let error = launch(&d.clone().with_clusters_of(cluster), "softmax", blocks, 128, 0, &args).unwrap_err();
            let words = format!("clusters of {cluster}x1x1 blocks in a grid of {blocks}x1x1; at most 8 blocks");
            assert!(matches!(&error, EmulatorError::Refused(e) if e.contains(&words)), "{error}");
        }
        assert!(x.upload(60, &[0u8; 5]).is_err());
        assert!(d.kernels().contains(&"softmax".to_string()));
    }
}

#[test]
fn blocks_on_several_os_threads_give_the_same_result() {
    let halves = Random(1).halves(64 * 1000);
    let results = [1, 2, 5].map(|threads| {
        let d = device(Build::Normal, ThreadOrder::Random(3)).with_threads(threads);
        let (x, y, n) = (filled(&d, &halves), d.alloc(2 * halves.len()).unwrap(), 1000i32);
        for _ in 0..20 {
            launch(&d, "softmax", 64, 128, 0, &[x.arg(), y.arg(), Arg::of(&n)]).unwrap();
        }
        read::<u16>(&y)
    });
    assert!(results[0] == results[1] && results[0] == results[2]);
}

// ---- 16-bit types -----------------------------------------------------------------------------------

#[test]
fn every_half_and_bf16_widens_exactly() {
    let d = device(Build::Normal, ThreadOrder::Forward);
    let (h, b) = (d.alloc(4 << 16).unwrap(), d.alloc(4 << 16).unwrap());
    launch(&d, "probe_widen", 256, 256, 0, &[h.arg(), b.arg()]).unwrap();
    for (i, (h, b)) in read::<f32>(&h).into_iter().zip(read::<f32>(&b)).enumerate() {
        let expected = f16::from_bits(i as u16).to_f32();
        // 0xffff is the emulator's poison, and stays it.
        let nan = if i == 0xffff { u32::MAX } else { 0x7fff_ffff };
        let bits = if expected.is_nan() { nan } else { expected.to_bits() };
        assert_eq!(h.to_bits(), bits, "half {i:#06x}");
        assert_eq!(b.to_bits(), (i as u32) << 16, "bf16 {i:#06x}");
    }
}

/// Every sign and exponent with every mantissa that rounding can tell apart, and 2^24 floats of any kind, against the crate `half`
/// (for bf16: the definition), and the emulator's integer path against the processor's instruction.
///
/// A rounding keeps upper bits, looks at the next one, and asks of the rest whether it is zero. A normal half keeps the upper
/// 19 bits, all else fewer: so all 2^20 patterns of the upper 20 bits, with lower ones that are zero, that are not, and that carry.
#[test]
fn every_float_narrows_to_the_nearest_even_half_and_bf16() {
    const CHUNK: usize = 1 << 18; // all that belongs to it stays in the cache
    const PER_THREAD: i32 = (CHUNK / (16 * 128)) as i32;
    let d = Emulator::new(Build::Normal).unwrap();
    let (bits, differ) = (d.alloc(4 * CHUNK).unwrap(), filled(&d, &[0u32]));
    let (h, b) = (d.alloc(2 * CHUNK).unwrap(), d.alloc(2 * CHUNK).unwrap());
    let (mut floats, mut halves) = (vec![0f32; CHUNK], vec![f16::ZERO; CHUNK]);
    let (mut got, mut expected) = (vec![0u16; CHUNK], vec![0u16; CHUNK]);
    let compare = |name: &str, floats: &[f32], got: &[u16], expected: &[u16]| {
        if let Some(i) = (got != expected).then(|| (0..CHUNK).find(|&i| got[i] != expected[i])).flatten() {
            let (x, got, expected) = (floats[i], got[i], expected[i]);
            panic!("{name} of {x:e} = {:#010x} is {got:#06x}, expected {expected:#06x}", x.to_bits());
        }
    };
    let mut random = Random(8);
    let tails = [0, 1, 0x7ff, 0x800, 0x801, 0xfff];
    let mut patterns = (0..1u32 << 20)
        .flat_map(|upper| tails.map(|tail| upper << 12 | tail))
        .chain(std::iter::from_fn(|| Some(random.bits() as u32)));
    let chunks = ((tails.len() << 20) + (1 << 24)) / CHUNK;
    for _ in 0..chunks {
        floats.fill_with(|| f32::from_bits(patterns.next().unwrap()));
        bits.upload(0, &floats).unwrap();
        launch(&d, "probe_narrow", 16, 128, 0, &[bits.arg(), h.arg(), b.arg(), Arg::of(&PER_THREAD)]).unwrap();
        launch(&d, "probe_portable", 16, 128, 0, &[bits.arg(), differ.arg(), Arg::of(&PER_THREAD)]).unwrap();

        // What the emulator calls poison stays it.
        let nan = |x: &f32| if x.to_bits() >= 0xffff_0000 { 0xffff } else { 0x7fff };
        halves.convert_from_f32_slice(&floats);
        for ((e, x), h) in expected.iter_mut().zip(&floats).zip(&halves) {
            *e = if x.is_nan() { nan(x) } else { h.to_bits() };
        }
        h.download(0, &mut got).unwrap();
        compare("half", &floats, &got, &expected);

        for (e, x) in expected.iter_mut().zip(&floats) {
            // The bits that go, against half of their range; a tie goes to even.
            let (kept, rest) = (x.to_bits() >> 16, x.to_bits() & 0xffff);
            let up = u32::from(rest > 0x8000) | (u32::from(rest == 0x8000) & kept);
            *e = if x.is_nan() { nan(x) } else { (kept + up) as u16 };
        }
        b.download(0, &mut got).unwrap();
        compare("bf16", &floats, &got, &expected);
    }
    launch(&d, "probe_portable_halves", 512, 128, 0, &[differ.arg()]).unwrap();
    assert_eq!(read::<u32>(&differ), [0], "integer conversions that differ from the processor's");
}

/// The value 2^-48 * x, as a half: nearest, ties to even.
fn half_of_fixed(x: i128) -> f16 {
    let (sign, mut magnitude) = (if x < 0 { 0x8000u16 } else { 0 }, x.unsigned_abs());
    let exponent = (128 - magnitude.leading_zeros() as i32 - 49).max(-14); // of the leading bit
    let drop = (exponent - 10 + 48) as u32; // bits below the half's last
    let (rest, half) = (magnitude & ((1 << drop) - 1), 1u128 << (drop - 1));
    magnitude >>= drop;
    if rest > half || (rest == half && magnitude & 1 == 1) {
        magnitude += 1;
    }
    // The hidden bit counts as one in the exponent, a carry out of the mantissa as well.
    let bits = magnitude as i64 + (i64::from(exponent + 14) << 10);
    f16::from_bits(sign | bits.min(0x7c00) as u16)
}

#[test]
fn half_arithmetic_is_correctly_rounded() {
    let n = 1 << 16;
    let mut random = Random(2);
    let mut finite = |_: usize| loop {
        let h = f16::from_bits(random.bits() as u16);
        if h.is_finite() {
            return h;
        }
    };
    let d = device(Build::Normal, ThreadOrder::Forward);
    for _ in 0..8 {
        let [x, y, z]: [Vec<f16>; 3] = std::array::from_fn(|_| (0..n).map(&mut finite).collect());
        let inputs = [&x, &y, &z].map(|v| filled(&d, v));
        let outputs: [EmulatedMemory; 4] = std::array::from_fn(|_| d.alloc(2 * n).unwrap());
        let args: Vec<Arg> = inputs.iter().chain(&outputs).map(EmulatedMemory::arg).collect();
        launch(&d, "probe_half_math", 256, 256, 0, &args).unwrap();
        let [fma, sum, product, copy] = outputs.map(|m| read::<f16>(&m));
        for i in 0..n {
            // Halves are multiples of 2^-24, their products of 2^-48, all below 2^32.
            let fixed = |h: f16| (h.to_f64() * 2f64.powi(24)) as i128;
            let (fx, fy, fz) = (fixed(x[i]), fixed(y[i]), fixed(z[i]));
            let exact = [fx * fy + (fz << 24), (fx + fy) << 24, fx * fy];
            for (name, got, exact) in
                [("fma", fma[i], exact[0]), ("sum", sum[i], exact[1]), ("product", product[i], exact[2])]
            {
                assert!(
                    got == half_of_fixed(exact),
                    "{name} of {} {} {}: {got}, expected {}",
                    x[i],
                    y[i],
                    z[i],
                    half_of_fixed(exact)
                );
            }
            assert_eq!(copy[i].to_bits(), x[i].to_bits());
        }
    }
}

#[test]
fn operators_of_halves_round_after_each_operation() {
    let n = 1 << 16;
    let mut random = Random(5);
    let d = device(Build::Normal, ThreadOrder::Forward);
    for _ in 0..4 {
        let mut finite = |_: usize| loop {
            let h = f16::from_bits(random.bits() as u16);
            if h.is_finite() && h != f16::ZERO {
                return h;
            }
        };
        let [x, y, z]: [Vec<f16>; 3] = std::array::from_fn(|_| (0..n).map(&mut finite).collect());
        let (inputs, out) = ([&x, &y, &z].map(|v| filled(&d, v)), d.alloc(5 * 2 * n).unwrap());
        let args: Vec<Arg> = inputs.iter().chain([&out]).map(EmulatedMemory::arg).collect();
        launch(&d, "probe_operators_f16", 256, 256, 0, &args).unwrap();
        let got: Vec<f16> = read(&out);
        // Halves are multiples of 2^-24; a quotient is what a double says, and a last bit that says "not exactly".
        let fixed = |h: f16| (h.to_f64() * 2f64.powi(24)) as i128;
        for i in 0..n {
            let (fx, fy) = (fixed(x[i]), fixed(y[i]));
            let scaled = x[i].to_f64() / y[i].to_f64() * 2f64.powi(48);
            let inexact = scaled.fract() != 0.0 || (fx << 48) % fy != 0;
            let quotient = (scaled.abs().trunc() as i128 | i128::from(inexact)) * scaled.signum() as i128;
            let product = half_of_fixed(fx * fy);
            let again = if product.is_finite() { half_of_fixed((fixed(product) + fixed(z[i])) << 24) } else { product };
            let exact = [(fx + fy) << 24, (fx - fy) << 24, fx * fy, quotient].map(half_of_fixed);
            for (k, expected) in exact.into_iter().chain([again]).enumerate() {
                let (got, x, y) = (got[k * n + i], x[i], y[i]);
                assert_eq!(got, expected, "operation {k} of {x} {y} {}", z[i]);
            }
        }
    }
}

#[test]
fn operators_of_bf16_round_after_each_operation() {
    let n = 1 << 16;
    let mut random = Random(6);
    // Exponents near 0: then a double holds sums, differences and products exactly.
    let mut near_one = |_: usize| bf16::from_bits((random.bits() as u16 & 0x87ff) | 0x3c00);
    let [x, y, z]: [Vec<bf16>; 3] = std::array::from_fn(|_| (0..n).map(&mut near_one).collect());
    let d = device(Build::Normal, ThreadOrder::Forward);
    let (inputs, out) = ([&x, &y, &z].map(|v| filled(&d, v)), d.alloc(5 * 2 * n).unwrap());
    let args: Vec<Arg> = inputs.iter().chain([&out]).map(EmulatedMemory::arg).collect();
    launch(&d, "probe_operators_bf16", 256, 256, 0, &args).unwrap();
    let got: Vec<bf16> = read(&out);
    let nearest = |x: f64| {
        // The 45 bits that go, against half of their range.
        let (kept, rest) = (x.to_bits() >> 45, x.to_bits() & ((1 << 45) - 1));
        let up = u64::from(rest > 1 << 44) | (u64::from(rest == 1 << 44) & kept & 1);
        bf16::from_f64(f64::from_bits((kept + up) << 45))
    };
    for i in 0..n {
        let (a, b, c) = (x[i].to_f64(), y[i].to_f64(), z[i].to_f64());
        let exact = [a + b, a - b, a * b, a / b, nearest(a * b).to_f64() + c].map(nearest);
        for (k, expected) in exact.into_iter().enumerate() {
            assert_eq!(got[k * n + i], expected, "operation {k} of {a} {b} {c}");
        }
    }
}

/// A product that lies between two bf16, and an addend that a double cannot hold beside it: the
/// addend's sign decides.
#[test]
fn bf16_fma_sees_the_smallest_addend() {
    let d = device(Build::Normal, ThreadOrder::Forward);
    let (ulp, tiny) = (2f32.powi(-7), 2f32.powi(-100));
    let addends = [tiny, 0.0, -tiny].map(bf16::from_f32);
    let (x, y) = (filled(&d, &[bf16::from_f32(1.0 + ulp); 3]), filled(&d, &[bf16::from_f32(1.5); 3]));
    let (z, out) = (filled(&d, &addends), d.alloc(6).unwrap());
    launch(&d, "probe_bf16_fma", 1, 3, 0, &[x.arg(), y.arg(), z.arg(), out.arg()]).unwrap();
    // 1.5 + 1.5 ulp; the tie goes to the even 1.5 + 2 ulp.
    let expected = [2.0, 2.0, 1.0].map(|n| bf16::from_f32(1.5 + n * ulp));
    assert_eq!(read::<bf16>(&out), expected);
}

// ---- ptx.cuh against plain loops ----------------------------------------------------------------------

/// d + a b of 16 x 16 and 16 x 8, exactly enough.
fn product16(a: &[f32], b: &[f32], d: &[f32]) -> Vec<f64> {
    (0..128)
        .map(|i| {
            (0..16).map(|k| f64::from(a[i / 8 * 16 + k]) * f64::from(b[k * 8 + i % 8])).sum::<f64>() + f64::from(d[i])
        })
        .collect()
}

#[test]
fn mma_is_the_product_of_its_fragments() {
    for (build, order) in BUILDS.into_iter().flat_map(|b| ORDERS.map(|o| (b, o))) {
        let d = device(build, order);
        let mut random = Random(3);
        let mut values = |n: usize| (0..n).map(|_| random.float()).collect::<Vec<f32>>();
        let (a, b, c) = (values(256), values(128), values(128));
        let check = |name: &str, got: Vec<f32>, expected: Vec<f64>, bound: f64| {
            let worst = (0..128)
                .max_by(|&i, &j| {
                    (f64::from(got[i]) - expected[i]).abs().total_cmp(&(f64::from(got[j]) - expected[j]).abs())
                })
                .unwrap();
            let error = (f64::from(got[worst]) - expected[worst]).abs();
            assert!(error <= bound, "{name}: element {worst} is {}, expected {}", got[worst], expected[worst]);
        };
        let launch_on = |kernel: &str, a: &EmulatedMemory, b: &EmulatedMemory, c: &EmulatedMemory| {
            launch(&d, kernel, 1, 32, 0, &[a.arg(), b.arg(), c.arg()]).unwrap();
        };
        let to_f32 = |v: &[f16]| v.iter().map(|x| x.to_f32()).collect::<Vec<_>>();

        let [ah, bh, ch]: [Vec<f16>; 3] = [&a, &b, &c].map(|v| v.iter().map(|&x| f16::from_f32(x)).collect());
        let out = filled(&d, &c);
        launch_on("probe_mma_f16", &filled(&d, &ah), &filled(&d, &bh), &out);
        // 16 additions in f32 of numbers below 17.
        check("f16", read(&out), product16(&to_f32(&ah), &to_f32(&bh), &c), 17.0 * 16.0 * 6e-8);

        let out = filled(&d, &ch);
        launch_on("probe_mma_f16_f16", &filled(&d, &ah), &filled(&d, &bh), &out);
        // One rounding to half of numbers below 16: half of 2^-7.
        check("f16 accumulators", to_f32(&read(&out)), product16(&to_f32(&ah), &to_f32(&bh), &to_f32(&ch)), 0.0040);

        let [ab, bb]: [Vec<bf16>; 2] = [&a, &b].map(|v| v.iter().map(|&x| bf16::from_f32(x)).collect());
        let [aw, bw] = [&ab, &bb].map(|v| v.iter().map(|x| x.to_f32()).collect::<Vec<_>>());
        let out = filled(&d, &c);
        launch_on("probe_mma_bf16", &filled(&d, &ab), &filled(&d, &bb), &out);
        check("bf16", read(&out), product16(&aw, &bw, &c), 17.0 * 16.0 * 6e-8);
    }
}

#[test]
fn ldmatrix_deals_out_rows_or_columns() {
    let matrices: Vec<u16> = (0..256).map(|i| i * 37).collect();
    for (build, order) in BUILDS.into_iter().flat_map(|b| ORDERS.map(|o| (b, o))) {
        let d = device(build, order);
        let m = filled(&d, &matrices);
        for (count, trans) in [(1, false), (2, false), (4, false), (1, true), (2, true), (4, true)] {
            let out = d.alloc(32 * count * 4).unwrap();
            let kernel = format!("probe_ldmatrix_x{count}{}", if trans { "_trans" } else { "" });
            launch(&d, &kernel, 1, 32, 0, &[m.arg(), out.arg()]).unwrap();
            for (i, word) in read::<u32>(&out).into_iter().enumerate() {
                let (lane, matrix) = (i / count, i % count);
                let (g, t) = (lane / 4, lane % 4);
                let element = |e| {
                    let (row, column) = if trans { (2 * t + e, g) } else { (g, 2 * t + e) };
                    u32::from(matrices[matrix * 64 + row * 8 + column])
                };
                assert_eq!(word, element(0) | element(1) << 16, "{kernel}, lane {lane}, register {matrix}");
            }
        }
    }
}

#[test]
fn cp_async_copies_or_fills_with_zeros() {
    for (build, order) in BUILDS.into_iter().flat_map(|b| ORDERS.map(|o| (b, o))) {
        let d = device(build, order);
        for bytes in [16usize, 8, 4] {
            let input: Vec<u8> = (0..32 * bytes).map(|i| 1 + (i % 255) as u8).collect();
            let (x, y) = (filled(&d, &input), d.alloc(input.len()).unwrap());
            launch(&d, &format!("probe_cp_async_{bytes}"), 1, 32, 0, &[x.arg(), y.arg()]).unwrap();
            for (i, (&y, &x)) in read::<u8>(&y).iter().zip(&input).enumerate() {
                assert_eq!(y, if i / bytes % 2 == 0 { x } else { 0 }, "byte {i} of {bytes}-byte copies");
            }
        }
    }
}

#[test]
fn shuffles_votes_and_reductions() {
    let mut random = Random(4);
    let x: Vec<f32> = (0..32).map(|_| random.float()).collect();
    for (build, order) in BUILDS.into_iter().flat_map(|b| ORDERS.map(|o| (b, o))) {
        let d = device(build, order);
        let (input, out) = (filled(&d, &x), d.alloc(7 * 32 * 4).unwrap());
        launch(&d, "probe_warp", 1, 32, 0, &[input.arg(), out.arg()]).unwrap();
        let y: Vec<f32> = read(&out);
        let (sum, max) = (x.iter().sum::<f32>(), x.iter().copied().fold(f32::MIN, f32::max));
        for lane in 0..32 {
            let segment = lane / 16 * 16;
            assert!((y[lane] - sum).abs() < 32.0 * 16.0 * 6e-8, "sum of 32 numbers below 1, in another order");
            assert_eq!(y[32 + lane], max);
            assert_eq!(y[64 + lane], x[segment + 3]);
            assert_eq!(y[96 + lane], x[if lane - segment >= 3 { lane - 3 } else { lane }]);
            assert_eq!(y[128 + lane], x[if lane - segment < 13 { lane + 3 } else { lane }]);
            assert_eq!(y[160 + lane], x[lane ^ 3]);
            assert_eq!(y[192 + lane], x.iter().filter(|&&x| x > 0.0).count() as f32);
        }
    }
}

// ---- real kernels -------------------------------------------------------------------------------------

/// Relative error in the Euclidean norm, and the worst element.
fn relative_error(got: &[f64], expected: &[f64]) -> (f64, String) {
    let difference: f64 = got.iter().zip(expected).map(|(g, e)| (g - e) * (g - e)).sum();
    let size: f64 = expected.iter().map(|e| e * e).sum();
    let far = |&i: &usize, &j: &usize| (got[i] - expected[i]).abs().total_cmp(&(got[j] - expected[j]).abs());
    let worst = (0..got.len()).max_by(far).unwrap_or(0);
    let error = (difference / size).sqrt();
    // NaN, which poison leaves behind, must not compare as small.
    (
        if error.is_nan() { f64::INFINITY } else { error },
        format!("worst at {worst}: {} instead of {}", got[worst], expected[worst]),
    )
}

#[test]
fn softmax_is_right_on_odd_widths() {
    for (build, order) in BUILDS.into_iter().flat_map(|b| ORDERS.map(|o| (b, o))) {
        let d = device(build, order);
        for n in [1usize, 7, 128, 333] {
            let x = Random(5).halves(3 * n);
            let (input, out) = (filled(&d, &x), d.alloc(2 * x.len()).unwrap());
            let counters = launch(&d, "softmax", 3, 128, 0, &[input.arg(), out.arg(), Arg::of(&(n as i32))]).unwrap();
            let mut expected = Vec::new();
            for row in x.chunks(n) {
                let sum: f64 = row.iter().map(|x| x.to_f64().exp()).sum();
                expected.extend(row.iter().map(|x| x.to_f64().exp() / sum));
            }
            let got: Vec<f64> = read::<f16>(&out).iter().map(|y| y.to_f64()).collect();
            let (error, worst) = relative_error(&got, &expected);
            assert!(error < 5e-4, "rounded to half once: {error:e}, {worst}");
            assert_eq!(counters.bank_conflicts, 0);
        }
    }
}

#[test]
fn gemm_with_mma_ldmatrix_and_cp_async_is_right_on_odd_sizes_without_bank_conflicts() {
    for (build, order) in BUILDS.into_iter().flat_map(|b| ORDERS.map(|o| (b, o))) {
        let d = device(build, order);
        for (m, n, k) in [(64usize, 64usize, 32usize), (1, 1, 8), (70, 130, 200), (65, 3, 72)] {
            let mut random = Random(6);
            let (a, b) = (random.halves(m * k), random.halves(n * k));
            let grid = [n.div_ceil(64) as u32, m.div_ceil(64) as u32, 1];
            let run = |kernel: &str, a: EmulatedMemory, b: EmulatedMemory| {
                let c = d.alloc(2 * m * n).unwrap();
                let sizes = [m, n, k].map(|s| s as i32);
                let args = [a.arg(), b.arg(), c.arg(), Arg::of(&sizes[0]), Arg::of(&sizes[1]), Arg::of(&sizes[2])];
                // SAFETY: the sizes are those of the memory.
                let counters = unsafe { d.launch(kernel, grid, [128, 1, 1], 3 * 8192, &args) }.unwrap();
                assert_eq!(counters.bank_conflicts, 0, "{kernel} {m}x{n}x{k}");
                c
            };
            let expected = |a: &[f64], b: &[f64]| -> Vec<f64> {
                (0..m * n).map(|i| (0..k).map(|j| a[i / n * k + j] * b[i % n * k + j]).sum()).collect()
            };
            let wide = |v: &[f16]| v.iter().map(|x| x.to_f64()).collect::<Vec<_>>();
            let c = run("gemm_f16_64x64x32_s3", filled(&d, &a), filled(&d, &b));
            let (error, worst) = relative_error(&wide(&read(&c)), &expected(&wide(&a), &wide(&b)));
            assert!(error < 5e-4, "f16 {m}x{n}x{k} {build:?} {order:?}, rounded to half once: {error:e}, {worst}");

            let narrow = |v: &[f16]| v.iter().map(|x| bf16::from_f32(x.to_f32())).collect::<Vec<_>>();
            let (a, b) = (narrow(&a), narrow(&b));
            let wide = |v: &[bf16]| v.iter().map(|x| x.to_f64()).collect::<Vec<_>>();
            let c = run("gemm_bf16_64x64x32_s3", filled(&d, &a), filled(&d, &b));
            let (error, worst) = relative_error(&wide(&read(&c)), &expected(&wide(&a), &wide(&b)));
            assert!(error < 4e-3, "bf16 {m}x{n}x{k} {build:?} {order:?}, rounded to bf16 once: {error:e}, {worst}");
        }
    }
}
