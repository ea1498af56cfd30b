//! `cargo bench`: each convolution of EDM2-XS at 64x88, forward and both gradients, on the CPU.
//!
//! The floor is multiply-adds / rate, the rate being that of a large matrix product measured in the
//! same run (the `gemm` crate, all threads, best of several); the last column is floor / time.

use std::time::Instant;

use edm2k::backend::cpu::Cpu;
use edm2k::backend::{Backend, NetworkBackend, Normalization, Operand, Slot, TrainingBackend};
use edm2k::params::ParamTable;
use edm2k::rng::{Purpose, Stream};

/// Image height, width, input and output channels, kernel.
const SHAPES: [(usize, usize, usize, usize, usize); 7] = [
    (88, 64, 128, 128, 3),
    (88, 64, 384, 128, 3),
    (44, 32, 256, 256, 3),
    (22, 16, 384, 384, 3),
    (11, 8, 512, 512, 3),
    (11, 8, 1024, 512, 3),
    (22, 16, 384, 1152, 1),
];

/// Median seconds of a call.
fn time(mut f: impl FnMut()) -> f64 {
    f();
    let mut times: Vec<f64> = (0..9)
        .map(|_| {
            let start = Instant::now();
            f();
            start.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Multiply-adds per second of a 1536^3 product.
fn matmul_rate() -> f64 {
    const N: usize = 1536;
    let (a, b, mut c) = (vec![0.5f32; N * N], vec![0.25f32; N * N], vec![0.0f32; N * N]);
    let n = N as isize;
    let seconds = time(|| {
        // SAFETY: three square row-major matrices of N * N values.
        unsafe {
            gemm::gemm(
                N,
                N,
                N,
                c.as_mut_ptr(),
                1,
                n,
                false,
                a.as_ptr(),
                1,
                n,
                b.as_ptr(),
                1,
                n,
                0.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::Rayon(0),
            );
        }
    });
    (N * N * N) as f64 / seconds
}

fn main() {
    let rate = matmul_rate();
    println!("matrix product: {:.0} GMAC/s on {} threads\n", rate * 1e-9, rayon::current_num_threads());
    println!("{:<22} {:>14} {:>9} {:>8} {:>7}", "conv", "", "ms", "GMAC/s", "floor");
    for (h, w, cin, cout, kernel) in SHAPES {
        let mut table = ParamTable::default();
        let id = table.conv("conv".into(), cin, cout, kernel);
        let mut b = Cpu::<f32>::for_training(&table, 0);
        let random = |len: usize, image: u64| {
            let mut values = vec![0.0; len];
            Stream::new(0, Purpose::Init, image).normals(&mut values);
            values
        };
        b.write_param(Slot::Weight, id, &random(table[id].numel(), 0)).expect("as many values as the weight has");
        b.make_effective(Slot::Weight, Normalization::Eval).expect("the weight is held");
        let x = b.upload([1, h, w, cin], &random(h * w * cin, 1));
        let g = b.upload([1, h, w, cout], &random(h * w * cout, 2));
        let macs = (h * w * table[id].numel()) as f64;
        let name = format!("{w}x{h} {cin}->{cout} {kernel}x{kernel}");
        let report = |what: &str, seconds: f64| {
            let share = 100.0 * macs / rate / seconds;
            println!("{name:<22} {what:>14} {:9.2} {:8.1} {share:6.0} %", seconds * 1e3, macs / seconds * 1e-9);
        };
        report("forward", time(|| drop(b.conv(id, Operand::of(&x)))));
        report("input grad", time(|| drop(b.conv_dgrad(id, &g, 1.0, Operand::of(&x), None))));
        report("weight grad", time(|| b.conv_wgrad(id, Operand::of(&x), &g, 1.0)));
    }
}
