//! EDM2 as its authors have it: their datasets read in place, class-conditional models, their presets.

use std::fs;
use std::path::Path;

use crate::common::command::{edm2k, printed, refused_in_one_line};
use crate::common::zip::zip;
use edm2k::data::dataset::{Dataset, DatasetError, Representation, Split};
use edm2k::model::Model;
use edm2k::pictures::png;
use edm2k::rng::{Purpose, Stream};
use edm2k::sample::Solver;
use edm2k::sample::presets::{PRESETS, preset};
use image::{ExtendedColorType, ImageEncoder};
use serde_json::{Value, json};

/// A picture that is the square of its class.
fn picture(class: usize, number: usize) -> Vec<u8> {
    let pixel = |x: usize, y: usize| [40 * class as u8, (16 * x) as u8, (10 * y + number) as u8];
    let rgb: Vec<u8> = (0..64).flat_map(|i| pixel(i % 8, i / 8)).collect();
    let mut file = Vec::new();
    image::codecs::png::PngEncoder::new(&mut file).write_image(&rgb, 8, 8, ExtendedColorType::Rgb8).unwrap();
    file
}

/// `.npy` of f32.
fn npy(shape: &str, values: &[f32]) -> Vec<u8> {
    let header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    values.iter().for_each(|x| bytes.extend(x.to_le_bytes()));
    bytes
}

const CLASSES: usize = 3;

/// Nine pictures of three classes.
fn pictures() -> Vec<(String, Vec<u8>)> {
    (0..9).map(|i| (format!("0000{}/img{i:08}.png", i / 5), picture(i % CLASSES, i))).collect()
}

fn labels(names: &[String]) -> Vec<u8> {
    let labels: Vec<Value> = names.iter().enumerate().map(|(i, name)| json!([name, i % CLASSES])).collect();
    json!({"labels": labels}).to_string().into_bytes()
}

fn write(path: &Path, images: &[(String, Vec<u8>)], labels: Option<Vec<u8>>, wide: bool) {
    // dataset.json is the last entry, and directories do not sort.
    let mut entries: Vec<(&str, Vec<u8>)> = images.iter().rev().map(|(name, data)| (&**name, data.clone())).collect();
    entries.extend(labels.map(|labels| ("dataset.json", labels)));
    fs::write(path, zip(&entries, wide)).unwrap();
}

const NOISE: Stream = Stream { seed: 1, purpose: Purpose::Latent, step: 0, image: 2 };

#[test]
fn an_archive_is_read_in_place() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pictures.zip");
    let images = pictures();
    let names: Vec<String> = images.iter().map(|(name, _)| name.clone()).collect();
    for wide in [false, true] {
        write(&path, &images, Some(labels(&names)), wide);
        let data = Dataset::open(&path, Split::Train).unwrap();
        assert_eq!((data.len(), data.shape(), data.condition_dim()), (9, [8, 8, 3], CLASSES));
        assert_eq!((data.header().kind, data.id(4), data.find(4)), (Representation::Images, 4, Some(4)));
        for i in 0..9 {
            let (mut image, mut condition) = (vec![0.0; 192], vec![0.5; CLASSES]);
            data.image(i, NOISE, &mut image).unwrap();
            data.condition(i, &mut condition);
            let hot: Vec<f32> = (0..CLASSES).map(|class| f32::from(u8::from(class == i % CLASSES))).collect();
            assert_eq!(condition, hot, "image {i}");
            let expected = [40.0 * (i % CLASSES) as f32, 16.0 * 3.0, 10.0 * 2.0 + i as f32];
            let found: Vec<f32> = image[3 * (2 * 8 + 3)..][..3].iter().map(|x| (x + 1.0) * 127.5).collect();
            assert!(found.iter().zip(expected).all(|(x, y)| (x - y).abs() < 1e-3), "image {i}: {found:?}");
        }
    }
    let print = |path: &Path| Dataset::open(path, Split::Train).unwrap().fingerprint();
    let before = print(&path);
    let mut other = images.clone();
    other[3].1 = picture(2, 77);
    write(&path, &other, Some(labels(&names)), true);
    assert_ne!(print(&path), before, "another picture under the same name");

    // What was put into it again, as Python's `zipfile` does in mode 'a', is what counts.
    let mut entries: Vec<(&str, Vec<u8>)> = images.iter().map(|(name, data)| (&**name, data.clone())).collect();
    let all_of = |class: usize| {
        let labels: Vec<Value> = names.iter().map(|name| json!([name, class])).collect();
        ("dataset.json", json!({"labels": labels}).to_string().into_bytes())
    };
    entries.extend([all_of(1), all_of(2), (names[3].as_str(), picture(2, 77))]);
    fs::write(&path, zip(&entries, false)).unwrap();
    let data = Dataset::open(&path, Split::Train).unwrap();
    let (mut image, mut condition) = (vec![0.0; 192], vec![0.5; 3]);
    data.condition(0, &mut condition);
    data.image(3, NOISE, &mut image).unwrap();
    assert_eq!((data.len(), &condition[..]), (9, &[0.0, 0.0, 1.0][..]));
    assert!(((image[2] + 1.0) * 127.5 - 77.0).abs() < 1e-3, "{}", image[2]);

    // Images of other kinds.
    let colour = |file: &str, name: &str| {
        let mut bytes = std::io::Cursor::new(Vec::new());
        let picture = image::load_from_memory(&images.iter().find(|(of, _)| of == file).unwrap().1).unwrap();
        picture.write_to(&mut bytes, image::ImageFormat::from_path(name).unwrap()).unwrap();
        (name.to_owned(), bytes.into_inner())
    };
    let kinds: Vec<_> = ["a.JPG", "b.webp", "c.jpeg", "d.png"].iter().map(|name| colour(&names[0], name)).collect();
    let kind_names: Vec<String> = kinds.iter().map(|(name, _)| name.clone()).collect();
    write(&path, &kinds, Some(labels(&kind_names)), false);
    let data = Dataset::open(&path, Split::Train).unwrap();
    assert_eq!((data.len(), data.check(&mut || ()).unwrap()), (4, 1));
    (0..4).for_each(|i| data.image(i, NOISE, &mut image).unwrap());

    write(&path, &images, None, false);
    assert_eq!(Dataset::open(&path, Split::Train).unwrap().condition_dim(), 0);
    assert!(matches!(Dataset::open(&path, Split::Test), Err(DatasetError::NoSplit { .. })));
}

#[test]
fn latents_are_scaled_as_edm2_scales_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("latents.zip");
    // Mean c + y / 10 + x / 100 and standard deviation (c + 1) / 8 of channel c.
    let mean = |c: usize, y: usize, x: usize| c as f32 + y as f32 / 10.0 + x as f32 / 100.0;
    let std = |c: usize| (c + 1) as f32 / 8.0;
    let places = || (0..4).flat_map(|c| (0..2).flat_map(move |y| (0..3).map(move |x| (c, y, x))));
    let values: Vec<f32> = places().map(|(c, y, x)| mean(c, y, x)).chain(places().map(|(c, ..)| std(c))).collect();
    let images = vec![("00000/img-mean-std-00000000.npy".to_owned(), npy("(8, 2, 3)", &values))];
    write(&path, &images, None, false);
    let data = Dataset::open(&path, Split::Train).unwrap();
    assert_eq!((data.shape(), data.header().kind), ([2, 3, 4], Representation::Latents));
    let (mut noise, mut image) = (vec![0.0; 24], vec![0.0; 24]);
    NOISE.normals(&mut noise);
    data.image(0, NOISE, &mut image).unwrap();
    for (c, y, x) in places() {
        let at = (y * 3 + x) * 4 + c;
        let (raw_mean, raw_std) = ([5.81, 3.25, 0.12, -2.15][c], [4.17, 4.62, 3.71, 3.28][c]);
        let expected = (mean(c, y, x) + std(c) * noise[at] - raw_mean) * 0.5 / raw_std;
        assert!((image[at] - expected).abs() < 1e-6, "channel {c} at {x},{y}: {}, expected {expected}", image[at]);
    }
}

fn data_at(path: &Path) -> Dataset {
    Dataset::open(path, Split::Train).unwrap()
}

#[test]
fn damage_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.zip");
    let images = pictures();
    let names: Vec<String> = images.iter().map(|(name, _)| name.clone()).collect();
    let refuses = |expected: &str| {
        let error = Dataset::open(&path, Split::Train).unwrap_err().to_string();
        assert!(error.contains("d.zip: ") && error.contains(expected), "{error}; expected {expected}");
    };
    write(&path, &images, Some(labels(&names[..8])), false);
    refuses("entry dataset.json: it has no label of 00001/img00000008.png");
    // Labels of images that somebody took out do no harm.
    write(&path, &images[..8], Some(labels(&names)), false);
    assert_eq!(data_at(&path).len(), 8);
    let latents =
        |name: &str, width: usize| (name.to_owned(), npy(&format!("(8, 2, {width})"), &vec![0.0; 16 * width]));
    for second in [images[0].clone(), latents("b.npy", 4)] {
        write(&path, &[latents("/a.npy", 3), second.clone()], None, false);
        refuses(&format!("entry {}: not of the kind and size of /a.npy, the archive's first", second.0));
    }
    write(&path, &[images[0].clone(), ("b.tif".into(), vec![1])], None, false);
    refuses("entry b.tif: an image that cannot be read, expected one of .png, .npy, .jpg");
    write(&path, &images, Some(b"{\"labels\": [[\"a\", -1]]}".to_vec()), false);
    refuses("entry dataset.json: invalid value");
    write(&path, &[], None, false);
    refuses("it has no images");
    write(&path, &images[..1], Some(br#"{"labels": [["00000/img00000000.png", 4000000000]]}"#.to_vec()), false);
    refuses("labels of 4000000001 classes");
    write(&path, &[("a.npy".into(), npy("(4, 2, 3)", &[0.0; 24]))], None, false);
    refuses("entry a.npy: an array of shape [4, 2, 3], expected [8, height, width]");
    fs::write(&path, "not a zip at all, but longer than one").unwrap();
    refuses("not a usable zip archive");

    // What is only met when an image is read: another size, a damaged picture, a damaged place.
    let mut other = images.clone();
    other[1].1 = npy("(8, 2, 3)", &[0.0; 48]);
    other[2].1 = b"no picture".to_vec();
    write(&path, &other, Some(labels(&names)), false);
    let data = Dataset::open(&path, Split::Train).unwrap();
    let reads = |i: usize| data.image(i, NOISE, &mut vec![0.0; 192]).map_err(|error| error.to_string());
    assert!(reads(0).is_ok());
    for (i, expected) in [(1, "it is a NumPy array (.npy)"), (2, "no image of a known kind")] {
        let error = reads(i).unwrap_err();
        assert!(error.contains(&names[i]) && error.contains(expected), "{error}");
    }

    // `--check` finds them too, and other sizes.
    let checked = || data_at(&path).check(&mut || ()).unwrap_err().to_string();
    assert!(checked().contains(&format!("d.zip: entry {}: ", names[1])), "{}", checked());
    let mut wide = std::io::Cursor::new(Vec::new());
    image::RgbImage::new(8, 6).write_to(&mut wide, image::ImageFormat::Png).unwrap();
    write(&path, &[images[0].clone(), ("b.png".into(), wide.into_inner())], None, false);
    assert!(checked().contains("entry b.png: a picture of 8x6, but the archive's first is a picture of 8x8"));
    let other = [("a.npy".into(), npy("(8, 2, 3)", &[0.0; 48])), ("b.npy".into(), npy("(8, 3, 2)", &[0.0; 48]))];
    write(&path, &other, None, false);
    assert!(
        checked().contains("b.npy: latents of shape [8, 3, 2], but the archive's first is latents of shape [8, 2, 3]")
    );

    // Other numbers under the old checksum, which look like latents too; and no numbers at all under the right one.
    let latents = [("a.npy", npy("(8, 2, 3)", &[0.25; 48])), ("b.npy", npy("(8, 2, 3)", &[0.5; 48]))]
        .map(|(name, x)| (name.into(), x));
    write(&path, &latents, None, false);
    let mut file = fs::read(&path).unwrap();
    let place = file.windows(4).position(|bytes| bytes == 0.5f32.to_le_bytes()).unwrap();
    file[place..place + 4].copy_from_slice(&0.75f32.to_le_bytes());
    fs::write(&path, &file).unwrap();
    let data = Dataset::open(&path, Split::Train).unwrap();
    let read = data.image(1, NOISE, &mut [0.0; 24]).unwrap_err().to_string();
    let checked = data.check(&mut || panic!("a damaged archive is no whole one")).unwrap_err().to_string();
    for error in [read, checked, refused_in_one_line(edm2k(dir.path(), &["info", "--check", "d.zip"]).assert())] {
        assert!(error.contains("d.zip: entry b.npy: checksum ") && error.contains("it is damaged"), "{error}");
    }
    assert!(data.image(0, NOISE, &mut [0.0; 24]).is_ok());
    write(&path, &[latents[0].clone(), ("b.npy".into(), npy("(8, 2, 3)", &[f32::NAN; 48]))], None, false);
    let data = Dataset::open(&path, Split::Train).unwrap();
    let error = data.image(1, NOISE, &mut [0.0; 24]).unwrap_err().to_string();
    assert!(error.contains("entry b.npy: a value of NaN, expected finite numbers"), "{error}");
    assert_eq!(data.check(&mut || ()).unwrap(), 1);

    // What was compressed, by what the directory says of the first entry.
    write(&path, &images, Some(labels(&names)), false);
    let mut file = fs::read(&path).unwrap();
    let place = file.windows(4).rposition(|bytes| bytes == b"PK\x01\x02").unwrap();
    file[place + 10] = 8;
    fs::write(&path, &file).unwrap();
    refuses("it is compressed, expected a stored one: unpack the archive, and pack it by `zip -0 -r`");

    // What an archive is made of, and what has no tags.
    write(&path, &images, Some(labels(&names)), false);
    fs::create_dir(dir.path().join("folder")).unwrap();
    fs::write(dir.path().join("folder/dataset.json"), labels(&names)).unwrap();
    let error = Dataset::open(&dir.path().join("folder"), Split::Train).unwrap_err().to_string();
    assert!(error.contains("folder: an unpacked EDM2 dataset: `dataset_tool.py convert` packs it"), "{error}");
    for (line, expected) in [
        (
            "condition train --data d.zip --out c.safetensors",
            "its conditions are classes, so there is nothing to invent",
        ),
        ("condition tags --data d.zip", "d.zip: a zip of EDM2's, whose conditions are classes; it has no tags"),
        ("condition tags --data folder", "folder: an unpacked EDM2 dataset"),
    ] {
        let said = refused_in_one_line(edm2k(dir.path(), &line.split(' ').collect::<Vec<_>>()).assert());
        assert!(said.contains(expected), "{said}");
    }

    // Every shorter file is refused, and no byte makes a panic.
    write(&path, &images, Some(labels(&names)), true);
    let good = fs::read(&path).unwrap();
    for length in (0..good.len()).step_by(61) {
        fs::write(&path, &good[..length]).unwrap();
        assert!(Dataset::open(&path, Split::Train).is_err(), "{length} bytes");
    }
    for at in (0..good.len()).step_by(7) {
        let mut bad = good.clone();
        bad[at] ^= 0xff;
        fs::write(&path, &bad).unwrap();
        if let Ok(data) = Dataset::open(&path, Split::Train) {
            let mut image = vec![0.0; data.shape().iter().product()];
            (0..data.len()).for_each(|i| drop(data.image(i, NOISE, &mut image)));
        }
    }
}

/// What EDM2's authors do: train on a zip, with its classes; sample a class, any class, and measure the loss.
#[test]
fn a_class_conditional_model_learns_from_an_archive_and_draws_classes() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let images = pictures();
    let names: Vec<String> = images.iter().map(|(name, _)| name.clone()).collect();
    write(&at.join("data.zip"), &images, Some(labels(&names)), false);
    let network = r#"{"model_channels": 8, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [4], "channels_per_head": 8}"#;
    fs::write(at.join("net.json"), network).unwrap();
    let run = |line: &str| {
        edm2k(at, &line.split_whitespace().map(|word| word.trim_matches('|')).collect::<Vec<_>>()).assert()
    };
    let train =
        "train --data data.zip --outdir run --config net.json --batch 4 --batch-gpu 4 --rampup 0 --seed 1 --device cpu";
    run(&format!("{train} --duration 16")).success();
    run(&format!("{train} --duration 24")).success(); // goes on
    let model = "run/snapshot-000000024-0.050.safetensors";
    let opened = Model::load(at.join(model)).unwrap();
    assert_eq!((opened.net.config.label_dim, opened.meta.vocabulary.len()), (CLASSES, 0));
    let said = printed(run(&format!("eval --model {model} --data data.zip --split train --device cpu")));
    assert!(said.contains("9 images of the train split"), "{said}");

    for (file, expected) in [
        ("--check data.zip", "conditions are classes (3)\n"),
        ("--check data.zip", "checked        the archive is whole\n"),
        (model, "conditions are classes (3)\n"),
        ("run", "conditions of 3 values: classes (3)\n"),
    ] {
        let said = printed(run(&format!("info {file}")));
        assert!(said.contains(expected) && !said.contains("tags"), "{said}");
    }

    let sample = format!("sample --model {model} --steps 2 --device cpu");
    fs::write(at.join("names.txt"), "tench, Tinca tinca\ngoldfish\nshark\n").unwrap();
    run(&format!("{sample} --outdir a --class 2 --class Goldfish --class-names names.txt")).success();
    run(&format!("{sample} --outdir b --class random --seeds 0-19")).success();
    let condition = |name: &str| -> Value {
        let text = png::read_text(&at.join(name)).unwrap();
        let json = &text.iter().find(|(keyword, _)| keyword == "edm2k").unwrap().1;
        serde_json::from_str::<Value>(json).unwrap()["condition"].clone()
    };
    assert_eq!(condition("a/000000.png"), json!({"class": 2, "name": "shark"}));
    assert_eq!(condition("a/000001.png"), json!({"class": 1, "name": "goldfish"}));
    let drawn: Vec<u64> = (0..20).map(|i| condition(&format!("b/{i:06}.png"))["class"].as_u64().unwrap()).collect();
    assert!((0..CLASSES as u64).all(|class| drawn.contains(&class)), "{drawn:?}");
    // A seed has its class whatever else is drawn.
    run(&format!("{sample} --outdir c --class random --seeds 7")).success();
    assert!(fs::read(at.join("b/000007.png")).unwrap() == fs::read(at.join("c/000007.png")).unwrap());
    // A class is the row of an image that has it.
    run(&format!("{sample} --outdir d --row data.zip:5 --seeds 0")).success();
    let pixels = |name: &str| image::open(at.join(name)).unwrap();
    assert!(pixels("d/000000.png") == pixels("a/000000.png"));

    fs::write(at.join("more.txt"), "tench\ngoldfish\nshark\nray\n").unwrap();
    for (names, warns) in [("more.txt", true), ("names.txt", false)] {
        let done = run(&format!("{sample} --outdir w-{names} --class 1 --class-names {names}")).success();
        let said = String::from_utf8(done.get_output().stderr.clone()).unwrap();
        let warning = format!("warning: --class-names more.txt: 4 names of classes, but {model} has 3");
        assert_eq!(said.contains(&warning), warns, "{said}");
    }
    // Away from a class, and away from none.
    run(&format!("{sample} --outdir n --class 2 --negative Goldfish --class-names names.txt")).success();
    assert_eq!(condition("n/000000.png")["negative"], json!({"class": 1, "name": "goldfish"}));
    run(&format!("{sample} --outdir o --negative Goldfish --class-names names.txt")).success();
    assert_eq!(condition("o/000000.png")["negative"], json!({"class": 1, "name": "goldfish"}));
    let done = run(&format!("{sample} --outdir p")).success();
    let said = String::from_utf8(done.get_output().stderr.clone()).unwrap();
    assert!(said.contains("warning: the model was trained without --cond-dropout"), "{said}");

    // Images without labels are none of such a model.
    write(&at.join("bare.zip"), &images, None, false);
    for arguments in [
        format!("eval --model {model} --data bare.zip --split train --device cpu"),
        format!("{sample} --outdir e --row bare.zip:3"),
        format!("{sample} --outdir e --mix bare.zip:3:1"),
    ] {
        let said = refused_in_one_line(run(&arguments));
        assert!(said.contains(&format!("bare.zip: its images have no conditions, which {model} takes")), "{said}");
    }
    let dry = format!(
        "train --data bare.zip --init {model} --duration 8 --batch 8 --cond-dropout 0.1 --device cpu --dry-run"
    );
    let done = run(&dry).success();
    let said = String::from_utf8(done.get_output().stderr.clone()).unwrap();
    let lost =
        format!("warning: the conditions of --init are lost: bare.zip: its images have no conditions, which {model}");
    assert!(said.contains(&lost) && said.contains("warning: --cond-dropout drops nothing"), "{said}");

    for (arguments, expected) in [
        ("--class 1 --negative 3", "--negative: run/snapshot-000000024-0.050.safetensors: class 3, expected 0 to 2"),
        ("--class 3", "--class: run/snapshot-000000024-0.050.safetensors: class 3, expected 0 to 2"),
        ("--class shrk --class-names names.txt", "--class: unknown class \"shrk\", did you mean \"shark\"?"),
        ("--class shark", "--class: \"shark\" is no number, and there are no names of classes"),
        ("--class random --class 1", "--class: \"random\" goes alone"),
        ("--class-names names.txt", "--class-names: there is no --class and no --negative"),
        ("--tags cat", "the model has no vocabulary"),
    ] {
        let said = refused_in_one_line(run(&format!("{sample} --outdir e {arguments}")));
        assert!(said.contains(expected), "{arguments}: {said}");
    }
    let presets = format!("sample --model {model} --device cpu --outdir f --preset");
    let said = refused_in_one_line(run(&format!("{presets} edm2-img512-s-guid-fid")));
    assert!(said.contains("there is no --gnet"), "{said}");
    // What is given goes before what the preset says.
    let dir = format!("sample --model {model} --device cpu --class 1 --preset edm2-img64-s-fid --outdir");
    run(&format!("{dir} g --steps 2")).success();
    run(&format!("{dir} h --steps 2 --guidance 1.5 --solver euler")).success();
    let sampler = |name: &str| {
        let text = png::read_text(&at.join(name)).unwrap();
        let json = &text.iter().find(|(keyword, _)| keyword == "edm2k").unwrap().1;
        let sampler = serde_json::from_str::<Value>(json).unwrap()["sampler"].clone();
        [&sampler["solver"], &sampler["steps"], &sampler["guidance"]].map(Value::clone)
    };
    assert_eq!(sampler("g/000000.png"), [json!("heun"), json!(2), json!(1.0)]);
    assert_eq!(sampler("h/000000.png"), [json!("euler"), json!(2), json!(1.5)]);
}

#[test]
fn the_presets_are_those_of_the_authors() {
    let with = |name: &str| preset(name).unwrap().config();
    assert_eq!((with("edm2-img512-xs-guid-fid").guidance, with("edm2-img512-s-autog-dino").guidance), (1.4, 2.45));
    assert_eq!((with("edm2-img64-s-fid").guidance, with("edm2-img64-s-fid").steps), (1.0, 32));
    assert!(PRESETS.iter().all(|preset| preset.config().solver == Solver::Heun && preset.config().validate().is_ok()));
    assert!(preset("edm2").unwrap_err().to_string().contains("edm2-img512-xxl-autog-fid"));
}
