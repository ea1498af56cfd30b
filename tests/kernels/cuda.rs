//! A CUDA device as a runtime: order, graphs, memory, faults; and what is said where there is none.
//!
//! The tests need a GPU and say so where there is none. With the feature `emulator` they run too with a driver
//! whose device is the emulator (`driver.cpp`).
#![cfg(feature = "cuda")]

use std::process::Command as Process;
use std::rc::Rc;
use std::time::Instant;

#[cfg(feature = "emulator")]
use crate::common::driver;
use crate::testbed;
use edm2k::backend::gpu::cuda::{Cuda, devices};
use edm2k::backend::gpu::launch::{DevicePtr, Launch};
use edm2k::backend::gpu::pixelwise;
use edm2k::backend::gpu::runtime::{Command, Memory, Runtime};
use edm2k::backend::{DeviceError, Values};
use edm2k::collective::{Alone, Collective, Nccl, nccl};

/// Uniform, other in every place.
fn noise(n: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 56) as u8
    };
    (0..n).map(|_| next()).collect()
}

fn read(memory: &dyn Memory) -> Vec<u8> {
    let mut found = vec![0; memory.bytes()];
    memory.read(0, &mut found).unwrap();
    found
}

fn floats(memory: &dyn Memory) -> Vec<f32> {
    bytemuck::pod_collect_to_vec(&read(memory))
}

fn message<T>(result: Result<T, DeviceError>) -> String {
    result.err().expect("an error").to_string()
}

#[test]
fn without_a_gpu_one_line_says_what_is_missing() {
    match devices() {
        Ok(cards) => {
            let error = message(Cuda::new(cards.len()));
            let last = cards.len() - 1;
            assert_eq!(error, format!("there is no device cuda:{}; the last one is cuda:{last}", cards.len()));
            assert!(
                cards.iter().all(|card| card.sms > 0 && card.memory > 1 << 30 && card.shared >= 99 << 10),
                "{cards:?}"
            );
        }
        Err(error) => {
            use DeviceError as E;
            assert!(matches!(error, E::NoDriver { .. } | E::Absent(_) | E::Unavailable(_)), "{error:?}");
            assert!(error.to_string().contains("NVIDIA") && !error.to_string().contains('\n'), "{error}");
            assert_eq!(Cuda::new(0).err(), Some(error));
        }
    }
}

#[test]
fn memory_keeps_what_was_written_at_any_offset_and_size() {
    let Some(gpu) = testbed::gpu() else { return };
    // Far larger than the ring of uploads, and odd.
    let content = noise((150 << 20) + 7, 3);
    let memory = gpu.allocate(content.len(), "a test").unwrap();
    memory.write(0, &content).unwrap();
    assert!(read(&*memory) == content);
    for (offset, length) in [(0, 1), (5, 3), (255, 257), (1 << 20, 9 << 20), (content.len() - 1, 1), (17, 0)] {
        let piece = noise(length, offset as u64);
        memory.write(offset, &piece).unwrap();
        let mut found = vec![0; length];
        memory.read(offset, &mut found).unwrap();
        assert!(found == piece, "{length} bytes at {offset}");
    }
    assert!(message(memory.write(content.len(), &[0])).contains("copy of 1 bytes at"));
    assert_eq!(gpu.allocate(0, "nothing").unwrap().bytes(), 0);
    let small: Vec<_> = (1..40).map(|n| gpu.allocate(n * 100, "a test").unwrap()).collect();
    assert!(small.iter().all(|m| m.ptr().0 % 256 == 0));
}

#[test]
fn writes_commands_and_reads_happen_in_the_order_given() {
    let Some(gpu) = testbed::gpu() else { return };
    let n = 1 << 20;
    let [a, sum] = [0; 2].map(|_| gpu.allocate(4 * n, "a test").unwrap());
    // SAFETY: here and below, the sizes are those of the memory.
    unsafe { gpu.run(&Command::Zero { at: sum.ptr(), bytes: 4 * n }).unwrap() };
    let mut values = vec![0f32; n];
    for turn in 1..=40 {
        // One buffer, changed as soon as it was written, while the sum of the last turn may be under way.
        values.fill(turn as f32);
        a.write(0, bytemuck::cast_slice(&values)).unwrap();
        let add = pixelwise::combine_f32(n, &[(sum.ptr(), 1.0), (a.ptr(), 1.0)], sum.ptr());
        unsafe { gpu.run(&add.into()).unwrap() };
    }
    assert!(floats(&*sum).iter().all(|&x| x == 820.0));
    unsafe { gpu.run(&Command::Copy { from: a.ptr(), to: sum.ptr(), bytes: 4 * n }).unwrap() };
    assert!(floats(&*sum).iter().all(|&x| x == 40.0));
}

#[test]
fn a_graph_runs_as_often_as_it_is_told_and_not_before() {
    let Some(gpu) = testbed::gpu() else { return };
    let n = 1000;
    let [a, sum, copy] = [0; 3].map(|_| gpu.allocate(4 * n, "a test").unwrap());
    sum.write(0, bytemuck::cast_slice(&vec![7f32; n])).unwrap();
    let add = pixelwise::combine_f32(n, &[(sum.ptr(), 1.0), (a.ptr(), 2.0)], sum.ptr());
    let commands = vec![
        Command::Launch(add),
        Command::Copy { from: sum.ptr(), to: copy.ptr(), bytes: 4 * n },
        Command::Zero { at: a.ptr(), bytes: 4 * n },
    ];
    let graph = unsafe { gpu.record(commands, false).unwrap() };
    assert!(floats(&*sum).iter().all(|&x| x == 7.0));
    for turn in 1..=3 {
        a.write(0, bytemuck::cast_slice(&vec![1f32; n])).unwrap();
        graph.run().unwrap();
        assert!(floats(&*copy).iter().all(|&x| x == 7.0 + 2.0 * turn as f32));
        assert!(floats(&*a).iter().all(|&x| x == 0.0));
    }
    // A graph of nothing is one too.
    let nothing = unsafe { gpu.record(Vec::new(), false).unwrap() };
    nothing.run().unwrap();
    let seconds = gpu.time(&*graph, &*nothing, 5).unwrap();
    assert!(seconds.len() == 5 && seconds.iter().all(|&s| s > 0.0 && s < 1.0), "{seconds:?}");
}

/// With EDM2K_OVERLAP=1 a launch may begin while the one before it ends; it must not show.
#[test]
fn launches_of_a_graph_see_what_those_before_wrote() {
    let Some(gpu) = testbed::gpu() else { return };
    let n = (1 << 16) + 3;
    let [a, b, far] = [0; 3].map(|_| gpu.allocate(4 * n, "a test").unwrap());
    let copy = |from: &dyn Memory, factor, to: &dyn Memory| {
        Command::from(pixelwise::combine_f32(n, &[(from.ptr(), factor)], to.ptr()))
    };
    // Each reads what the last one wrote, or writes what it read; one in between touches other memory.
    let mut commands = Vec::new();
    for _ in 0..20 {
        commands.extend([copy(&*a, 2.0, &*b), copy(&*far, 1.0, &*far), copy(&*b, 0.5, &*a), copy(&*a, 1.5, &*a)]);
        commands.push(copy(&*a, 2.0 / 3.0, &*a));
    }
    let graph = unsafe { gpu.record(commands, false).unwrap() };
    for turn in 0..5 {
        let values: Vec<f32> = (0..n).map(|i| ((i + turn) % 1001 * 3) as f32).collect();
        a.write(0, bytemuck::cast_slice(&values)).unwrap();
        graph.run().unwrap();
        let found = floats(&*a);
        let wrong = found.iter().zip(&values).position(|(x, y)| (x - y).abs() > 1e-3 * y);
        assert!(wrong.is_none(), "turn {turn}, value {}", wrong.unwrap());
    }
}

/// At once and in a graph, where they may overlap too.
#[test]
fn launches_run_in_clusters_on_cards_that_have_them() {
    let Some(gpu) = testbed::gpu() else { return };
    if gpu.card().capability < 90 {
        return;
    }
    let n = 1003;
    let [a, b] = [0; 2].map(|_| gpu.allocate(4 * n, "a test").unwrap());
    // Blocks beyond the last value do nothing.
    let double = |from: &dyn Memory, to: &dyn Memory, blocks| {
        let mut launch = pixelwise::combine_f32(n, &[(from.ptr(), 2.0)], to.ptr());
        launch.grid = [16, 1, 1];
        Command::from(launch.in_clusters_of(blocks))
    };
    let values: Vec<f32> = (0..n).map(|i| (i * 7 % 101) as f32).collect();
    a.write(0, bytemuck::cast_slice(&values)).unwrap();
    unsafe { gpu.run(&double(&*a, &*b, 8)).unwrap() };
    let graph = unsafe { gpu.record(vec![double(&*b, &*a, 2), double(&*a, &*b, 4)], false).unwrap() };
    graph.run().unwrap();
    assert!(floats(&*b).iter().zip(&values).all(|(x, y)| *x == 8.0 * y));
    let error = message(unsafe { gpu.run(&double(&*a, &*b, 3)) });
    assert!(error.contains("[16, 1, 1] blocks of") && error.contains("clusters of 3: "), "{error}");
}

#[test]
fn dropped_memory_is_given_out_again_only_after_what_was_done_with_it() {
    let Some(gpu) = testbed::gpu() else { return };
    let n = 1 << 20;
    let result = gpu.allocate(4 * n, "a test").unwrap();
    for turn in 0..20 {
        let a = gpu.allocate(4 * n, "a test").unwrap();
        a.write(0, bytemuck::cast_slice(&vec![turn as f32; n])).unwrap();
        let copy = pixelwise::combine_f32(n, &[(a.ptr(), 1.0)], result.ptr());
        unsafe { gpu.run(&copy.into()).unwrap() };
        drop(a);
        let b = gpu.allocate(4 * n, "a test").unwrap();
        b.write(0, &vec![0xff; 4 * n]).unwrap();
        assert!(floats(&*result).iter().all(|&x| x == turn as f32), "turn {turn}");
    }
}

#[test]
fn too_much_memory_is_an_error_with_numbers_and_the_device_goes_on() {
    let Some(gpu) = testbed::gpu() else { return };
    let all = gpu.info().memory;
    let error = gpu.allocate(2 * all as usize, "activations").err().unwrap();
    let DeviceError::OutOfMemory { asked, purpose, free, total, .. } = error else { panic!("{error}") };
    assert_eq!((asked, purpose), (Some(2 * all), "activations"));
    assert!(free <= total && total <= all && total > all / 2, "{free} of {total}, {all}");
    let memory = gpu.allocate(100, "a test").unwrap();
    memory.write(0, &[9; 100]).unwrap();
    assert_eq!(read(&*memory), [9; 100]);
}

#[test]
fn launches_that_cannot_be_are_named() {
    let Some(gpu) = testbed::gpu() else { return };
    let memory = gpu.allocate(4096, "a test").unwrap();
    let good = pixelwise::combine_f32(8, &[(memory.ptr(), 1.0)], memory.ptr());
    let unknown = Launch::new("no_such_kernel", [1, 1, 1], 32, 0, &0u64);
    assert!(message(unsafe { gpu.run(&unknown.into()) }).contains("there is no kernel no_such_kernel"));
    let other = Launch::new("combine_f32", [1, 1, 1], 32, 0, &0u64);
    let error = message(unsafe { gpu.run(&other.into()) });
    assert!(error.contains("combine_f32 takes 96 bytes of parameters, given 8"), "{error}");
    let mut large = good.clone();
    large.block = 2048;
    let error = message(unsafe { gpu.run(&large.clone().into()) });
    assert!(error.contains("launch of combine_f32") && error.contains("2048 threads"), "{error}");
    // A capture that fails leaves the stream usable.
    let error = message(unsafe { gpu.record(vec![good.clone().into(), large.into(), good.clone().into()], false) });
    assert!(error.contains("launch of combine_f32"), "{error}");
    unsafe { gpu.run(&good.into()).unwrap() };
    read(&*memory);
}

/// Whether this test runs in a process of its own, which it needs as a fault ends the device for its process; if not, one is
/// started for it.
fn in_a_process_of_its_own(test: &str) -> bool {
    if std::env::var_os("EDM2K_TEST_FAULT").is_some() {
        return true;
    }
    let mut child = Process::new(std::env::current_exe().unwrap());
    let out = child.args([test, "--nocapture"]).env("EDM2K_TEST_FAULT", "1").output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    false
}

/// A command that reads where no memory is.
fn wild(to: &dyn Memory) -> Command {
    pixelwise::combine_f32(8, &[(DevicePtr(1 << 20), 1.0)], to.ptr()).into()
}

#[test]
fn who_keeps_pace_is_one_call_behind_the_device() {
    let Some(gpu) = testbed::gpu() else { return };
    if !in_a_process_of_its_own("who_keeps_pace_is_one_call_behind_the_device") {
        return;
    }
    let memory = gpu.allocate(4096, "a test").unwrap();
    for _ in 0..3 {
        gpu.pace().unwrap();
    }
    unsafe { gpu.run(&wild(&*memory)).unwrap() };
    // A fast device may have told of the fault. That of the emulator does nothing before somebody waits.
    let early = gpu.pace();
    assert!(early.is_ok() || gpu.info().name != "Emulated Card");
    assert!(early.is_err() || gpu.pace().is_err());
}

#[test]
fn a_fault_names_the_device_the_error_and_the_last_kernel() {
    let Some(gpu) = testbed::gpu() else { return };
    if !in_a_process_of_its_own("a_fault_names_the_device_the_error_and_the_last_kernel") {
        return;
    }
    let memory = gpu.allocate(4096, "a test").unwrap();
    unsafe { gpu.run(&wild(&*memory)).unwrap() };
    let error = memory.read(0, &mut [0; 4]).unwrap_err();
    let DeviceError::Failed { device, what } = &error else { panic!("{error}") };
    assert_eq!(*device, gpu.name());
    assert!(what.starts_with("CUDA_ERROR_ILLEGAL_ADDRESS") && what.ends_with("combine_f32"), "{what}");
    // Every later call says so as well, and nothing hangs or panics.
    assert!(memory.write(0, &[1]).is_err() && gpu.allocate(1 << 20, "a test").is_err());
}

/// A directory with a driver of our own, compiled with these flags too.
#[cfg(feature = "emulator")]
fn emulators_driver(more: &[&str]) -> tempfile::TempDir {
    driver::stand_in("driver.cpp", "libcuda.so.1", more).0
}

/// This file's tests with that driver; what they print, and whether they passed.
#[cfg(feature = "emulator")]
fn with_driver(tests: &[&str], variables: &[(&str, &str)]) -> (String, bool) {
    let dir = emulators_driver(&[]);
    let mut child = Process::new(std::env::current_exe().unwrap());
    child.args(tests).args(["--nocapture", "--skip", "emulators_driver"]);
    child.env("LD_LIBRARY_PATH", dir.path()).env("EMULATOR_LIBRARY", env!("EMULATOR_LIBRARY"));
    child.envs(variables.iter().copied());
    let out = child.env_remove("EDM2K_NO_GPU").output().unwrap();
    (String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned(), out.status.success())
}

#[cfg(feature = "emulator")]
#[test]
fn all_of_it_with_the_emulators_driver() {
    for early in [&[][..], &[("DRIVER_EARLY", "1")]] {
        // NCCL wants a card.
        let (said, passed) = with_driver(&["cuda::", "--skip", "nccl_sums"], early);
        assert!(passed && !said.contains("skipped") && said.contains("13 passed"), "{said}");
    }
}

/// Launches overlap where kernels wait by themselves, and the checked kernels find nothing wrong with it.
#[cfg(feature = "emulator")]
#[test]
fn launches_overlap_with_the_emulators_driver() {
    let graph = "launches_of_a_graph_see_what_those_before_wrote";
    let clusters = "launches_run_in_clusters_on_cards_that_have_them";
    let checked = ("EMULATOR_LIBRARY", env!("EMULATOR_LIBRARY_CHECKED"));
    for (test, variables, overlaps) in [
        (graph, &[checked, ("EDM2K_OVERLAP", "1")][..], 99),
        (graph, &[checked, ("EDM2K_OVERLAP", "0")], 0),
        (graph, &[checked, ("EDM2K_OVERLAP", "1"), ("DRIVER_OLD_CODE", "1")], 0),
        (clusters, &[checked, ("EDM2K_OVERLAP", "1")], 1),
    ] {
        let (said, passed) = with_driver(&[test], variables);
        assert!(
            passed && said.contains("1 passed") && said.contains(&format!("{overlaps} launches overlap")),
            "{said}"
        );
    }
}

#[cfg(feature = "emulator")]
#[test]
fn old_drivers_and_cards_are_refused_by_the_emulators_driver_too() {
    let test = ["memory_keeps_what_was_written_at_any_offset_and_size"];
    for (variable, value, why) in [
        ("DRIVER_OLD", "1", "the NVIDIA driver is for CUDA 11.4, needs 12.4 or newer"),
        ("DRIVER_CARD", "70", "Emulated Card (cuda:0): compute capability 7.0, needs 8.0 or newer (RTX 30, A100)"),
    ] {
        let (said, passed) = with_driver(&test, &[(variable, value)]);
        assert!(passed && said.contains(&format!("skipped on a GPU: {why}")), "{said}");
    }
}

/// A driver refuses a file without code for its card; so none may be loaded there that is for another one alone. It says
/// the more, the more architectures were compiled for.
#[cfg(feature = "emulator")]
#[test]
fn cards_of_all_generations_load_their_kernels_with_the_emulators_driver() {
    let test = ["memory_keeps_what_was_written_at_any_offset_and_size"];
    for card in ["80", "86", "89", "90", "100", "120"] {
        let (said, passed) = with_driver(&test, &[("DRIVER_CARD", card)]);
        // Where one generation was compiled for, older cards have no code.
        let too_old = said.contains("this edm2k was compiled for");
        assert!(passed && said.contains("1 passed") && (too_old || !said.contains("skipped")), "{card}: {said}");
    }
}

#[cfg(feature = "emulator")]
#[test]
fn with_the_emulators_driver_broken_the_cpu_computes_and_says_why() {
    let (driver, rubble) = (emulators_driver(&[]), tempfile::tempdir().unwrap());
    let without = |function: &str| emulators_driver(&[&format!("-D{function}=lacking")]);
    let (hollow, old) = (without("cuInit"), without("cuGraphUpload"));
    std::fs::write(rubble.path().join("libcuda.so.1"), "no library").unwrap();
    for (libraries, variable, why) in [
        (&rubble, "NONE", "the NVIDIA driver does not load: "),
        (&hollow, "NONE", "the NVIDIA driver does not load: its library has no function cuInit"),
        (&old, "NONE", "the NVIDIA driver does not load: its library has no function cuGraphUpload"),
        (&old, "DRIVER_OLD", "the NVIDIA driver is for CUDA 11.4, needs 12.4 or newer"),
        (&driver, "DRIVER_BROKEN", "the NVIDIA driver does not start: "),
        (&driver, "DRIVER_OLD", "the NVIDIA driver is for CUDA 11.4, needs 12.4 or newer"),
    ] {
        let out = tempfile::tempdir().unwrap();
        let sample = |device: &str| {
            let model = concat!(env!("CARGO_MANIFEST_DIR"), "/demo/emoji.safetensors");
            let mut edm2k = Process::new(env!("CARGO_BIN_EXE_edm2k"));
            edm2k.args(["sample", "--model", model, "--seeds", "0", "--steps", "1", "--device", device, "--outdir"]);
            edm2k.arg(out.path()).env("LD_LIBRARY_PATH", libraries.path()).env(variable, "1");
            edm2k.env("EMULATOR_LIBRARY", env!("EMULATOR_LIBRARY")).env_remove("EDM2K_NO_GPU");
            let output = edm2k.output().unwrap();
            (String::from_utf8_lossy(&output.stderr).into_owned(), output.status.code())
        };
        let (said, code) = sample("cuda");
        assert!(code == Some(1) && said.contains(why) && !said.contains("computing on"), "{code:?}: {said}");
        let (said, code) = sample("auto");
        assert!(code == Some(0) && said.contains(&format!("warning: computing on the CPU: {why}")), "{code:?}: {said}");
    }
}

/// On one card, what NCCL sums is what it was given, in order with the commands before and after; what that takes is printed.
/// Where there is no library, the test says so.
#[test]
fn nccl_sums_and_broadcasts_with_one_rank() {
    let Some(gpu) = testbed::gpu() else { return };
    match nccl::version() {
        Ok(version) => println!("NCCL {version}"),
        Err(why) => return eprintln!("skipped: {why}"),
    }
    let gpu: Rc<dyn Runtime> = Rc::new(gpu);
    let mut ranks = Nccl::new(Box::new(Alone), gpu.beside().unwrap().unwrap()).unwrap();
    assert_eq!((ranks.rank(), ranks.size()), (0, 1));
    let values = noise(4 << 20, 3);
    // Bits of any kind, NaNs among them, may change in a sum; small whole numbers may not.
    let values: Vec<u8> = values.iter().flat_map(|&x| f32::from(x).to_le_bytes()).collect();
    let (from, memory) = (gpu.allocate(values.len(), "a test").unwrap(), gpu.allocate(values.len(), "a test").unwrap());
    from.write(0, &values).unwrap();
    let copy = Command::Copy { from: from.ptr(), to: memory.ptr(), bytes: values.len() };
    // SAFETY: both have as many bytes.
    unsafe { gpu.run(&copy).unwrap() };
    // In two pieces, of which the first is summed beside what comes then.
    let half = values.len() / 2;
    ranks.all_reduce(Values::Device(&*memory, half..values.len())).unwrap();
    ranks.all_reduce(Values::Device(&*memory, 0..half)).unwrap();
    ranks.summed().unwrap();
    assert!(read(&*memory) == values);
    ranks.broadcast(Values::Device(&*memory, 0..memory.bytes())).unwrap();
    assert!(read(&*memory) == values);
    // What EDM2-XS has of gradients.
    let large = gpu.allocate(500 << 20, "a test").unwrap();
    for _ in 0..3 {
        let begun = Instant::now();
        ranks.all_reduce(Values::Device(&*large, 0..large.bytes())).unwrap();
        ranks.summed().unwrap();
        large.read(0, &mut [0; 4]).unwrap();
        println!("a sum of 500 MiB on one rank: {:.3} ms", begun.elapsed().as_secs_f64() * 1e3);
    }
    assert!(ranks.all_reduce(Values::Host(&mut [1.0])).unwrap_err().to_string().contains("not on a card"));
    ranks.leave(None);
}

#[test]
fn a_missing_nccl_is_named_with_what_to_do() {
    let test = ["--nocapture", "says_which_nccl_there_is"];
    let said = |path: &str| {
        let mut own = Process::new(std::env::current_exe().unwrap());
        let output = own.args(test).env("EDM2K_NCCL", path).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let missing = said("/nowhere/libnccl.so.2");
    assert!(missing.contains("NCCL: the library is missing (/nowhere/libnccl.so.2: "), "{missing}");
    assert!(missing.contains("pip install nvidia-nccl-cu13, or let EDM2K_NCCL name a libnccl.so.2"), "{missing}");
    let other = said("libc.so.6");
    assert!(other.contains("NCCL: libc.so.6: ") && other.contains("ncclGetVersion"), "{other}");
}

/// For [`a_missing_nccl_is_named_with_what_to_do`], and for people.
#[test]
fn says_which_nccl_there_is() {
    match nccl::version() {
        Ok(version) => println!("NCCL {version}"),
        Err(why) => println!("{why}"),
    }
}
