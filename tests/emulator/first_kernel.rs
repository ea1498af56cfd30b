//! The steps of docs/first-kernel.md on the emulator: each computes the same convolution, what the text says of each is
//! so, and the mistakes that it warns of are caught.

use std::path::{Path, PathBuf};

use bytemuck::{Pod, Zeroable};
use edm2k::backend::gpu::emulated::{Arg, Build, Counters, Emulator, EmulatorError, ThreadOrder};
use edm2k::backend::gpu::launch::DevicePtr;
use edm2k::rng::{Purpose, Stream};
use half::f16;

/// Kernel, threads of a block, and whether a block makes 64 x 64 values or one for each thread.
const STEPS: [(&str, u32, bool); 4] =
    [("conv_naive", 256, false), ("conv_tiled", 256, true), ("conv_tensor", 128, true), ("conv_pipelined", 128, true)];

/// `struct Conv` of docs/first-kernel.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Conv {
    x: DevicePtr,
    w: DevicePtr,
    y: DevicePtr,
    pixels: i32,
    height: i32,
    width: i32,
    cin: i32,
    cout: i32,
    padding: i32,
}

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/first-kernel.cu")
}

fn halves(n: usize, key: u64, scale: f32) -> Vec<f16> {
    let mut values = vec![0.0; n];
    Stream::new(3, Purpose::Init, key).normals(&mut values);
    values.into_iter().map(|x| f16::from_f32(scale * x)).collect()
}

/// Runs a step on two images of 5 x 7 pixels, 32 channels to 64, and compares with the sums written out.
fn run(device: &Emulator, (kernel, threads, tiled): (&str, u32, bool)) -> Result<Counters, EmulatorError> {
    let (n, height, width, cin, cout) = (2, 5, 7, 32, 64);
    let pixels = n * height * width;
    let (x, w) = (halves(pixels * cin, 0, 1.0), halves(cout * 9 * cin, 1, 1.0 / 17.0));
    let (dx, dw, dy) = (device.alloc(2 * x.len())?, device.alloc(2 * w.len())?, device.alloc(2 * pixels * cout)?);
    dx.upload(0, &x)?;
    dw.upload(0, &w)?;
    let size = |x: usize| x as i32;
    let params = Conv {
        x: dx.ptr(),
        w: dw.ptr(),
        y: dy.ptr(),
        pixels: size(pixels),
        height: size(height),
        width: size(width),
        cin: size(cin),
        cout: size(cout),
        padding: 0,
    };
    let grid = match tiled {
        true => [pixels.div_ceil(64) as u32, (cout / 64) as u32, 1],
        false => [(pixels * cout).div_ceil(threads as usize) as u32, 1, 1],
    };
    // SAFETY: the memory has the sizes that `params` says.
    let counters = unsafe { device.launch(kernel, grid, [threads, 1, 1], 0, &[Arg::of(&params)])? };
    let mut got = vec![f16::ZERO; pixels * cout];
    dy.download(0, &mut got)?;
    for (i, got) in got.iter().enumerate() {
        let (pixel, o) = (i / cout, i % cout);
        let (row, column) = (pixel / width % height, pixel % width);
        let mut want = 0.0;
        for tap in 0..9 {
            let (y, x0) = ((row + tap / 3).wrapping_sub(1), (column + tap % 3).wrapping_sub(1));
            if y < height && x0 < width {
                let from = (pixel / (width * height) * height + y) * width + x0;
                let products = (0..cin).map(|c| x[from * cin + c].to_f64() * w[(o * 9 + tap) * cin + c].to_f64());
                want += products.sum::<f64>();
            }
        }
        // Sums of 288 products in f32, then one rounding to f16; values are about 1.
        assert!((got.to_f64() - want).abs() < 1e-3 * want.abs().max(1.0), "{kernel}: {got} instead of {want} at {i}");
    }
    Ok(counters)
}

#[test]
fn every_step_computes_the_same_convolution() {
    for build in [Build::Normal, Build::Checked] {
        let device = Emulator::compile(&source(), build).unwrap();
        assert_eq!(device.kernels().len(), STEPS.len());
        for order in [ThreadOrder::Forward, ThreadOrder::Reversed, ThreadOrder::Random(1)] {
            for step in STEPS {
                let counters = run(&device.clone().with_order(order), step).unwrap();
                // The text says that no step's shared memory has bank conflicts.
                assert_eq!(counters.bank_conflicts, 0, "{} {build:?} {order:?}", step.0);
            }
        }
    }
}

#[test]
fn the_mistakes_that_the_text_warns_of_are_caught() {
    let text = std::fs::read_to_string(source()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let race = "with no barrier between";
    // What the page quotes of the emulator, each on one line.
    let page = std::fs::read_to_string(source().with_extension("md")).unwrap();
    let page = page.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut quotes: Vec<&str> =
        page.split('`').filter(|text| text.contains(race) || text.contains("writing: no")).collect();
    assert_eq!(quotes.len(), 2, "{quotes:?}");
    let mut errors = Vec::new();
    for (number, (step, right, wrong, said)) in [
        (0, "pixel >= p.pixels", "pixel > p.pixels", "out of bounds: write of 2 bytes"),
        (1, "            __syncthreads();  // all have written what all will read\n", "", "that nobody has written"),
        (1, "            __syncthreads();  // all have read what the next step overwrites\n", "", race),
        (2, "            __syncthreads();\n            sums.multiply", "            sums.multiply", race),
        (3, "cp_async_wait<STAGES - 2>", "cp_async_wait<STAGES - 1>", "a cp.async is still writing: no cp_async_wait"),
        (3, "load(step + STAGES - 1)", "load(step + STAGES)", "a cp.async is still writing"),
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(text.matches(right).count(), 1, "{right}");
        let path = dir.path().join(format!("mistake-{number}.cu"));
        std::fs::write(&path, text.replace(right, wrong)).unwrap();
        let device = Emulator::compile(&path, Build::Checked).unwrap();
        let error = run(&device, STEPS[step]).err().map_or("nothing was noticed".into(), |e| e.to_string());
        assert!(error.contains(said) && error.contains("mistake-"), "{wrong}: {error}");
        let error = error.replace(&path.display().to_string(), "first-kernel.cu");
        let error = error.replace(&format!("mistake-{number}.cu"), "first-kernel.cu");
        // The page does not quote by whom a line is called.
        let mut places = error.split(", called at ");
        let (first, caller) = (places.next().unwrap_or_default(), places.last());
        let error = match caller.and_then(|caller| caller.split_once(": ")) {
            Some((_, said)) => format!("{first}: {said}"),
            None => error,
        };
        quotes.retain(|quote| !error.contains(quote));
        errors.push(error);
    }
    assert!(quotes.is_empty(), "the page quotes {quotes:?}, and the emulator says {errors:#?}");
}

/// The page shows what is in the file.
#[test]
fn the_page_quotes_the_kernels_as_they_are() {
    let unindented = |text: &str| text.lines().map(|line| line.trim().to_owned()).collect::<Vec<_>>().join("\n");
    let page = std::fs::read_to_string(source().with_extension("md")).unwrap();
    let source = unindented(&std::fs::read_to_string(source()).unwrap());
    let quotes: Vec<&str> = page.split("```cuda\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    assert_eq!(quotes.len(), 2);
    quotes.iter().for_each(|quote| assert!(source.contains(unindented(quote).trim()), "{quote}"));
}

#[test]
fn what_does_not_compile_is_said_by_the_compiler() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("wrong.cu");
    std::fs::write(&path, "#include \"ptx.cuh\"\nint x = nothing;\n").unwrap();
    let error = Emulator::compile(&path, Build::Normal).err().unwrap().to_string();
    assert!(error.contains("wrong.cu:2") && error.contains("nothing"), "{error}");
}
