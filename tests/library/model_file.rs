//! Model files: what is written is read back, and what is wrong with a file is said.

use std::collections::HashMap;
use std::path::Path;

use edm2k::formats::safetensors::{self, Dtype, SafeFile};
use edm2k::model::{Config, ImageSpace, Model, ModelMeta, Stored};
use edm2k::params::ParamKind;

fn tiny(label_dim: usize) -> Config {
    let json = format!(
        r#"{{"img_resolution": 8, "img_channels": 3, "label_dim": {label_dim}, "model_channels": 8,
            "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "channels_per_head": 8}}"#
    );
    serde_json::from_str(&json).unwrap()
}

fn meta(config: &Config) -> ModelMeta {
    let vocabulary = (0..config.label_dim).map(|i| format!("tag {i}")).collect();
    ModelMeta { height: 6, width: 10, vocabulary, images_seen: 77, ema_std: Some(0.05), ..ModelMeta::of(config) }
}

/// Rewrites the file with `change` applied to its tensors and metadata.
fn tamper(
    path: &Path,
    change: impl FnOnce(&mut Vec<(String, Dtype, Vec<usize>, Vec<u8>)>, &mut HashMap<String, String>),
) {
    let file = SafeFile::open(path).unwrap();
    let mut metadata = file.metadata().clone();
    let mut tensors = file
        .names()
        .map(|n| {
            let shape = file.shape(n).unwrap().to_vec();
            (n.to_owned(), file.dtype(n).unwrap(), shape, file.bytes(n).unwrap().to_vec())
        })
        .collect();
    change(&mut tensors, &mut metadata);
    drop(file);
    let tensors: Vec<_> = tensors.iter().map(|(n, d, s, b)| (n.as_str(), *d, s.as_slice(), b.as_slice())).collect();
    safetensors::write(path, &tensors, &metadata).unwrap();
}

#[test]
fn f32_files_give_back_every_bit_and_f16_files_the_nearest_half() {
    let dir = tempfile::tempdir().unwrap();
    let config = tiny(5);
    let mut model = Model::init(&config, 3).unwrap();
    model.meta = meta(&config);
    for precision in [Stored::F32, Stored::F16] {
        let path = dir.path().join("model.safetensors");
        model.save(&path, precision).unwrap();
        let read = Model::load(&path).unwrap();
        assert_eq!(read.meta, meta(&config));
        assert_eq!(read.net.config, config);
        for ((_, spec), (a, b)) in model.table.iter().zip(model.weights.iter().zip(&read.weights)) {
            for (a, b) in a.iter().zip(b) {
                let want = if precision == Stored::F16 { half::f16::from_f32(*a).to_f32() } else { *a };
                assert_eq!(want.to_bits(), b.to_bits(), "{}", spec.name);
            }
        }
    }
}

#[test]
fn fresh_parameters_have_the_distributions_of_the_paper() {
    let config = Config { model_channels: 64, logvar_channels: 4096, ..tiny(300) };
    let model = Model::init(&config, 9).unwrap();
    for ((_, spec), values) in model.table.iter().zip(&model.weights) {
        let n = values.len() as f64;
        let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        let var = values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n - mean * mean;
        let tau = std::f64::consts::TAU;
        let (want_mean, want_var) = match spec.kind {
            ParamKind::Gain => (0.0, 0.0),
            ParamKind::Weight { .. } => (0.0, 1.0),
            ParamKind::Freqs => (0.0, tau * tau),
            ParamKind::Phases => (tau / 2.0, tau * tau / 12.0),
        };
        // Five standard errors of mean and variance of n normal variates.
        let sd = f64::sqrt(want_var);
        assert!((mean - want_mean).abs() <= 5.0 * sd / n.sqrt(), "{}: mean {mean}", spec.name);
        assert!((var - want_var).abs() <= 5.0 * want_var * (2.0 / n).sqrt(), "{}: variance {var}", spec.name);
    }
    let other = Model::init(&config, 10).unwrap();
    assert_ne!(model.weights[3][0], other.weights[3][0]);
}

#[test]
fn another_label_width_renews_the_label_embedding_only() {
    let old = Model::init(&tiny(5), 1).unwrap();
    let kept = old.weights.clone();
    let table = old.table.clone();
    let (new, fresh) = old.adapt(&tiny(7), 2).unwrap();
    assert_eq!(fresh.len(), 1);
    assert_eq!(fresh[0].name, "unet.emb_label.weight");
    assert_eq!((fresh[0].found.clone(), fresh[0].expected.clone()), (Some(vec![16, 5]), vec![16, 7]));
    for ((id, spec), values) in new.table.iter().zip(&new.weights) {
        assert_eq!(table[id].name, spec.name);
        assert_eq!(*values == kept[id.0], spec.name != fresh[0].name, "{}", spec.name);
    }
    let (_, fresh) = Model::init(&tiny(0), 1).unwrap().adapt(&tiny(7), 2).unwrap();
    assert_eq!(fresh[0].found, None);
}

#[test]
fn a_file_of_another_program_is_taken_to_be_square() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let config = Config { img_channels: 4, ..tiny(0) };
    let model = Model::init(&config, 3).unwrap();
    model.save(&path, Stored::F16).unwrap();
    tamper(&path, |_, metadata| {
        metadata.remove("edm2k");
    });
    let read = Model::load(&path).unwrap();
    assert_eq!((read.meta.height, read.meta.width, read.meta.encoder), (8, 8, ImageSpace::SdVae));
}

#[test]
fn damage_is_named() {
    type Tensors = Vec<(String, Dtype, Vec<usize>, Vec<u8>)>;
    type Metadata = HashMap<String, String>;
    let config = tiny(5);
    let model = Model::init(&config, 3).unwrap();
    type Damage = fn(&mut Tensors, &mut Metadata);
    let cases: [(&str, Damage); 9] = [
        ("\"config\": it is missing", |_, m| drop(m.remove("config"))),
        ("\"config\": unknown field `colour`", |_, m| drop(m.insert("config".into(), r#"{"colour": 1}"#.into()))),
        ("\"edm2k\": 1 tags in the vocabulary, expected label_dim = 5", |_, m| {
            drop(m.insert("edm2k".into(), r#"{"height":8,"width":8,"encoder":"rgb","vocabulary":["a"]}"#.into()))
        }),
        ("\"edm2k\": tag 2 of the vocabulary: \"a\" is already tag 0", |_, m| {
            let vocabulary = r#"["a","b","a","c","d"]"#;
            let text = format!(r#"{{"height":8,"width":8,"encoder":"rgb","vocabulary":{vocabulary}}}"#);
            drop(m.insert("edm2k".into(), text))
        }),
        ("image of 8x7", |_, m| drop(m.insert("edm2k".into(), r#"{"height":7,"width":8,"encoder":"rgb"}"#.into()))),
        ("tensor unet.out_conv.weight is missing", |t, _| t.retain(|t| t.0 != "unet.out_conv.weight")),
        ("tensor spare is not a parameter", |t, _| t.push(("spare".into(), Dtype::F32, vec![1], vec![0; 4]))),
        ("tensor unet.emb_label.weight: found shape [5, 16], expected [16, 5]", |t, _| {
            t.iter_mut().filter(|t| t.0 == "unet.emb_label.weight").for_each(|t| t.2.reverse())
        }),
        ("tensor unet.emb_noise.weight: found NaN at 2, expected finite F32 numbers", |t, _| {
            let t = t.iter_mut().find(|t| t.0 == "unet.emb_noise.weight").unwrap();
            t.3[8..12].copy_from_slice(&f32::NAN.to_le_bytes());
        }),
    ];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    for (message, damage) in cases {
        model.save(&path, Stored::F32).unwrap();
        tamper(&path, damage);
        let error = Model::load(&path).expect_err(message).to_string();
        assert!(error.contains(message) && error.contains("model.safetensors"), "{error}\nexpected {message}");
    }
}

#[test]
fn weights_too_large_for_f16_are_not_saved_as_infinity() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let config = tiny(0);
    let mut model = Model::init(&config, 3).unwrap();
    model.weights[3][1] = 1e6;
    let error = model.save(&path, Stored::F16).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("unet.emb_noise.weight: found 1000000 at 1, expected finite F16 numbers, which are smaller"),
        "{error}"
    );
    assert!(!path.exists());
}
