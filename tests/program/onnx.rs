//! Networks in ONNX files: what they compute is what a direct computation finds; what a tagger is shown is what
//! Pillow makes; bad files are refused in a line. And what is made of them: `prepare --tagger`, `sample --like`,
//! `fid`.
#![cfg(feature = "onnx")]

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::command::edm2k;
use crate::common::onnx::{
    self, Dim, FLOAT, Graph, Message, POOLED, UINT8, float, int, ints, node, tensor, tensor_i64, value_info,
};
use assert_cmd::assert::Assert;
use edm2k::condition::Conditioning;
use edm2k::condition::tagger::Tagger;
use edm2k::data::dataset::{Dataset, Split};
use edm2k::formats::fingerprint::Fingerprint;
use edm2k::formats::safetensors::{self, Dtype};
use edm2k::model::{Config, Model, Stored};
use edm2k::onnx::{FeatureTensor, OnnxNetwork};
use edm2k::pictures::{Picture, bicubic::resize, decode, png};
use edm2k::rng::{Purpose, Stream};
use nalgebra::{DMatrix, DVector};
use proptest::prelude::*;
use serde_json::{Value, json};

/// Colours without any regularity that a filter could hide in.
fn picture(width: usize, height: usize) -> Picture {
    let value = |i: usize| {
        let (y, x, c) = (i / 3 / width, i / 3 % width, i % 3);
        ((x * 37 + y * 91 + c * 53 + x * y * (c + 3)) % 256) as u8
    };
    Picture::new(height, width, (0..height * width * 3).map(value).collect())
}

fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf29ce484222325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x100000001b3))
}

fn write(dir: &tempfile::TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.path().join(name);
    fs::write(&path, bytes).unwrap();
    path
}

/// Hashes of what Pillow 13.0 makes of the same picture.
#[test]
fn resizing_is_pillows_to_the_byte() {
    for ((width, height), (to_width, to_height), hash) in [
        ((13, 6), (20, 31), 0xdb30866092af62ab),
        ((13, 6), (13, 9), 0x2d9543d1d188fb1e),
        ((64, 41), (17, 41), 0x846bf1f2801bdf75),
        ((200, 150), (48, 48), 0xe9b0b814a39f2ea3),
        ((5, 7), (1, 1), 0x0c86061acd64d40e),
        ((300, 2), (448, 448), 0x7af6470d26aa404f),
        ((512, 704), (299, 299), 0x9bace44cb457489e),
        ((900, 900), (448, 448), 0xe90151bf5250a40b),
    ] {
        let made = resize(&picture(width, height), [to_height, to_width]);
        assert_eq!((made.width(), made.height()), (to_width, to_height));
        assert_eq!(fnv(made.rgb()), hash, "{width}x{height} to {to_width}x{to_height}");
    }
}

/// A network that hands out the image that it is shown.
fn mirror(side: usize, planes: bool) -> Vec<u8> {
    let side = || Dim::Fixed(side as i64);
    let dims = match planes {
        false => [Dim::Open("N"), side(), side(), Dim::Fixed(3)],
        true => [Dim::Open("N"), Dim::Fixed(3), side(), side()],
    };
    let flatten = node("f", "Flatten", &["x"], "all").message(5, int("axis", 1));
    Graph {
        nodes: vec![flatten],
        inputs: vec![value_info("x", FLOAT, &dims)],
        outputs: vec![value_info("all", FLOAT, &[])],
        ..Graph::default()
    }
    .file()
}

#[test]
fn a_tagger_is_shown_the_picture_in_a_white_square_blue_first() {
    // Pillow's, of 13x6 pixels on white; [5, 5, 3].
    const RGB: [u8; 75] = [
        249, 252, 255, 254, 255, 255, 255, 252, 252, 251, 255, 255, 255, 255, 252, 120, 149, 163, 166, 155, 166, 148,
        151, 144, 134, 133, 159, 152, 164, 136, 114, 120, 112, 136, 102, 116, 133, 125, 123, 121, 136, 117, 100, 114,
        127, 219, 202, 188, 201, 199, 205, 215, 188, 204, 200, 213, 192, 180, 199, 194, 255, 255, 255, 255, 255, 255,
        255, 255, 255, 255, 255, 255, 255, 255, 255,
    ];
    let dir = tempfile::tempdir().unwrap();
    let shown = |planes| {
        let tagger = Tagger::open(&write(&dir, "mirror", &mirror(5, planes)), Some("all")).unwrap();
        tagger.features(&picture(13, 6), "picture").unwrap()
    };
    let bgr: Vec<f32> = RGB.as_chunks().0.iter().flat_map(|&[r, g, b]| [b, g, r].map(f32::from)).collect();
    assert_eq!(shown(false), bgr);
    let planes: Vec<f32> = (0..3).flat_map(|c| bgr.iter().skip(c).step_by(3).copied()).collect();
    assert_eq!(shown(true), planes);
}

#[test]
fn features_are_those_of_a_direct_computation() {
    let dir = tempfile::tempdir().unwrap();
    let (small, picture) = (onnx::Tagger::new(9, 6), picture(9, 9));
    let bgr: Vec<f32> = picture.rgb().as_chunks().0.iter().flat_map(|&[r, g, b]| [b, g, r].map(f32::from)).collect();
    let expected = small.features(&bgr);
    assert!(expected.iter().filter(|&&x| x > 0.01).count() >= 3, "{expected:?}");
    for planes in [false, true] {
        let path = write(&dir, "tagger.onnx", &small.graph(planes).file());
        for node in [None, Some(POOLED)] {
            let tagger = Tagger::open(&path, node).unwrap();
            assert_eq!(
                (tagger.network().width(), tagger.network().node(), tagger.network().size()),
                (6, POOLED, [9, 9])
            );
            let found = tagger.features(&picture, "picture").unwrap();
            for (i, (&found, expected)) in found.iter().zip(&expected).enumerate() {
                // 27 products of values up to 1 and a mean of 25, in f32.
                let error = (f64::from(found) - expected).abs();
                assert!(error < 2e-6, "feature {i}: {found}, expected {expected}");
            }
            let fingerprint = Some(Fingerprint::of_file(&path).unwrap());
            let expected = Conditioning::Features { source: "tagger.onnx".into(), node: POOLED.into(), fingerprint };
            assert_eq!(tagger.conditioning(), expected);
        }
    }
    // The output is another tensor.
    let path = dir.path().join("tagger.onnx");
    let network = OnnxNetwork::open(&path, FeatureTensor::Output, None).unwrap();
    assert_eq!((network.node(), network.width()), ("output", 5));
}

/// The network of tract's that is fast computes these wrong: it forgets where the slice begins.
#[test]
fn a_slice_behind_a_convolution_begins_where_it_says() {
    let dir = tempfile::tempdir().unwrap();
    let [from, to, axes] = [("from", [1, 1]), ("to", [8, 8]), ("axes", [2, 3])].map(|(name, of)| tensor_i64(name, &of));
    // A 3x3 convolution that leaves the first channel as it is.
    let centre: Vec<f32> = (0..27).map(|i| f32::from(i == 4)).collect();
    let conv = node("c", "Conv", &["x", "centre"], "conv").message(5, ints("pads", &[1, 1, 1, 1]));
    let flatten = node("f", "Flatten", &["part"], "all").message(5, int("axis", 1));
    let by_step = vec![node("s", "Slice", &["conv", "from", "to", "axes", "steps"], "part")];
    let by_convolution = vec![
        node("s", "Slice", &["conv", "from", "to", "axes"], "slice"),
        node("d", "Conv", &["slice", "one"], "part").message(5, ints("strides", &[2, 2])),
    ];
    let image: Vec<f32> = (0..8 * 8 * 3).map(|i| i as f32).collect();
    let pixel = |y: usize, x: usize| image[(y * 8 + x) * 3];
    let expected: Vec<f32> =
        (1..8).step_by(2).flat_map(|y| (1..8).step_by(2).map(move |x| (y, x))).map(|(y, x)| pixel(y, x)).collect();
    for (name, slice) in [("by a step", by_step), ("by a convolution", by_convolution)] {
        let side = || Dim::Fixed(8);
        let weights = vec![
            from.clone(),
            to.clone(),
            axes.clone(),
            tensor_i64("steps", &[2, 2]),
            tensor("centre", &[1, 3, 3, 3], &centre),
            tensor("one", &[1, 1, 1, 1], &[1.0]),
        ];
        let graph = Graph {
            nodes: [vec![conv.clone()], slice, vec![flatten.clone()]].concat(),
            weights,
            inputs: vec![value_info("x", FLOAT, &[Dim::Open("N"), Dim::Fixed(3), side(), side()])],
            outputs: vec![value_info("all", FLOAT, &[])],
        };
        let network = OnnxNetwork::open(&write(&dir, name, &graph.file()), FeatureTensor::Output, None).unwrap();
        assert_eq!(network.features(&image, name).unwrap(), expected, "{name}");
    }
}

#[test]
fn the_classifier_is_found_by_the_names_that_taggers_have() {
    let dir = tempfile::tempdir().unwrap();
    let pooled = |head: [(&str, &str, &[&str], &str); 3]| {
        let mut graph = onnx::Tagger::new(4, 6).graph(false);
        graph.nodes.truncate(3);
        graph.nodes.push(node("mean", "GlobalAveragePool", &["relu"], "m"));
        graph.nodes.push(node("flat", "Flatten", &["m"], "flat").message(5, int("axis", 1)));
        graph.weights.push(tensor("w", &[6, 2], &[0.5; 12]));
        graph.weights.push(tensor("b", &[2], &[0.5; 2]));
        for (name, operator, inputs, output) in head {
            graph.nodes.push(node(name, operator, inputs, output));
        }
        let path = write(&dir, "tagger.onnx", &graph.file());
        Tagger::open(&path, None).map(|tagger| tagger.network().node().to_owned()).map_err(|e| e.to_string())
    };
    // Keras: the product, the bias and the activation have the layer's name; a weight may come first.
    let keras: [(&str, &str, &[&str], &str); 3] = [
        ("model/other/MatMul", "Relu", &["flat"], "pooled:0"),
        ("model/predictions_dense/MatMul", "MatMul", &["pooled:0", "w"], "model/predictions_dense/MatMul:0"),
        ("model/predictions_dense/BiasAdd", "Add", &["model/predictions_dense/MatMul:0", "b"], "output"),
    ];
    assert_eq!(pooled(keras).unwrap(), "pooled:0");
    // timm: the head may pool too; the product is its last.
    let timm: [(&str, &str, &[&str], &str); 3] = [
        ("/core_model/head/norm/Relu", "Relu", &["flat"], "normed"),
        ("/core_model/head/fc/MatMul", "MatMul", &["normed", "w"], "logits"),
        ("/core_model/head/fc/Add", "Add", &["logits", "b"], "output"),
    ];
    assert_eq!(pooled(timm).unwrap(), "normed");
    let unknown: [(&str, &str, &[&str], &str); 3] = [
        ("/net/norm", "Relu", &["flat"], "normed"),
        ("/net/fc/MatMul", "MatMul", &["normed", "w"], "logits"),
        ("/net/core_model/head", "Add", &["logits", "b"], "output"),
    ];
    let why = pooled(unknown).unwrap_err();
    assert!(why.contains("must be named; inputs of matrix products are normed"), "{why}");
}

#[test]
fn what_comes_after_the_features_plays_no_role() {
    let dir = tempfile::tempdir().unwrap();
    let small = onnx::Tagger::new(9, 6);
    let mut graph = small.graph(false);
    graph.nodes.push(node("odd", "NoSuchOperator", &["logits", "second"], "odd"));
    graph.inputs.push(value_info("second", UINT8, &[Dim::Fixed(7)]));
    graph.outputs.push(value_info("odd", FLOAT, &[]));
    let path = write(&dir, "tagger.onnx", &graph.file());
    let tagger = Tagger::open(&path, None).unwrap();
    assert_eq!(tagger.features(&picture(9, 9), "picture").unwrap().len(), 6);
}

#[test]
fn a_size_that_is_left_open_is_the_callers() {
    let dir = tempfile::tempdir().unwrap();
    let small = onnx::Tagger::new(9, 6);
    let mut graph = small.graph(true);
    let dims = [Dim::Open("N"), Dim::Fixed(3), Dim::Open("H"), Dim::Open("W")];
    graph.inputs = vec![value_info("input", FLOAT, &dims)];
    graph.outputs = vec![value_info(POOLED, FLOAT, &[])];
    let path = write(&dir, "network.onnx", &graph.file());
    let network = OnnxNetwork::open(&path, FeatureTensor::Output, Some([9, 9])).unwrap();
    let values: Vec<f32> = picture(9, 9).rgb().iter().map(|&x| f32::from(x)).collect();
    let found = network.features(&values, "picture").unwrap();
    for (&found, expected) in found.iter().zip(small.features(&values)) {
        assert!((f64::from(found) - expected).abs() < 2e-6, "{found}, expected {expected}");
    }
    assert_eq!(OnnxNetwork::open(&path, FeatureTensor::Output, Some([4, 6])).unwrap().size(), [4, 6]);
    let why = OnnxNetwork::open(&path, FeatureTensor::Output, None).err().unwrap().to_string();
    assert!(why.contains("the input input is [?, 3, ?, ?], which leaves the size open"), "{why}");
}

/// What opening says about a file; one line that names it.
fn refusal(path: &Path, wanted: FeatureTensor) -> String {
    let why = OnnxNetwork::open(path, wanted, None).err().expect("the file is refused").to_string();
    assert!(why.lines().count() == 1 && why.len() < 600 && why.starts_with(path.to_str().unwrap()), "{why}");
    why
}

#[test]
fn bad_files_are_refused_in_a_line() {
    let dir = tempfile::tempdir().unwrap();
    let good = onnx::Tagger::new(9, 6);
    let changed = |change: &dyn Fn(&mut Graph)| {
        let mut graph = good.graph(false);
        change(&mut graph);
        graph.file()
    };
    let input = |kind, dims: &[Dim]| value_info("input", kind, dims);
    let side = || Dim::Fixed(9);
    let file = good.file();
    let cases: Vec<(&str, Vec<u8>, FeatureTensor, &str)> = vec![
        ("empty", vec![], FeatureTensor::Pooled, "not an ONNX file: it is empty"),
        ("page", b"<!doctype html><html>".into(), FeatureTensor::Pooled, "not an ONNX file"),
        ("pointer", b"version https://git-lfs.github.com/spec/v1\n".into(), FeatureTensor::Pooled, "not an ONNX file"),
        ("no-graph", vec![0x08, 0x08], FeatureTensor::Pooled, "not an ONNX file: it has no graph"),
        ("cut", file[..file.len() / 2].into(), FeatureTensor::Pooled, "a damaged ONNX file"),
        (
            "typo",
            file.clone(),
            FeatureTensor::Named("/core_model/pool/Flaten_output"),
            "no node makes a tensor /core_model/pool/Flaten_output; names near it: /core_model/pool/Flatten_output_0",
        ),
        ("input-asked", file.clone(), FeatureTensor::Named("input"), "no node makes a tensor input"),
        ("spatial", file.clone(), FeatureTensor::Named("relu"), "the tensor relu is [1, 6, 5, 5], expected a vector"),
        (
            "two-outputs",
            changed(&|graph| graph.outputs.push(value_info(POOLED, FLOAT, &[]))),
            FeatureTensor::Output,
            "2 outputs, so the tensor of the features must be named; they are output, /core_model/pool/Flatten_output_0",
        ),
        (
            "grey",
            changed(&|graph| graph.inputs = vec![input(FLOAT, &[Dim::Open("N"), side(), side(), Dim::Fixed(1)])]),
            FeatureTensor::Pooled,
            "the input input is [?, 9, 9, 1], expected one input of images",
        ),
        (
            "bytes",
            changed(&|graph| graph.inputs = vec![input(UINT8, &[Dim::Open("N"), side(), side(), Dim::Fixed(3)])]),
            FeatureTensor::Pooled,
            "the input input is uint8, expected",
        ),
        (
            "batch",
            changed(&|graph| graph.inputs = vec![input(FLOAT, &[Dim::Fixed(2), side(), side(), Dim::Fixed(3)])]),
            FeatureTensor::Pooled,
            "the input input is [2, 9, 9, 3], expected",
        ),
        (
            "open",
            changed(&|graph| {
                graph.inputs = vec![input(FLOAT, &[Dim::Fixed(1), Dim::Open("H"), Dim::Open("W"), Dim::Fixed(3)])]
            }),
            FeatureTensor::Pooled,
            "leaves the size open",
        ),
        (
            "huge",
            changed(&|graph| {
                graph.inputs = vec![input(FLOAT, &[Dim::Fixed(1), Dim::Fixed(1 << 40), side(), Dim::Fixed(3)])]
            }),
            FeatureTensor::Pooled,
            "larger than 4096",
        ),
        (
            "no-input",
            changed(&|graph| {
                graph.nodes.push(node("c", "Relu", &["core_model.stem.bias"], "constant"));
            }),
            FeatureTensor::Named("constant"),
            "the features depend on no input",
        ),
        (
            "untyped",
            changed(&|graph| graph.inputs = vec![Message::default().bytes(1, "input")]),
            FeatureTensor::Pooled,
            "the input input has no type",
        ),
        (
            "undeclared",
            changed(&|graph| graph.inputs.clear()),
            FeatureTensor::Pooled,
            "the features depend on no input",
        ),
        (
            "dangling",
            changed(&|graph| drop(graph.weights.remove(1))),
            FeatureTensor::Pooled,
            "a damaged ONNX file: nothing makes the tensors core_model.stem.bias",
        ),
        (
            "operator",
            changed(&|graph| graph.nodes[2] = node("/stem/Odd", "Oddity", &["conv"], "relu")),
            FeatureTensor::Pooled,
            "the operator Oddity (node /stem/Odd) is not supported",
        ),
        (
            "circle",
            changed(&|graph| graph.nodes[2] = node("/Circle", "Add", &["conv", POOLED], "relu")),
            FeatureTensor::Pooled,
            "the network cannot be run",
        ),
        (
            "permutation",
            changed(&|graph| {
                graph.nodes[0] = node("/T", "Transpose", &["input"], "nchw").message(5, ints("perm", &[3, 3, 1, 2]));
            }),
            FeatureTensor::Pooled,
            "a damaged ONNX file: node /T: its perm is no permutation",
        ),
        (
            "shapes",
            changed(&|graph| graph.weights[1] = tensor("core_model.stem.bias", &[5], &[0.0; 5])),
            FeatureTensor::Pooled,
            "the network cannot be run",
        ),
        (
            "bomb",
            changed(&|graph| {
                graph.nodes[2] = node("/Pad", "Conv", &["nchw", "core_model.stem.weight"], "relu")
                    .message(5, ints("pads", &[20_000, 20_000, 20_000, 20_000]));
            }),
            FeatureTensor::Pooled,
            "node /Pad: pads [20000, 20000, 20000, 20000], larger than any image",
        ),
        (
            "window-bomb",
            changed(&|graph| {
                graph.nodes[2] =
                    node("/Pool", "MaxPool", &["conv"], "relu").message(5, ints("kernel_shape", &[i64::MAX, 2]));
            }),
            FeatureTensor::Pooled,
            "node /Pool: kernel_shape [9223372036854775807, 2], larger than any image",
        ),
        (
            "long",
            changed(&|graph| {
                for i in 0..30_000 {
                    let before = if i == 0 { "conv".into() } else { format!("r{}", i - 1) };
                    graph.nodes.insert(2 + i, node(&format!("n{i}"), "Relu", &[&before], &format!("r{i}")));
                }
                graph.nodes[30_002] = node("/Last", "Relu", &["r29999"], "relu");
            }),
            FeatureTensor::Pooled,
            " nodes, expected 20000 at most",
        ),
        (
            "constant-bomb",
            changed(&|graph| {
                graph.weights.push(tensor_i64("sides", &[1 << 20, 1 << 20, 1 << 20]));
                graph.nodes[2] = node("/Expand", "ConstantOfShape", &["sides"], "much");
                graph.nodes.insert(3, node("/Sum", "Add", &["much", "conv"], "relu"));
            }),
            FeatureTensor::Pooled,
            "node /Expand: ConstantOfShape [1048576, 1048576, 1048576], larger than any image",
        ),
        (
            "nan",
            changed(&|graph| {
                graph.weights[1] = tensor("core_model.stem.bias", &[6], &[0.0, 0.0, f32::NAN, 0.0, 0.0, 0.0])
            }),
            FeatureTensor::Pooled,
            "a damaged ONNX file: tensor core_model.stem.bias: found NaN, expected numbers",
        ),
        (
            "celu",
            changed(&|graph| {
                graph.nodes[2] = node("/Celu", "Celu", &["conv"], "relu").message(5, float("alpha", 0.5));
            }),
            FeatureTensor::Pooled,
            "Celu with an alpha that is not 1 (node /Celu) is not supported",
        ),
    ];
    for (name, bytes, wanted, expected) in cases {
        let why = refusal(&write(&dir, name, &bytes), wanted);
        assert!(why.contains(expected), "{name}: {why}\nexpected {expected}");
        println!("{why}");
    }
    refusal(&dir.path().join("missing"), FeatureTensor::Pooled);
    refusal(dir.path(), FeatureTensor::Pooled);
    // Taggers look at squares.
    let flat = changed(&|graph| {
        graph.inputs = vec![input(FLOAT, &[Dim::Fixed(1), Dim::Fixed(4), side(), Dim::Fixed(3)])];
    });
    let why = Tagger::open(&write(&dir, "flat", &flat), None).err().unwrap().to_string();
    assert!(why.contains("images of 9x4, which is no square"), "{why}");
}

#[test]
fn features_that_are_no_numbers_are_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let mut small = onnx::Tagger::new(9, 6);
    small.bias[2] = f32::INFINITY;
    let tagger = Tagger::open(&write(&dir, "tagger", &small.file()), None).unwrap();
    let why = tagger.features(&picture(9, 9), "cat.png").unwrap_err().to_string();
    assert!(why.ends_with("tagger: the features of cat.png are not finite numbers"), "{why}");
}

/// A directory, and the program run in it.
struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs a command line, split at spaces.
    fn run(&self, line: &str) -> Assert {
        edm2k(self.dir.path(), &line.split_whitespace().collect::<Vec<_>>()).assert()
    }

    /// What a command says that fails with one line, maybe after a warning.
    fn fails(&self, line: &str) -> String {
        let said = String::from_utf8(self.run(line).code(1).get_output().stderr.clone()).unwrap();
        let errors: Vec<_> = said.lines().filter(|line| !line.starts_with("warning: ")).collect();
        assert!(errors.len() == 1 && errors[0].starts_with("edm2k: error: "), "{line}: {said}");
        errors[0].to_owned()
    }

    fn says(&self, line: &str) -> (String, String) {
        let output = self.run(line).success().get_output().clone();
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    }

    /// A small network whose gains are not 0 as they are before training, so that conditions show.
    fn model(&self, name: &str, label_dim: usize, side: usize, conditioning: Conditioning) {
        let config: Config = serde_json::from_value(json!({
            "img_resolution": side, "img_channels": 3, "label_dim": label_dim, "model_channels": 8,
            "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [], "channels_per_head": 8,
        }))
        .unwrap();
        let mut model = Model::init(&config, 4).unwrap();
        for (id, spec) in model.table.iter() {
            if spec.name.ends_with("gain") {
                model.weights[id.0].fill(0.5);
            }
        }
        model.meta.conditioning = conditioning;
        model.save(self.path(name), Stored::F32).unwrap();
    }
}

fn features_of(source: &str, node: &str) -> Conditioning {
    Conditioning::Features { source: source.into(), node: node.into(), fingerprint: None }
}

fn unit(features: &[f64]) -> Vec<f32> {
    let norm = features.iter().map(|x| x * x).sum::<f64>().sqrt();
    features.iter().map(|x| (x / norm) as f32).collect()
}

/// The features that the small tagger makes of a picture of its own size, computed directly.
fn expected(small: &onnx::Tagger, picture: &Picture) -> Vec<f32> {
    let bgr: Vec<f32> = picture.rgb().as_chunks().0.iter().flat_map(|&[r, g, b]| [b, g, r].map(f32::from)).collect();
    unit(&small.features(&bgr))
}

#[test]
fn sample_like_takes_a_pictures_features_as_the_condition() {
    let bench = Bench::new();
    let small = onnx::Tagger::new(9, 6);
    fs::write(bench.path("tagger.onnx"), small.file()).unwrap();
    let first = picture(9, 9);
    let second = Picture::new(9, 9, first.rgb().iter().map(|x| 255 - x).collect());
    let pictures = [first, second];
    pictures[0].save(&bench.path("a.png"), &[]).unwrap();
    pictures[1].save(&bench.path("b.png"), &[]).unwrap();
    bench.model("model", 6, 8, features_of("tagger.onnx", POOLED));
    let conditions: Vec<u8> = pictures.iter().flat_map(|p| expected(&small, p)).flat_map(f32::to_le_bytes).collect();
    let tensors: [safetensors::TensorOut; 1] = [("conditions", Dtype::F32, &[2, 6], &conditions)];
    safetensors::write(bench.path("c.safetensors"), &tensors, &Default::default()).unwrap();

    let options = "sample --model model --seeds 0-3 --steps 4 --guidance 2 --device cpu";
    let like = "--tagger tagger.onnx --like a.png --like b.png";
    let (_, said) = bench.says(&format!("{options} --outdir like {like}"));
    assert!(!said.contains("warning"), "{said}");
    bench.says(&format!("{options} --outdir same --conditions c.safetensors"));
    bench.says(&format!("{options} --outdir none"));
    let pixels = |name: &str| image::open(bench.path(name)).unwrap().into_rgb8().into_raw();
    for number in 0..4 {
        let (like, same, none) = ("like", "same", "none");
        let at = |dir: &str| pixels(&format!("{dir}/{number:06}.png"));
        let furthest = at(like).iter().zip(at(same)).map(|(&a, b)| a.abs_diff(b)).max();
        assert!(furthest <= Some(1), "image {number} is {furthest:?} away"); // features differ by rounding
        assert_ne!(at(like), at(none), "image {number}");
    }
    assert_ne!(pixels("like/000000.png"), pixels("like/000001.png"));
    let text = png::read_text(&bench.path("like/000001.png")).unwrap();
    let about: Value = serde_json::from_str(&text.iter().find(|(key, _)| key == "edm2k").unwrap().1).unwrap();
    assert_eq!(about["condition"], json!({"like": "b.png", "tagger": "tagger.onnx", "node": POOLED}));

    // Another tagger than the model was trained on: a warning; nothing if nobody knows.
    for (name, source, node, warns) in
        [("other", "other.onnx", POOLED, true), ("node", "", "other", true), ("unknown", "", "", false)]
    {
        bench.model(name, 6, 8, features_of(source, node));
        let line = format!("sample --model {name} --steps 1 --device cpu --outdir {name}.out {like}");
        let (_, said) = bench.says(&line);
        assert_eq!(said.contains(&format!("warning: {name} was trained on features")), warns, "{said}");
    }

    // Where the content is known, the name does not matter, and another content is an error.
    let of_file = |path: &str| Conditioning::Features {
        source: "tagger.onnx".into(),
        node: POOLED.into(),
        fingerprint: Some(Fingerprint::of_file(&bench.path(path)).unwrap()),
    };
    bench.model("exact", 6, 8, of_file("tagger.onnx"));
    fs::create_dir(bench.path("other-dir")).unwrap();
    let mut changed = onnx::Tagger::new(9, 6);
    changed.bias[0] += 1.0;
    fs::write(bench.path("other-dir/tagger.onnx"), changed.file()).unwrap();
    fs::copy(bench.path("tagger.onnx"), bench.path("renamed.onnx")).unwrap();
    let line = "sample --model exact --steps 1 --device cpu --overwrite --outdir exact.out --like a.png --tagger";
    let (_, said) = bench.says(&format!("{line} renamed.onnx"));
    assert!(!said.contains("warning"), "{said}");
    let said = bench.fails(&format!("{line} other-dir/tagger.onnx"));
    assert!(said.contains("--tagger: exact was trained on features of tagger.onnx ("), "{said}");
    assert!(said.contains("but these are features of tagger.onnx ("), "{said}");
    // A long strip is no reason to make a square of its side.
    let strip = Picture::new(1, 60_000, [40, 80, 120].repeat(60_000));
    strip.save(&bench.path("strip.png"), &[]).unwrap();
    bench.says(&format!("{line} renamed.onnx --like strip.png"));

    bench.model("tags", 6, 8, Conditioning::Tags);
    bench.model("wide", 7, 8, features_of("", ""));
    fs::write(bench.path("text.png"), "no picture").unwrap();
    let mut black = onnx::Tagger::new(9, 6);
    black.bias = vec![-1e9; 6];
    fs::write(bench.path("black.onnx"), black.file()).unwrap();
    for (line, expected) in [
        ("--model tags --tagger tagger.onnx --like a.png", "tags: its conditions are tags, not features"),
        ("--model wide --tagger tagger.onnx --like a.png", "its features are 6 wide, expected the model's 7"),
        ("--model model --tagger missing.onnx --like a.png", "--tagger: missing.onnx: "),
        ("--model model --tagger tagger.onnx --tagger-node relu --like a.png", "the tensor relu is [1, 6, 5, 5]"),
        ("--model model --tagger tagger.onnx --like a.png --like c.png", "--like: c.png: "),
        ("--model model --tagger tagger.onnx --like text.png", "--like: text.png: "),
        ("--model model --tagger black.onnx --like a.png", "--like: a.png: its features are all zero"),
    ] {
        let said = bench.fails(&format!("sample {line} --outdir out --device cpu"));
        assert!(said.contains(expected), "{said}expected {expected}");
    }
    assert!(!bench.path("out").join("000000.png").exists());
    bench.run("sample --model model --outdir out --like a.png").code(2);
    bench.run("sample --model model --outdir out --tagger tagger.onnx").code(2);
}

#[test]
fn pictures_are_mixed_by_their_weights() {
    let bench = Bench::new();
    let small = onnx::Tagger::new(9, 6);
    fs::write(bench.path("tagger.onnx"), small.file()).unwrap();
    let first = picture(9, 9);
    let second = Picture::new(9, 9, first.rgb().iter().map(|x| 255 - x).collect());
    first.save(&bench.path("a.png"), &[]).unwrap();
    second.save(&bench.path("b.png"), &[]).unwrap();
    bench.model("model", 6, 8, features_of("tagger.onnx", POOLED));
    let (a, b) = (expected(&small, &first), expected(&small, &second));
    // The weighted sum, of norm 1.
    let mixed: Vec<f64> = a.iter().zip(&b).map(|(&a, &b)| 0.7 * f64::from(a) + 0.3 * f64::from(b)).collect();
    let conditions: Vec<u8> = [unit(&mixed), a].concat().into_iter().flat_map(f32::to_le_bytes).collect();
    let tensors: [safetensors::TensorOut; 1] = [("conditions", Dtype::F32, &[2, 6], &conditions)];
    safetensors::write(bench.path("c.safetensors"), &tensors, &Default::default()).unwrap();

    let options = "sample --model model --seeds 0-1 --steps 4 --guidance 2 --device cpu";
    bench.says(&format!("{options} --outdir mix --tagger tagger.onnx --mix a.png:0.7,b.png:0.3 --mix a.png:5"));
    bench.says(&format!("{options} --outdir same --conditions c.safetensors"));
    bench.says(&format!("{options} --outdir other --tagger tagger.onnx --mix a.png:0.3,b.png:0.7 --mix b.png:1"));
    let pixels = |name: String| image::open(bench.path(&name)).unwrap().into_rgb8().into_raw();
    for number in 0..2 {
        let at = |dir: &str| pixels(format!("{dir}/{number:06}.png"));
        let furthest = at("mix").iter().zip(at("same")).map(|(&a, b)| a.abs_diff(b)).max();
        assert!(furthest <= Some(1), "image {number} is {furthest:?} away"); // features differ by rounding
        assert_ne!(at("mix"), at("other"), "image {number}");
    }
    let text = png::read_text(&bench.path("mix/000000.png")).unwrap();
    let about: Value = serde_json::from_str(&text.iter().find(|(key, _)| key == "edm2k").unwrap().1).unwrap();
    let mix = &about["condition"]["mix"];
    assert_eq!((&mix[0][0]["like"], &mix[0][1], &mix[1][1]), (&json!("a.png"), &json!(0.7), &json!(0.3)), "{about}");
    let line = "sample --model model --device cpu --outdir out --tagger tagger.onnx --mix";
    assert!(bench.fails(&format!("{line} a.png:1,c.png:1")).contains("--mix a.png:1,c.png:1: c.png: "));
    assert!(bench.fails(&format!("{line} a.png:1,a.png:-1")).contains("sum of these conditions is zero"));
    assert!(!bench.path("out").exists());
}

#[test]
fn prepare_tagger_shows_the_tagger_the_whole_image() {
    let bench = Bench::new();
    let small = onnx::Tagger::new(40, 6);
    fs::write(bench.path("tagger.onnx"), small.file()).unwrap();
    fs::create_dir(bench.path("images")).unwrap();
    let mut lines = String::new();
    let colour = |x: u32, y: u32, i: u32| [(x * 37 + y * 11 * i) as u8, (y * 91) as u8, (x * y * (i + 1)) as u8];
    for i in 0..6 {
        // Higher than the dataset's shape, and transparent in a corner.
        let image = image::RgbaImage::from_fn(36, 40, |x, y| {
            let [r, g, b] = colour(x, y, i);
            image::Rgba([r, g, b, if x + y < 20 { 128 } else { 255 }])
        });
        image.save(bench.path(&format!("images/{i}.png"))).unwrap();
        lines += &format!("{}\n", json!({"id": i, "file": format!("{i}.png"), "tags": ["x"]}));
    }
    // In danbooru's way of things this is the common fault.
    fs::write(bench.path("images/6.png"), "no picture").unwrap();
    lines += &format!("{}\n", json!({"id": 6, "file": "6.png", "tags": ["x"]}));
    fs::write(bench.path("meta.jsonl"), lines).unwrap();
    let line = "prepare --images images --metadata meta.jsonl --out data --size 16x16 --background #000000 \
                --max-crop 0.2 --validation-modulus 3 --tagger tagger.onnx";
    bench.says(line);
    for split in Split::ALL {
        let data = Dataset::open(&bench.path("data"), split).unwrap();
        assert!(!data.header().conditioning.differs(&features_of("tagger.onnx", POOLED)));
        assert!(data.header().conditioning.to_string().starts_with("features of tagger.onnx ("));
        assert_eq!((data.condition_dim(), data.len()), (6, 2));
        for k in 0..data.len() {
            // On white, and padded by two columns of white on each side.
            let i = data.id(k) as u32;
            let mut rgb = vec![255; 40 * 40 * 3];
            for (x, y) in (0..36 * 40).map(|at| (at % 36, at / 36)) {
                let over =
                    |c: u8| if x + y < 20 { (u32::from(c) * 128 + 255 * 127 + 127) / 255 } else { c.into() } as u8;
                rgb[((y * 40 + x + 2) * 3) as usize..][..3].copy_from_slice(&colour(x, y, i).map(over));
            }
            let mut found = vec![0.0; 6];
            data.condition(k, &mut found);
            for (found, expected) in found.iter().zip(expected(&small, &Picture::new(40, 40, rgb))) {
                // Stored in f16.
                assert!((found - expected).abs() <= expected.abs() / 1024.0 + 1e-6, "{i}: {found}, {expected}");
            }
        }
    }
    // Again: nothing to do. Another tagger, or tensor: another dataset.
    let (_, said) = bench.says(line);
    assert_eq!(said.matches("was there").count(), 3, "{said}");
    let other = bench.fails(&line.replace("--tagger", "--tagger-node conv --tagger"));
    assert!(other.contains("the tensor conv is"), "{other}");
    // Of the same content under another name: the same dataset.
    fs::rename(bench.path("tagger.onnx"), bench.path("renamed.onnx")).unwrap();
    let (_, said) = bench.says(&line.replace("tagger.onnx", "renamed.onnx"));
    assert_eq!(said.matches("was there").count(), 3, "{said}");
    fs::write(bench.path("tagger.onnx"), onnx::Tagger::new(39, 6).file()).unwrap();
    let other = bench.fails(line);
    assert!(other.contains("made before with tagger tagger.onnx ("), "{other}");
    bench.run(&format!("{line} --features x.npy")).code(2);
}

/// The mean colour of the picture, or of the squares: features that are known. [N, 3, open, open], so that nothing is
/// resized.
fn mean_colour(of: &str) -> Vec<u8> {
    let dims = [Dim::Open("N"), Dim::Fixed(3), Dim::Open("H"), Dim::Open("W")];
    Graph {
        nodes: vec![
            node("square", "Mul", &["x", "x"], "squares"),
            node("mean", "GlobalAveragePool", &[of], "mean"),
            node("flat", "Flatten", &["mean"], "colour").message(5, int("axis", 1)),
        ],
        inputs: vec![value_info("x", FLOAT, &dims)],
        outputs: vec![value_info("colour", FLOAT, &[])],
        ..Graph::default()
    }
    .file()
}

/// The distance of mean colours to the power `power`, by another way: the eigenvalues of S1 S2 itself.
fn distance(one: &[Picture], other: &[Picture], power: i32) -> f64 {
    let gaussian = |pictures: &[Picture]| {
        let colour = |picture: &Picture| {
            let area = (picture.width() * picture.height()) as f64;
            let sum = |c| picture.rgb().iter().skip(c).step_by(3).map(|&x| f64::from(x).powi(power)).sum::<f64>();
            DVector::from_iterator(3, (0..3).map(|c| sum(c) / area))
        };
        let colours: Vec<_> = pictures.iter().map(colour).collect();
        let n = colours.len() as f64;
        let mean: DVector<f64> = colours.iter().sum::<DVector<f64>>() / n;
        let spread: DMatrix<f64> = colours.iter().map(|x| (x - &mean) * (x - &mean).transpose()).sum();
        (mean, spread / (n - 1.0))
    };
    let ((m1, s1), (m2, s2)) = (gaussian(one), gaussian(other));
    let root: f64 = (&s1 * &s2).complex_eigenvalues().iter().map(|x| x.re.max(0.0).sqrt()).sum();
    (m1 - m2).norm_squared() + s1.trace() + s2.trace() - 2.0 * root
}

#[test]
fn fid_is_the_distance_of_what_is_made_from_the_dataset() {
    let bench = Bench::new();
    fs::write(bench.path("colour.onnx"), mean_colour("x")).unwrap();
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/emoji");
    let emoji = Dataset::open(&data, Split::Train).unwrap();
    let references: Vec<Picture> = (0..emoji.len())
        .map(|i| {
            let mut image = vec![0.0; 32 * 32 * 3];
            emoji.image(i, Stream::new(0, Purpose::Latent, 0), &mut image).unwrap();
            Picture::from_model(32, 32, &image)
        })
        .collect();
    let fid = |options: &str| {
        let line = format!("fid --network colour.onnx --data {} --split train --json {options}", data.display());
        let (out, said) = bench.says(&line);
        (serde_json::from_str::<Value>(&out).unwrap(), said)
    };
    let near = |found: &Value, expected: f64| {
        // Means of 1024 bytes, added in f32: 1e-5 of 255 at most, in distances of a hundred.
        let found = found["frechet_distance"].as_f64().unwrap();
        assert!((found - expected).abs() < 1e-3, "{found}, expected {expected}");
    };

    // Pictures of any size; what `sample` writes beside its images is not meant.
    fs::create_dir(bench.path("made")).unwrap();
    let made: Vec<Picture> = (0..70).map(|i| picture(32, 20 + i)).map(|p| resize(&p, [32, 32])).collect();
    for (i, picture) in made.iter().enumerate() {
        picture.save(&bench.path(&format!("made/{i:06}.{}", if i == 3 { "PNG" } else { "png" })), &[]).unwrap();
    }
    for other in ["grid.png", "000000-steps.png", "notes.txt"] {
        fs::write(bench.path("made").join(other), "something else").unwrap();
    }
    let (found, said) = fid("--generated made");
    near(&found, distance(&made, &references, 1));
    assert_eq!((&found["images"], &found["references"], &found["features"]), (&json!(70), &json!(159), &json!(3)));
    assert!(!said.contains("warning"), "{said}");
    let (found, _) = fid("--generated made --images 20");
    near(&found, distance(&made, &references[..20], 1));

    // The dataset against itself.
    fs::create_dir(bench.path("itself")).unwrap();
    for (i, picture) in references.iter().enumerate() {
        picture.save(&bench.path(&format!("itself/{i}.png")), &[]).unwrap();
    }
    near(&fid("--generated itself").0, 0.0);

    // What a model makes is what `sample` makes of the same seeds and conditions, in turn.
    bench.model("model", 64, 32, Conditioning::Tags);
    let options = "--steps 3 --solver euler --guidance 2 --device cpu --batch 4";
    let (found, said) = fid(&format!("--model model --count 7 --images 5 {options}"));
    let doubt = "warning: model: nothing says what its conditions mean (classes?), those of ";
    assert!(said.contains(doubt) && said.matches("warning").count() == 1, "{said}");
    let rows: Vec<_> = (0..5).map(|i| format!("--row {}:{}", data.display(), emoji.id(i))).collect();
    let exact =
        format!("sample --model model --outdir sampled --seeds 0-6 --precision f32 {options} {}", rows.join(" "));
    bench.says(&exact);
    let (again, _) = fid("--generated sampled --images 5");
    assert_eq!(found["frechet_distance"], again["frechet_distance"]);
    assert_eq!(found["sampler"]["steps"], 3);
    let unconditional = fid("--generated made --images 5").0;
    assert_ne!(found["frechet_distance"], unconditional["frechet_distance"]);
    let (_, said) = fid("--generated sampled --images 3");
    assert!(said.starts_with("warning: 7 images against 3 have singular covariances of 3 features"), "{said}");

    let line = |options: &str| format!("fid --data {} {options}", data.display());
    let text = line("--network colour.onnx --generated made --split train");
    assert!(bench.says(&text).0.starts_with("Frechet distance "));
    fs::create_dir(bench.path("one")).unwrap();
    made[0].save(&bench.path("one/0.png"), &[]).unwrap();
    fs::create_dir(bench.path("bad")).unwrap();
    made[0].save(&bench.path("bad/0.png"), &[]).unwrap();
    fs::write(bench.path("bad/1.png"), "no picture").unwrap();
    fs::write(bench.path("text.onnx"), "no network").unwrap();
    for (options, expected) in [
        ("--network colour.onnx --generated one", "--generated: one: 1 PNG files, expected 2 at least"),
        ("--network colour.onnx --generated bad", "--generated bad/1.png: "),
        ("--network colour.onnx --generated missing", "--generated: missing: "),
        ("--network colour.onnx --generated made --images 1", "emoji: 1 image, expected 2 at least"),
        ("--network text.onnx --generated made", "--network: text.onnx: not an ONNX file"),
        ("--network colour.onnx --network-node x --generated made", "no node makes a tensor x"),
        ("--network colour.onnx --generated made --vae x", "has no latents, but pixels"),
        ("--network colour.onnx --model model --steps 0", "steps = 0"),
    ] {
        let said = bench.fails(&line(options));
        assert!(said.contains(expected), "{said}expected {expected}");
    }
    for options in [
        "--generated made",
        "--network colour.onnx",
        "--network colour.onnx --generated made --model model",
        "--network colour.onnx --model model --count 1",
    ] {
        bench.run(&line(options)).code(2);
    }
}

/// Each image of a dataset of several sizes is looked at as it is, and what a model makes is of the size of the image whose
/// condition it has.
#[test]
fn fid_of_several_sizes_is_of_pictures_of_these_sizes() {
    let bench = Bench::new();
    fs::write(bench.path("colour.onnx"), mean_colour("x")).unwrap();
    for dir in ["photos", "all"] {
        fs::create_dir(bench.path(dir)).unwrap();
    }
    let mut lines = String::new();
    let sizes = [[32, 32], [48, 32], [32, 32], [32, 48], [48, 32]];
    for (id, [width, height]) in (2..).zip(sizes) {
        let photo = resize(&picture(32, 20 + id), [height, width]);
        photo.save(&bench.path(&format!("photos/{id}.png")), &[]).unwrap();
        lines += &format!("{}\n", json!({"id": id, "file": format!("{id}.png"), "tags": [format!("t{id}")]}));
    }
    fs::write(bench.path("lines.jsonl"), lines).unwrap();
    bench.says("prepare --images photos --metadata lines.jsonl --out data --sizes 32x32,48x32,32x48");
    let fid = |options: &str| {
        let line = format!("fid --network colour.onnx --data data --split train --json {options}");
        let found: Value = serde_json::from_str(&bench.says(&line).0).unwrap();
        found["frechet_distance"].as_f64().unwrap()
    };
    assert!(fid("--generated photos").abs() < 1e-3);
    // Enlarged or reduced, noise would have other squares.
    fs::write(bench.path("colour.onnx"), mean_colour("squares")).unwrap();
    fs::create_dir(bench.path("noise")).unwrap();
    let picture_of =
        |dir: &str, name: &str| decode::open(&bench.path(&format!("{dir}/{name}")), [255; 3]).unwrap().picture;
    let mut noise = vec![];
    for (id, [width, height]) in [[32, 32], [48, 32], [32, 64], [64, 64], [16, 16]].into_iter().enumerate() {
        let rgb = (0..width * height * 3)
            .map(|i| ((i as u32).wrapping_mul(2_654_435_761).wrapping_mul(id as u32 + 1) >> 24) as u8)
            .collect();
        Picture::new(height, width, rgb).save(&bench.path(&format!("noise/{id}.png")), &[]).unwrap();
        noise.push(picture_of("noise", &format!("{id}.png")));
    }
    let photos: Vec<Picture> = (2..7).map(|id| picture_of("photos", &format!("{id}.png"))).collect();
    let (found, expected) = (fid("--generated noise"), distance(&noise, &photos, 2));
    assert!((found - expected).abs() < 1e-3 * expected, "{found}, expected {expected}");
    fs::write(bench.path("colour.onnx"), mean_colour("x")).unwrap();

    bench.model("model", 5, 32, Conditioning::Tags);
    let options = "--steps 3 --solver euler --guidance 2 --device cpu";
    for number in 0..7 {
        let (id, [width, height]) = (2 + number % 5, sizes[number % 5]);
        let row = format!("--row data:{id} --seeds {number} --size {width}x{height} --outdir made-{number}");
        bench.says(&format!("sample --model model --precision f32 {options} {row}"));
        let made = bench.path(&format!("made-{number}/{number:06}.png"));
        fs::copy(made, bench.path(&format!("all/{number}.png"))).unwrap();
    }
    let (found, expected) = (fid(&format!("--model model --count 7 --batch 2 {options}")), fid("--generated all"));
    assert!((found - expected).abs() < 1e-3 * expected, "{found}, expected {expected}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn damage_is_an_error_or_harmless(
        places in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
    ) {
        let mut bytes = onnx::Tagger::new(4, 2).file();
        for (place, value) in places {
            let place = place.index(bytes.len());
            bytes[place] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let dir = tempfile::tempdir().unwrap();
        let path = write(&dir, "tagger.onnx", &bytes);
        for wanted in [FeatureTensor::Pooled, FeatureTensor::Output] {
            match OnnxNetwork::open(&path, wanted, Some([4, 4])) {
                Err(why) => prop_assert!(why.to_string().lines().count() == 1, "{}", why),
                Ok(network) => {
                    let [height, width] = network.size();
                    if let Err(why) = network.features(&vec![100.0; height * width * 3], "picture") {
                        prop_assert!(why.to_string().lines().count() == 1, "{}", why);
                    }
                }
            }
        }
    }
}
