//! Trains a small network on a dataset that `edm2k prepare` has made, and says where its snapshots are:
//!
//! ```sh
//! cargo run --release --example train -- tests/data/emoji runs/small 100000
//! ```
//!
//! The arguments are the dataset, the directory of the run, and how many images to train on. The same command again goes
//! on with the run.

use std::env;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use edm2k::Device;
use edm2k::data::dataset::{Dataset, Split};
use edm2k::model::{Config, Model};
use edm2k::train::{Alone, Event, Execution, Settings, Splits, Training, meta_of};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [data, outdir, images] = &arguments[..] else { return Err("expected DATASET OUTDIR IMAGES".into()) };
    let data = Dataset::open(Path::new(data), Split::Train)?;
    let [height, width, channels] = data.shape();
    let config = Config {
        channel_mult: vec![1, 2],
        num_blocks: 1,
        attn_resolutions: vec![16],
        channels_per_head: 16,
        ..Config::new(height.min(width), channels, data.condition_dim(), 16)
    };

    let settings = Settings { batch: 32, ..Settings::new(&data, config.clone(), images.parse()?) };
    let mut model = Model::init(&config, settings.seed)?;
    model.meta = meta_of(&data, &config, settings.seed);

    let device = Device::open("auto")?;
    let execution = Execution::new(outdir, &settings, &device);
    println!("training {:.1} M parameters on {device}", model.table.trained_values() as f64 / 1e6);
    let mut event = |event: Event| match event {
        Event::Status(s) => println!("{} images, loss {:.4}, {:.1} images/s", s.nimg, s.loss, s.images_per_s),
        Event::Saved(path) => println!("wrote {}", path.display()),
        Event::Note(text) => println!("{text}"),
        Event::Warning(text) | Event::Fewer(text) => println!("warning: {text}"),
        _ => {}
    };
    // Set by somebody else, such as a signal's handler, it ends the run after the step at hand, with a checkpoint.
    let stop = AtomicBool::new(false);
    let splits = Splits { train: &data, validation: None };
    let training = Training {
        model,
        settings: &settings,
        execution: &execution,
        splits,
        show: None,
        stop: &stop,
        event: &mut event,
        ranks: &mut Alone,
    };
    training.run(&device)?;
    Ok(())
}
