//! A kernel of your own, compiled, run and checked without a GPU; then the same kernel with a mistake.
//!
//! ```sh
//! cargo run --release --no-default-features --features emulator --example own_kernel
//! ```

use std::error::Error;
use std::path::Path;

use edm2k::backend::gpu::emulated::{Arg, Build, Emulator, ThreadOrder};

const ROWS: usize = 5;
const WIDTH: usize = 1000;

fn main() -> Result<(), Box<dyn Error>> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/own_kernel.cu");
    for order in [ThreadOrder::Forward, ThreadOrder::Reversed, ThreadOrder::Random(1)] {
        println!("{order:?}: sums of rows {:?}", row_sums(&source, order)?);
    }

    let text = std::fs::read_to_string(&source)?;
    let forgetful = std::env::temp_dir().join("own_kernel_without_barrier.cu");
    std::fs::write(&forgetful, text.replace("__syncthreads();", ""))?;
    match row_sums(&forgetful, ThreadOrder::Forward) {
        Ok(sums) => return Err(format!("a missing barrier was not noticed: {sums:?}").into()),
        Err(error) => println!("without its barrier: {error}"),
    }
    Ok(())
}

/// Row i is WIDTH times the number i.
fn row_sums(source: &Path, order: ThreadOrder) -> Result<Vec<f32>, Box<dyn Error>> {
    // The checked build sees every access to memory.
    let device = Emulator::compile(source, Build::Checked)?.with_order(order);
    let rows: Vec<f32> = (0..ROWS * WIDTH).map(|i| (i / WIDTH) as f32).collect();
    let (x, y) = (device.alloc(4 * ROWS * WIDTH)?, device.alloc(4 * ROWS)?);
    x.upload(0, &rows)?;
    // SAFETY: the kernel reads ROWS x WIDTH floats and writes ROWS.
    unsafe {
        let arguments = [x.arg(), y.arg(), Arg::of(&(WIDTH as i32))];
        device.launch("row_sums", [ROWS as u32, 1, 1], [128, 1, 1], 0, &arguments)?;
    }
    let mut sums = vec![0.0; ROWS];
    y.download(0, &mut sums)?;
    for (i, sum) in sums.iter().enumerate() {
        if *sum != (i * WIDTH) as f32 {
            return Err(format!("row {i} sums up to {sum}").into());
        }
    }
    Ok(sums)
}
