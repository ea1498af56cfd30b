//! Draws emoji from tags, an image for each argument:
//!
//! ```sh
//! cargo run --release --example sample -- 'green, heart' 'cat, face'
//! ```
//!
//! The pictures are those of `edm2k sample --seeds 0-1 --tags 'green, heart' --tags 'cat, face'`, to the byte.
//! `STEPS` and `OUTDIR` in the environment change how many steps it takes and where they go.

use std::env;
use std::path::Path;

use edm2k::pipeline::Step;
use edm2k::{Device, Pipeline, Request};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let device = Device::open("auto")?.fastest();
    let mut pipeline = Pipeline::load(&device, "demo/emoji.safetensors")?;
    let conditions = env::args().skip(1).map(|tags| pipeline.tags(&tags, 0)).collect::<Result<Vec<_>, _>>()?;
    let seeds = (0..conditions.len().max(1) as u64).collect();
    let mut request = Request { conditions, seeds, ..Request::default() };
    if let Ok(steps) = env::var("STEPS") {
        request.sampler.steps = steps.parse()?;
    }
    let out = env::var("OUTDIR").unwrap_or_else(|_| ".".into());
    println!("drawing {} images on {device}", request.seeds.len());
    let images = pipeline.images(&request)?.watched(|step: &mut Step| {
        println!("step {} of {}, noise level {:.3}", step.index + 1, step.of, step.sigma);
        Ok(()) // step.pictures() are what it looks like so far; an error stops the work
    });
    for image in images {
        let image = image?;
        let path = Path::new(&out).join(format!("{:06}.png", image.seed));
        std::fs::write(&path, image.png()?)?;
        println!("{}", path.display());
    }
    Ok(())
}
