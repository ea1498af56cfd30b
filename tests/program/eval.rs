//! `edm2k eval`: the losses of a network that is known by formula, and what is refused.

use std::fs;
use std::path::Path;

use crate::common::command::{here, printed};
use edm2k::backend::Backend;
use edm2k::backend::cpu::Cpu;
use edm2k::collective::Alone;
use edm2k::data::dataset::{Dataset, Split};
use edm2k::model::{Config, ImageSpace, Model, Stored};
use edm2k::rng::{Purpose, Stream};
use edm2k::train::validation::{self, SIGMAS};
use edm2k::train::{DataIdentity, Schedule, Settings};
use serde_json::Value;

const DATA: &str = "tests/data/emoji";

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn eval(model: &Path, options: &[&str]) -> String {
    printed(here(&["eval", "--model", text(model), "--data", DATA]).args(options).assert())
}

fn dataset(split: Split) -> Dataset {
    Dataset::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join(DATA), split).unwrap()
}

/// A fresh network for the committed emoji, whose output gain is zero: D(x; sigma) = c_skip x.
fn model() -> Model {
    let config: Config = serde_json::from_value(serde_json::json!({
        "img_resolution": 32, "img_channels": 3, "label_dim": 64, "model_channels": 8, "channel_mult": [1, 2],
        "num_blocks": 1, "attn_resolutions": [], "channels_per_head": 8,
    }))
    .unwrap();
    let mut model = Model::init(&config, 4).unwrap();
    model.meta.vocabulary = dataset(Split::Train).vocabulary().tags().iter().map(|tag| tag.tag.clone()).collect();
    model
}

fn write(model: &Model, path: &Path) {
    model.save(path, Stored::F32).unwrap();
}

/// Error of D = c_skip x, when image i is shown `draws` times, time j with noise i * draws + j at `sigma(j)`.
fn expected(data: &Dataset, draws: usize, sigma: impl Fn(usize) -> f64) -> Vec<f64> {
    let [h, w, c] = data.shape();
    let mut sums = vec![0.0; draws];
    let (mut image, mut noise) = (vec![0.0; h * w * c], vec![0.0; h * w * c]);
    for (k, j) in (0..data.len() * draws).map(|k| (k, k % draws)) {
        data.image(k / draws, Stream::new(0, Purpose::Latent, (k / draws) as u64), &mut image).unwrap();
        Stream::new(0, Purpose::TrainNoise, k as u64).normals(&mut noise);
        let (s2, d2) = (sigma(j) * sigma(j), 0.25);
        let c_skip = d2 / (s2 + d2);
        let far = |(&y, &n): (&f32, &f32)| (c_skip * (f64::from(y) + sigma(j) * f64::from(n)) - f64::from(y)).powi(2);
        let square = image.iter().zip(&noise).map(far).sum::<f64>() / image.len() as f64;
        sums[j] += (s2 + d2) / (s2 * d2) * square;
    }
    sums.iter().map(|sum| sum / data.len() as f64).collect()
}

#[test]
fn losses_by_level_are_those_of_the_formula() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    write(&model(), &path);
    for split in [Split::Validation, Split::Test] {
        let json: Value = serde_json::from_str(&eval(&path, &["--json", "--split", &split.to_string()])).unwrap();
        let data = dataset(split);
        assert_eq!((&json["images"], &json["split"]), (&data.len().into(), &split.to_string().into()));
        let levels = json["levels"].as_array().unwrap();
        assert_eq!(levels.len(), SIGMAS.len());
        for ((level, sigma), want) in levels.iter().zip(SIGMAS).zip(expected(&data, SIGMAS.len(), |j| SIGMAS[j])) {
            let [found, loss, error, logvar] =
                ["sigma", "loss", "error", "logvar"].map(|key| level[key].as_f64().unwrap());
            assert_eq!(found, sigma);
            // f32: c_skip x - y loses the digits that both have in common, 3 at sigma = 0.002.
            assert!((error / want - 1.0).abs() < 1e-3, "sigma {sigma}: error {error}, expected {want}");
            // logvar depends on the level only, so the formula holds for the means too.
            let want = error / logvar.exp() + logvar;
            assert!((loss - want).abs() < 1e-9 * want.abs().max(1.0), "sigma {sigma}: loss {loss}, expected {want}");
        }
    }
}

#[test]
fn the_loss_watched_in_training_is_the_mean_over_its_levels() {
    let (model, data) = (model(), dataset(Split::Validation));
    let mut backend = Cpu::<f32>::for_sampling(&model.table);
    model.load_into(&mut backend).unwrap();
    let sigma = 0.5f64;
    let settings = Settings {
        config: model.net.config.clone(),
        data: DataIdentity::of(&data),
        init: None,
        seed: 1,
        duration: 1,
        batch: 1,
        lr: 1.0,
        schedule: Schedule::Edm2,
        decay: 0.0,
        rampup: 0,
        p_mean: sigma.ln(),
        p_std: 0.0,
        ema: vec![],
        cond_dropout: 0.0,
        cond_dropout_from: 0,
        flip: false,
        dropout: 0.0,
    };
    let got = validation::loss(&mut backend, &model.net, &settings, &data, 3, &mut Alone).unwrap();
    let level = backend.upload([1, 1, 1, 1], &[sigma as f32]);
    let logvar = model.net.logvar(&mut backend, &level).1;
    let logvar = f64::from(backend.download(&logvar).unwrap()[0]);
    let error = expected(&data, 4, |_| sigma).iter().sum::<f64>() / 4.0;
    let want = error / logvar.exp() + logvar;
    assert!((got - want).abs() < 1e-5 * want.abs().max(1.0), "{got}, expected {want}");
}

#[test]
fn the_batch_changes_no_digit_and_the_first_images_are_taken() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    let mut model = model();
    model.weights.iter_mut().filter(|values| values.len() == 1).for_each(|gain| gain[0] = 0.5);
    write(&model, &path);
    let plot = dir.path().join("loss.svg");
    let table = eval(&path, &["--images", "3", "--plot", text(&plot)]);
    assert_eq!(table, eval(&path, &["--images", "3", "--batch", "2"]));
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines[..2], ["3 images of the validation split", "   sigma       loss      error     logvar"]);
    assert_eq!(lines.len(), 2 + SIGMAS.len());
    assert!(lines[2].starts_with("   0.002 ") && lines[16].starts_with("      80 "), "{table}");
    assert!(table != eval(&path, &["--images", "4"]));
    let svg = fs::read_to_string(&plot).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("noise level sigma") && svg.contains("error"), "{svg}");
}

#[test]
fn what_does_not_fit_is_one_clear_line() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name);
    let made = |name: &str, change: &dyn Fn(&mut Model)| {
        let mut model = model();
        change(&mut model);
        write(&model, &file(name));
    };
    made("right", &|_| {});
    made("words", &|model| model.meta.vocabulary[1] = "face of a cat".into());
    made("latents", &|model| model.meta.encoder = ImageSpace::SdVae);
    let config = |change: &dyn Fn(&mut Config)| {
        let mut config = model().net.config;
        change(&mut config);
        Model::init(&config, 1).unwrap()
    };
    write(&config(&|config| config.label_dim = 6), &file("narrow"));
    write(&config(&|config| config.img_channels = 1), &file("grey"));
    write(&config(&|config| (config.img_resolution, config.channel_mult) = (64, vec![1; 7])), &file("deep"));
    write(&config(&|config| config.label_dim = 0), &file("unconditional"));
    fs::write(file("junk"), "junk").unwrap();
    let cases = [
        ("words", &[][..], "made for another vocabulary (it has \"face\" where "),
        ("latents", &[], "tests/data/emoji: its images are pixels, those of "),
        ("narrow", &[], "narrow are 6 wide"),
        ("grey", &[], "tests/data/emoji: its images have 3 channels, those of "),
        ("deep", &[], "tests/data/emoji: an image of 32x32 (width x height), expected both to be multiples of 64"),
        ("junk", &[], "junk: not a whole safetensors file"),
        ("nowhere", &[], "nowhere: No such file"),
        ("right", &["--data", "demo"], "demo: no dataset of edm2k (there is no vocabulary.json in it)"),
        ("right", &["--images", "1", "--plot", "Cargo.toml/x.svg"], "Cargo.toml/x.svg: Not a directory"),
    ];
    for (model, options, message) in cases {
        let model = file(model);
        let arguments = ["eval", "--model", text(&model)];
        let data: &[&str] = if options.contains(&"--data") { &[] } else { &["--data", DATA] };
        let output = here(&arguments).args(data).args(options).assert().code(1).get_output().clone();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.starts_with("edm2k: error: ") && said.lines().count() == 1, "{said}");
        assert!(said.contains(message), "{said}expected {message}");
    }
    for option in [["--images", "0"], ["--batch", "0"], ["--split", "trian"]] {
        here(&["eval", "--model", "x", "--data", DATA]).args(option).assert().code(2);
    }
    // A network without conditions is measured without them; a split may be missing.
    eval(&file("unconditional"), &["--images", "1"]);
    let half = file("half");
    fs::create_dir(&half).unwrap();
    for name in ["vocabulary.json", "train-00000.safetensors"] {
        fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join(DATA).join(name), half.join(name)).unwrap();
    }
    let right = file("right");
    let output = here(&["eval", "--model", text(&right), "--data", text(&half)]).assert().code(1).get_output().clone();
    assert!(String::from_utf8(output.stderr).unwrap().contains("half: no validation shards"));
}

#[test]
fn weights_that_overflow_give_a_table_and_a_picture_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    let mut model = model();
    // Loss and error become infinite or NaN.
    let logvar = model.table.find("logvar_linear.weight").unwrap();
    let gain = model.table.find("unet.out_gain").unwrap();
    model.weights[gain.0][0] = 3e38;
    assert!(model.weights[logvar.0].iter().all(|x| x.is_finite()));
    write(&model, &path);
    let plot = dir.path().join("loss.svg");
    let json: Value = serde_json::from_str(&eval(&path, &["--json", "--images", "1", "--plot", text(&plot)])).unwrap();
    assert!(json["levels"][14]["error"].is_null() && json["levels"][14]["logvar"].is_number());
    assert!(plot.exists());
}
