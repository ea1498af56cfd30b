//! The whole pipeline, command by command as docs/guide.md has it, on miniatures of everything that one would
//! download: danbooru2023 in archives with all that is wrong in it, an SD-VAE, a tagger, a snapshot of NVIDIA's.
//! On the CPU, and on the emulator where this build has it.
#![cfg(feature = "onnx")]

use std::fs;
use std::path::Path;

use crate::common::autoencoder;
use crate::common::command::printed;
use crate::common::danbooru::{self, Danbooru, KEPT};
use crate::common::onnx;
use crate::common::place;
use assert_cmd::assert::OutputAssertExt as _;
use edm2k::condition::Conditioning;
use edm2k::data::dataset::{Representation, Split};
use edm2k::model::{ImageSpace, Model};
use edm2k::pictures::png::read_text;
use image::ImageReader;
use serde_json::Value;

/// Width of the tagger's features.
const WIDTH: usize = 24;

enum Here {}
type Place = place::Place<Here>;

impl Place {
    /// What a user of the guide has downloaded.
    fn new() -> Self {
        let place = Self::empty();
        let at = place.dir();
        let posts = Danbooru::miniature();
        fs::create_dir(at.join("danbooru")).unwrap();
        posts.write_tars(&at.join("danbooru"));
        posts.write_posts(at);
        // Three levels: a latent for 4x4 pixels.
        autoencoder::write(&at.join("vae.safetensors"), &autoencoder::sd_vae(&[32, 32, 32], 1));
        fs::write(at.join("tagger.onnx"), onnx::Tagger::new(16, WIDTH).file()).unwrap();
        danbooru::picture(5, 70, 50).save(at.join("drawing.png")).unwrap();
        let snapshot = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/official_style_snapshot_nosrc.pkl");
        fs::copy(snapshot, at.join("edm2.pkl")).unwrap();
        place
    }

    /// Runs a command, its words separated by spaces ('_' stands for a space in a word); what it prints.
    fn run(&self, command: &str) -> String {
        let mut edm2k = self.command("");
        edm2k.args(command.split_whitespace().map(|word| word.replace('_', " ")));
        printed(edm2k.assert())
    }

    /// The files of a directory whose names end so, with their bytes.
    fn files(&self, dir: &str, ending: &str) -> Vec<(String, Vec<u8>)> {
        place::files(&self.path(dir)).into_iter().filter(|(name, _)| name.ends_with(ending)).collect()
    }

    fn prepare(&self, out: &str) -> String {
        self.run(&format!(
            "prepare --danbooru danbooru --metadata posts.json --out {out} --size 64x88 --vae vae.safetensors \
             --tagger tagger.onnx --vocabulary 8 --shard-size 7 --source miniature"
        ))
    }
}

fn pipeline(device: &'static str) {
    let place = Place::new();
    let compute = |command: &str| place.run(&format!("{command} --device {device}"));

    // The pictures.
    let said = place.prepare("data");
    for (split, count) in KEPT {
        assert!(said.contains(&format!("{:10} {count:>8} images", split.to_string())), "{split}: {said}");
        let data = place.open("data", split);
        assert_eq!((data.len(), data.shape(), data.condition_dim()), (count, [22, 16, 4], WIDTH));
        assert_eq!(data.header().kind, Representation::Latents);
        let Conditioning::Features { source, node, fingerprint: Some(_) } = &data.header().conditioning else {
            panic!("{:?}", data.header().conditioning);
        };
        assert_eq!((source.as_str(), node.as_str()), ("tagger.onnx", onnx::POOLED));
        assert_eq!(
            data.header().autoencoder.as_ref().map(|made_by| made_by.network),
            Some(edm2k::codec::AutoencoderKind::SdVae)
        );
        let remainder = match split {
            Split::Validation => 0..1,
            Split::Test => 1..2,
            Split::Train => 2..1000,
        };
        assert!((0..data.len()).all(|i| remainder.contains(&(data.id(i) % 1000))));
    }
    place.prepare("again");
    assert!(place.files("data", ".safetensors") == place.files("again", ".safetensors"));

    // The checkpoint, the training, and the same after the loss of half of it.
    place.run(&format!("import edm2.pkl --condition-dim {WIDTH} --out start.safetensors"));
    let train = "train --init start.safetensors --data data --outdir run --duration 40 --batch 2 --rampup 0 --lr 0.003 \
                 --cond-dropout 0.5 --cond-dropout-from 20 --snapshot 4 --checkpoint 20 --validate 20 --status 2 --grid 20 --vae vae.safetensors";
    compute(train);
    let snapshots = place.files("run", "0.100.safetensors");
    assert_eq!(snapshots.len(), 10);
    fs::remove_file(place.path("run/checkpoint-000000040.safetensors")).unwrap();
    fs::remove_file(place.path("run").join(&snapshots[9].0)).unwrap();
    compute(train);
    assert!(place.files("run", "0.100.safetensors") == snapshots, "resuming changed the snapshots");
    // Rows of an image and four samples, as pictures.
    let grids = place.files("run", ".png");
    assert_eq!(
        grids.iter().map(|(name, _)| &name[..]).collect::<Vec<_>>(),
        ["grid-000000020.png", "grid-000000040.png"]
    );
    let grid = ImageReader::open(place.path("run/grid-000000040.png")).unwrap().into_dimensions().unwrap();
    assert!(grid.0 >= 5 * 64 && grid.1 >= 88 && grid.1.div_ceil(88) >= 1, "{grid:?}");
    let model = Model::load(place.path("run").join(&snapshots[9].0)).unwrap();
    assert_eq!((model.meta.encoder, model.meta.height, model.meta.width), (ImageSpace::SdVae, 22, 16));
    assert_eq!((model.meta.images_seen, model.meta.source.as_str()), (40, "miniature"));
    assert!(matches!(&model.meta.conditioning, Conditioning::Features { source, .. } if source == "tagger.onnx"));

    // Another average, and how good it is.
    place.run("ema run --std 0.08 --out averages");
    let average = "averages/ema-000000040-0.080.safetensors";
    let eval = compute(&format!("eval --model {average} --data data --split validation --plot loss.svg --json"));
    serde_json::from_str::<Value>(&eval).unwrap();
    assert!(fs::read_to_string(place.path("loss.svg")).unwrap().contains("<svg"));

    // Conditions, and pictures from them: from tags, invented, and like a drawing.
    place.run("condition train --data data --out conditions.safetensors --epochs 4");
    let words = place.run("condition sample --model conditions.safetensors --tags blue_hair --count 2 --data data");
    assert!(words.contains("blue hair"), "{words}");
    let sample = format!("sample --model {average} --vae vae.safetensors --steps 2 --outdir");
    let ways = [
        ("tags", "--tags smile,_blue_hair --condition-model conditions.safetensors --seeds 0-1"),
        ("invented", "--random-conditions 1 --per-condition 2 --condition-model conditions.safetensors"),
        ("like", "--like drawing.png --tagger tagger.onnx --per-condition 2"),
    ];
    let mut conditions = Vec::new();
    for (name, options) in ways {
        compute(&format!("{sample} {name} {options}"));
        for seed in 0..2 {
            let path = place.path(name).join(format!("{seed:06}.png"));
            let picture = ImageReader::open(&path).unwrap().decode().unwrap();
            assert_eq!((picture.width(), picture.height()), (64, 88), "{name}");
            let texts = read_text(&path).unwrap();
            let (_, about) = texts.iter().find(|(keyword, _)| keyword == "edm2k").unwrap();
            let about: Value = serde_json::from_str(about).unwrap();
            conditions.push(about["condition"].to_string());
        }
        compute(&format!("{sample} {name}-again {options}"));
        let (first, second) = (place.files(name, ".png"), place.files(&format!("{name}-again"), ".png"));
        assert!(first == second, "{name}: the same command made another picture");
    }
    assert!(conditions[0].contains("blue hair") && conditions[4].contains("drawing.png"), "{conditions:?}");
}

#[test]
fn everything_works_together_on_the_cpu() {
    pipeline("cpu");
}

#[cfg(feature = "emulator")]
#[test]
fn everything_works_together_on_the_emulator() {
    pipeline("emulated");
}
