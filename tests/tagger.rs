//! Networks in ONNX files: what they compute is what a direct computation finds; what a tagger is shown is what
//! Pillow makes; bad files are refused in a line.
#![cfg(feature = "onnx")]

#[path = "common/onnx.rs"]
mod onnx;

use std::fs;
use std::path::{Path, PathBuf};

use edm2k::condition::Conditioning;
use edm2k::condition::tagger::Tagger;
use edm2k::data::bicubic::resize;
use edm2k::formats::png::Picture;
use edm2k::onnx::{Network, Wanted};
use onnx::{Dim, FLOAT, Graph, Message, POOLED, UINT8, int, ints, node, tensor, tensor_i64, value_info};
use proptest::prelude::*;

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
            let expected = Conditioning::Features { source: "tagger.onnx".into(), node: POOLED.into() };
            assert_eq!(tagger.conditioning(), expected);
        }
    }
    // The output is another tensor.
    let path = dir.path().join("tagger.onnx");
    let network = Network::open(&path, Wanted::Output, None).unwrap();
    assert_eq!((network.node(), network.width()), ("output", 5));
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
    let network = Network::open(&path, Wanted::Output, Some([9, 9])).unwrap();
    let values: Vec<f32> = picture(9, 9).rgb().iter().map(|&x| f32::from(x)).collect();
    let found = network.features(&values, "picture").unwrap();
    for (&found, expected) in found.iter().zip(small.features(&values)) {
        assert!((f64::from(found) - expected).abs() < 2e-6, "{found}, expected {expected}");
    }
    assert_eq!(Network::open(&path, Wanted::Output, Some([4, 6])).unwrap().size(), [4, 6]);
    let why = Network::open(&path, Wanted::Output, None).err().unwrap().to_string();
    assert!(why.contains("the input input is [?, 3, ?, ?], which leaves the size open"), "{why}");
}

/// What opening says about a file; one line that names it.
fn refusal(path: &Path, wanted: Wanted) -> String {
    let why = Network::open(path, wanted, None).err().expect("the file is refused").to_string();
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
    let cases: Vec<(&str, Vec<u8>, Wanted, &str)> = vec![
        ("empty", vec![], Wanted::Pooled, "not an ONNX file: it is empty"),
        ("page", b"<!doctype html><html>".into(), Wanted::Pooled, "not an ONNX file"),
        ("pointer", b"version https://git-lfs.github.com/spec/v1\n".into(), Wanted::Pooled, "not an ONNX file"),
        ("no-graph", vec![0x08, 0x08], Wanted::Pooled, "not an ONNX file: it has no graph"),
        ("cut", file[..file.len() / 2].into(), Wanted::Pooled, "a damaged ONNX file"),
        (
            "typo",
            file.clone(),
            Wanted::Named("/core_model/pool/Flaten_output"),
            "no node makes a tensor /core_model/pool/Flaten_output; names near it: /core_model/pool/Flatten_output_0",
        ),
        ("input-asked", file.clone(), Wanted::Named("input"), "no node makes a tensor input"),
        ("spatial", file.clone(), Wanted::Named("relu"), "the tensor relu is [1, 6, 5, 5], expected a vector"),
        (
            "two-outputs",
            changed(&|graph| graph.outputs.push(value_info(POOLED, FLOAT, &[]))),
            Wanted::Output,
            "2 outputs, so the tensor of the features must be named; they are output, /core_model/pool/Flatten_output_0",
        ),
        (
            "grey",
            changed(&|graph| graph.inputs = vec![input(FLOAT, &[Dim::Open("N"), side(), side(), Dim::Fixed(1)])]),
            Wanted::Pooled,
            "the input input is [?, 9, 9, 1], expected one input of images",
        ),
        (
            "bytes",
            changed(&|graph| graph.inputs = vec![input(UINT8, &[Dim::Open("N"), side(), side(), Dim::Fixed(3)])]),
            Wanted::Pooled,
            "the input input is uint8, expected",
        ),
        (
            "batch",
            changed(&|graph| graph.inputs = vec![input(FLOAT, &[Dim::Fixed(2), side(), side(), Dim::Fixed(3)])]),
            Wanted::Pooled,
            "the input input is [2, 9, 9, 3], expected",
        ),
        (
            "open",
            changed(&|graph| {
                graph.inputs = vec![input(FLOAT, &[Dim::Fixed(1), Dim::Open("H"), Dim::Open("W"), Dim::Fixed(3)])]
            }),
            Wanted::Pooled,
            "leaves the size open",
        ),
        (
            "huge",
            changed(&|graph| {
                graph.inputs = vec![input(FLOAT, &[Dim::Fixed(1), Dim::Fixed(1 << 40), side(), Dim::Fixed(3)])]
            }),
            Wanted::Pooled,
            "larger than 4096",
        ),
        (
            "no-input",
            changed(&|graph| {
                graph.nodes.push(node("c", "Relu", &["core_model.stem.bias"], "constant"));
            }),
            Wanted::Named("constant"),
            "the features depend on no input",
        ),
        (
            "untyped",
            changed(&|graph| graph.inputs = vec![Message::default().bytes(1, "input")]),
            Wanted::Pooled,
            "the input input has no type",
        ),
        ("undeclared", changed(&|graph| graph.inputs.clear()), Wanted::Pooled, "the features depend on no input"),
        (
            "dangling",
            changed(&|graph| drop(graph.weights.remove(1))),
            Wanted::Pooled,
            "a damaged ONNX file: nothing makes the tensors core_model.stem.bias",
        ),
        (
            "operator",
            changed(&|graph| graph.nodes[2] = node("/stem/Odd", "Oddity", &["conv"], "relu")),
            Wanted::Pooled,
            "the operator Oddity (node /stem/Odd) is not supported",
        ),
        (
            "circle",
            changed(&|graph| graph.nodes[2] = node("/Circle", "Add", &["conv", POOLED], "relu")),
            Wanted::Pooled,
            "the network cannot be run",
        ),
        (
            "shapes",
            changed(&|graph| graph.weights[1] = tensor("core_model.stem.bias", &[5], &[0.0; 5])),
            Wanted::Pooled,
            "the network cannot be run",
        ),
        (
            "bomb",
            changed(&|graph| {
                graph.nodes[2] = node("/Pad", "Conv", &["nchw", "core_model.stem.weight"], "relu")
                    .message(5, ints("pads", &[20_000, 20_000, 20_000, 20_000]));
            }),
            Wanted::Pooled,
            "expected 268435456 at most",
        ),
        (
            "constant-bomb",
            changed(&|graph| {
                graph.weights.push(tensor_i64("sides", &[1 << 20, 1 << 20, 1 << 20]));
                graph.nodes[2] = node("/Expand", "ConstantOfShape", &["sides"], "much");
                graph.nodes.insert(3, node("/Sum", "Add", &["much", "conv"], "relu"));
            }),
            Wanted::Pooled,
            "",
        ),
    ];
    for (name, bytes, wanted, expected) in cases {
        let why = refusal(&write(&dir, name, &bytes), wanted);
        assert!(why.contains(expected), "{name}: {why}\nexpected {expected}");
        println!("{why}");
    }
    refusal(&dir.path().join("missing"), Wanted::Pooled);
    refusal(dir.path(), Wanted::Pooled);
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
        for wanted in [Wanted::Pooled, Wanted::Output] {
            match Network::open(&path, wanted, Some([4, 4])) {
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
