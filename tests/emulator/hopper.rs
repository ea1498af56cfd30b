//! Hopper in the emulator: bulk copies and wgmma compute what plain loops compute, the planted bugs of
//! selftest_hopper.cu are caught and their clean twins pass, and convolutions with a producer warp are right.

use super::*;
use edm2k::backend::gpu::emulated::Emulated;
use edm2k::backend::gpu::launch::Precision;
use edm2k::backend::gpu::launch::{TensorMap, TensorMapSpec};
use edm2k::backend::gpu::runtime::{Imagined, Runtime};
use edm2k::backend::gpu::tiles::Card;

fn map(d: &Emulator, spec: TensorMapSpec) -> TensorMap {
    Emulated::new(d.clone(), u64::MAX).tensor_map(&spec).unwrap()
}

/// Of a dense matrix.
fn matrix(at: &EmulatedMemory, precision: Precision, columns: usize, rows: usize, tile_rows: usize) -> TensorMapSpec {
    let size = [columns as u32, rows as u32];
    TensorMapSpec::Tiled { at: at.ptr(), precision, size, stride: 2 * columns as u64, tile: [64, tile_rows as u32] }
}

/// Of dense images, [channels, width, height, images].
fn images(at: &EmulatedMemory, size: [usize; 4], lower: i32, upper: i32, pixels: usize) -> TensorMapSpec {
    let [c, w, h, _] = size.map(|s| s as u64);
    TensorMapSpec::Im2col {
        at: at.ptr(),
        precision: Precision::F16,
        size: size.map(|s| s as u32),
        strides: [2 * c, 2 * c * w, 2 * c * w * h],
        lower: [lower; 2],
        upper: [upper; 2],
        channels: 64,
        pixels: pixels as u32,
    }
}

/// Launches with as much dynamic shared memory as asked for.
fn launch_hopper(
    d: &Emulator,
    kernel: &str,
    grid: [u32; 3],
    block: u32,
    shared: usize,
    params: &impl bytemuck::NoUninit,
) -> Result<Counters, EmulatorError> {
    d.allow_shared(kernel, shared).unwrap();
    // SAFETY: the tests' kernels stay within their arguments, or are planted to be caught.
    unsafe { d.launch(kernel, grid, [block, 1, 1], shared as u32, &[Arg::of(params)]) }
}

// ---- bulk copies ----------------------------------------------------------------------------------------

/// `struct CopyProbe` of selftest_hopper.cu.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct CopyProbe {
    map: TensorMap,
    out: DevicePtr,
    rows: i32,
    im2col: i32,
    at: [i32; 4],
    offset: [i32; 2],
    padding: [i32; 6],
}

/// What a bulk copy brings, row by row of 64.
fn copied(
    d: &Emulator,
    spec: TensorMapSpec,
    rows: usize,
    at: [i32; 4],
    offset: [i32; 2],
) -> Result<Vec<u16>, EmulatorError> {
    let out = d.alloc(128 * rows).unwrap();
    let im2col = i32::from(matches!(spec, TensorMapSpec::Im2col { .. }));
    let probe = CopyProbe { map: map(d, spec), out: out.ptr(), rows: rows as i32, im2col, at, offset, padding: [0; 6] };
    launch_hopper(d, "probe_bulk_copy", [1, 1, 1], 128, 1024 + 128 * rows, &probe)?;
    Ok(read(&out))
}

#[test]
fn tiled_copies_bring_boxes_and_zeros_around_the_matrix() {
    for (build, order) in BUILDS.into_iter().flat_map(|b| ORDERS.map(|o| (b, o))) {
        let d = device(build, order);
        for (columns, rows, stride) in [(64usize, 10usize, 64usize), (200, 33, 216), (72, 5, 72), (8, 300, 8)] {
            let values: Vec<u16> = (0..rows * stride).map(|i| 1 + (i % 65521) as u16).collect();
            let m = filled(&d, &values);
            for tile in [1usize, 16, 256] {
                for (x, y) in [(0, 0), (-3, -2), (columns as i32 - 10, rows as i32 - 3), (64, 1), (0, rows as i32)] {
                    let size = [columns as u32, rows as u32];
                    let (precision, tile_size) = (Precision::F16, [64, tile as u32]);
                    let stride_bytes = 2 * stride as u64;
                    let spec =
                        TensorMapSpec::Tiled { at: m.ptr(), precision, size, stride: stride_bytes, tile: tile_size };
                    let got = copied(&d, spec, tile, [x, y, 0, 0], [0, 0]).unwrap();
                    for (i, got) in got.into_iter().enumerate() {
                        let (column, row) = (x + (i % 64) as i32, y + (i / 64) as i32);
                        let inside = (0..columns as i32).contains(&column) && (0..rows as i32).contains(&row);
                        let expected = if inside { values[row as usize * stride + column as usize] } else { 0 };
                        assert_eq!(got, expected, "{columns}x{rows}, {tile} rows from ({x}, {y}), element {i}");
                    }
                }
            }
        }
    }
}

#[test]
fn im2col_copies_walk_over_rows_and_images() {
    for (build, order) in BUILDS.into_iter().flat_map(|b| ORDERS.map(|o| (b, o))) {
        let d = device(build, order);
        for size @ [c, w, h, n] in [[72usize, 5, 3, 2], [64, 11, 8, 3], [8, 1, 1, 1], [136, 3, 7, 1]] {
            let values: Vec<u16> = (0..c * w * h * n).map(|i| 1 + (i % 65521) as u16).collect();
            let x = filled(&d, &values);
            // 3x3 with padding 1, 1x1, 3x3 without padding, and a box larger than the image.
            for (lower, upper, taps) in [(-1, -1, 3), (0, 0, 1), (0, -2, 3), (-2, 2, 2)] {
                if (w.min(h) as i32) + upper <= lower {
                    continue;
                }
                let (wide, high) = (w as i32 + upper - lower, h as i32 + upper - lower);
                // Bases of pixels, image by image, row by row.
                let base = |i: i32| [lower + i % wide, lower + i / wide % high, i / (wide * high)];
                let all = wide * high * n as i32;
                for (first, pixels, channel, tap) in
                    [(0, 64, 0, [0, 0]), (all / 2, 128, 0, [taps - 1, 0]), (all - 1, 8, 64, [taps - 1, taps - 1])]
                {
                    let [bw, bh, bn] = base(first);
                    let got = copied(&d, images(&x, size, lower, upper, pixels), pixels, [channel, bw, bh, bn], tap);
                    for (i, got) in got.unwrap().into_iter().enumerate() {
                        let [bw, bh, bn] = base(first + i as i32 / 64);
                        let at = [channel + i as i32 % 64, bw + tap[0], bh + tap[1], bn];
                        let inside = at.iter().zip(size).all(|(&a, s)| (0..s as i32).contains(&a));
                        let [ac, aw, ah, an] = at.map(|a| a as usize);
                        let expected = if inside { values[((an * h + ah) * w + aw) * c + ac] } else { 0 };
                        assert_eq!(got, expected, "{size:?}, corners {lower} {upper}, from {first}, {tap:?}, {i}");
                    }
                }
            }
            let refused = |at, offset, words| {
                let error = copied(&d, images(&x, size, -1, -1, 8), 8, at, offset).unwrap_err().to_string();
                assert!(error.contains(words), "{error}");
            };
            refused([0, w as i32 - 1, -1, 0], [0, 0], "the map's bounding box");
            refused([0, -1, -2, 0], [0, 0], "the map's bounding box");
            refused([0, -1, -1, 0], [0, 256], "expected 0 to 255");
        }
    }
}

#[test]
fn tensor_maps_are_refused_that_the_driver_would_refuse() {
    let d = device(Build::Normal, ThreadOrder::Forward);
    let x = d.alloc(1 << 16).unwrap();
    let devices: [&dyn Runtime; 2] = [&Emulated::new(d.clone(), 0), &Imagined::new(Card::new(1, 90))];
    for device in devices {
        let tiled = |offset, columns, stride, tile| {
            let (at, size) = (x.ptr().offset(offset), [columns, 16]);
            device.tensor_map(&TensorMapSpec::Tiled { at, precision: Precision::Bf16, size, stride, tile })
        };
        assert!(tiled(16, 64, 128, [64, 256]).is_ok());
        for (spec, words) in [
            (tiled(8, 64, 128, [64, 16]), "no multiple of 16"),
            (tiled(0, 0, 128, [64, 16]), "a size is 0"),
            (tiled(0, 60, 120, [64, 16]), "a stride is no multiple of 16"),
            (tiled(0, 64, 128, [64, 257]), "a tile of 64 elements by 257"),
            (tiled(0, 64, 128, [128, 16]), "a tile of 128 elements by 16"),
            (tiled(0, 64, 128, [64, 0]), "a tile of 64 elements by 0"),
        ] {
            let error = spec.unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
        assert!(device.tensor_map(&images(&x, [64, 4, 4, 4], -1, -1, 1024)).is_ok());
        for (spec, words) in [
            (images(&x, [64, 4, 4, 4], -1, -1, 1025), "a tile of 64 elements by 1025"),
            (images(&x, [64, 4, 4, 4], 0, -4, 64), "the bounding box is empty"),
            (images(&x, [64, 4, 4, 4], -129, 0, 64), "a corner is not in -128..128"),
            (images(&x, [4, 4, 4, 4], -1, -1, 64), "a stride is no multiple of 16"),
        ] {
            let error = device.tensor_map(&spec).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}

// ---- wgmma ----------------------------------------------------------------------------------------------

/// `struct WgmmaProbe` of selftest_hopper.cu.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct WgmmaProbe {
    a: TensorMap,
    b: TensorMap,
    d: DevicePtr,
    padding: [u64; 7],
}

#[test]
fn wgmma_is_the_product_in_both_majors_types_and_all_widths() {
    for (build, order) in BUILDS.into_iter().flat_map(|b| ORDERS.map(|o| (b, o))) {
        let device = device(build, order);
        for (n, mn_major, precision) in [8usize, 16, 32, 64, 96, 128, 192, 256].into_iter().flat_map(|n| {
            [false, true].into_iter().flat_map(move |mn| [Precision::F16, Precision::Bf16].map(|p| (n, mn, p)))
        }) {
            let mut random = Random(8);
            let mut values = |n: usize| (0..n).map(|_| random.float()).collect::<Vec<f32>>();
            let (a, b, d) = (values(64 * 64), values(64 * n), values(64 * n));
            // The bits, and the values that they stand for.
            let narrow = |v: &[f32]| -> (Vec<u16>, Vec<f64>) {
                let element = |&x: &f32| match precision {
                    Precision::F16 => (f16::from_f32(x).to_bits(), f16::from_f32(x).to_f64()),
                    Precision::Bf16 => (bf16::from_f32(x).to_bits(), bf16::from_f32(x).to_f64()),
                };
                v.iter().map(element).unzip()
            };
            let ((a_bits, a), (b_bits, b)) = (narrow(&a), narrow(&b));
            let [am, bm] = [a_bits, b_bits].map(|bits| filled(&device, &bits));
            let out = filled(&device, &d);
            let b_map = if mn_major { matrix(&bm, precision, n, 64, 64) } else { matrix(&bm, precision, 64, n, n) };
            let probe = WgmmaProbe {
                a: map(&device, matrix(&am, precision, 64, 64, 64)),
                b: map(&device, b_map),
                d: out.ptr(),
                padding: [0; 7],
            };
            let kernel = format!("probe_wgmma_{}_{}_{n}", precision.name(), if mn_major { "mn" } else { "k" });
            let shared = 1024 + 8192 + if mn_major { n.div_ceil(64) * 8192 } else { n * 128 };
            launch_hopper(&device, &kernel, [1, 1, 1], 128, shared, &probe).unwrap();
            for (i, got) in read::<f32>(&out).into_iter().enumerate() {
                let (row, column) = (i / n, i % n);
                let term = |k: usize| match mn_major {
                    true => a[k * 64 + row] * b[k * n + column],
                    false => a[row * 64 + k] * b[column * 64 + k],
                };
                let expected = (0..64).map(term).sum::<f64>() + f64::from(d[i]);
                // 64 additions in f32 of numbers below 65.
                let bound = 65.0 * 64.0 * 6e-8;
                assert!((f64::from(got) - expected).abs() < bound, "{kernel}: {i} is {got}, expected {expected}");
            }
        }
    }
}

// ---- planted bugs ---------------------------------------------------------------------------------------

/// `struct Pipeline` of selftest_hopper.cu.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Pipeline {
    a: TensorMap,
    b: TensorMap,
    images: TensorMap,
    c: DevicePtr,
    steps: i32,
    one: i32,
    padding: [u64; 6],
}

/// How a planted bug of the pipeline shows.
#[derive(Clone, Copy, Debug)]
enum Caught {
    /// Not in this build, or not in every thread order.
    Rarely,
    /// As an error that contains these words.
    Error(&'static str),
    /// As NaN, the poison, in the result.
    Poison,
    /// As an error or a wrong result, by the thread order.
    Somehow,
}

fn wide(halves: &[f16]) -> Vec<f64> {
    halves.iter().map(|x| x.to_f64()).collect()
}

/// Whether c is a b^T for rows of k; NaN is not.
fn is_product(c: &[f32], a: &[f64], b: &[f64], k: usize, columns: usize) -> bool {
    c.iter().enumerate().all(|(i, &c)| {
        let (row, column) = (i / columns * k, i % columns * k);
        let expected: f64 = (0..k).map(|j| a[row + j] * b[column + j]).sum();
        // k additions in f32 of numbers below k.
        (f64::from(c) - expected).abs() < (k * k) as f64 * 6e-8
    })
}

#[test]
fn each_bug_of_a_pipeline_is_caught_and_the_pipeline_without_passes() {
    use Caught::*;
    #[rustfmt::skip]
    let bugs: &[(&str, Caught, Caught)] = &[
        // kernel                      normal build                                checked build
        ("too_many_bytes",             Error("lacks 0 of 1 arrivals and 128 of 24704 bytes"), Error("lacks 0 of 1 arrivals and 128 of 24704 bytes")),
        ("too_few_bytes",              Error("more bytes than the 24448 that were expected"), Error("more bytes than the 24448 that were expected")),
        ("one_copy_expected",          Error(" were expected"),                    Error(" were expected")),
        ("wrong_parity",               Somehow,                                    Error("read of shared memory that ")),
        ("read_before_landing",        Somehow,                                    Error("shared memory")),
        ("released_too_early",         Somehow,                                    Error("shared memory")),
        ("one_consumer_awaited",       Somehow,                                    Error("mbarrier")),
        ("one_warp_waits",             Rarely,                                     Error("which a bulk copy wrote with no barrier between: no mbarrier_wait for it")),
        ("read_accumulators_too_early", Poison,                                    Error("read of accumulators while wgmma adds to them")),
        ("wrote_accumulators",         Error("was written while the products were in flight"), Error("of accumulators while wgmma adds to them")),
        ("missing_wgmma_fence",        Error("no wgmma_fence since"),              Error("no wgmma_fence since")),
        ("missing_wgmma_wait",         Error("left the kernel with products in flight"), Error("read of accumulators while wgmma adds to them")),
        ("missing_commit",             Error("with this wgmma not committed"),     Error("read of accumulators while wgmma adds to them")),
        ("divergent_products",         Error("has issued other products than"),    Error("has issued other products than")),
        ("tile_overrun",               Somehow,                                    Error("the descriptor reaches beyond its tile: byte ")),
        ("shared_overrun",             Error("the descriptor of B reaches beyond shared memory"), Error("the descriptor of B reaches beyond shared memory")),
        ("stride_of_512",              Error("a stride of 512 bytes, expected multiples of 1024"), Error("a stride of 512 bytes, expected multiples of 1024")),
        ("tile_at_128",                Error("A begins at byte "),                 Error("A begins at byte ")),
        ("destination_at_128",         Error("not a multiple of 1024 bytes, where the swizzle's pattern begins (of 128: it is)"), Error("(of 128: it is)")),
        ("destination_at_64",          Error("not a multiple of 1024 bytes, where the swizzle's pattern begins (of 128: neither)"), Error("(of 128: neither)")),
        ("not_rounded_up",             Error("not a multiple of 1024 bytes"),      Error("not a multiple of 1024 bytes")),
        ("copy_overrun",               Error("the box of 8192 bytes from byte "),  Error("the box of 8192 bytes from byte ")),
        ("wrong_map",                  Error("the tensor map is for im2col"),      Error("the tensor map is for im2col")),
        ("memory_overrun",             Error("384 bytes past the end of an allocation"), Error("read of 128 bytes, 384 bytes past the end of an allocation")),
        ("missing_init_fence",         Error("no fence_mbarrier_init"),            Error("no fence_mbarrier_init")),
        ("missing_init",               Error("there is no mbarrier at byte "),     Error("there is no mbarrier at byte ")),
        ("use_before_init",            Rarely,                                     Error("mbarrier")),
        ("too_many_arrivals",          Error("more arrivals than its 1"),          Error("more arrivals than its 1")),
        ("nobody_waits",               Error("nobody has waited for this bulk copy"), Error("nobody has waited for this bulk copy")),
        ("plain_access_to_mbarrier",   Error("none was made, or it was overwritten"), Error("write of shared memory that is an mbarrier")),
        ("named_barrier_lacks_warp",   Error("deadlock: named_barrier 1: 256 of 288 threads have come"), Error("deadlock: named_barrier 1: 256 of 288 threads have come")),
    ];
    let k = 6 * 64;
    for (b, build) in BUILDS.into_iter().enumerate() {
        for order in ORDERS {
            let d = device(build, order);
            let planted = d.kernels().iter().filter(|kernel| kernel.starts_with("pipeline_")).count();
            assert_eq!(planted, bugs.len() + 1, "every planted bug is in the table");
            let mut random = Random(9);
            let (left, right) = (random.halves(128 * k), random.halves(64 * k));
            let (am, bm) = (filled(&d, &left), filled(&d, &right));
            let run = |name: &str| {
                let c = d.alloc(4 * 2 * 128 * 64).unwrap();
                let rows = if name == "memory_overrun" { 129 } else { 128 };
                let params = Pipeline {
                    a: map(&d, matrix(&am, Precision::F16, k, rows, 128)),
                    b: map(&d, matrix(&bm, Precision::F16, k, 64, 64)),
                    images: map(&d, images(&am, [64, 4, 4, 4], -1, -1, 128)),
                    c: c.ptr(),
                    steps: 6,
                    one: 1,
                    padding: [0; 6],
                };
                let shared = 1024 + 2 * 24576 + 32;
                let result = launch_hopper(&d, &format!("pipeline_{name}"), [2, 1, 1], 384, shared, &params);
                let c: Vec<f32> = read(&c);
                let both = c.chunks(128 * 64);
                let right = both.into_iter().all(|c| is_product(c, &wide(&left), &wide(&right), k, 64));
                (result, right, c.iter().any(|c| c.is_nan()))
            };
            for (name, normal, checked) in bugs {
                let caught = [normal, checked][b];
                let (result, right, nan) = run(name);
                let context = format!("{name}, {build:?}, {order:?}, expected {caught:?}: {result:?}, right: {right}");
                match (caught, &result) {
                    (Rarely, _) => {}
                    (Poison, Ok(_)) => assert!(nan, "{context}"),
                    (Somehow, Ok(_)) => assert!(!right, "{context}"),
                    (Somehow, Err(EmulatorError::Fault(message))) => {
                        assert!(message.contains("kernels/emulator/selftest_hopper.cu:"), "{context}");
                    }
                    (Error(words), Err(EmulatorError::Fault(message))) => {
                        let place = format!("kernel pipeline_{name}, block (");
                        assert!(message.contains(words) && message.starts_with(&place), "{context}");
                        assert!(message.contains("), kernels/emulator/selftest_hopper.cu:"), "{context}");
                    }
                    _ => panic!("{context}"),
                }
                let (result, right, _) = run("ok");
                assert!(result.is_ok() && right, "after {context}: {result:?}, right: {right}");
            }
        }
    }
}

/// `struct Stored` of selftest_hopper.cu.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Stored {
    a: DevicePtr,
    b: DevicePtr,
    c: DevicePtr,
}

#[test]
fn a_missing_proxy_fence_is_caught_and_with_it_stored_operands_are_right() {
    for (build, order) in BUILDS.into_iter().flat_map(|b| ORDERS.map(|o| (b, o))) {
        let d = device(build, order);
        let mut random = Random(10);
        let (a, b) = (random.halves(64 * 64), random.halves(64 * 64));
        let (am, bm, c) = (filled(&d, &a), filled(&d, &b), d.alloc(4 * 64 * 64).unwrap());
        let params = Stored { a: am.ptr(), b: bm.ptr(), c: c.ptr() };
        launch_hopper(&d, "stored_operands_ok", [1, 1, 1], 128, 1024 + 16384, &params).unwrap();
        assert!(is_product(&read::<f32>(&c), &wide(&a), &wide(&b), 64, 64));
        let result = launch_hopper(&d, "stored_operands_bug", [1, 1, 1], 128, 1024 + 16384, &params);
        match build {
            Build::Normal => assert!(result.is_ok()),
            Build::Checked => {
                let error = result.unwrap_err().to_string();
                assert!(error.contains("missing proxy fence: thread ("), "{error}");
            }
        }
    }
}

#[test]
fn only_kernels_for_hopper_have_its_instructions_and_227_kb() {
    for build in BUILDS {
        let d = device(build, ThreadOrder::Forward);
        let error = launch(&d, "hopper_on_ampere", 1, 32, 0, &[Arg::of(&0i32)]).unwrap_err().to_string();
        assert!(error.contains("not exported by KERNEL_EXPORT_HOPPER"), "{error}");
        d.allow_shared("pipeline_ok", 227 << 10).unwrap();
        let error = d.allow_shared("pipeline_ok", (227 << 10) + 1).unwrap_err().to_string();
        assert!(error.contains("at most 232448"), "{error}");
    }
}

// ---- real kernels ---------------------------------------------------------------------------------------

/// `struct Conv` of selftest_hopper.cu.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Conv {
    x: TensorMap,
    w: TensorMap,
    y: DevicePtr,
    sizes: [i32; 5],
    padding: [i32; 9],
}

#[test]
fn a_convolution_with_a_producer_warp_is_right_on_odd_images() {
    for (build, order) in BUILDS.into_iter().flat_map(|b| ORDERS.map(|o| (b, o))) {
        let d = device(build, order);
        for (n, h, w, cin, cout) in [(3usize, 7usize, 5usize, 64usize, 64usize), (1, 8, 11, 128, 192)] {
            for precision in [Precision::F16, Precision::Bf16] {
                let (kernel, columns) = match precision {
                    Precision::F16 => ("hopper_conv3x3_f16_128x64_s3", 64),
                    Precision::Bf16 => ("hopper_conv3x3_bf16_128x192_s3", 192),
                };
                if cout % columns != 0 {
                    continue;
                }
                let mut random = Random(11);
                let mut values = |n: usize| -> (Vec<u16>, Vec<f64>) {
                    let element = |x: f32| match precision {
                        Precision::F16 => (f16::from_f32(x).to_bits(), f16::from_f32(x).to_f64()),
                        Precision::Bf16 => (bf16::from_f32(x).to_bits(), bf16::from_f32(x).to_f64()),
                    };
                    (0..n).map(|_| element(random.float())).unzip()
                };
                let pixels = n * h * w;
                let ((x_bits, x), (w_bits, weights)) = (values(pixels * cin), values(cout * 9 * cin));
                let (xm, wm, y) = (filled(&d, &x_bits), filled(&d, &w_bits), d.alloc(2 * pixels * cout).unwrap());
                let params = Conv {
                    x: map(&d, images(&xm, [cin, w, h, n], -1, -1, 128)),
                    w: map(&d, matrix(&wm, precision, 9 * cin, cout, columns)),
                    y: y.ptr(),
                    sizes: [h, w, cin, cout, pixels].map(|s| s as i32),
                    padding: [0; 9],
                };
                let grid = [pixels.div_ceil(128) as u32, (cout / columns) as u32, 1];
                let shared = 1024 + 3 * (128 + columns) * 128 + 6 * 8;
                launch_hopper(&d, kernel, grid, 288, shared, &params).unwrap();
                let mut expected = vec![0f64; pixels * cout];
                for (i, y) in expected.iter_mut().enumerate() {
                    let (pixel, co) = (i / cout, i % cout);
                    for tap in 0..9 {
                        let (px, py) = (pixel % w + tap % 3, pixel / w % h + tap / 3);
                        if (1..=w).contains(&px) && (1..=h).contains(&py) {
                            let from = ((pixel / (w * h) * h + py - 1) * w + px - 1) * cin;
                            let row = (co * 9 + tap) * cin;
                            *y += (0..cin).map(|c| x[from + c] * weights[row + c]).sum::<f64>();
                        }
                    }
                }
                let got: Vec<f64> = match precision {
                    Precision::F16 => wide(&read::<f16>(&y)),
                    Precision::Bf16 => read::<bf16>(&y).iter().map(|y| y.to_f64()).collect(),
                };
                let (error, worst) = relative_error(&got, &expected);
                let bound = [5e-4, 4e-3][precision as usize];
                assert!(error < bound, "{kernel} {n}x{h}x{w}, rounded once: {error:e}, {worst}");
            }
        }
    }
}

/// `struct Wgrad` of selftest_hopper.cu.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Wgrad {
    g: TensorMap,
    x: [TensorMap; 2],
    dw: DevicePtr,
    sizes: [i32; 6],
    padding: [i32; 8],
}

/// Persistent blocks, MN-major operands, operands from two tensors, and a stage that ordinary stores use in between.
#[test]
fn a_weight_gradient_of_two_inputs_by_persistent_blocks_is_right() {
    for (build, order) in BUILDS.into_iter().flat_map(|b| ORDERS.map(|o| (b, o))) {
        let d = device(build, order);
        for ([n, h, w], cin, cout) in
            [([3usize, 7usize, 5usize], [64usize, 128usize], 64usize), ([1, 8, 11], [128, 64], 192)]
        {
            let (pixels, mut random) = (n * h * w, Random(12));
            let x = cin.map(|c| random.halves(pixels * c));
            let g = random.halves(pixels * cout);
            let (xm, gm) = ([0, 1].map(|i| filled(&d, &x[i])), filled(&d, &g));
            let columns = 9 * (cin[0] + cin[1]);
            let dw = d.alloc(4 * cout * columns).unwrap();
            let params = Wgrad {
                g: map(&d, matrix(&gm, Precision::F16, cout, pixels, 64)),
                x: [0, 1].map(|i| map(&d, images(&xm[i], [cin[i], w, h, n], -1, -1, 64))),
                dw: dw.ptr(),
                sizes: [h, w, cin[0], cin[1], cout, pixels].map(|s| s as i32),
                padding: [0; 8],
            };
            let shared = 1024 + 3 * 32768 + 6 * 8;
            launch_hopper(&d, "hopper_wgrad3x3_f16_128x128_s3", [5, 1, 1], 384, shared, &params).unwrap();
            let (x, g) = (x.map(|x| wide(&x)), wide(&g));
            let mut expected = vec![0f64; cout * columns];
            for (i, dw) in expected.iter_mut().enumerate() {
                let (co, tap, c) = (i / columns, i % columns / (cin[0] + cin[1]), i % (cin[0] + cin[1]));
                let (which, c) = if c < cin[0] { (0, c) } else { (1, c - cin[0]) };
                for pixel in 0..pixels {
                    let (px, py) = (pixel % w + tap % 3, pixel / w % h + tap / 3);
                    if (1..=w).contains(&px) && (1..=h).contains(&py) {
                        let from = (pixel / (w * h) * h + py - 1) * w + px - 1;
                        *dw += g[pixel * cout + co] * x[which][from * cin[which] + c];
                    }
                }
            }
            let got: Vec<f64> = read::<f32>(&dw).into_iter().map(f64::from).collect();
            let (error, worst) = relative_error(&got, &expected);
            assert!(error < 1e-6, "{n}x{h}x{w} {cin:?} to {cout}, {build:?}, {order:?}: {error:e}, {worst}");
        }
    }
}
