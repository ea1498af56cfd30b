//! Datasets of several sizes: which one a picture gets, what is stored, in which order training shows them, and that a run
//! on them goes on to the bit.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::Write as _;

use crate::common::autoencoder;
use crate::common::command::{edm2k, refused_in_one_line};
use crate::common::place::{self, assert_same_tensors, distance, files, succeed, text};
use edm2k::collective::Part;
use edm2k::data::dataset::{Dataset, Split};
use edm2k::formats::safetensors::SafeFile;
use edm2k::pictures::Picture;
use edm2k::pictures::Size;
use edm2k::pictures::decode;
use edm2k::pictures::fit::choose;
use edm2k::rng::{Purpose, Stream};
use edm2k::train::order::{MAX_GROUP, Order};
use edm2k::train::{DataIdentity, Settings};
use proptest::prelude::*;
use serde_json::{Value, json};

const CONFIG: &str = r#"{"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1,
    "attn_resolutions": [4], "channels_per_head": 16}"#;

/// Width and height of each picture is one of these, and a bit more.
const SIZES: [[u32; 2]; 3] = [[8, 8], [16, 8], [8, 16]];

/// A directory with pictures, each of one colour, and lines that describe them.
enum Here {}
type Place = place::Place<Here>;

impl Place {
    fn new() -> Self {
        let place = Self::empty();
        fs::create_dir(place.path("pictures")).unwrap();
        fs::write(place.path("config.json"), CONFIG).unwrap();
        fs::write(place.path("meta.jsonl"), "").unwrap();
        place
    }

    /// With so many training pictures of each size, and a fifth as many for validation, of all in turn.
    fn with(counts: [usize; 3]) -> Self {
        let place = Self::new();
        let mut left = counts;
        let mut id = 0;
        while left.iter().any(|&left| left > 0) {
            let bucket = id as usize % 3;
            id += 1;
            if left[bucket] > 0 && id % 5 > 1 {
                left[bucket] -= 1;
                place.picture(id, SIZES[bucket], 1);
            } else if id % 5 == 0 {
                place.picture(id, SIZES[bucket], 1);
            }
        }
        place
    }

    fn picture(&self, id: i64, [width, height]: [u32; 2], repeats: u8) {
        let (width, height) = (width as usize, height as usize);
        let mut noise = vec![0.0; width * height * 3];
        Stream::new(3, Purpose::Init, id as u64).normals(&mut noise);
        let rgb = noise.iter().map(|x| (x * 64.0 + 128.0) as u8).collect();
        let name = format!("{id}.png");
        Picture::new(height, width, rgb).save(&self.path("pictures").join(&name), &[]).unwrap();
        let line = json!({"id": id, "file": name, "tags": [format!("t{}", id % 4)], "repeats": repeats});
        writeln!(File::options().append(true).open(self.path("meta.jsonl")).unwrap(), "{line}").unwrap();
    }

    fn run(&self, arguments: &str) -> String {
        succeed(&mut self.command(arguments))
    }

    fn refuses(&self, arguments: &str) -> String {
        refused_in_one_line(edm2k(self.dir(), &arguments.split_whitespace().collect::<Vec<_>>()).assert())
    }

    fn prepare(&self, out: &str, more: &str) -> String {
        self.run(&prepare(out, &format!("--sizes 8x8,16x8,8x16 {more}")))
    }
}

fn prepare(out: &str, more: &str) -> String {
    format!(
        "prepare --images pictures --metadata meta.jsonl --out {out} --validation-modulus 5 --shard-size 7 \
         --vocabulary 8 {more}"
    )
}

/// Bytes of an image as it was in its picture, `[H, W, C]`.
fn pixels(data: &Dataset, i: usize) -> Vec<u8> {
    let mut image = vec![0.0; data.shape_of(i).iter().product()];
    data.image(i, Stream::new(0, Purpose::Latent, 0), &mut image).unwrap();
    image.iter().map(|x| ((x + 1.0) * 127.5).round() as u8).collect()
}

// ---- which size ------------------------------------------------------------------------------

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    /// Against all crops one could make: the largest rectangle of each shape, in floating point.
    #[test]
    fn a_picture_gets_the_size_that_crops_it_least(
        width in 1u32..3000, height in 1u32..3000,
        sizes in prop::collection::vec((1u32..24, 1u32..24).prop_map(|(w, h)| size(32 * w, 32 * h)), 1..12),
    ) {
        let (chosen, crop) = choose(size(width, height), &sizes);
        let of = |of: &Size| {
            let [w, h, width, height] = [of.width, of.height, width, height].map(f64::from);
            // As wide as the picture, or as high, whichever fits.
            let fits = if width * h / w <= height { [width, width * h / w] } else { [height * w / h, height] };
            let factor = fits[0] / w;
            (1.0 - fits[0] * fits[1] / (width * height), factor.max(1.0 / factor))
        };
        let all: Vec<(f64, f64)> = sizes.iter().map(of).collect();
        let least = all.iter().map(|of| of.0).fold(f64::MAX, f64::min);
        prop_assert!((crop.lost - all[chosen].0).abs() < 1e-9);
        // Sizes of 32ths differ by far more than that, or not at all.
        let alike: Vec<usize> = (0..sizes.len()).filter(|&at| all[at].0 < least + 1e-11).collect();
        let mildest = alike.iter().map(|&at| all[at].1).fold(f64::MAX, f64::min);
        let first = alike.iter().find(|&&at| all[at].1 < mildest * (1.0 + 1e-11));
        prop_assert_eq!(Some(&chosen), first, "{:?}", all);
    }
}

#[test]
fn of_sizes_that_crop_alike_the_nearest_is_taken_and_then_the_first() {
    let at = |width, height, sizes: &[(u32, u32)]| {
        let sizes: Vec<Size> = sizes.iter().map(|&(width, height)| size(width, height)).collect();
        choose(size(width, height), &sizes).0
    };
    assert_eq!(at(1000, 1000, &[(256, 256), (512, 512), (1536, 1536)]), 2, "by 1.54, not by 1.95 or 3.9");
    assert_eq!(at(512, 512, &[(256, 256), (1024, 1024)]), 0, "by two up or down: the first");
    assert_eq!(at(300, 300, &[(512, 704), (704, 512)]), 0);
    assert_eq!(at(300, 301, &[(704, 512), (512, 704)]), 1);
    // A crop that is less by one part in 2^40 counts.
    assert_eq!(at(1 << 20, (1 << 20) - 1, &[(8192, 8191), (8192, 8192)]), 1);
}

fn size(width: u32, height: u32) -> Size {
    Size { width, height }
}

// ---- what is stored --------------------------------------------------------------------------

#[test]
fn pictures_are_stored_at_their_sizes_and_counted() {
    let place = Place::with([30, 12, 6]);
    // Between two shapes.
    place.picture(1002, [13, 9], 1);
    let said = place.prepare("data", "--max-crop 0.3");
    assert!(said.contains("  8x8") && said.contains("  16x8") && said.contains("  8x16"), "{said}");

    let mut of_size: HashMap<[usize; 2], usize> = HashMap::new();
    for split in [Split::Train, Split::Validation] {
        let data = place.open("data", split);
        let mut counted: HashMap<[usize; 2], usize> = HashMap::new();
        for i in 0..data.len() {
            let [height, width, channels] = data.shape_of(i);
            *counted.entry([height, width]).or_default() += 1;
            *of_size.entry([height, width]).or_default() += 1;
            let original =
                decode::open(&place.path(&format!("pictures/{}.png", data.id(i))), [255; 3]).unwrap().picture;
            if data.id(i) != 1002 {
                assert_eq!([height, width, channels], [original.height(), original.width(), 3]);
                assert_eq!(pixels(&data, i), original.rgb(), "image {}", data.id(i));
            }
        }
        let buckets: HashMap<_, _> = data.buckets().into_iter().collect();
        assert_eq!(buckets, counted, "{split}");
        // Of sizes that are alike the first.
        let count =
            |[width, height]: &[u32; 2]| counted.get(&[*height as usize, *width as usize]).copied().unwrap_or(0);
        let [width, height] = SIZES.iter().rev().max_by_key(|size| count(size)).unwrap();
        assert_eq!(data.shape(), [*height as usize, *width as usize, 3], "{split}");
    }
    let train = place.open("data", Split::Train);
    assert_eq!(train.buckets().iter().map(|of| of.1).sum::<usize>(), 49);
    assert_eq!(train.shape_of(train.find(1002).unwrap()), [8, 16, 3], "13/18 of it is kept, of 8x8 9/13");

    // The three views of the counts agree.
    let summary: Value = serde_json::from_slice(&fs::read(place.path("data/summary.json")).unwrap()).unwrap();
    let info: Value = serde_json::from_str(&place.run("info data --json")).unwrap();
    for ([width, height], bucket) in SIZES.iter().zip(summary["sizes"].as_array().unwrap()) {
        let name = format!("{width}x{height}");
        let expected = of_size.get(&[*height as usize, *width as usize]).copied().unwrap_or(0);
        assert_eq!((bucket["size"].as_str(), bucket["images"].as_u64()), (Some(&*name), Some(expected as u64)));
        let parts = info["parts"].as_array().unwrap().iter();
        let shown = parts.flat_map(|part| part["buckets"].as_array().unwrap()).filter(|of| of["size"] == *name);
        assert_eq!(shown.map(|of| of["images"].as_u64().unwrap()).sum::<u64>(), expected as u64, "{name}");
        assert!(said.contains(&format!("  {name:10} {expected:>8} images")), "{said}");
    }
    let shown = place.run("info data --check");
    assert!(shown.contains("3 sizes") && shown.contains(" of 16x8") && shown.contains("shards are whole"), "{shown}");
}

#[test]
fn one_size_is_stored_as_it_always_was() {
    let place = Place::with([10, 0, 0]);
    place.run(&prepare("one", "--size 8x8"));
    place.run(&prepare("listed", "--sizes 8x8"));
    assert_eq!(files(&place.path("one")), files(&place.path("listed")));
    let shard = SafeFile::open(place.path("one/train-00000.safetensors")).unwrap();
    let names: Vec<&str> = shard.names().collect();
    assert_eq!(names, ["conditions", "flips", "ids", "images", "repeats", "tag_indices", "tag_offsets"]);
    assert!(!shard.metadata()["dataset"].contains("sizes"), "{}", shard.metadata()["dataset"]);
    assert!(!fs::read_to_string(place.path("one/summary.json")).unwrap().contains("sizes"));
}

#[test]
fn missing_and_damaged_shards_are_made_again_with_the_same_bytes() {
    let place = Place::with([20, 9, 5]);
    place.prepare("data", "");
    let whole = files(&place.path("data"));
    assert!(whole.keys().filter(|name| name.starts_with("train-")).count() > 3, "{:?}", whole.keys());
    for name in whole.keys().filter(|name| name.ends_with(".safetensors")) {
        let path = place.path("data").join(name);
        fs::remove_file(&path).unwrap();
        place.prepare("data", "");
        assert!(files(&place.path("data")) == whole, "{name} removed");
        let mut bytes = whole[name].clone();
        let at = bytes.len() - 20;
        bytes[at] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert!(place.refuses("info --check data").contains(name.as_str()));
        assert!(place.prepare("data", "").contains("made again"), "{name}");
        assert!(files(&place.path("data")) == whole, "{name} damaged");
    }
    let other = place.refuses(&prepare("data", "--sizes 8x8,16x8"));
    assert!(other.contains("made before with size 8x8,16x8,8x16, now 8x8,16x8"), "{other}");
}

#[test]
fn a_shard_whose_sizes_do_not_fit_its_images_is_refused() {
    let place = Place::with([8, 4, 2]);
    place.prepare("data", "");
    let path = place.path("data/train-00000.safetensors");
    let file = SafeFile::open(&path).unwrap();
    let shapes = file.bytes("shapes").unwrap().to_vec();
    for (change, words) in [([9u8, 9], "expected places among 3 sizes"), ([1, 0], "images.")] {
        let tensors: Vec<_> = file.names().map(str::to_owned).collect();
        let mut changed = shapes.clone();
        let at = if change[0] == 1 { changed.iter().position(|&shape| shape == 0).unwrap() } else { 0 };
        changed[at] = change[0];
        let out: Vec<edm2k::formats::safetensors::TensorOut> = tensors
            .iter()
            .map(|name| {
                let bytes = if name == "shapes" { &changed } else { file.bytes(name).unwrap() };
                (&**name, file.dtype(name).unwrap(), file.shape(name).unwrap(), bytes)
            })
            .collect();
        fs::create_dir_all(place.path("bad")).unwrap();
        let bad = place.path("bad/train-00000.safetensors");
        let mut metadata = file.metadata().clone();
        metadata.remove("checksums");
        metadata.insert("dataset".into(), metadata["dataset"].replace("\"vocabulary\":", "\"unknown\":"));
        edm2k::formats::safetensors::write(&bad, &out, &metadata).unwrap();
        fs::copy(place.path("data/vocabulary.json"), place.path("bad/vocabulary.json")).unwrap();
        let why = Dataset::open(&place.path("bad"), Split::Train).unwrap_err().to_string();
        assert!(why.contains("train-00000") && why.contains(words), "{why}");
    }
}

#[test]
fn pictures_are_added_and_retagged_at_their_sizes() {
    let place = Place::with([12, 6, 3]);
    place.prepare("data", "");
    let before = place.open("data", Split::Train).len();
    for (id, size) in [(5002, SIZES[2]), (5003, SIZES[0]), (5004, SIZES[1]), (5005, SIZES[2])] {
        place.picture(id, size, 1);
    }
    let wrong = place.refuses(&prepare("data", "--add --size 8x8"));
    assert!(wrong.contains("made before with size 8x8,16x8,8x16, now 8x8"), "{wrong}");
    let said = place.prepare("data", "--add");
    let data = place.open("data", Split::Train);
    assert_eq!(data.len(), before + 3);
    assert!(place.open("data", Split::Validation).find(5005).is_some());
    for (id, shape) in [(5002, [16, 8, 3]), (5003, [8, 8, 3]), (5004, [8, 16, 3])] {
        assert_eq!(data.shape_of(data.find(id).unwrap()), shape);
    }
    assert!(said.contains("  8x16"), "{said}");
    let all: Vec<_> = (0..data.len()).map(|i| (data.id(i), data.shape_of(i), pixels(&data, i))).collect();
    let lines = fs::read_to_string(place.path("meta.jsonl")).unwrap();
    fs::write(place.path("meta.jsonl"), lines.replace("\"t1\"", "\"other\"")).unwrap();
    place.prepare("data", "--retag");
    let data = place.open("data", Split::Train);
    assert!(data.vocabulary().get("other").is_some());
    let now: Vec<_> = (0..data.len()).map(|i| (data.id(i), data.shape_of(i), pixels(&data, i))).collect();
    assert!(all == now);
}

#[test]
fn sizes_are_checked_before_anything_is_made() {
    let place = Place::with([4, 2, 1]);
    let many: Vec<String> = (1..=65).map(|side| format!("{side}x8")).collect();
    for (sizes, words) in [
        ("8x8,16x8,8x8".into(), "the list of sizes is 8x8,16x8,8x8, expected 8x8 once"),
        ("8x8,20000x8".into(), "the size is 20000x8, expected sides of 1 to 16384"),
        (many.join(","), "the number of sizes is 65, expected 1 to 64"),
    ] {
        let said = place.refuses(&prepare("data", &format!("--sizes {sizes}")));
        assert!(said.contains(words), "{said}");
        assert!(!place.path("data").exists());
    }
    for (wrong, words) in [
        ("--sizes 8x8,", "is not a size"),
        ("--sizes 8x8,axb", "'axb' is not a size"),
        ("--sizes 8x8 --size 8x8", "cannot be used with"),
    ] {
        let output = place.command(&prepare("data", wrong)).output().unwrap();
        assert!(!output.status.success() && text(&output).contains(words), "{}", text(&output));
    }
    autoencoder::write(&place.path("taesd.safetensors"), &autoencoder::taesd(8));
    let said = place.refuses(&prepare("data", "--vae taesd.safetensors --sizes 64x64,64x68"));
    assert!(said.contains("the size is 64x68, expected multiples of the 8 pixels"), "{said}");
    // The network has two levels.
    let odd = Place::with([4, 2, 1]);
    odd.picture(2002, [8, 9], 1);
    odd.run(&prepare("data", "--sizes 8x8,8x9"));
    let train = "train --data data --outdir run --config config.json --duration 8 --batch 8";
    let said = odd.refuses(train);
    assert!(said.contains("the dataset data: ") && said.contains("8x9"), "{said}");
    // A size that no image has does not count.
    let even = Place::with([4, 2, 1]);
    even.run(&prepare("data", "--sizes 8x8,16x8,8x16,9x900"));
    assert_eq!(
        (even.open("data", Split::Train).buckets().len(), even.open("data", Split::Train).sizes().len()),
        (4, 3)
    );
    even.run(train);
}

#[test]
fn latents_are_stored_at_their_sizes() {
    let place = Place::new();
    autoencoder::write(&place.path("taesd.safetensors"), &autoencoder::taesd(8));
    for (id, size) in [(2, [64, 64]), (3, [64, 128]), (4, [128, 64]), (7, [64, 128])] {
        place.picture(id, size, 1);
    }
    let said = place.run(&prepare("data", "--vae taesd.safetensors --sizes 64x64,64x128,128x64"));
    assert!(said.contains("  64x128            2 images"), "{said}");
    let data = place.open("data", Split::Train);
    let shapes: Vec<_> = (0..data.len()).map(|i| (data.id(i), data.shape_of(i))).collect();
    assert_eq!(shapes, [(2, [8, 8, 4]), (3, [16, 8, 4]), (4, [8, 16, 4]), (7, [16, 8, 4])]);
    // Alone they have the same latents.
    place.run(&format!("{} --max-crop 0.9", prepare("alone", "--vae taesd.safetensors --size 128x64")));
    let alone = place.open("alone", Split::Train);
    let latents = |data: &Dataset| {
        let i = data.find(4).unwrap();
        let mut image = vec![0.0; data.shape_of(i).iter().product()];
        data.image(i, Stream::new(0, Purpose::Latent, 0), &mut image).unwrap();
        image
    };
    assert_eq!(latents(&data), latents(&alone));
}

// ---- the order of training -------------------------------------------------------------------

fn settings(data: &Dataset, batch: u64) -> Settings {
    let mut config: Value = serde_json::from_str(CONFIG).unwrap();
    (config["img_resolution"], config["img_channels"]) = (8.into(), 3.into());
    config["label_dim"] = data.condition_dim().into();
    Settings { batch, ..Settings::new(data, serde_json::from_value(config).unwrap(), 1000) }
}

/// The images of these numbers by number.
fn shown(order: &mut Order, numbers: std::ops::Range<u64>, most: u64) -> Vec<(u64, usize)> {
    let all = order.micro_batches(numbers, most);
    let mut all: Vec<_> = all.iter().flatten().map(|shown| (shown.number, shown.image)).collect();
    all.sort_unstable();
    all
}

#[test]
fn an_image_follows_from_its_number_alone() {
    let place = Place::with([40, 25, 17]);
    place.prepare("data", "");
    let data = place.open("data", Split::Train);
    let s = settings(&data, 40);
    let whole = shown(&mut Order::new(&data, &s), 0..4000, 1000);
    assert!(whole.iter().map(|of| of.0).eq(0..4000));
    // Groups of 10, the largest divisor of 40 below 16, are of one size.
    for group in whole.chunks(10) {
        let shapes: HashSet<_> = group.iter().map(|(_, image)| data.shape_of(*image)).collect();
        assert_eq!(shapes.len(), 1, "{group:?}");
    }
    for (ranks, most) in [(1, 1), (1, 2), (1, 4), (2, 4), (3, 7), (1, 40)] {
        let mut all = Vec::new();
        // Whatever was asked for before.
        let mut order = Order::new(&data, &s);
        for step in [3, 2, 90, 0] {
            for rank in 0..ranks {
                let own = (Part { number: rank, of: ranks }).share(40);
                let own = own.start as u64..own.end as u64;
                let batches = order.micro_batches(step * 40 + own.start..step * 40 + own.end, most);
                for batch in &batches {
                    assert!(!batch.is_empty() && batch.len() as u64 <= most);
                    let shapes: HashSet<_> = batch.iter().map(|shown| data.shape_of(shown.image)).collect();
                    assert_eq!(shapes.len(), 1);
                }
                // No more of them than sizes need.
                assert!(batches.len() as u64 <= (own.end - own.start) / most + 3);
                all.extend(batches.iter().flatten().map(|shown| (shown.number, shown.image)));
            }
        }
        all.sort_unstable();
        let expected = [0, 2, 3, 90].into_iter().flat_map(|step| &whole[40 * step..][..40]).copied();
        assert!(all.iter().copied().eq(expected), "{ranks} ranks, {most} at a time");
    }
    // Another seed, another order; of sizes too.
    let other = shown(&mut Order::new(&data, &Settings { seed: 1, ..s }), 0..4000, 1000);
    let of_one = |a: &[(u64, usize)], b: &[(u64, usize)]| {
        let same = |(a, b): (&(u64, usize), &(u64, usize))| data.shape_of(a.1) == data.shape_of(b.1);
        a.iter().zip(b).filter(|pair| same(*pair)).count()
    };
    assert!(of_one(&whole, &other) < 2400, "{}", of_one(&whole, &other));
}

#[test]
fn every_image_is_seen_as_often_as_any_other() {
    let place = Place::with([40, 25, 17]);
    place.picture(7002, SIZES[0], 3);
    place.prepare("data", "");
    let data = place.open("data", Split::Train);
    let s = settings(&data, 64);
    let epoch: usize = (0..data.len()).map(|i| data.repeats(i)).sum();
    assert_eq!(epoch, 85);
    let mut order = Order::new(&data, &s);
    let mut seen = vec![0u64; data.len()];
    for (k, (_, image)) in shown(&mut order, 0..85 * 200, 1000).into_iter().enumerate() {
        seen[image] += 1;
        let epochs = (k + 1) as f64 / 85.0;
        // A group is the whole of the smallest bucket's epoch, less one image, and an image waits an epoch for its turn.
        for i in if k % 16 == 15 { 0..data.len() } else { 0..0 } {
            let away = (seen[i] as f64 / data.repeats(i) as f64 - epochs).abs();
            assert!(away < 2.0 + 16.0 / 17.0, "image {i} was shown {} times in {epochs} epochs", seen[i]);
        }
    }
    let mean = |size: [u32; 2]| {
        let of = (0..data.len()).filter(|&i| data.shape_of(i)[..2] == [size[1] as usize, size[0] as usize]);
        let of: Vec<_> = of.collect();
        let times: u64 = of.iter().map(|&i| seen[i]).sum();
        times as f64 / of.iter().map(|&i| data.repeats(i)).sum::<usize>() as f64
    };
    for size in SIZES {
        // Within a group of 200 epochs.
        assert!((mean(size) - 200.0).abs() < 1.5, "{}", mean(size));
    }
    // Within a size, every image is shown once before any is shown again.
    let large = (0..data.len()).filter(|&i| data.shape_of(i) == [8, 8, 3] && data.repeats(i) == 1);
    let (low, high) = large.fold((u64::MAX, 0), |(low, high), i| (low.min(seen[i]), high.max(seen[i])));
    assert!(high - low <= 1, "{low} to {high}");
}

#[test]
fn a_size_with_fewer_images_than_a_group_is_not_shown_more_often() {
    let place = Place::with([60, 3, 1]);
    place.prepare("data", "");
    let data = place.open("data", Split::Train);
    let s = settings(&data, 32);
    assert_eq!(MAX_GROUP, 16);
    let mut seen = vec![0u64; data.len()];
    let steps = 4000;
    shown(&mut Order::new(&data, &s), 0..32 * steps, 1000).iter().for_each(|(_, image)| seen[*image] += 1);
    let expected = (32 * steps) as f64 / 64.0;
    for (i, seen) in seen.iter().enumerate() {
        // Within a group, of which the smallest bucket's one image is all.
        assert!((*seen as f64 - expected).abs() <= 17.0, "image {i}: {seen}, expected {expected}");
    }
}

// ---- from pictures to pictures ---------------------------------------------------------------

/// The relative distance of two runs' weights. A gain began at 0 and is still small; all others have larger norms than 1.
fn far(place: &Place, one: &str, other: &str) -> f64 {
    distance(&place.newest(one), &place.newest(other), &["weight."], 1.0).0
}

fn train(out: &str, duration: u64, more: &str) -> String {
    format!(
        "train --data data --config config.json --outdir {out} --batch 8 --rampup 0 --lr 0.01 --cond-dropout 0.2 --dropout 0.1 \
         --status 16 --validate 48 --grid 48 --snapshot 48 --checkpoint 16 --keep 9 --duration {duration} {more}"
    )
}

#[test]
fn a_run_on_several_sizes_goes_on_to_the_bit() {
    let place = Place::with([24, 13, 9]);
    place.prepare("data", "");
    place.run(&train("whole", 96, "--device cpu"));
    let checkpoints = edm2k::train::checkpoint::list(&place.path("whole")).unwrap();
    assert_eq!(checkpoints.len(), 6);
    for checkpoint in &checkpoints[1..] {
        let resumed = place.path("resumed");
        fs::create_dir(&resumed).unwrap();
        fs::copy(checkpoint, resumed.join(checkpoint.file_name().unwrap())).unwrap();
        place.run(&train("resumed", 96, "--device cpu"));
        assert_same_tensors(&place.newest("whole"), &place.newest("resumed"));
        fs::remove_dir_all(&resumed).unwrap();
    }

    // Fewer images at a time change rounding only; with other images each weight would be 1e-1 away.
    for batch_gpu in [1, 2, 4] {
        let out = format!("gpu-{batch_gpu}");
        place.run(&train(&out, 96, &format!("--device cpu --batch-gpu {batch_gpu}")));
        let far = far(&place, "whole", &out);
        println!("{batch_gpu}: {far:.1e}");
        assert!(far < 5e-3, "{batch_gpu} at a time: {far}");
    }

    // Six rows of an image and four samples, all of the most frequent size.
    let grid = decode::open(&place.path("whole/grid-000000096.png"), [0; 3]).unwrap().picture;
    assert_eq!((grid.width(), grid.height()), (2 + 5 * 10, 2 + 6 * 10));
    let shown = place.run("info whole");
    assert!(shown.contains("3 sizes, most 8 x 8"), "{shown}");
    let model = "whole/snapshot-000000096-0.050.safetensors";
    let levels: Value =
        serde_json::from_str(&place.run(&format!("eval --model {model} --data data --json --device cpu"))).unwrap();
    let by_ones: Value =
        serde_json::from_str(&place.run(&format!("eval --model {model} --data data --json --batch 1 --device cpu")))
            .unwrap();
    for (a, b) in levels["levels"].as_array().unwrap().iter().zip(by_ones["levels"].as_array().unwrap()) {
        let (a, b) = (a["loss"].as_f64().unwrap(), b["loss"].as_f64().unwrap());
        assert!((a - b).abs() < 1e-5 * a.abs().max(1.0), "{a} {b}");
    }
    for size in ["8x8", "16x8"] {
        let sample =
            format!("sample --model {model} --tags t1 --size {size} --steps 2 --device cpu --outdir out-{size}");
        place.run(&sample);
        let picture = decode::open(&place.path(&format!("out-{size}/000000.png")), [0; 3]).unwrap().picture;
        assert_eq!(format!("{}x{}", picture.width(), picture.height()), size);
    }
    // Other sizes are another dataset.
    place.run(&prepare("other", "--sizes 8x8,16x8 --max-crop 0.9"));
    let said = place.refuses(&train("whole", 96, "--device cpu").replace("--data data", "--data other"));
    assert!(said.contains("was made with other options") && said.contains("sizes"), "{said}");
}

/// One dataset of two sizes is the sum of the two: the loss of a step is that of its images, whatever their sizes.
#[test]
fn losses_are_per_element_whatever_the_size() {
    let place = Place::with([12, 0, 12]);
    place.prepare("data", "");
    let data = place.open("data", Split::Train);
    assert_eq!(DataIdentity::of(&data).sizes, [[8, 8], [16, 8]]);
    assert_eq!(DataIdentity::of(&data).largest(), [16, 8]);
    place.run(&train("run", 96, "--device cpu"));
    let text = fs::read_to_string(place.path("run/stats.jsonl")).unwrap();
    let losses = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()?["loss"].as_f64());
    for loss in losses {
        // A network that knows nothing has 1 an element; counted by another size's elements, it would be 2 or a half.
        assert!((0.75..1.35).contains(&loss), "{loss}");
    }
}

/// Two sizes on the emulator: the same weights as on the CPU, but for 16 bits.
#[cfg(feature = "emulator")]
#[test]
fn the_emulator_trains_on_several_sizes() {
    let place = Place::with([8, 4, 0]);
    place.prepare("data", "");
    let quiet =
        "--status 0 --validate 0 --grid 0 --snapshot 0 --checkpoint 0 --duration 16 --batch 8 --rampup 0 --lr 0.01";
    let train = |out: &str, device: &str| {
        place.run(&format!("train --data data --config config.json --outdir {out} --device {device} {quiet}"))
    };
    train("cpu", "cpu");
    train("emulated", "emulated");
    let far = far(&place, "cpu", "emulated");
    println!("{far:.1e}");
    // 6e-4 by rounding; with the pictures of one size cropped to the other, 2.
    assert!(far < 5e-3, "{far}");
}
