//! Claims about datasets: what `prepare` makes of images, that it resumes, and that the
//! reader gives back what was stored or says what is wrong.

use std::collections::HashMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::common::autoencoder;
use crate::common::command::{edm2k, here, printed, refused, refused_in_one_line};
use crate::common::place::files;
use edm2k::backend::cpu::Cpu;
use edm2k::codec::{CodecFile, RAW_MEAN, RAW_STD};
use edm2k::collective::Part;
use edm2k::condition::Conditioning;
use edm2k::condition::vocabulary::{Tag, Vocabulary};
use edm2k::data::dataset::{Dataset, Representation, Split};
use edm2k::data::prepare::{
    ConditionInput, Counts, DropCounts, DropReason, Event, Folder, PrepareError, Settings, Summary, add, prepare, retag,
};
use edm2k::formats::safetensors::{self, Dtype, SafeFile};
use edm2k::pictures::Size;
use edm2k::pictures::decode::decode;
use edm2k::rng::{Purpose, Stream};
use half::f16;
use image::{DynamicImage, GrayImage, ImageFormat, Luma, Rgb, RgbImage, Rgba, RgbaImage};
use proptest::prelude::*;
use tempfile::TempDir;

/// A folder with images, the metadata, and settings for a 16x16 dataset.
struct Workshop {
    dir: TempDir,
    lines: Vec<String>,
}

impl Workshop {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("images")).unwrap();
        Self { dir, lines: Vec::new() }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join("images").join(name)
    }

    fn record(&mut self, id: i64, file: &str, tags: &[&str]) {
        self.lines.push(serde_json::json!({"id": id, "file": file, "tags": tags}).to_string());
    }

    fn image(&mut self, id: i64, image: impl Into<DynamicImage>, tags: &[&str]) {
        let name = format!("{id}.png");
        image.into().save(self.file(&name)).unwrap();
        self.record(id, &name, tags);
    }

    fn folder(&self) -> Folder {
        let metadata = self.dir.path().join("metadata.jsonl");
        fs::write(&metadata, self.lines.join("\n")).unwrap();
        Folder { images: self.dir.path().join("images"), metadata }
    }

    fn settings(&self) -> Settings {
        Settings {
            conditions: ConditionInput::Tags,
            out: self.dir.path().join("out"),
            part: Part::WHOLE,
            sizes: vec![Size { width: 16, height: 16 }],
            background: [255; 3],
            max_crop: 0.05,
            vocabulary: 8,
            validation_modulus: 10,
            shard_size: 4,
            source: "made up".into(),
            licence: "CC0".into(),
        }
    }

    fn prepare(&self) -> Summary {
        prepare(&self.folder(), &self.settings(), None, &|_| ()).unwrap()
    }

    /// The same with these settings, and "file: why" of each picture that is called unreadable, in order.
    fn prepare_listing(&self, settings: &Settings) -> (Summary, Vec<String>) {
        let listed = Mutex::new(Vec::new());
        let listen = |event: Event| {
            if let Event::Unreadable { file, why } = event {
                listed.lock().unwrap().push(format!("{file}: {why}"));
            }
        };
        let summary = prepare(&self.folder(), settings, None, &listen).unwrap();
        let mut listed = listed.into_inner().unwrap();
        listed.sort();
        (summary, listed)
    }

    fn open(&self, split: Split) -> Dataset {
        Dataset::open(&self.dir.path().join("out"), split).unwrap()
    }
}

/// What latents are drawn with; of pixels it changes nothing.
const NOISE: Stream = Stream { seed: 5, purpose: Purpose::Latent, step: 0, image: 77 };

fn solid(width: u32, height: u32, colour: [u8; 3]) -> RgbImage {
    RgbImage::from_pixel(width, height, Rgb(colour))
}

fn counts(summary: &Summary, split: Split) -> Counts {
    summary.splits.iter().find(|(this, _)| *this == split).unwrap().1
}

fn drops(expected: &[(DropReason, usize)]) -> DropCounts {
    DropCounts(expected.iter().copied().collect())
}

/// Pixels of the image with this id as 8-bit RGB, `[H * W][3]`.
fn pixels(dataset: &Dataset, id: i64) -> Vec<[u8; 3]> {
    let [height, width, channels] = dataset.shape();
    let mut image = vec![0.0; height * width * channels];
    dataset.image(dataset.find(id).unwrap(), NOISE, &mut image).unwrap();
    image.chunks_exact(3).map(|pixel| std::array::from_fn(|c| ((pixel[c] + 1.0) * 127.5).round() as u8)).collect()
}

#[test]
fn colours_survive_resizing_and_layouts_are_as_documented() {
    let mut shop = Workshop::new();
    // The left half red, the right half blue: NHWC and NCHW cannot be confused.
    let halves = RgbImage::from_fn(40, 40, |x, _| Rgb([[250, 7, 3], [9, 30, 200]][x as usize / 20]));
    shop.image(2, halves, &["red", "blue"]);
    shop.image(3, solid(23, 23, [12, 34, 56]), &["blue"]);
    shop.image(4, GrayImage::from_pixel(16, 16, Luma([77])), &["grey", "unusual"]);
    shop.lines.push(r#"{"id": 5, "file": "4.png", "tags": [], "flip": true, "repeats": 3}"#.into());
    let summary = shop.prepare();
    assert_eq!(counts(&summary, Split::Train), Counts { kept: 4, untagged: 1, ..Counts::default() });

    let dataset = shop.open(Split::Train);
    assert_eq!(dataset.shape(), [16, 16, 3]);
    let halves = pixels(&dataset, 2);
    assert_eq!((halves[16 * 5 + 1], halves[16 * 5 + 14]), ([250, 7, 3], [9, 30, 200]));
    assert_eq!(pixels(&dataset, 3), [[12, 34, 56]; 256]);
    assert_eq!(pixels(&dataset, 4), [[77; 3]; 256]);

    let tags = |id| {
        let tags = dataset.tags(dataset.find(id).unwrap()).iter();
        tags.map(|&tag| dataset.vocabulary().tag(tag).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(tags(2), ["blue", "red"]);
    assert_eq!(tags(4), ["grey", "unusual"]);
    assert!(tags(5).is_empty());
    assert_eq!([2, 3, 4, 5].map(|id| dataset.flip_allowed(dataset.find(id).unwrap())), [false, false, false, true]);
    assert_eq!([2, 3, 4, 5].map(|id| dataset.repeats(dataset.find(id).unwrap())), [1, 1, 1, 3]);
    assert_eq!((dataset.header().kind, dataset.header().licence.as_str()), (Representation::Images, "CC0"));
    for i in 0..dataset.len() {
        let mut condition = vec![f32::NAN; dataset.condition_dim()];
        dataset.condition(i, &mut condition);
        let expected = dataset.vocabulary().multi_hot(dataset.tags(i));
        for (found, expected) in condition.iter().zip(expected) {
            // Rounding to f16: 2^-11 of the value.
            assert!((found - expected).abs() <= expected * 4.9e-4, "{found} {expected}");
        }
    }
}

#[test]
fn light_is_averaged_not_its_code() {
    let mut shop = Workshop::new();
    let board = RgbImage::from_fn(64, 64, |x, y| Rgb([if (x + y) % 2 == 0 { 255 } else { 0 }; 3]));
    shop.image(2, board, &["board"]);
    shop.prepare();
    // Half the light of white is sRGB 188; averaging the codes would give 128. The border
    // sees a filter cut off at the edge.
    let pixels = pixels(&shop.open(Split::Train), 2);
    for (place, pixel) in pixels.iter().enumerate() {
        let (x, y) = (place % 16, place / 16);
        if (2..14).contains(&x) && (2..14).contains(&y) {
            assert!((186..=190).contains(&pixel[0]), "{pixel:?} at {x}, {y}");
        }
    }
}

#[test]
fn transparency_leaves_no_fringe_of_hidden_colours() {
    let mut shop = Workshop::new();
    // A yellow disc whose transparent surroundings are black underneath, and one pixel of
    // half transparency around it.
    let disc = RgbaImage::from_fn(50, 50, |x, y| {
        let distance = (f64::from(x) - 24.5).hypot(f64::from(y) - 24.5);
        match distance {
            d if d < 18.0 => Rgba([255, 220, 0, 255]),
            d if d < 19.0 => Rgba([255, 220, 0, 128]),
            _ => Rgba([0, 0, 0, 0]),
        }
    });
    shop.image(2, disc, &["disc"]);
    let mut settings = shop.settings();
    prepare(&shop.folder(), &settings, None, &|_| ()).unwrap();
    let on_white = pixels(&shop.open(Split::Train), 2);
    for pixel in &on_white {
        // Between yellow and white; the filter's ringing takes a little off the green.
        assert!(pixel[0] >= 250 && pixel[1] >= 210, "a dark fringe: {pixel:?}");
    }
    assert_eq!((on_white[0], on_white[16 * 8 + 8]), ([255; 3], [255, 220, 0]));

    settings.out = shop.dir.path().join("green");
    settings.background = [0, 128, 0];
    prepare(&shop.folder(), &settings, None, &|_| ()).unwrap();
    let dataset = Dataset::open(&settings.out, Split::Train).unwrap();
    assert_eq!(pixels(&dataset, 2)[0], [0, 128, 0]);
}

#[test]
fn at_most_the_allowed_share_is_cropped_about_the_centre() {
    let mut shop = Workshop::new();
    let cases = [(2, 16, 16, true), (3, 20, 19, true), (4, 19, 20, true), (5, 20, 18, false)];
    for (id, width, height, _) in cases {
        shop.image(id, solid(width, height, [1, 2, 3]), &["x"]);
    }
    // 80 x 76 keeps its middle 76 columns: the outermost two on each side are red.
    let framed = RgbImage::from_fn(80, 76, |x, _| Rgb(if (2..78).contains(&x) { [10, 200, 10] } else { [255, 0, 0] }));
    shop.image(6, framed, &["x"]);
    shop.image(7, solid(9, 9, [5, 5, 5]), &["x"]);
    let summary = shop.prepare();
    assert_eq!(counts(&summary, Split::Train), Counts { kept: 5, enlarged: 1, ..Counts::default() });
    assert_eq!(summary.dropped, drops(&[(DropReason::Cropped, 1)]));
    let dataset = shop.open(Split::Train);
    for (id, .., kept) in cases {
        assert_eq!(dataset.find(id).is_some(), kept, "image {id}");
    }
    assert_eq!(pixels(&dataset, 6), [[10, 200, 10]; 256]);
}

/// A PNG whose header claims 60,000 x 60,000 pixels: 10.8 GB in a few bytes.
fn bomb() -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, 60_000, 60_000);
    encoder.set_color(png::ColorType::Rgb);
    let mut writer = encoder.write_header().unwrap();
    writer.write_chunk(png::chunk::IDAT, &[0x78, 0x9c, 0x03, 0x00, 0, 0, 0, 1]).unwrap();
    drop(writer);
    bytes
}

#[test]
fn unreadable_images_are_listed_and_counted_not_fatal() {
    let mut shop = Workshop::new();
    shop.image(2, solid(16, 16, [0; 3]), &["x"]);
    let mut whole = Vec::new();
    let noise = RgbImage::from_fn(64, 64, |x, y| Rgb([(x * 37 + y * y) as u8, (x * y) as u8, 9]));
    noise.write_to(&mut std::io::Cursor::new(&mut whole), ImageFormat::Png).unwrap();
    let mut corrupt = whole.clone();
    corrupt[60..90].fill(0xaa);
    for (id, name, bytes) in [
        (3, "truncated.png", &whole[..whole.len() / 2]),
        (4, "corrupt.png", &corrupt),
        (5, "bomb.png", &bomb()),
        (6, "text.png", b"not an image at all"),
        (7, "empty.png", b""),
    ] {
        fs::write(shop.file(name), bytes).unwrap();
        shop.record(id, name, &["x"]);
    }
    shop.record(8, "absent.png", &["x"]);
    let (summary, first) = shop.prepare_listing(&shop.settings());
    assert_eq!(counts(&summary, Split::Train), Counts { kept: 1, ..Counts::default() });
    assert_eq!(summary.dropped, drops(&[(DropReason::Unreadable, 6)]));
    let names: Vec<_> = first.iter().map(|line| line.split(':').next().unwrap()).collect();
    assert_eq!(names, ["absent.png", "bomb.png", "corrupt.png", "empty.png", "text.png", "truncated.png"]);
    assert!(first[1].contains("60000x60000 is more than"), "{}", first[1]);

    // The second time nothing is decoded, but the list is the same.
    let (again, second) = shop.prepare_listing(&shop.settings());
    assert_eq!((again.splits, again.dropped, second), (summary.splits, summary.dropped, first));
}

fn gallery() -> Workshop {
    let mut shop = Workshop::new();
    for id in 0..40 {
        let image = RgbImage::from_fn(20 + id as u32 % 2, 20, |x, y| {
            Rgb([(x * 9 + id as u32 * 5) as u8, (y * 11) as u8, (x * y) as u8])
        });
        shop.image(id * 3 - 20, image, &[["a", "b", "c"][id as usize % 3], "all"]);
    }
    fs::write(shop.file("broken.png"), "x").unwrap();
    shop.record(1002, "broken.png", &["all"]);
    shop
}

#[test]
fn splits_follow_from_the_id_alone() {
    let shop = gallery();
    let summary = shop.prepare();
    for split in Split::ALL {
        let dataset = shop.open(split);
        assert_eq!(dataset.len(), counts(&summary, split).kept);
        for i in 0..dataset.len() {
            let expected = match dataset.id(i).rem_euclid(10) {
                0 => Split::Validation,
                1 => Split::Test,
                _ => Split::Train,
            };
            assert_eq!(split, expected, "id {}", dataset.id(i));
        }
    }
    assert_eq!(summary.splits.map(|(_, counts)| counts.kept), [32, 4, 4]);
    // The vocabulary is counted on the training images, the unreadable one included: its
    // tags are known before it is decoded.
    assert_eq!(summary.vocabulary.tags()[0], Tag { tag: "all".into(), count: 33 });
}

#[test]
fn resuming_redoes_only_what_is_missing_and_gives_the_same_bytes() {
    let shop = gallery();
    shop.prepare();
    let out = shop.dir.path().join("out");
    let whole = files(&out);
    assert_eq!(whole.len(), 9 + 1 + 1 + 2, "{:?}", whole.keys());

    fs::remove_file(out.join("train-00002.safetensors")).unwrap();
    fs::remove_file(out.join("vocabulary.json")).unwrap();
    let half = &whole["train-00005.safetensors"];
    fs::write(out.join("train-00005.safetensors"), &half[..half.len() / 2]).unwrap();
    fs::write(out.join("train-00006.safetensors.0123456789abcdef.tmp"), b"left by a killed run").unwrap();
    fs::remove_file(out.join("train-00006.safetensors")).unwrap();

    let redone = Mutex::new(Vec::new());
    let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    one_thread.install(|| {
        prepare(&shop.folder(), &shop.settings(), None, &|event| {
            if let Event::Shard { name, kept: false, .. } = event {
                redone.lock().unwrap().push(name.to_string());
            }
        })
        .unwrap()
    });
    assert_eq!(redone.into_inner().unwrap(), [2, 5, 6].map(|number| format!("train-{number:05}.safetensors")));
    assert!(files(&out) == whole, "the resumed dataset differs");
}

#[test]
fn a_dataset_made_otherwise_is_refused_and_left_alone() {
    let shop = gallery();
    shop.prepare();
    let out = shop.dir.path().join("out");
    let before = files(&out);
    let differs_of = |folder: &Folder, settings: Settings, expected: &str| {
        let text = prepare(folder, &settings, None, &|_| ()).unwrap_err().to_string();
        assert!(text.contains(expected), "{text}");
        assert!(files(&out) == before, "files were changed");
    };
    let differs = |settings: Settings, expected: &str| differs_of(&shop.folder(), settings, expected);
    differs(
        Settings { sizes: vec![Size { width: 8, height: 16 }], ..shop.settings() },
        "made before with size 16x16, now 8x16; take the settings of before, or another directory",
    );
    differs(Settings { max_crop: 0.5, ..shop.settings() }, "max-crop 0.05, now 0.5");
    let both = Settings { max_crop: 0.5, validation_modulus: 20, ..shop.settings() };
    differs(both, "made before with max-crop 0.05, now 0.5; validation-modulus 10, now 20; take");
    differs(Settings { shard_size: 5, ..shop.settings() }, "shard-size 4, now 5");
    let changed = shop.lines[3].replace("\"all\"", "\"other\"");
    fs::write(shop.dir.path().join("changed.jsonl"), changed + "\n" + &shop.lines[4..].join("\n")).unwrap();
    let changed = Folder { metadata: shop.dir.path().join("changed.jsonl"), ..shop.folder() };
    differs_of(&changed, shop.settings(), "made before with records 41 (");

    fs::write(out.join("train-00099.safetensors"), "someone else's").unwrap();
    let text = prepare(&shop.folder(), &shop.settings(), None, &|_| ()).unwrap_err().to_string();
    assert!(text.contains("train-00099.safetensors: a shard of another dataset"), "{text}");
}

#[test]
fn what_is_no_dataset_s_is_set_aside_and_never_written_over() {
    let shop = gallery();
    let out = shop.dir.path().join("out");
    fs::create_dir(&out).unwrap();
    for name in ["train-00000.safetensors", "vocabulary.json", "summary.json"] {
        fs::write(out.join(name), format!("somebody's {name}")).unwrap();
    }
    shop.prepare();
    for name in ["train-00000.safetensors", "vocabulary.json", "summary.json"] {
        let kept = fs::read_to_string(out.join(format!("{name}.foreign"))).unwrap();
        assert_eq!(kept, format!("somebody's {name}"));
    }
    assert_eq!(Dataset::open(&out, Split::Train).unwrap().len(), 32);

    // The dataset's own shards as its metadata.
    let metadata = out.join("train-00000.safetensors");
    let before = fs::read(&metadata).unwrap();
    let folder = Folder { metadata: metadata.clone(), ..shop.folder() };
    let said = prepare(&folder, &shop.settings(), None, &|_| ()).unwrap_err().to_string();
    assert!(said.contains("expected another file"), "{said}");
    assert!(fs::read(&metadata).unwrap() == before);
}

#[test]
fn shards_of_another_vocabulary_are_refused_in_any_split() {
    let shop = gallery();
    shop.prepare();
    let mut other = gallery();
    other.lines.iter_mut().for_each(|line| *line = line.replace("\"a\"", "\"z\""));
    other.prepare();
    let (ours, theirs) = (shop.dir.path().join("out"), other.dir.path().join("out"));
    for (name, split) in [
        ("train-00001.safetensors", Split::Train),
        ("validation-00000.safetensors", Split::Train),
        ("test-00000.safetensors", Split::Validation),
    ] {
        let kept = fs::read(ours.join(name)).unwrap();
        fs::copy(theirs.join(name), ours.join(name)).unwrap();
        let said = Dataset::open(&ours, split).unwrap_err().to_string();
        assert!(said.contains(name) && said.contains("vocabulary"), "{said}");
        fs::write(ours.join(name), kept).unwrap();
    }
}

#[test]
fn a_shard_of_a_sibling_with_the_same_records_is_refused() {
    let of_shade = |shade: u8| {
        let mut shop = Workshop::new();
        for id in 2..7 {
            let name = format!("{id}.bmp"); // of one length
            solid(16, 16, [id, 7, shade]).save(shop.file(&name)).unwrap();
            shop.record(id.into(), &name, &["x"]);
        }
        shop.prepare();
        shop
    };
    let [ours, theirs] = [1, 2].map(of_shade);
    let (name, summary) = ("train-00001.safetensors", ours.dir.path().join("out/summary.json"));
    let path = ours.dir.path().join("out").join(name);
    let own = fs::read(&path).unwrap();
    fs::copy(theirs.dir.path().join("out").join(name), &path).unwrap();
    let said = Dataset::open(&ours.dir.path().join("out"), Split::Train).unwrap_err().to_string();
    assert!(said.contains(name) && said.contains("not the shard that summary.json beside it knows"), "{said}");
    let said = prepare(&ours.folder(), &ours.settings(), None, &|_| ()).unwrap_err().to_string();
    assert!(said.contains(name) && said.contains("not the shard that summary.json"), "{said}");
    // Nor may a shard be there that does not say what it holds.
    let strip = |path: &Path| {
        let file = SafeFile::open(path).unwrap();
        let names: Vec<String> = file.names().map(str::to_owned).collect();
        let all: Vec<_> = names
            .iter()
            .map(|name| (&**name, file.dtype(name).unwrap(), file.shape(name).unwrap(), file.bytes(name).unwrap()))
            .collect();
        let mut metadata = file.metadata().clone();
        metadata.remove("checksums");
        let header = metadata["dataset"].replace("\"vocabulary\":", "\"then\":");
        metadata.insert("dataset".into(), header);
        let aside = path.with_extension("stripped");
        safetensors::write(&aside, &all, &metadata).unwrap();
        fs::rename(aside, path).unwrap();
    };
    strip(&path);
    let said = Dataset::open(&ours.dir.path().join("out"), Split::Train).unwrap_err().to_string();
    assert!(said.contains("found none"), "{said}");
    // What the summary says is not to be lost without a word.
    let whole = fs::read(&summary).unwrap();
    fs::write(&summary, &whole[..whole.len() / 2]).unwrap();
    for said in [
        Dataset::open(&ours.dir.path().join("out"), Split::Train).unwrap_err().to_string(),
        prepare(&ours.folder(), &ours.settings(), None, &|_| ()).unwrap_err().to_string(),
    ] {
        assert!(said.contains("summary.json: damaged ("), "{said}");
    }
    fs::write(&summary, whole).unwrap();
    // The advice is right, and so is the summary that it makes.
    fs::remove_file(&path).unwrap();
    ours.prepare();
    assert!(fs::read(&path).unwrap() == own);
    Dataset::open(&ours.dir.path().join("out"), Split::Train).unwrap();
    assert_eq!(Dataset::open(&ours.dir.path().join("out"), Split::Train).unwrap().doubt(), None);
    // A dataset need not have one, but then nothing vouches for it; and it comes again.
    fs::remove_file(&summary).unwrap();
    let doubt = Dataset::open(&ours.dir.path().join("out"), Split::Train).unwrap().doubt().unwrap();
    assert!(doubt.contains("train-00000.safetensors: no summary.json beside it knows it"), "{doubt}");
    let told = edm2k(ours.dir.path(), &["info", "out", "--check"]).output().unwrap();
    let told = String::from_utf8_lossy(&told.stdout);
    assert!(told.contains("  out/train-00000.safetensors: no summary.json beside it knows it"), "{told}");
    ours.prepare();
    assert_eq!(Dataset::open(&ours.dir.path().join("out"), Split::Train).unwrap().doubt(), None);
}

#[test]
fn without_a_summary_a_shard_of_other_records_of_the_same_images_is_refused() {
    let tagged = |first: &str, last: &str| {
        let mut shop = Workshop::new();
        for (id, tags) in [(2, vec![first]), (3, vec![first]), (4, vec!["x", "y"]), (5, vec![last]), (6, vec![last])] {
            shop.image(id, solid(16, 16, [id as u8, 7, 1]), &tags);
        }
        shop.prepare();
        shop
    };
    let [ours, theirs] = [tagged("x", "y"), tagged("y", "x")];
    let [ours, theirs] = [&ours, &theirs].map(|shop| shop.dir.path().join("out"));
    let name = "train-00001.safetensors";
    fs::remove_file(ours.join("summary.json")).unwrap();
    Dataset::open(&ours, Split::Train).unwrap();
    fs::copy(theirs.join(name), ours.join(name)).unwrap();
    let said = Dataset::open(&ours, Split::Train).unwrap_err().to_string();
    let names = said.contains(name) && said.contains("train-00000.safetensors");
    assert!(names && said.contains("the list of records that it is of is 5 ("), "{said}");
}

#[test]
fn a_picture_that_was_replaced_is_noticed_whatever_its_length_and_date() {
    let mut shop = Workshop::new();
    for id in 2..7 {
        let name = format!("{id}.bmp");
        solid(16, 16, [id, 7, 9]).save(shop.file(&name)).unwrap();
        shop.record(id.into(), &name, &["x"]);
    }
    let kept = || {
        let kept = Mutex::new(0);
        let count =
            |event: Event| *kept.lock().unwrap() += usize::from(matches!(event, Event::Shard { kept: true, .. }));
        prepare(&shop.folder(), &shop.settings(), None, &count).map(|_| kept.into_inner().unwrap())
    };
    assert_eq!(kept().unwrap(), 0);
    // Copied to where it was: newer than the shards, and the same.
    let (path, bytes) = (shop.file("5.bmp"), fs::read(shop.file("5.bmp")).unwrap());
    fs::remove_file(&path).unwrap();
    fs::write(&path, &bytes).unwrap();
    assert_eq!(kept().unwrap(), 2);

    solid(16, 16, [200, 7, 9]).save(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), bytes.len() as u64);
    let long_ago = std::time::SystemTime::UNIX_EPOCH;
    fs::File::options().write(true).open(&path).unwrap().set_modified(long_ago).unwrap();
    let error = kept().unwrap_err().to_string();
    assert!(error.contains("train-00000.safetensors: made when 5.bmp was another picture; remove this"), "{error}");
    fs::remove_file(shop.dir.path().join("out/train-00000.safetensors")).unwrap();
    assert_eq!(kept().unwrap(), 1);
    // Another folder's pictures, older than the shards.
    for id in 2..7 {
        let path = shop.file(&format!("{id}.bmp"));
        solid(16, 16, [id, 70, 90]).save(&path).unwrap();
        fs::File::options().write(true).open(&path).unwrap().set_modified(long_ago).unwrap();
    }
    fs::remove_file(shop.dir.path().join("out/train-00000.safetensors")).unwrap();
    let error = kept().unwrap_err().to_string();
    assert!(error.contains("train-00001.safetensors: made when "), "{error}");
    for id in [2, 3, 4, 6] {
        solid(16, 16, [id, 7, 9]).save(shop.file(&format!("{id}.bmp"))).unwrap();
    }
    solid(16, 16, [200, 7, 9]).save(&path).unwrap();
    assert_eq!(kept().unwrap(), 1);
    assert_eq!(pixels(&shop.open(Split::Train), 5)[0], [200, 7, 9]);
}

// ---- datasets that grow and change ----------------------------------------------------------

/// Ids, tags in words, conditions and images of all splits.
type Content = Vec<(i64, String, Vec<f32>, Vec<f32>)>;

fn content(dir: &Path) -> Content {
    let mut all = Content::new();
    for split in Split::ALL {
        let Ok(data) = Dataset::open(dir, split) else { continue };
        for i in 0..data.len() {
            let mut image = vec![0.0; data.shape().iter().product()];
            data.image(i, NOISE, &mut image).unwrap();
            let mut condition = vec![0.0; data.condition_dim()];
            data.condition(i, &mut condition);
            all.push((data.id(i), data.vocabulary().words(data.tags(i)), condition, image));
        }
    }
    all.sort_by_key(|image| image.0);
    all
}

/// A dataset of the gallery, and six pictures more in the metadata, one of them broken, one without a known tag.
fn grown() -> Workshop {
    let mut shop = gallery();
    shop.prepare();
    for (id, tag) in [(11, "a"), (21, "b"), (201, "c"), (202, "b"), (203, "new")] {
        shop.image(id, solid(18, 18, [id as u8, 3, 9]), &[tag]);
    }
    fs::write(shop.file("204.png"), "x").unwrap();
    shop.record(204, "204.png", &["a"]);
    shop
}

#[test]
fn new_pictures_become_new_shards_and_old_ones_stay_as_they_are() {
    let shop = grown();
    let out = shop.dir.path().join("out");
    let (before, old) = (files(&out), content(&out));
    let print = shop.open(Split::Train).fingerprint().unwrap();
    let error = prepare(&shop.folder(), &shop.settings(), None, &|_| ()).unwrap_err().to_string();
    assert!(
        error.contains("made before with records 41 (") && error.contains("add the pictures that are new"),
        "{error}"
    );

    // A smaller shard, another source: only what makes pictures and conditions must be the same.
    let settings = Settings { shard_size: 3, licence: "CC BY".into(), ..shop.settings() };
    let summary = add(&shop.folder(), &settings, None, &|_| ()).unwrap();
    assert_eq!((summary.records, summary.skipped), (47, 40));
    assert_eq!(summary.dropped, drops(&[(DropReason::Unreadable, 2)]), "one of them long since");
    assert_eq!(summary.splits.map(|(_, counts)| counts.kept), [34, 4, 7]);
    assert_eq!(counts(&summary, Split::Train).untagged, 1);
    let after = files(&out);
    for (name, bytes) in before.iter().filter(|(name, _)| *name != "summary.json") {
        assert!(after[name] == *bytes, "{name} has changed");
    }
    let names: Vec<_> = after.keys().filter(|name| !before.contains_key(*name)).collect();
    assert!(names.len() == 2, "{names:?}");
    let data = shop.open(Split::Train);
    assert_eq!(data.header().licence, "CC0; CC BY");
    assert!(data.grown_from(print) && !data.grown_from(data.fingerprint().unwrap()));
    let new = content(&out);
    assert_eq!(new.len(), old.len() + 5);
    assert!(old.iter().all(|image| new.contains(image)));
    let of = |id: i64| new.iter().find(|image| image.0 == id).unwrap();
    assert_eq!((of(21).1.as_str(), of(203).1.as_str()), ("b", ""));
    assert_eq!(pixels(&shop.open(Split::Test), 201)[7], [201, 3, 9]);

    // Nothing is left to do, and the broken picture is not tried again.
    let again = add(&shop.folder(), &settings, None, &|event| assert!(!matches!(event, Event::Shard { .. }))).unwrap();
    assert_eq!((again.skipped, again.dropped), (45, drops(&[(DropReason::Unreadable, 2)])));
    // A shard that was added and is gone is missed.
    let error = prepare(&gallery_of(&shop), &shop.settings(), None, &|_| ()).unwrap_err().to_string();
    assert!(error.contains(": pictures were added later; go on adding"), "{error}");
}

/// The metadata of the first preparation.
/// The command that prepares what [`grown`] has, with more options.
fn command_of(folder: &Folder, out: &Path, more: &[&str]) -> Vec<String> {
    let options = "--size 16x16 --vocabulary 8 --validation-modulus 10 --shard-size 4 --licence CC0";
    let paths = [("--images", &*folder.images), ("--metadata", &*folder.metadata), ("--out", out)];
    let paths = paths.into_iter().flat_map(|(option, path)| [option, path.to_str().unwrap()]);
    let all = ["prepare"].into_iter().chain(paths).chain(options.split(' ')).chain(["--source", "made up"]);
    all.chain(more.iter().copied()).map(String::from).collect()
}

fn gallery_of(shop: &Workshop) -> Folder {
    let metadata = shop.dir.path().join("first.jsonl");
    fs::write(&metadata, shop.lines[..41].join("\n")).unwrap();
    Folder { metadata, ..shop.folder() }
}

#[test]
fn what_does_not_fit_a_dataset_is_not_added_to_it() {
    let shop = grown();
    let out = shop.dir.path().join("out");
    let before = files(&out);
    let refused = |settings: Settings, expected: &str| {
        let error = add(&shop.folder(), &settings, None, &|_| ()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}; expected {expected}");
        assert!(files(&out) == before, "files were changed");
    };
    refused(
        Settings { sizes: vec![Size { width: 8, height: 16 }], ..shop.settings() },
        "made before with size 16x16, now 8x16",
    );
    refused(Settings { validation_modulus: 11, ..shop.settings() }, "validation-modulus 10, now 11");
    let ids: Vec<i64> = (-20..210).collect();
    write_features(shop.dir.path(), &ids, 4, &vec![1.0; 4 * ids.len()], None);
    let conditions = of_file(shop.dir.path().join("full.safetensors"), None);
    refused(
        Settings { conditions, ..shop.settings() },
        "made before with conditions of 4 values of tags, now 4 values of",
    );
    let nowhere = Settings { out: shop.dir.path().join("nowhere"), ..shop.settings() };
    let error = add(&shop.folder(), &nowhere, None, &|_| ()).unwrap_err().to_string();
    assert!(
        error.contains("nowhere: no dataset is there, or its vocabulary.json is missing; expected one to add to"),
        "{error}"
    );
    assert!(!nowhere.out.exists());
}

#[test]
fn a_folder_of_the_name_that_changes_wait_in_is_left_alone_if_it_is_somebody_s() {
    let shop = gallery();
    shop.prepare();
    let out = shop.dir.path().join("out");
    let pending = out.join("pending");
    let refused = |expected: &str| {
        for change in [
            add(&shop.folder(), &shop.settings(), None, &|_| ()).map(|_| ()),
            retag(&shop.folder(), &shop.settings(), &|_| ()).map(|_| ()),
        ] {
            let said = change.unwrap_err().to_string();
            assert!(said.contains("pending: ") && said.contains(expected), "{said}");
        }
    };
    fs::create_dir(&pending).unwrap();
    fs::write(pending.join("mine.png"), "mine").unwrap();
    refused("it has \"mine.png\"");
    for name in ["checkpoint-000004096.safetensors", "model-00001.safetensors", "x.0123456789abcdef.tmp"] {
        fs::rename(pending.join("mine.png"), pending.join(name)).unwrap();
        refused(name);
        fs::rename(pending.join(name), pending.join("mine.png")).unwrap();
    }
    assert_eq!(fs::read(pending.join("mine.png")).unwrap(), b"mine");
    fs::write(pending.join("ready"), "").unwrap();
    let said = prepare(&shop.folder(), &shop.settings(), None, &|_| ()).unwrap_err().to_string();
    assert!(said.contains("it has \"mine.png\"") && pending.join("mine.png").exists(), "{said}");
    let elsewhere = shop.dir.path().join("elsewhere");
    fs::rename(&pending, &elsewhere).unwrap();
    fs::remove_file(elsewhere.join("ready")).unwrap();
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(&elsewhere, &pending).unwrap();
        refused("not a folder");
        fs::remove_file(&pending).unwrap();
    }
    assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 1);
}

#[test]
fn what_was_dropped_is_looked_at_again_once_its_file_is_another() {
    let mut shop = gallery();
    fs::write(shop.file("300.png"), "half a picture").unwrap();
    shop.record(300, "300.png", &["a"]);
    fs::write(shop.file("301.png"), "no picture").unwrap();
    shop.record(301, "301.png", &["a"]);
    // In the shard of `broken.png`.
    shop.image(303, solid(16, 16, [3, 3, 3]), &["a"]);
    let first = shop.prepare();
    let before = first.dropped.0[&DropReason::Unreadable];
    let images = |summary: &Summary| summary.splits.iter().map(|(_, counts)| counts.kept).sum::<usize>();
    let unchanged = add(&shop.folder(), &shop.settings(), None, &|_| ()).unwrap();
    assert_eq!(
        (images(&unchanged), unchanged.skipped, &unchanged.dropped),
        (images(&first), images(&first), &first.dropped)
    );
    solid(16, 16, [9, 9, 9]).save(shop.file("300.png")).unwrap();
    for _ in 0..2 {
        let mended = add(&shop.folder(), &shop.settings(), None, &|_| ()).unwrap();
        assert_eq!((images(&mended), mended.dropped.0[&DropReason::Unreadable]), (images(&first) + 1, before - 1));
        assert!(Split::ALL.iter().any(|&split| shop.open(split).find(300).is_some()));
    }
    // The same if the other record of its shard is not listed any more.
    shop.lines.retain(|line| !line.contains("303.png"));
    solid(16, 16, [9, 9, 9]).save(shop.file("broken.png")).unwrap();
    add(&shop.folder(), &shop.settings(), None, &|_| ()).unwrap();
    assert!(shop.open(Split::Train).find(1002).is_some());
}

/// The program, killed as soon as something is true; whether it had not ended before.
fn killed_when(arguments: &[&str], mut done: impl FnMut() -> bool) -> bool {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_edm2k"));
    command.args(arguments).stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    let mut child = command.spawn().unwrap();
    while !done() {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
    }
    child.kill().unwrap();
    child.wait().unwrap();
    true
}

#[test]
fn a_growth_that_is_killed_leaves_the_old_dataset_and_goes_on() {
    let mut shop = gallery();
    shop.prepare();
    let out = shop.dir.path().join("out");
    for id in 300..420 {
        shop.image(id, solid(18, 18, [id as u8, 3, 9]), &["a"]);
    }
    let (folder, settings) = (shop.folder(), shop.settings());
    let arguments = command_of(&folder, &out, &["--add"]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (old, first) = (content(&out), files(&out));
    let pending = |least: usize| fs::read_dir(out.join("pending")).is_ok_and(|files| files.count() >= least);
    let mut states = Vec::new();
    for least in [1, 5, 12, 20] {
        assert!(killed_when(&arguments, || pending(least)), "it ended before it had {least} shards");
        let now = content(&out);
        states.push(now.len());
        assert!(now == old, "{least}: {} images, {} before", now.len(), old.len());
    }
    // What was made is kept.
    let kept = Mutex::new(0);
    let count = |event: Event| *kept.lock().unwrap() += usize::from(matches!(event, Event::Shard { kept: true, .. }));
    let summary = add(&folder, &settings, None, &count).unwrap();
    assert!(kept.into_inner().unwrap() >= 12, "{states:?}");
    let whole = content(&out);
    assert_eq!((summary.skipped, whole.len()), (40, old.len() + 120));
    assert!(!out.join("pending").exists());

    // A kill between the moment at which it counts and the last file's move.
    let there = files(&out);
    let mut added: Vec<_> = there.keys().filter(|name| !first.contains_key(*name)).collect();
    added.sort();
    assert!(added.len() > 25, "{added:?}");
    fs::create_dir(out.join("pending")).unwrap();
    for name in &added {
        fs::rename(out.join(name), out.join("pending").join(name)).unwrap();
    }
    assert!(content(&out) == old, "without the mark, the old one");
    fs::write(out.join("pending/ready"), "").unwrap();
    assert!(content(&out) == whole, "with the mark, the new one");
    for name in &added[..20] {
        fs::rename(out.join("pending").join(name), out.join(name)).unwrap();
    }
    assert!(content(&out) == whole, "with the mark, and some in their places");
    add(&folder, &settings, None, &|_| ()).unwrap();
    assert!(content(&out) == whole && !out.join("pending").exists());
    assert_eq!(files(&out).len(), there.len());
}

#[test]
fn tags_and_conditions_are_changed_without_the_pictures() {
    let shop = gallery();
    shop.prepare();
    let out = shop.dir.path().join("out");
    let before = content(&out);
    let lines: Vec<_> =
        shop.lines.iter().map(|line| line.replace("\"a\"", "\"first\"").replace("[\"b\"", "[\"a\", \"b\"")).collect();
    let metadata = shop.dir.path().join("other.jsonl");
    fs::write(&metadata, lines.join("\n")).unwrap();
    let other = Folder { metadata: metadata.clone(), ..shop.folder() };
    let settings = shop.settings();
    // No picture is looked at.
    let (images, hidden) = (shop.dir.path().join("images"), shop.dir.path().join("hidden"));
    fs::rename(&images, &hidden).unwrap();
    fs::create_dir(&images).unwrap();
    let summary = retag(&other, &settings, &|_| ()).unwrap();
    fs::remove_dir(&images).unwrap();
    fs::rename(&hidden, &images).unwrap();
    assert_eq!(summary.splits.map(|(_, counts)| counts.kept), [32, 4, 4]);
    let after = content(&out);
    let vocabulary = Vocabulary::load(&out.join("vocabulary.json")).unwrap();
    assert_eq!(vocabulary.len(), 5);
    for ((id, was, _, image), (same, now, condition, kept)) in before.iter().zip(&after) {
        assert!(id == same && image == kept, "{id}");
        let expected = match was.split(", ").next().unwrap() {
            "all" => match was.as_str() {
                "all, a" => "all, first",
                "all, b" => "all, a, b",
                other => other,
            },
            other => panic!("{other}"),
        };
        let sorted = |text: &str| {
            let mut words: Vec<_> = text.split(", ").map(str::to_owned).collect();
            words.sort();
            words
        };
        assert_eq!(sorted(now), sorted(expected), "{id}");
        let hot = vocabulary.multi_hot(&vocabulary.parse(now).unwrap().places());
        assert!(condition.iter().zip(hot).all(|(x, y)| (x - y).abs() < 1e-3), "{id}");
    }
    assert_eq!((summary.skipped, &summary.dropped), (0, &drops(&[(DropReason::Unreadable, 1)])));
    // The same call that made the shards finds them as it would make them, and makes one anew that is lost.
    prepare(&other, &settings, None, &|event| assert!(!matches!(event, Event::Shard { kept: false, .. }))).unwrap();
    fs::remove_file(out.join("train-00001.safetensors")).unwrap();
    prepare(&other, &settings, None, &|_| ()).unwrap();
    assert!(content(&out) == after);

    let ids: Vec<i64> = before.iter().map(|image| image.0).collect();
    let values: Vec<f32> = (0..6 * ids.len()).map(|i| (i % 7) as f32 + 1.0).collect();
    write_features(shop.dir.path(), &ids, 6, &values, None);
    let conditions = of_file(shop.dir.path().join("full.safetensors"), None);
    let with = Settings { conditions, ..settings.clone() };
    retag(&other, &with, &|_| ()).unwrap();
    let data = shop.open(Split::Train);
    assert!(matches!(data.header().conditioning, Conditioning::Features { .. }) && data.condition_dim() == 6);
    // Without a file of features, they stay.
    let featured = content(&out);
    let told = Mutex::new(String::new());
    let tell = |event: Event| {
        if let Event::Warning { text } = event {
            *told.lock().unwrap() += text;
        }
    };
    retag(&shop.folder(), &settings, &tell).unwrap();
    assert!(told.lock().unwrap().contains("conditions stay features"), "{told:?}");
    for ((_, _, was, image), (id, words, now, kept)) in featured.iter().zip(content(&out)) {
        assert!(*was == now && *image == kept && !words.contains("first"), "{id}");
    }

    let (there, state) = (files(&out), content(&out));
    let refused = |folder: &Folder, settings: &Settings, expected: &str| {
        let error = retag(folder, settings, &|_| ()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}; expected {expected}");
        assert!(files(&out) == there);
    };
    fs::write(&metadata, lines[3..].join("\n")).unwrap();
    refused(&other, &settings, "other.jsonl: no usable record for 3 images of the dataset, such as id ");
    write_features(shop.dir.path(), &ids[1..], 6, &values[6..], None);
    refused(&shop.folder(), &with, "full.safetensors: no feature for 1 images of the dataset, such as id -20");
    refused(
        &shop.folder(),
        &Settings { sizes: vec![Size { width: 8, height: 16 }], ..settings.clone() },
        "made before with size 16x16, now 8x16",
    );

    // A kill before the mark: as it was.
    fs::create_dir(out.join("pending")).unwrap();
    fs::write(out.join("pending/vocabulary.json"), "[]").unwrap();
    fs::write(out.join("pending/train-00000.safetensors"), "half").unwrap();
    assert!(content(&out) == state);
    retag(&shop.folder(), &settings, &|_| ()).unwrap();
    assert!(content(&out) == state && !out.join("pending").exists());
}

#[test]
fn a_retagged_dataset_is_not_taken_for_one_of_the_records_that_gave_the_tags() {
    let shop = grown();
    let (out, all) = (shop.dir.path().join("out"), shop.folder());
    let refused = |folder: &Folder, settings: &Settings, expected: &str| {
        let there = files(&out);
        let said = prepare(folder, settings, None, &|_| ()).unwrap_err().to_string();
        assert!(said.contains(expected) && said.contains("; add the pictures that are new"), "{said}");
        assert!(files(&out) == there);
    };
    // Its pictures came by two calls, and make as many shards as they would by one.
    let settings = Settings { shard_size: 5, ..shop.settings() };
    fs::remove_dir_all(&out).unwrap();
    prepare(&gallery_of(&shop), &settings, None, &|_| ()).unwrap();
    add(&all, &settings, None, &|_| ()).unwrap();
    retag(&all, &settings, &|_| ()).unwrap();
    refused(&all, &settings, "train-00000.safetensors: one of 7 shards, expected 8;");
    // Records that it does not have are neither counted in its vocabulary nor taken for pictures that are there.
    for (shard_size, expected) in [
        (4, "train-00000.safetensors: one of 6 shards, expected 9"),
        (100, "of 24 records, expected 36 (id 67 is missing)"),
    ] {
        fs::remove_dir_all(&out).unwrap();
        let settings = Settings { shard_size, ..shop.settings() };
        let metadata = shop.dir.path().join("fewer.jsonl");
        fs::write(&metadata, shop.lines[..29].join("\n") + "\n" + &shop.lines[40]).unwrap();
        let fewer = Folder { metadata, ..shop.folder() };
        let first = prepare(&fewer, &settings, None, &|_| ()).unwrap();
        let summary = retag(&all, &settings, &|_| ()).unwrap();
        assert_eq!((summary.records, summary.skipped, &summary.dropped), (47, 17, &first.dropped));
        assert_eq!(summary.vocabulary, first.vocabulary);
        refused(&all, &settings, expected);
        prepare(&fewer, &settings, None, &|_| ()).unwrap();
    }
    // As many of each tag, on other pictures.
    let swap = |line: &String| match line {
        line if line.contains("\"id\":7,") => line.replace("[\"a\"", "[\"b\""),
        line if line.contains("\"id\":19,") => line.replace("[\"b\"", "[\"a\""),
        line => line.clone(),
    };
    let swapped: Vec<String> = shop.lines[..29].iter().chain([&shop.lines[40]]).map(swap).collect();
    fs::write(shop.dir.path().join("fewer.jsonl"), swapped.join("\n")).unwrap();
    let swapped = Folder { metadata: shop.dir.path().join("fewer.jsonl"), ..shop.folder() };
    refused(&swapped, &Settings { shard_size: 100, ..shop.settings() }, "with other tags, flip or repeats of id 7;");
}

#[test]
fn a_dataset_whose_tags_were_renamed_grows_and_is_told_when_they_lose_their_names() {
    let shop = grown();
    let (out, folder, settings) = (shop.settings().out, shop.folder(), shop.settings());
    let vocabulary = out.join("vocabulary.json");
    let told = Mutex::new(String::new());
    let tell = |event: Event| {
        if let Event::Warning { text } = event {
            *told.lock().unwrap() += text;
        }
    };
    let kept = Mutex::new(0);
    let count = |event: Event| *kept.lock().unwrap() += usize::from(matches!(event, Event::Shard { kept: true, .. }));
    // What a killed process has added already is kept, unless tags were renamed since.
    let old = files(&out);
    add(&folder, &settings, None, &|_| ()).unwrap();
    let added: Vec<_> = files(&out).into_iter().filter(|(name, _)| !old.contains_key(name)).collect();
    for renamed in [false, true] {
        fs::create_dir(out.join("pending")).unwrap();
        for (name, bytes) in &added {
            fs::remove_file(out.join(name)).unwrap();
            fs::write(out.join("pending").join(name), bytes).unwrap();
        }
        fs::write(out.join("summary.json"), &old["summary.json"]).unwrap();
        if renamed {
            let text = fs::read_to_string(&vocabulary).unwrap();
            fs::write(&vocabulary, text.replace("\"b\"", "\"bee\"")).unwrap();
        }
        *kept.lock().unwrap() = 0;
        add(&folder, &settings, None, &count).unwrap();
        assert_eq!(*kept.lock().unwrap(), if renamed { 0 } else { added.len() });
        let words = |id: i64| content(&out).into_iter().find(|image| image.0 == id).unwrap().1;
        let [first, new] = if renamed { ["all, bee", ""] } else { ["all, b", "b"] };
        assert_eq!((words(-17).as_str(), words(21).as_str()), (first, new));
    }
    // It can be opened, added to, and retagged.
    assert!(shop.open(Split::Train).renamed() && shop.open(Split::Test).renamed());
    add(&folder, &settings, None, &tell).unwrap();
    assert!(told.lock().unwrap().contains("tags are renamed in vocabulary.json"), "{told:?}");
    retag(&folder, &settings, &tell).unwrap();
    assert!(told.lock().unwrap().contains("renamed in vocabulary.json are called again as in "), "{told:?}");
    assert!(!shop.open(Split::Train).renamed());
}

#[test]
fn a_picture_without_a_usable_feature_is_taken_once_it_has_one() {
    let shop = gallery();
    let features = |of_19: f32| {
        let ids: Vec<i64> = (0..40).map(|i| i * 3 - 20).collect();
        let values: Vec<f32> = ids.iter().map(|&id| if id == 19 { of_19 } else { 2.0 }).collect();
        write_features(shop.dir.path(), &ids, 1, &values, None);
    };
    let settings = Settings { conditions: of_file(shop.dir.path().join("full.safetensors"), None), ..shop.settings() };
    let adds = || {
        let summary = add(&shop.folder(), &settings, None, &|_| ()).unwrap();
        (summary.dropped.0.get(&DropReason::NoFeature).copied(), shop.open(Split::Train).find(19).is_some())
    };
    for retags in [false, true] {
        features(0.0);
        prepare(&shop.folder(), &settings, None, &|_| ()).unwrap();
        // The broken picture has no feature at all.
        assert_eq!(adds(), (Some(2), false));
        if retags {
            // With the features of before all stays, and the call that made the dataset finds it whole.
            retag(&shop.folder(), &settings, &|_| ()).unwrap();
            prepare(&shop.folder(), &settings, None, &|_| ()).unwrap();
        }
        features(3.0);
        if retags {
            let summary = retag(&shop.folder(), &settings, &|_| ()).unwrap();
            assert_eq!(summary.skipped, 2, "as good as new");
        }
        assert_eq!((adds(), adds()), ((Some(1), true), (Some(1), true)));
        fs::remove_dir_all(&settings.out).unwrap();
    }
}

#[test]
fn a_dataset_s_folder_may_be_called_as_a_zip() {
    let shop = gallery();
    let out = shop.dir.path().join("data.zip");
    prepare(&shop.folder(), &Settings { out: out.clone(), ..shop.settings() }, None, &|_| ()).unwrap();
    assert_eq!(Dataset::open(&out, Split::Test).unwrap().len(), 4);
    assert_eq!(Dataset::tags_of(&out).unwrap().len(), 4);
    assert!(printed(here(&["info", out.to_str().unwrap()]).assert()).contains("test           4 images"));
}

/// New tags would go onto old pictures.
#[test]
fn a_dataset_of_other_pictures_is_neither_added_to_nor_retagged() {
    let shop = grown();
    let out = shop.dir.path().join("out");
    let there = files(&out);
    let long_ago = std::time::SystemTime::UNIX_EPOCH;
    let refused = |what: &str| {
        let tries =
            [add(&shop.folder(), &shop.settings(), None, &|_| ()), retag(&shop.folder(), &shop.settings(), &|_| ())];
        let advice =
            ["; give it an id of its own", "; if only its file was written anew, an empty folder of images will do"];
        for (error, advice) in tries.map(|tried| tried.unwrap_err().to_string()).into_iter().zip(advice) {
            assert!(error.contains(": made when ") && error.contains(advice), "{what}: {error}");
        }
        assert!(files(&out) == there, "{what}");
    };
    // One that is newer than its shard.
    let (path, bytes) = (shop.file("7.png"), fs::read(shop.file("7.png")).unwrap());
    solid(18, 18, [1, 2, 3]).save(&path).unwrap();
    refused("replaced");
    fs::write(&path, &bytes).unwrap();
    // Two that have each other's names.
    let (other, old) = (shop.file("10.png"), fs::read(shop.file("10.png")).unwrap());
    fs::write(&path, &old).unwrap();
    fs::write(&other, &bytes).unwrap();
    refused("exchanged");
    fs::write(&path, &bytes).unwrap();
    fs::write(&other, &old).unwrap();
    // All of them, older than the shards.
    for id in (0..40).map(|i| i * 3 - 20) {
        let path = shop.file(&format!("{id}.png"));
        solid(18, 18, [1, 2, id as u8]).save(&path).unwrap();
        fs::File::options().write(true).open(&path).unwrap().set_modified(long_ago).unwrap();
    }
    refused("of another folder");
}

#[test]
fn a_replaced_picture_is_noticed_though_another_one_is_not_listed_any_more() {
    let mut shop = grown();
    shop.lines.retain(|line| !line.contains("\"id\":4,"));
    solid(18, 18, [1, 2, 3]).save(shop.file("7.png")).unwrap();
    let said = add(&shop.folder(), &shop.settings(), None, &|_| ()).unwrap_err().to_string();
    assert!(said.contains("made when 7.png was another picture; give it an id of its own"), "{said}");
}

#[test]
fn the_command_adds_and_retags() {
    let shop = grown();
    let (folder, out) = (shop.folder(), shop.settings().out);
    let run = |more: &[&str]| {
        let arguments = command_of(&folder, &out, more);
        here(&arguments.iter().map(String::as_str).collect::<Vec<_>>()).assert()
    };
    let added = run(&["--add"]).success();
    let said = String::from_utf8_lossy(&added.get_output().stderr).into_owned();
    assert!(
        said.contains("warning: vocabulary.json stays, and lacks 1 of the new pictures' tags, such as \"new\""),
        "{said}"
    );
    let text = printed(added);
    assert!(
        text.contains("train            34 images") && text.contains("skipped          40 there already"),
        "{text}"
    );
    let retagged = run(&["--retag"]).success();
    let said = String::from_utf8_lossy(&retagged.get_output().stderr).into_owned();
    assert!(said.contains("warning: vocabulary.json has 5 tags from now on, it had 4"), "{said}");
    let text = printed(retagged);
    assert!(text.contains("vocabulary        5 tags") && text.contains("dropped           2 unreadable"), "{text}");
    let words = content(&out).into_iter().find(|image| image.0 == 203).unwrap().1;
    assert_eq!(words, "new");
    assert!(refused(run(&["--add", "--retag"])).contains("cannot be used with"));
}

#[test]
fn options_that_would_do_nothing_are_refused() {
    let (shop, out) = (gallery(), PathBuf::from("nowhere"));
    let folder = shop.folder();
    for options in [
        "--require cat",
        "--rating g,s",
        "--enlarge",
        "--tagger t.onnx --feature-ids ids.npy",
        "--features f.safetensors --tagger-node n",
        "--retag --tagger-node n",
    ] {
        let arguments = command_of(&folder, &out, &options.split(' ').collect::<Vec<_>>());
        let said = refused(here(&arguments.iter().map(String::as_str).collect::<Vec<_>>()).assert().code(2));
        assert!(said.contains("cannot be used with"), "{options}: {said}");
    }
    for arguments in ["bench --kernels --model m", "bench --batch-gpu 2 --vae v", "info --check --preset 1girl-xs"] {
        let said = refused(here(&arguments.split(' ').collect::<Vec<_>>()).assert().code(2));
        assert!(said.contains("cannot be used with"), "{arguments}: {said}");
    }
    // Whichever of several would do, all are named.
    for (arguments, all) in [
        ("train --data d --outdir o", &["--preset", "--config", "--init"][..]),
        ("prepare --images i --metadata m --out o", &["--size", "--sizes"]),
        ("fid --network n --data d", &["--model", "--generated"]),
    ] {
        let said = refused(here(&arguments.split(' ').collect::<Vec<_>>()).assert().code(2));
        assert!(all.iter().all(|option| said.contains(option)), "{said}");
    }
    for (arguments, expected) in [
        ("condition sample --model c.safetensors --out c.npy", "c.npy: found the ending .npy, expected .safetensors"),
        ("eval --model m --data d --plot l.png", "l.png: found the ending .png, expected .svg"),
        (
            "fid --network n --data d --generated g --steps 3",
            "--generated: its images are there, so no sampler makes them",
        ),
    ] {
        let said = refused_in_one_line(here(&arguments.split(' ').collect::<Vec<_>>()).assert());
        assert!(said.contains(expected), "{said}");
    }
}

#[test]
fn a_dataset_and_a_run_have_directories_of_their_own() {
    let shop = gallery();
    shop.prepare();
    let (folder, out) = (shop.folder(), shop.settings().out);
    let config = shop.dir.path().join("net.json");
    fs::write(&config, r#"{"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "channels_per_head": 8}"#)
        .unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let (data, config, run) = (text(&out), text(&config), text(&shop.dir.path().join("run")));
    let train = |outdir: &str, more: &[&str]| {
        let all =
            ["train", "--data", &data, "--outdir", outdir, "--config", &config, "--duration", "8", "--batch", "8"];
        here(&[&all, more].concat()).args(["--device", "cpu", "--rampup", "0"]).assert()
    };
    let said = refused_in_one_line(train(&data, &[]));
    assert!(said.contains("a dataset is there, and a run needs a directory of its own"), "{said}");
    let trained = train(&run, &["--flip", "--cond-dropout", "1"]).success();
    let said = String::from_utf8_lossy(&trained.get_output().stderr).into_owned();
    assert!(said.contains("warning: --flip mirrors nothing"), "{said}");
    assert!(said.contains("warning: --cond-dropout 1 drops every condition"), "{said}");
    for (out, what) in [(Path::new(&run), "a run is there"), (&folder.images, "the pictures are there")] {
        let arguments = command_of(&folder, out, &[]);
        let said = refused_in_one_line(here(&arguments.iter().map(String::as_str).collect::<Vec<_>>()).assert());
        assert!(said.contains(&format!("{what}, and a dataset needs a directory of its own")), "{said}");
    }
    // The last field counted, before.
    fs::write(shop.dir.path().join("net.json"), r#"{"model_channels": 8, "model_channels": 16}"#).unwrap();
    let said = refused_in_one_line(train(&text(&shop.dir.path().join("other")), &[]));
    assert!(said.contains("net.json: duplicate field `model_channels`"), "{said}");

    // A part of a dataset is not taken for all of it.
    assert_eq!(shop.open(Split::Train).doubt(), None);
    let lone = Settings { shard_size: 64, part: Part { number: 0, of: 2 }, ..shop.settings() };
    let lone = Settings { out: shop.dir.path().join("half"), ..lone };
    prepare(&folder, &lone, None, &|_| ()).unwrap();
    let doubt = Dataset::open(&lone.out, Split::Train).unwrap().doubt().unwrap();
    assert!(doubt.contains("nothing tells that the dataset is whole"), "{doubt}");
}

#[test]
fn unusable_settings_and_metadata_are_named() {
    let shop = gallery();
    let fails_of = |folder, settings| prepare(&folder, &settings, None, &|_| ()).unwrap_err().to_string();
    let fails = |settings| fails_of(shop.folder(), settings);
    let base = || shop.settings();
    assert!(
        fails(Settings { sizes: vec![Size { width: 0, height: 4 }], ..base() })
            .contains("the size is 0x4, expected sides")
    );
    assert!(fails(Settings { max_crop: f64::NAN, ..base() }).contains("crop is NaN, expected"));
    assert!(fails(Settings { validation_modulus: 2, ..base() }).contains("at least 3"));
    assert!(fails(Settings { shard_size: 0, ..base() }).contains("shard size is 0"));
    assert!(fails(Settings { vocabulary: 0, ..base() }).contains("vocabulary is 0"));
    for (line, expected) in [
        ("{\"id\": 1,", "line 2: EOF"),
        ("{\"id\": \"one\", \"file\": \"a\", \"tags\": []}", "line 2: id: invalid type: string"),
        ("{\"id\": 1, \"tags\": []}", "line 2: missing field `file`"),
        ("{\"id\": 1, \"file\": \"a\", \"tags\": [\"a,b\"]}", "line 2: a tag: \"a,b\" contains a comma"),
        (
            "{\"id\": 1, \"file\": \"a\", \"tags\": [\"\u{feff}red\"]}",
            "line 2: a tag: \"\\u{feff}red\" has an invisible character",
        ),
        (
            "{\"id\": 1, \"file\": \"a\", \"tags\": [\"r\\u0007ed\"]}",
            "line 2: a tag: \"r\\u{7}ed\" has a control character",
        ),
        ("{\"id\": -20, \"file\": \"a\", \"tags\": []}", "line 2: id -20 occurs twice"),
    ] {
        let metadata = shop.dir.path().join("bad.jsonl");
        fs::write(&metadata, format!("{}\n{line}\n", shop.lines[0])).unwrap();
        let text = fails_of(Folder { metadata, ..shop.folder() }, base());
        assert!(text.contains("bad.jsonl line 2") && text.contains(expected), "{text}");
    }
    let metadata = shop.dir.path().join("misspelt.jsonl");
    let lines = shop.lines.join("\n").replace("\"tags\"", "\"repeat\": 4, \"caption\": \"?\", \"tags\"");
    fs::write(&metadata, lines).unwrap();
    let warnings = Mutex::new(Vec::new());
    let report = |event: Event| {
        if let Event::Warning { text } = event {
            warnings.lock().unwrap().push(text.to_owned());
        }
    };
    prepare(&Folder { metadata, ..shop.folder() }, &base(), None, &report).unwrap();
    let warnings = warnings.into_inner().unwrap();
    let expected = "misspelt.jsonl: nothing reads \"caption\", \"repeat\"; only id, file, tags, flip and repeats count";
    assert!(warnings.len() == 1 && warnings[0].ends_with(expected), "{warnings:?}");
    let empty = shop.dir.path().join("empty.jsonl");
    fs::write(&empty, "\n\n").unwrap();
    assert!(fails_of(Folder { metadata: empty, ..shop.folder() }, base()).contains("empty.jsonl: no records"));

    let mut unreadable = Workshop::new();
    unreadable.record(2, "absent.png", &["x"]);
    let result = prepare(&unreadable.folder(), &unreadable.settings(), None, &|_| ());
    let text = result.unwrap_err().to_string();
    assert_eq!(text, "none of the 1 images could be kept (1 unreadable)");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_size_is_fitted_or_dropped_as_the_arithmetic_says(
        width in 1u32..60, height in 1u32..60, max_crop in 0.0f64..0.6,
        target in (1u32..40, 1u32..40).prop_map(|(width, height)| Size { width, height }),
    ) {
        let mut shop = Workshop::new();
        shop.image(2, solid(width, height, [90, 180, 20]), &["x"]);
        let settings = Settings { sizes: vec![target], max_crop, ..shop.settings() };
        let lost = {
            let (w, h) = (f64::from(width) / f64::from(target.width), f64::from(height) / f64::from(target.height));
            1.0 - w.min(h) / w.max(h)
        };
        prop_assume!((lost - max_crop).abs() > 1e-6);
        match prepare(&shop.folder(), &settings, None, &|_| ()) {
            Ok(_) => {
                prop_assert!(lost < max_crop);
                let dataset = Dataset::open(&settings.out, Split::Train).unwrap();
                prop_assert!(pixels(&dataset, 2).iter().all(|&pixel| pixel == [90, 180, 20]));
            }
            Err(PrepareError::NothingKept { dropped, .. }) => {
                prop_assert_eq!(dropped, drops(&[(DropReason::Cropped, 1)]));
                prop_assert!(lost > max_crop);
            }
            Err(error) => prop_assert!(false, "{}", error),
        }
    }
}

// ---- latents ----

#[test]
fn latents_are_stored_as_the_network_is_to_see_them() {
    let mut shop = Workshop::new();
    for id in 2..7 {
        let image = RgbImage::from_fn(16, 16, |x, y| Rgb([(x * 15 + id * 3) as u8, (y * 11) as u8, (x * y) as u8]));
        shop.image(id.into(), image, &["x"]);
    }
    shop.image(7, solid(16, 9, [1, 2, 3]), &["x"]);
    let folder = shop.folder();
    let path = |path: &Path| path.to_str().unwrap().to_string();
    let (images, metadata) = (path(&folder.images), path(&folder.metadata));
    // A factor of 2 with a standard deviation, and one of 8 without.
    for (name, file, factor) in [("sd", autoencoder::sd_vae(&[32, 32], 1), 2), ("taesd", autoencoder::taesd(8), 8)] {
        let (vae, out) = (shop.dir.path().join(name), shop.dir.path().join(format!("{name}-out")));
        autoencoder::write(&vae, &file);
        let (vae_path, out_path) = (path(&vae), path(&out));
        let args = ["prepare", "--images", &images, "--metadata", &metadata, "--out", &out_path, "--vae", &vae_path];
        let done = here(&[&args[..], &["--size", "16x16"]].concat()).assert().success();
        let said = String::from_utf8(done.get_output().stdout.clone()).unwrap();
        assert!(said.contains("train             5 images\n") && said.contains("1 of too different a shape"), "{said}");

        let dataset = Dataset::open(&out, Split::Train).unwrap();
        assert_eq!((dataset.header().kind, dataset.shape()), (Representation::Latents, [16 / factor, 16 / factor, 4]));
        let mut cpu = Cpu::<f32, ()>::for_codec();
        let encoder = CodecFile::open(&vae).unwrap().encoder(&mut cpu).unwrap();
        let shard = SafeFile::open(out.join("train-00000.safetensors")).unwrap();
        let area = 256 / factor / factor;
        assert_eq!(shard.shape("latents").unwrap(), [5, 8, 16 / factor, 16 / factor]);
        let stored = shard.f32("latents").unwrap();
        for (i, stored) in stored.chunks(8 * area).enumerate() {
            let file = fs::read(shop.file(&format!("{}.png", i + 2))).unwrap();
            let picture = decode(&file, [255; 3]).unwrap().picture;
            let moments = encoder.encode(&mut cpu, &picture).unwrap();
            for at in 0..4 * area {
                let (c, place) = (at / area, at % area);
                let mean = (moments.mean[place * 4 + c] - RAW_MEAN[c]) * 0.5 / RAW_STD[c];
                let std = (moments.logvar[place * 4 + c] / 2.0).exp() * 0.5 / RAW_STD[c];
                assert!(std > 0.0 || name == "taesd");
                for (what, found, expected) in [("mean", stored[at], mean), ("std", stored[4 * area + at], std)] {
                    // Half of the last bit of f16, and a rounding to f32 more.
                    let near = expected.abs() * (1.0 / 2048.0 + 1e-6);
                    assert!((found - expected).abs() <= near, "{what} at {c}, {place}: {found}, expected {expected}");
                }
            }
            // What training sees is mean + std * noise, channels last.
            let (mut image, mut noise) = (vec![0.0; 4 * area], vec![0.0; 4 * area]);
            dataset.image(i, NOISE, &mut image).unwrap();
            NOISE.normals(&mut noise);
            for at in 0..4 * area {
                let planar = at % 4 * area + at / 4;
                assert_eq!(image[at], stored[planar] + stored[4 * area + planar] * noise[at]);
            }
        }
        // Again: kept; with another file: refused.
        let again = here(&[&args[..], &["--size", "16x16"]].concat()).assert().success();
        assert!(String::from_utf8_lossy(&again.get_output().stderr).contains("5 images (was there)"));
        autoencoder::write(&vae, &autoencoder::taesd(9));
        let said = refused(here(&[&args[..], &["--size", "16x16"]].concat()).assert());
        assert!(said.contains(&format!("made before with vae {name} (")), "{said}");
    }
}

#[test]
fn a_codec_that_does_not_fit_is_refused_in_one_line() {
    let shop = gallery();
    let (folder, settings) = (shop.folder(), shop.settings());
    let path = |path: &Path| path.to_str().unwrap().to_string();
    let (images, metadata, out) = (path(&folder.images), path(&folder.metadata), path(&settings.out));
    let file = |name: &str| path(&shop.dir.path().join(name));
    let mut decoder = autoencoder::taesd(8);
    decoder.retain(|name, _| name.starts_with("decoder"));
    // Under the names of TAESD's author there are decoders alone.
    let alone = |name: &str| {
        let mut parts = name.strip_prefix("decoder.layers.").unwrap().splitn(2, '.');
        let (number, rest) = (parts.next().unwrap().parse::<usize>().unwrap(), parts.next().unwrap());
        format!("{}.{rest}", number + 1)
    };
    let decoder = decoder.into_iter().map(|(name, tensor)| (alone(&name), tensor)).collect();
    autoencoder::write(Path::new(&file("decoder")), &decoder);
    autoencoder::write(Path::new(&file("taesd")), &autoencoder::taesd(8));
    let mut missing = autoencoder::sd_vae(&[32, 32], 1);
    missing.remove("encoder.conv_out.bias");
    autoencoder::write(Path::new(&file("missing")), &missing);
    let mut nan = autoencoder::taesd(8);
    nan.get_mut("encoder.layers.0.weight").unwrap().1[3] = f32::NAN;
    autoencoder::write(Path::new(&file("nan")), &nan);
    let emoji = path(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/emoji/train-00000.safetensors"));
    for (vae, size, expected) in [
        (
            file("taesd"),
            "20x16",
            "the size is 20x16, expected multiples of the 8 pixels that the codec has for a latent",
        ),
        (file("decoder"), "16x16", "this TAESD file holds the decoder only, expected one with the encoder"),
        (file("missing"), "16x16", "missing: tensor encoder.conv_out.bias is missing"),
        (file("nan"), "16x16", "nan: tensor encoder.layers.0.weight: "),
        (emoji, "16x16", "train-00000.safetensors: neither an SD-VAE nor a TAESD"),
        (file("nowhere"), "16x16", "nowhere: No such file"),
    ] {
        let args = ["prepare", "--images", &images, "--metadata", &metadata, "--out", &out, "--vae", &vae];
        let said = refused(here(&[&args[..], &["--size", size]].concat()).assert());
        assert!(said.contains(expected) && said.trim_end().lines().count() == 1, "{said}\nexpected {expected}");
    }
    assert!(!settings.out.exists());
}

// ---- conditions from features ----

/// Conditions that are the features of a file.
fn of_file(path: PathBuf, ids: Option<PathBuf>) -> ConditionInput {
    ConditionInput::Features { path, ids }
}

/// Writes features: of F16 and F32 in safetensors, of F32 in npy with their ids.
fn write_features(dir: &Path, ids: &[i64], width: usize, values: &[f32], about: Option<&str>) {
    let shape = [ids.len(), width];
    let little = bytes(ids, |x| x.to_le_bytes());
    let half = bytes(values, |x| f16::from_f32(*x).to_le_bytes());
    let full = bytes(values, |x| x.to_le_bytes());
    let metadata = about.map(|text| ("conditioning".to_owned(), text.to_owned())).into_iter().collect();
    for (name, dtype, content) in [("half.safetensors", Dtype::F16, &half), ("full.safetensors", Dtype::F32, &full)] {
        let tensors: [safetensors::TensorOut; 2] =
            [("ids", Dtype::I64, &[ids.len()], &little), ("features", dtype, &shape, content)];
        safetensors::write(dir.join(name), &tensors, &metadata).unwrap();
    }
    let npy = |descr: &str, shape: &str, content: &[u8]| {
        let header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
        [b"\x93NUMPY\x01\x00", &(header.len() as u16).to_le_bytes()[..], header.as_bytes(), content].concat()
    };
    fs::write(dir.join("features.npy"), npy("<f4", &format!("({}, {width})", ids.len()), &full)).unwrap();
    fs::write(dir.join("ids.npy"), npy("<i8", &format!("({},)", ids.len()), &little)).unwrap();
}

#[test]
fn features_take_the_place_of_tags_and_have_norm_1() {
    let shop = gallery();
    let dir = shop.dir.path();
    // Of most images, in another order; of some that are not there; image 19 has a feature of zeros, 22 one that is
    // no number.
    let ids: Vec<i64> = (0..45).rev().map(|k| k * 3 - 20).filter(|id| id % 7 != 0).collect();
    let mut values = vec![0.0; ids.len() * 5];
    Stream::new(3, Purpose::Init, 0).normals(&mut values);
    values.iter_mut().for_each(|x| *x *= 40.0);
    let row = |id: i64| ids.iter().position(|&known| known == id).unwrap() * 5;
    values[row(19)..][..5].fill(0.0);
    values[row(22)] = f32::NAN;
    let about = r#"{"features": {"source": "tagger.onnx", "node": "pooled"}}"#;
    write_features(dir, &ids, 5, &values, Some(about));
    let features = [("half.safetensors", None), ("full.safetensors", None), ("features.npy", Some("ids.npy"))];
    for (name, ids_name) in features {
        let out = dir.join(format!("{name}-out"));
        let conditions = of_file(dir.join(name), ids_name.map(|name| dir.join(name)));
        let settings = Settings { conditions, out: out.clone(), ..shop.settings() };
        let summary = prepare(&shop.folder(), &settings, None, &|_| ()).unwrap();
        let kept: usize = summary.splits.iter().map(|(_, counts)| counts.kept).sum();
        // Of the 40 pictures six have an id that 7 divides; the broken one's id, 1002, is unknown here.
        let expected = (0..40).map(|k| k * 3 - 20).filter(|id| id % 7 != 0).count() - 2;
        assert_eq!(kept, expected);
        assert_eq!(summary.dropped, drops(&[(DropReason::NoFeature, 41 - kept)]), "{name}");
        let data = Dataset::open(&out, Split::Train).unwrap();
        assert_eq!(data.condition_dim(), 5);
        let source = if name == "features.npy" { ("", "") } else { ("tagger.onnx", "pooled") };
        let conditioning = Conditioning::Features { source: source.0.into(), node: source.1.into(), fingerprint: None };
        assert_eq!(data.header().conditioning, conditioning, "{name}");
        assert!(data.vocabulary().get("all").is_some() && !data.tags(0).is_empty(), "tags are kept beside");
        for i in 0..data.len() {
            let mut condition = [0.0; 5];
            data.condition(i, &mut condition);
            let feature = &values[row(data.id(i))..][..5];
            let norm = feature.iter().map(|x| x * x).sum::<f32>().sqrt();
            for (found, x) in condition.iter().zip(feature) {
                // f16 in the file, f16 in the shard: 2^-11 of a number each, and of the norm.
                assert!((found - x / norm).abs() < 1.5e-3, "{name}, id {}: {found}, expected {}", data.id(i), x / norm);
            }
        }
    }
    let text = |out: &str| {
        let shown = here(&["info", dir.join(out).to_str().unwrap()]).assert().success();
        String::from_utf8(shown.get_output().stdout.clone()).unwrap()
    };
    assert!(text("half.safetensors-out").contains("conditions are features of tagger.onnx, tensor pooled\n"));
    assert!(text("features.npy-out").contains("conditions are features\n"));
    // The file is part of what a shard depends on.
    let out = dir.join("half.safetensors-out");
    let settings = Settings { conditions: of_file(dir.join("full.safetensors"), None), out, ..shop.settings() };
    let error = prepare(&shop.folder(), &settings, None, &|_| ()).unwrap_err().to_string();
    assert!(error.contains("made before with features half.safetensors ("), "{error}");
}

#[test]
fn unusable_features_are_named() {
    let shop = gallery();
    let dir = shop.dir.path();
    let fails = |file: &str, ids: Option<&str>, expected: &str| {
        let conditions = of_file(dir.join(file), ids.map(|ids| dir.join(ids)));
        let error = prepare(&shop.folder(), &Settings { conditions, ..shop.settings() }, None, &|_| ())
            .unwrap_err()
            .to_string();
        assert!(error.contains(expected), "{error}\nexpected {expected}");
    };
    write_features(dir, &[1, 4], 3, &[1.0; 6], None);
    fails("nowhere.safetensors", None, "nowhere.safetensors: No such file");
    fails("features.npy", None, "features.npy: features without ids; give the .npy of their ids too");
    fails("features.npy", Some("features.npy"), "features.npy: not a usable .npy file: elements of type \"<f4\"");
    fails("ids.npy", Some("ids.npy"), "elements of type \"<i8\", expected '<f2', '<f4' or '<f8'");
    fails("half.safetensors", Some("ids.npy"), "half.safetensors: it has ids of its own, but ");
    // Ids of another file.
    fs::rename(dir.join("features.npy"), dir.join("two.npy")).unwrap();
    write_features(dir, &[1, 4, 7], 3, &[1.0; 9], None);
    fails("two.npy", Some("ids.npy"), "ids.npy: ids of shape [3], expected [2], one a feature");
    write_features(dir, &[4, 1, 4], 3, &[1.0; 9], None);
    fails("full.safetensors", None, "full.safetensors: id 4 occurs twice");
    fails("features.npy", Some("ids.npy"), "ids.npy: id 4 occurs twice");
    write_features(dir, &[1, 4], 3, &[1.0; 6], Some("\"tags\""));
    fails("half.safetensors", None, "metadata \"conditioning\": found tags, expected features");
    write_features(dir, &[1, 4], 3, &[1.0; 6], Some("{"));
    fails("half.safetensors", None, "metadata \"conditioning\": EOF");
    let path = dir.join("x.safetensors");
    let write = |tensors: &[safetensors::TensorOut]| safetensors::write(&path, tensors, &HashMap::new()).unwrap();
    write(&[("ids", Dtype::I64, &[1], &[0; 8]), ("features", Dtype::F16, &[2], &[0; 4])]);
    fails("x.safetensors", None, "features of shape [2], expected [N, D]");
    write(&[("ids", Dtype::I64, &[1], &[0; 8]), ("features", Dtype::I64, &[1, 1], &[0; 8])]);
    fails("x.safetensors", None, "tensor features: found I64, expected F16 or F32");
    write(&[("features", Dtype::F16, &[1, 1], &[0; 2])]);
    fails("x.safetensors", None, "tensor ids is missing");
    write_features(dir, &[], 3, &[], None);
    fails("half.safetensors", None, "none of the 41 images could be kept (41 without a usable feature)");
    assert!(!shop.settings().out.exists());
}

#[test]
fn a_model_of_features_draws_what_tags_ask_for() {
    let shop = gallery();
    let dir = shop.dir.path();
    let ids: Vec<i64> = (0..40).map(|k| k * 3 - 20).collect();
    let mut values = vec![0.0; 40 * 4];
    Stream::new(3, Purpose::Init, 0).normals(&mut values);
    write_features(dir, &ids, 4, &values, Some(r#"{"features": {"source": "tagger.onnx", "node": "pooled"}}"#));
    autoencoder::write(&dir.join("vae.safetensors"), &autoencoder::taesd(8));
    fs::write(dir.join("images.jsonl"), shop.lines.join("\n")).unwrap();
    let config = r#"{"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [],
                     "channels_per_head": 8}"#;
    fs::write(dir.join("config.json"), config).unwrap();
    let run = |line: &str| {
        let args: Vec<_> = line.split_whitespace().map(|word| word.replace('+', " ")).collect();
        edm2k(dir, &args.iter().map(String::as_str).collect::<Vec<_>>()).assert()
    };
    let ok = |line: &str| printed(run(line));
    let fails = |line: &str, expected: &str| {
        let failed = run(line).code(1);
        let said = String::from_utf8_lossy(&failed.get_output().stderr).into_owned();
        assert!(said.contains(expected) && said.trim_end().lines().count() == 1, "{said}\nexpected {expected}");
    };
    let common = "prepare --images images --metadata images.jsonl --size 32x32 --max-crop 0.5 --vae vae.safetensors \
                  --validation-modulus 10";
    ok(&format!("{common} --out data --features full.safetensors"));
    ok(&format!("{common} --out of-tags"));
    let train = "train --device cpu --config config.json --duration 8 --batch 8 --seed 3 --data";
    ok(&format!("{train} data --outdir run"));
    ok(&format!("{train} of-tags --outdir tags-run"));
    fails(&format!("{train} data --outdir flipped --flip"), "--flip: the images are latents");
    let model = "run/snapshot-000000008-0.100.safetensors";
    let about = ok(&format!("info {model}"));
    assert!(about.contains("images are     sd-vae\n"), "{about}");
    assert!(about.contains("conditions are features of tagger.onnx, tensor pooled\n"), "{about}");
    assert!(!about.contains("vocabulary"), "the places of features have no names: {about}");
    ok(&format!("eval --device cpu --model {model} --data data --split train"));
    let of = "of-tags: its conditions are tags, those of run/";
    if Dataset::open(&dir.join("of-tags"), Split::Train).unwrap().condition_dim() == 4 {
        fails(&format!("eval --device cpu --model {model} --data of-tags --split train"), of);
    }

    assert!(ok("condition train --data data --out c.safetensors --epochs 3").contains("features and their tags"));
    ok("condition train --data of-tags --out t.safetensors --epochs 1");
    let sample = format!("sample --device cpu --model {model} --steps 2 --vae vae.safetensors");
    fails(
        &format!("{sample} --outdir o --tags all"),
        "its conditions are features of tagger.onnx, tensor pooled, so tags need a condition model that has learned",
    );
    let other = "t.safetensors: its conditions are tags, those of run/";
    fails(&format!("{sample} --outdir o --tags all --condition-model t.safetensors"), other);
    let other = "c.safetensors: its conditions are features of tagger.onnx, tensor pooled, those of tags-run/";
    let of_tags = sample.replace("run/", "tags-run/");
    fails(&format!("{of_tags} --outdir o --random-conditions 1 --condition-model c.safetensors"), other);
    fails(&format!("{sample} --outdir o --tags al --condition-model c.safetensors"), "unknown tag \"al\"");
    ok(&format!("{sample} --outdir o --tags all,a --condition-model c.safetensors"));
    assert_eq!(image::image_dimensions(dir.join("o/000000.png")).unwrap(), (32, 32));
    let text = edm2k::pictures::png::read_text(&dir.join("o/000000.png")).unwrap();
    assert!(text.iter().any(|(_, text)| text.contains(r#""asked":"all, a""#)), "{text:?}");
}

#[test]
fn a_call_that_keeps_nothing_does_not_stand_in_the_way_of_the_right_one() {
    let mut shop = Workshop::new();
    for id in 2..8 {
        // As photographs are.
        shop.image(id, solid(64, 48, [9, 90, 200]), &["x"]);
    }
    let fails_of = |folder: Folder, settings: Settings, expected: &str| {
        let error = prepare(&folder, &settings, None, &|_| ()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    let fails = |settings, expected| fails_of(shop.folder(), settings, expected);
    let absent = Folder { images: "no/such/folder".into(), ..shop.folder() };
    fails_of(absent, shop.settings(), "no/such/folder: No such file");
    let empty = shop.dir.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let (folder, settings) = (Folder { images: empty, ..shop.folder() }, Settings { shard_size: 2, ..shop.settings() });
    fails_of(folder, settings, "none of the 6 images could be kept (6 unreadable)");
    fails(shop.settings(), "(6 of too different a shape)");
    let right = Settings { max_crop: 0.5, ..shop.settings() };
    assert_eq!(counts(&prepare(&shop.folder(), &right, None, &|_| ()).unwrap(), Split::Train).kept, 6);
    // What has been accepted is kept.
    fails(shop.settings(), "made before with max-crop 0.5, now 0.05");
    assert_eq!(shop.open(Split::Train).len(), 6);
}

#[test]
fn the_readme_s_first_preparation_works_on_ordinary_photographs() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("photos")).unwrap();
    let mut lines = String::new();
    // Of cameras and telephones, upright and not.
    let sizes = [(80, 60), (60, 80), (90, 60), (60, 90), (96, 54), (54, 96), (70, 70), (40, 30)];
    for (k, (width, height)) in sizes.into_iter().enumerate() {
        solid(width, height, [9, 90, 200]).save(dir.path().join(format!("photos/{k}.jpg"))).unwrap();
        lines +=
            &format!("{}\n", serde_json::json!({"id": k + 7, "file": format!("{k}.jpg"), "tags": ["cat", "grass"]}));
    }
    fs::write(dir.path().join("meta.jsonl"), lines).unwrap();
    let readme = include_str!("../../README.md");
    let line = readme.lines().find_map(|line| line.strip_prefix("edm2k prepare --images ")).unwrap();
    let mut command = edm2k(dir.path(), &["prepare", "--images"]);
    let said = printed(command.args(line.split_whitespace()).assert());
    assert!(said.contains("train             8 images"), "{said}");
}

#[cfg(unix)]
#[test]
fn a_bad_record_is_one_bad_record() {
    let mut shop = Workshop::new();
    shop.image(2, solid(16, 16, [1, 2, 3]), &["x"]);
    fs::create_dir(shop.file("folder")).unwrap();
    fs::create_dir(shop.file("folder.png")).unwrap();
    std::os::unix::fs::symlink("loop.png", shop.file("loop.png")).unwrap();
    let pipe = std::ffi::CString::new(shop.file("pipe.png").to_str().unwrap()).unwrap();
    // SAFETY: a path that ends in a zero.
    assert_eq!(unsafe { libc::mkfifo(pipe.as_ptr(), 0o600) }, 0);
    let long = "a".repeat(300);
    let bad =
        ["folder", "folder/", "folder.png", "", "loop.png", "pipe.png", "2.png/x.png", "a\0.png", &long, "absent"];
    for (id, file) in (12..).zip(bad) {
        shop.record(id, file, &["x"]);
    }
    shop.lines.push(r#"{"id": 33, "file": "/dev/zero", "tags": ["x"]}"#.into());
    // A regular file that has nothing to say, or to nobody but root.
    shop.lines.push(r#"{"id": 34, "file": "/proc/kmsg", "tags": ["x"]}"#.into());
    let (summary, listed) = shop.prepare_listing(&shop.settings());
    assert_eq!(counts(&summary, Split::Train), Counts { kept: 1, ..Counts::default() });
    assert_eq!(summary.dropped, drops(&[(DropReason::Unreadable, bad.len() + 2)]));
    let listed = listed.join("\n");
    for expected in ["pipe.png: it is a pipe, not a regular file", "folder.png: it is a directory", "it is a device"] {
        assert!(listed.contains(expected), "{listed}");
    }
}

#[test]
fn files_that_are_no_images_are_called_what_they_are() {
    let mut shop = Workshop::new();
    shop.image(2, solid(16, 16, [1, 2, 3]), &["x"]);
    let lfs = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n";
    for (id, name, bytes) in
        [(3, "lfs.png", lfs), (4, "page.jpg", "<!DOCTYPE html>\n<p>404"), (5, "words.gif", "words")]
    {
        fs::write(shop.file(name), bytes).unwrap();
        shop.record(id, name, &["x"]);
    }
    let listed = shop.prepare_listing(&shop.settings()).1.join("\n");
    for expected in ["lfs.png: it is a Git LFS pointer", "page.jpg: it is a web page", "words.gif: it is no image"] {
        assert!(listed.contains(expected), "{listed}");
    }
}

#[test]
fn metadata_may_have_a_mark_and_is_called_what_it_is() {
    let mut shop = Workshop::new();
    shop.image(2, solid(16, 16, [1, 2, 3]), &["x"]);
    shop.image(3, solid(16, 16, [1, 2, 3]), &["x"]);
    let folder = shop.folder();
    let text = fs::read_to_string(&folder.metadata).unwrap();
    let write = |bytes: &[u8]| {
        fs::write(&folder.metadata, bytes).unwrap();
        prepare(&folder, &shop.settings(), None, &|_| ())
    };
    for text in [format!("\u{feff}{text}"), format!("\u{feff}{}\r\n", text.replace('\n', "\r\n"))] {
        assert_eq!(counts(&write(text.as_bytes()).unwrap(), Split::Train).kept, 2);
    }
    let utf16: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
    for (bytes, expected) in [
        ([b"\xff\xfe", &utf16[..]].concat(), "metadata.jsonl: it is text in UTF-16"),
        (b"\x1f\x8b\x08\0".to_vec(), "metadata.jsonl: it is compressed"),
        (format!("[{}]", text.replace('\n', ",\n")).into_bytes(), "metadata.jsonl: it is a list in JSON, expected"),
        (b"PK\x03\x04".to_vec(), "metadata.jsonl: it is a zip"),
        (
            format!("{text}\n{{\"id\": 4,").into_bytes(),
            "metadata.jsonl line 3: EOF while parsing a value at column 9; ",
        ),
    ] {
        let error = write(&bytes).unwrap_err().to_string();
        assert!(error.contains(expected) && error.matches("line").count() <= 1, "{error}");
    }
}

#[test]
fn a_vocabulary_that_is_not_of_the_shards_is_refused_and_renamed_tags_are_not() {
    let shop = gallery();
    shop.prepare();
    let out = shop.dir.path().join("out");
    let path = out.join("vocabulary.json");
    let whole = fs::read_to_string(&path).unwrap();
    let said = |event: Event, said: &Mutex<String>| {
        if let Event::Renamed { tags, was, now } = event {
            *said.lock().unwrap() = format!("{tags} {was} {now}");
        }
    };
    fs::write(&path, whole.replace("\"b\"", "\"bee\"")).unwrap();
    let renamed = Mutex::new(String::new());
    prepare(&shop.folder(), &shop.settings(), None, &|event| said(event, &renamed)).unwrap();
    assert_eq!(renamed.into_inner().unwrap(), "1 b bee");
    let data = shop.open(Split::Train);
    assert!(data.renamed() && data.vocabulary().get("bee").is_some());
    let told = here(&["info", out.to_str().unwrap(), "--check"]).assert().success();
    let told = String::from_utf8(told.get_output().stdout.clone()).unwrap();
    assert!(told.contains("4 tags, renamed since the shards were made: "), "{told}");
    assert!(told.contains("checked        11 shards are whole\n"), "{told}");

    let lines: Vec<_> = whole.lines().collect();
    let [open, first, second, rest @ ..] = &lines[..] else { panic!("{whole}") };
    for (what, text) in [
        ("cut", whole[..whole.len() - 9].to_owned()),
        ("of fewer tags", [*open, *first, lines[4], "]"].join("\n")),
        ("of another count", whole.replacen("33", "32", 1)),
        ("exchanged", [&[*open, *second, *first], rest].concat().join("\n")),
        ("a web page", "<html>".to_owned()),
    ] {
        fs::write(&path, text).unwrap();
        let error = prepare(&shop.folder(), &shop.settings(), None, &|_| ()).unwrap_err().to_string();
        assert!(error.contains("vocabulary.json: "), "{what}: {error}");
        Dataset::open(&out, Split::Train).unwrap_err();
    }
    fs::remove_file(&path).unwrap();
    shop.prepare();
    assert_eq!(fs::read_to_string(&path).unwrap(), whole);
}

#[test]
fn a_flipped_bit_anywhere_in_a_shard_is_found_and_mended() {
    let shop = gallery();
    shop.prepare();
    let out = shop.dir.path().join("out");
    let path = out.join("train-00001.safetensors");
    let whole = fs::read(&path).unwrap();
    let data = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    // Every byte of the header would be many; each tensor has a few among these.
    for (i, at) in (0..whole.len()).step_by(97).chain((data..whole.len()).step_by(41)).enumerate() {
        let mut damaged = whole.clone();
        damaged[at] ^= 1 << (i % 8);
        fs::write(&path, &damaged).unwrap();
        let found = Dataset::open(&out, Split::Train).and_then(|data| data.check(&mut || ()).map(|_| ()));
        let error = found.expect_err(&format!("bit {} of byte {at}", i % 8)).to_string();
        assert!(error.contains("train-00001.safetensors") || error.contains("vocabulary.json"), "{error}");
    }
    let mut damaged = whole.clone();
    *damaged.last_mut().unwrap() ^= 4;
    fs::write(&path, &damaged).unwrap();
    let text = refused(here(&["info", "--check", out.to_str().unwrap()]).assert());
    assert!(text.contains("its bytes are not those that were written (checksum)"), "{text}");
    let told = Mutex::new(String::new());
    let listen = |event: Event| {
        if let Event::Damaged { why } = event {
            *told.lock().unwrap() += why;
        }
    };
    prepare(&shop.folder(), &shop.settings(), None, &listen).unwrap();
    assert!(told.into_inner().unwrap().contains("train-00001.safetensors: tensor "));
    assert_eq!(fs::read(&path).unwrap(), whole, "it is made again");
}

#[test]
fn what_made_a_dataset_is_recognised_by_its_content() {
    let mut shop = Workshop::new();
    for id in 2..6 {
        shop.image(id, RgbImage::from_fn(16, 16, |x, y| Rgb([(x * 15) as u8, (y * 11) as u8, id as u8])), &["x"]);
    }
    let dir = shop.dir.path();
    shop.folder();
    let vae = autoencoder::sd_vae(&[32, 32], 1);
    autoencoder::write(&dir.join("a.safetensors"), &vae);
    autoencoder::write(&dir.join("b.safetensors"), &vae);
    let mut other = vae.clone();
    other.get_mut("encoder.conv_in.bias").unwrap().1[0] += 1.0;
    fs::create_dir(dir.join("other")).unwrap();
    autoencoder::write(&dir.join("other/a.safetensors"), &other);
    let run = |vae: &str| {
        let line = format!("prepare --images images --metadata metadata.jsonl --size 16x16 --out out --vae {vae}");
        edm2k(dir, &line.split_whitespace().collect::<Vec<_>>()).assert()
    };
    run("a.safetensors").success();
    let said = String::from_utf8(run("b.safetensors").success().get_output().stderr.clone()).unwrap();
    assert!(said.contains("train-00000.safetensors: 4 images (was there)"), "{said}");
    let said = refused(run("other/a.safetensors"));
    assert!(said.contains("made before with vae a.safetensors (") && said.contains("), now a.safetensors ("), "{said}");
    let data = Dataset::open(&dir.join("out"), Split::Train).unwrap();
    let made_by = CodecFile::open(dir.join("b.safetensors")).unwrap().autoencoder().unwrap();
    assert_eq!(data.header().autoencoder, made_by);
}

#[test]
fn truncated_jpegs_are_unreadable() {
    let mut shop = Workshop::new();
    for (k, (name, bytes)) in [
        ("baseline", &include_bytes!("../data/jpeg/baseline.jpg")[..]),
        ("progressive", include_bytes!("../data/jpeg/progressive.jpg")),
    ]
    .into_iter()
    .enumerate()
    {
        for (part, share) in [("whole", 100), ("without-end", 0), ("most", 95), ("half", 60)] {
            let end = if share == 0 { bytes.len() - 2 } else { bytes.len() * share / 100 };
            let file = format!("{name}-{part}.jpg");
            fs::write(shop.file(&file), &bytes[..end]).unwrap();
            shop.record(20 + 10 * k as i64 + shop.lines.len() as i64 % 4 + 2, &file, &["x"]);
        }
    }
    let (summary, listed) = shop.prepare_listing(&Settings { max_crop: 0.5, ..shop.settings() });
    assert_eq!(counts(&summary, Split::Train).kept, 4);
    let cut = |line: &String| line.split_once(": a JPEG that is not whole").map(|(file, _)| file.to_owned());
    let dropped: Vec<_> = listed.iter().map(|line| cut(line).unwrap_or_else(|| panic!("{line}"))).collect();
    assert_eq!(dropped, ["baseline-half.jpg", "baseline-most.jpg", "progressive-half.jpg", "progressive-most.jpg"]);
}

#[test]
fn colours_are_converted_by_their_profile_or_counted() {
    use image::ImageEncoder;
    use image::codecs::png::PngEncoder;
    let srgb = moxcms::ColorProfile::new_srgb();
    let mut exchanged = srgb.clone();
    std::mem::swap(&mut exchanged.red_colorant, &mut exchanged.blue_colorant);
    std::mem::swap(&mut exchanged.red_trc, &mut exchanged.blue_trc);
    let mut cmyk = srgb.encode().unwrap();
    cmyk[16..20].copy_from_slice(b"CMYK");
    let wide = moxcms::ColorProfile::new_adobe_rgb();
    let mut shop = Workshop::new();
    let picture = solid(16, 16, [200, 100, 50]);
    for (id, profile) in
        [(2, srgb.encode().unwrap()), (3, exchanged.encode().unwrap()), (4, wide.encode().unwrap()), (5, cmyk)]
    {
        let mut bytes = Vec::new();
        let mut encoder = PngEncoder::new(&mut bytes);
        encoder.set_icc_profile(profile).unwrap();
        encoder.write_image(&picture, 16, 16, image::ExtendedColorType::Rgb8).unwrap();
        fs::write(shop.file(&format!("{id}.png")), bytes).unwrap();
        shop.record(id, &format!("{id}.png"), &["x"]);
    }
    let told = Mutex::new(Vec::new());
    let listen = |event: Event| {
        if let Event::Unapplied { file, .. } = event {
            told.lock().unwrap().push(file.to_owned());
        }
    };
    // The second time from the shard.
    for _ in 0..2 {
        let summary = prepare(&shop.folder(), &shop.settings(), None, &listen).unwrap();
        let expected = Counts { kept: 4, unapplied: 1, ..Counts::default() };
        assert_eq!(counts(&summary, Split::Train), expected);
    }
    assert_eq!(told.into_inner().unwrap(), ["5.png", "5.png"]);
    let data = shop.open(Split::Train);
    let near = |id: i64, expected: [u8; 3]| {
        let found = pixels(&data, id)[0];
        assert!(found.iter().zip(expected).all(|(a, b)| a.abs_diff(b) <= 1), "{id}: {found:?}, expected {expected:?}");
    };
    assert_eq!(pixels(&data, 2)[0], [200, 100, 50], "sRGB stays as it is, to the bit");
    near(3, [50, 100, 200]);
    // By the matrices and curves of both: Adobe's red is further out.
    near(4, [227, 100, 42]);
    assert_eq!(pixels(&data, 5)[0], [200, 100, 50]);
}

#[test]
fn what_a_png_says_of_its_colours_is_converted_or_counted() {
    type Chunk = ([u8; 4], Vec<u8>);
    /// A PNG with chunks of its own before the pixels.
    fn picture(chunks: &[Chunk]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, 16, 16);
        encoder.set_color(png::ColorType::Rgb);
        let mut writer = encoder.write_header().unwrap();
        for (name, data) in chunks {
            writer.write_chunk(png::chunk::ChunkType(*name), data).unwrap();
        }
        writer.write_image_data(&[200, 100, 50].repeat(256)).unwrap();
        writer.finish().unwrap();
        bytes
    }
    let numbers = |numbers: &[u32]| numbers.iter().flat_map(|x| x.to_be_bytes()).collect::<Vec<u8>>();
    let gamma = |gamma| (*b"gAMA", numbers(&[gamma]));
    let primaries =
        |[red, green]: [[u32; 2]; 2], blue: [u32; 2]| (*b"cHRM", numbers(&[[31270, 32900], red, green, blue].concat()));
    let code_points = |codes: [u8; 4]| (*b"cICP", codes.to_vec());
    let (red, blue) = ([64000, 33000], [15000, 6000]);
    let same = Some([200, 100, 50]);
    // Linear light of 200/255 is sRGB 229, of 100/255 168, of 50/255 122.
    let bright = Some([229, 168, 122]);
    let cases = [
        (vec![gamma(45455)], same),
        (vec![gamma(45455), primaries([red, [30000, 60000]], blue)], same),
        (vec![gamma(100_000)], bright),
        (vec![(*b"sRGB", vec![0]), gamma(100_000)], same),
        (vec![gamma(100_000), primaries([red, [21000, 71000]], blue)], Some([248, 168, 120])),
        (vec![primaries([red, red], red)], None),
        (vec![gamma(1)], None),
        (vec![code_points([1, 13, 0, 1])], same),
        (vec![code_points([1, 8, 0, 1])], bright),
        (vec![gamma(100_000), code_points([1, 13, 0, 1])], same),
        // HDR, video range, and what nobody has defined.
        (vec![code_points([9, 16, 0, 1])], None),
        (vec![code_points([1, 13, 0, 0])], None),
        (vec![code_points([3, 13, 0, 1])], None),
    ];
    for (number, (chunks, expected)) in cases.iter().enumerate() {
        let image = decode(&picture(chunks), [255; 3]).unwrap();
        let (found, expected_pixel) = (&image.picture.rgb()[..3], expected.unwrap_or([200, 100, 50]));
        let near = found.iter().zip(expected_pixel).all(|(a, b)| a.abs_diff(b) <= 1);
        assert!(near, "case {number}: {found:?}, expected {expected_pixel:?}");
        assert_eq!(image.unapplied.is_none(), expected.is_some(), "case {number}: {:?}", image.unapplied);
    }
}

#[test]
fn sixteen_bits_are_rounded_after_their_colours_are_converted() {
    // Dark levels of linear light, which eight bits would make seven of.
    let level = |i: usize| 6 * i as u16;
    for kind in [png::ColorType::Grayscale, png::ColorType::Rgb, png::ColorType::Rgba] {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, 16, 16);
        encoder.set_color(kind);
        encoder.set_depth(png::BitDepth::Sixteen);
        encoder.set_source_gamma(png::ScaledFloat::new(1.0));
        let pixel = |i: usize| [vec![level(i); kind.samples().min(3)], vec![u16::MAX; kind.samples() / 4]].concat();
        let data: Vec<u8> = (0..256).flat_map(pixel).flat_map(u16::to_be_bytes).collect();
        encoder.write_header().unwrap().write_image_data(&data).unwrap();
        let image = decode(&bytes, [255; 3]).unwrap();
        for (i, found) in image.picture.rgb().chunks_exact(3).enumerate() {
            let light = f64::from(level(i)) / 65535.0;
            let code = if light <= 0.0031308 { 12.92 * light } else { 1.055 * light.powf(1.0 / 2.4) - 0.055 };
            // A rounding each of the converter's curve and here.
            let near = found.iter().all(|&x| (f64::from(x) - 255.0 * code).abs() < 1.01);
            assert!(near, "{kind:?}, level {}: {found:?}, expected {}", level(i), 255.0 * code);
        }
    }
}

// ---- the reader ----

/// A shard written by hand, so that each part can be wrong.
struct Shard {
    header: serde_json::Value,
    tensors: Vec<(&'static str, Dtype, Vec<usize>, Vec<u8>)>,
}

fn bytes<const N: usize, T>(values: &[T], convert: impl Fn(&T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(convert).collect()
}

impl Shard {
    /// Two latents of 1 x 2 x 3 (C, H, W), conditions 2 wide, three tags.
    fn latents(ids: [i64; 2]) -> Self {
        let half = |x: &f32| f16::from_f32(*x).to_le_bytes();
        // Means -2.5, -1.5, ... of the first, 3.5, ... of the second; standard deviations 0 and 0.25.
        let latents: Vec<f32> = [-2.5, 3.5]
            .into_iter()
            .zip([0.0, 0.25])
            .flat_map(|(first, std)| (0..6).map(move |i| first + i as f32).chain([std; 6]))
            .collect();
        Self {
            header: serde_json::json!({
                "kind": "latents", "height": 2, "width": 3, "channels": 1, "condition_dim": 2,
                "count": 2, "shards": 1, "source": "", "licence": "",
            }),
            tensors: vec![
                ("latents", Dtype::F16, vec![2, 2, 2, 3], bytes(&latents, half)),
                ("conditions", Dtype::F16, vec![2, 2], bytes(&[0.6, 0.8, 1.0, 0.0], half)),
                ("ids", Dtype::I64, vec![2], bytes(&ids, |x| x.to_le_bytes())),
                ("tag_offsets", Dtype::I64, vec![3], bytes(&[0i64, 2, 3], |x| x.to_le_bytes())),
                ("tag_indices", Dtype::I32, vec![3], bytes(&[0i32, 1, 0], |x| x.to_le_bytes())),
            ],
        }
    }

    fn set(mut self, name: &str, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) -> Self {
        for tensor in &mut self.tensors {
            if tensor.0 == name {
                (tensor.1, tensor.2, tensor.3) = (dtype, shape.to_vec(), bytes.clone());
            }
        }
        self
    }

    fn write(&self, dir: &Path, name: &str) {
        let tensors: Vec<_> =
            self.tensors.iter().map(|(name, dtype, shape, bytes)| (*name, *dtype, &shape[..], &bytes[..])).collect();
        let metadata = HashMap::from([("dataset".to_string(), self.header.to_string())]);
        safetensors::write(dir.join(name), &tensors, &metadata).unwrap();
    }
}

fn two_tags(dir: &Path) {
    Vocabulary::most_frequent([["a", "b"]], 2).unwrap().save(&dir.join("vocabulary.json")).unwrap();
}

#[test]
fn latents_are_drawn_from_what_is_stored_and_shards_continue_each_other() {
    let dir = tempfile::tempdir().unwrap();
    two_tags(dir.path());
    let mut first = Shard::latents([7, -7]);
    let mut second = Shard::latents([8, 9]);
    (first.header["shards"], second.header["shards"]) = (2.into(), 2.into());
    first.write(dir.path(), "validation-00000.safetensors");
    second.write(dir.path(), "validation-00001.safetensors");
    let dataset = Dataset::open(dir.path(), Split::Validation).unwrap();
    assert_eq!((dataset.len(), dataset.header().count), (4, 4));
    assert_eq!([0, 1, 2, 3].map(|i| dataset.id(i)), [7, -7, 8, 9]);
    assert_eq!([0, 1, 2, 3].map(|i| dataset.tags(i).to_vec()), [vec![0, 1], vec![0], vec![0, 1], vec![0]]);
    assert!(!dataset.flip_allowed(3), "no flips tensor means no flips");
    let (mut image, mut condition) = ([0.0; 6], [0.0; 2]);
    dataset.image(2, NOISE, &mut image).unwrap();
    assert_eq!(image, [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], "no standard deviation, no noise");
    dataset.image(3, NOISE, &mut image).unwrap();
    dataset.condition(3, &mut condition);
    let mut noise = [0.0; 6];
    NOISE.normals(&mut noise);
    assert_eq!(image, std::array::from_fn(|i| 3.5 + i as f32 + 0.25 * noise[i]));
    assert_eq!(condition, [1.0, 0.0]);
}

#[test]
fn every_fault_of_a_shard_is_an_error_that_says_what_and_where() {
    let fault = |shard: Shard| {
        let dir = tempfile::tempdir().unwrap();
        two_tags(dir.path());
        shard.write(dir.path(), "train-00000.safetensors");
        Dataset::open(dir.path(), Split::Train).unwrap_err().to_string()
    };
    let good = || Shard::latents([1, 2]);
    let half = |x: &f32| f16::from_f32(*x).to_le_bytes();
    let long = |x: &i64| x.to_le_bytes();
    let int = |x: &i32| x.to_le_bytes();
    let header = |key: &str, value: serde_json::Value| {
        let mut shard = good();
        shard.header[key] = value;
        shard
    };
    let without = |name: &str| {
        let mut shard = good();
        shard.tensors.retain(|tensor| tensor.0 != name);
        shard
    };
    let with = |name: &'static str, dtype, shape: &[usize], bytes: Vec<u8>| {
        let mut shard = good();
        shard.tensors.push((name, dtype, shape.to_vec(), bytes));
        shard
    };
    let nan = bytes(&[0.0, 1.0, f32::NAN, 0.0], half);
    let infinite = bytes(&[f32::NEG_INFINITY, 1.0, 0.0, 0.0], half);
    let cases = [
        (without("latents"), "tensor latents is missing"),
        (without("tag_indices"), "tensor tag_indices is missing"),
        (header("kind", "images".into()), "tensor images is missing"),
        (header("kind", "sound".into()), "metadata \"dataset\": unknown variant `sound`"),
        (header("height", 3.into()), "tensor latents: found F16 [2, 2, 2, 3], expected F16 [2, 2, 3, 3]"),
        (header("count", 3.into()), "found F16 [2, 2, 2, 3], expected F16 [3, 2, 2, 3]"),
        (header("count", u64::MAX.into()), "tensor latents: found"),
        (header("width", 0.into()), "width is 0, expected 1 to"),
        (header("width", u64::MAX.into()), "expected 1 to"),
        (header("condition_dim", 3.into()), "tensor conditions: found F16 [2, 2], expected F16 [2, 3]"),
        (header("shards", 2.into()), "shard train-00001.safetensors is missing (1 of 2 are there)"),
        (good().set("conditions", Dtype::F16, &[2, 2], nan), "conditions: found a NaN or infinity in row 1"),
        (good().set("conditions", Dtype::F16, &[2, 2], infinite), "a NaN or infinity in row 0"),
        (good().set("conditions", Dtype::F32, &[2, 2], vec![0; 16]), "found F32 [2, 2], expected F16"),
        (good().set("ids", Dtype::I64, &[2], bytes(&[5, 5], long)), "id 5 occurs twice"),
        (good().set("ids", Dtype::I64, &[1, 2], bytes(&[5, 6], long)), "expected I64 [2]"),
        (
            good().set("tag_indices", Dtype::I32, &[3], bytes(&[0, 2, 0], int)),
            "tag_indices: found 2 at 1, expected places in a vocabulary of 2",
        ),
        (good().set("tag_indices", Dtype::I32, &[3], bytes(&[0, -1, 0], int)), "found -1 at 1"),
        (good().set("tag_offsets", Dtype::I64, &[3], bytes(&[0, 2, 4], long)), "rising from 0 to 3"),
        (good().set("tag_offsets", Dtype::I64, &[3], bytes(&[0, 4, 3], long)), "found a decrease"),
        (good().set("tag_offsets", Dtype::I64, &[3], bytes(&[-1, 2, 3], long)), "tag_offsets: found ends"),
        (good().set("tag_offsets", Dtype::I64, &[2], bytes(&[0, 3], long)), "expected I64 [3]"),
        (with("flips", Dtype::U8, &[2], vec![0, 2]), "flips: found 2 at 1, expected 0 or 1"),
        (with("repeats", Dtype::U8, &[2], vec![1, 0]), "repeats: found 0 at 1, expected 1 to 255"),
        (with("flips", Dtype::U8, &[3], vec![0; 3]), "tensor flips: found U8 [3], expected U8 [2]"),
    ];
    for (shard, expected) in cases {
        let text = fault(shard);
        assert!(text.contains(expected), "expected \"{expected}\", found \"{text}\"");
    }
}

#[test]
fn faults_of_the_directory_are_named_too() {
    let dir = tempfile::tempdir().unwrap();
    let open = || Dataset::open(dir.path(), Split::Train).unwrap_err().to_string();
    assert!(open().contains("no dataset of edm2k (there is no vocabulary.json in it)"), "{}", open());
    fs::write(dir.path().join("vocabulary.json"), "{}").unwrap();
    assert!(open().contains("vocabulary.json: not a vocabulary"), "{}", open());
    two_tags(dir.path());
    assert!(open().contains("no train shards (expected train-00000.safetensors)"), "{}", open());

    Shard::latents([1, 2]).write(dir.path(), "train-4294967295.safetensors");
    assert!(open().contains("train-00000.safetensors is missing (1 of 4294967296"), "{}", open());
    fs::remove_file(dir.path().join("train-4294967295.safetensors")).unwrap();

    let half = |x: &f32| f16::from_f32(*x).to_le_bytes();
    let mut empty = Shard::latents([1, 2])
        .set("latents", Dtype::F16, &[0, 2, 2, 3], vec![])
        .set("conditions", Dtype::F16, &[0, 2], vec![])
        .set("ids", Dtype::I64, &[0], vec![])
        .set("tag_offsets", Dtype::I64, &[1], vec![0; 8])
        .set("tag_indices", Dtype::I32, &[0], vec![]);
    empty.header["count"] = 0.into();
    empty.write(dir.path(), "train-00000.safetensors");
    assert!(open().contains("the train split has no images"), "{}", open());

    let first = Shard::latents([1, 2]);
    let mut second = Shard::latents([3, 4]).set("conditions", Dtype::F16, &[2, 1], bytes(&[0.0, 1.0], half));
    second.header["condition_dim"] = 1.into();
    first.write(dir.path(), "train-00000.safetensors");
    second.write(dir.path(), "train-00001.safetensors");
    assert!(open().contains("train-00001.safetensors: condition_dim is 1, but 2 in"), "{}", open());
    Shard::latents([3, 1]).write(dir.path(), "train-00001.safetensors");
    assert!(open().contains("train-00001.safetensors: id 1 occurs twice"), "{}", open());
}

/// Opens all splits and reads everything they have.
fn read_all(dir: &Path) {
    for split in Split::ALL {
        let Ok(dataset) = Dataset::open(dir, split) else { continue };
        let mut image = vec![0.0; dataset.shape().iter().product()];
        let mut condition = vec![0.0; dataset.condition_dim()];
        for i in 0..dataset.len() {
            dataset.image(i, NOISE, &mut image).unwrap();
            dataset.condition(i, &mut condition);
            assert!(condition.iter().all(|x| x.is_finite()));
            let _ = dataset.vocabulary().multi_hot(dataset.tags(i));
            let _ = (dataset.id(i), dataset.flip_allowed(i));
        }
    }
}

proptest! {
    #[test]
    fn damaged_shards_never_panic(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        in_header in any::<bool>(),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let dir = tempfile::tempdir().unwrap();
        two_tags(dir.path());
        Shard::latents([1, 2]).write(dir.path(), "train-00000.safetensors");
        let path = dir.path().join("train-00000.safetensors");
        let mut content = fs::read(&path).unwrap();
        let header = 8 + u64::from_le_bytes(content[..8].try_into().unwrap()) as usize;
        for (place, byte) in damage {
            let at = if in_header { place.index(header) } else { header + place.index(content.len() - header) };
            content[at] = byte;
        }
        if let Some(cut) = cut {
            content.truncate(cut.index(content.len()));
        }
        fs::write(&path, content).unwrap();
        read_all(dir.path());
    }

    #[test]
    fn damaged_vocabularies_never_panic(text in "[\\[\\]{}\":,a-c0-9tagcoun ]{0,60}") {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("vocabulary.json"), text).unwrap();
        Shard::latents([1, 2]).write(dir.path(), "train-00000.safetensors");
        read_all(dir.path());
    }
}

#[test]
fn the_committed_emoji_are_a_dataset_with_the_right_pictures() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/emoji");
    let [train, validation, test] = Split::ALL.map(|split| Dataset::open(&dir, split).unwrap());
    assert_eq!([train.len(), validation.len(), test.len()], [159, 10, 10]);
    assert_eq!((train.shape(), train.condition_dim()), ([32, 32, 3], 64));
    assert!(train.header().licence.contains("Apache-2.0"));
    read_all(&dir);
    // Every heart called blue is more blue than red, every red one the other way round.
    let vocabulary = train.vocabulary();
    for (colour, channel, other) in [("red", 0, 2), ("blue", 2, 0)] {
        let wanted = vocabulary.parse(&format!("heart, {colour}")).unwrap().places();
        let mut found = 0;
        for i in 0..train.len() {
            if wanted.iter().all(|tag| train.tags(i).contains(tag)) {
                let pixels = pixels(&train, train.id(i));
                assert_eq!(pixels[0], [255; 3], "the corner is background");
                let sum = |c: usize| pixels.iter().map(|pixel| u32::from(pixel[c])).sum::<u32>();
                assert!(sum(channel) > sum(other), "{colour} heart, id {}", train.id(i));
                found += 1;
            }
        }
        assert!(found > 0, "no {colour} heart");
    }
}

// ---- the vocabulary ----

#[test]
fn the_most_frequent_tags_come_first_and_ties_are_alphabetical() {
    let sets = [vec!["b", "a", "c"], vec!["c", "b"], vec!["c", "c", "c", "d"]];
    let vocabulary = Vocabulary::most_frequent(sets.iter().map(|set| set.iter().copied()), 3).unwrap();
    let expected = [("c", 3), ("b", 2), ("a", 1)];
    for (index, (tag, count)) in expected.iter().enumerate() {
        assert_eq!(vocabulary.tags()[index], Tag { tag: (*tag).into(), count: *count });
        assert_eq!(vocabulary.get(tag), Some(index as u32));
    }
    assert_eq!((vocabulary.len(), vocabulary.get("d"), vocabulary.tag(3)), (3, None, None));
}

#[test]
fn conditions_have_unit_norm_whatever_the_number_of_tags() {
    let tags = (0..50).map(|i| Tag { tag: format!("t{i}"), count: 1 }).collect();
    let vocabulary = Vocabulary::new(tags).unwrap();
    for k in [1, 2, 7, 50] {
        let indices: Vec<u32> = (0..k).chain([0]).collect();
        let condition = vocabulary.multi_hot(&indices);
        let norm: f32 = condition.iter().map(|x| x * x).sum::<f32>().sqrt();
        // A sum of at most 50 rounded squares.
        assert!((norm - 1.0).abs() < 1e-5, "{k} tags: norm {norm}");
        assert_eq!(condition.iter().filter(|&&x| x != 0.0).count(), k as usize);
    }
    assert_eq!(vocabulary.multi_hot(&[3])[3], 1.0, "one tag is a class label");
    assert_eq!(vocabulary.multi_hot(&[]), [0.0; 50], "no tag is unconditional");
}

#[test]
fn unknown_tags_suggest_the_nearest_known_ones() {
    let tags = ["red heart", "red hair", "woman", "dark skin tone", "group: people & body"];
    let vocabulary = Vocabulary::most_frequent([tags], 9).unwrap();
    assert_eq!(vocabulary.parse(" woman,, red heart ,woman,").unwrap().places(), [3, 4]);
    assert!(vocabulary.parse("").unwrap().tags().is_empty());
    let error = |text: &str| vocabulary.parse(text).unwrap_err().to_string();
    assert_eq!(error("Woman"), "unknown tag \"Woman\", did you mean \"woman\"?");
    assert!(error("red hart").contains("did you mean \"red heart\" or \"red hair\"?"));
    assert_eq!(error("woman, zeppelin"), "unknown tag \"zeppelin\"");
}

#[test]
fn a_vocabulary_survives_its_file_and_faults_in_the_file_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vocabulary.json");
    let vocabulary = Vocabulary::most_frequent([["ü \"x\"", "b"], ["b", "c"]], 9).unwrap();
    vocabulary.save(&path).unwrap();
    assert_eq!(Vocabulary::load(&path).unwrap(), vocabulary);
    Vocabulary::default().save(&path).unwrap();
    assert!(Vocabulary::load(&path).unwrap().is_empty());
    for (text, expected) in [
        (r#"[{"tag": "a", "count": 1}, {"tag": "a", "count": 2}]"#, "tag 1 of the vocabulary: \"a\" is already tag 0"),
        (r#"[{"tag": "a,b", "count": 1}]"#, "tag 0 of the vocabulary: \"a,b\" contains a comma"),
        (r#"[{"tag": "", "count": 1}]"#, "it is empty"),
        (r#"[{"tag": " a", "count": 1}]"#, "space"),
        (r#"[{"tag": "a", "count": -1}]"#, "not a vocabulary"),
        (r#"["a"]"#, "not a vocabulary"),
    ] {
        fs::write(&path, text).unwrap();
        let found = Vocabulary::load(&path).unwrap_err().to_string();
        assert!(found.contains("vocabulary.json: ") && found.contains(expected), "{found}");
    }
}

proptest! {
    #[test]
    fn parsing_gives_back_any_set_of_known_tags(chosen in prop::collection::btree_set(0u32..20, 0..20)) {
        let tags = (0..20).map(|i| Tag { tag: format!("tag {i}"), count: 1 }).collect();
        let vocabulary = Vocabulary::new(tags).unwrap();
        let text: Vec<_> = chosen.iter().rev().map(|&i| vocabulary.tag(i).unwrap()).collect();
        prop_assert_eq!(vocabulary.parse(&text.join(", ")).unwrap().places(), chosen.into_iter().collect::<Vec<_>>());
    }
}

// ---- the command ----

#[test]
fn the_command_prepares_and_prints_a_summary() {
    let shop = gallery();
    let (folder, settings) = (shop.folder(), shop.settings());
    let path = |path: &Path| path.to_str().unwrap().to_string();
    let (images, metadata, out) = (path(&folder.images), path(&folder.metadata), path(&settings.out));
    let args = [
        "prepare",
        "--images",
        &images,
        "--metadata",
        &metadata,
        "--out",
        &out,
        "--size",
        "12x10",
        "--max-crop",
        "0.3",
        "--validation-modulus",
        "10",
        "--shard-size",
        "16",
    ];
    let done = here(&args).assert().success();
    let text = String::from_utf8(done.get_output().stdout.clone()).unwrap();
    assert!(text.contains("train            32 images\n"), "{text}");
    assert!(text.contains("dropped           1 unreadable"), "{text}");
    assert!(text.contains("vocabulary        4 tags, the rarest in"), "{text}");
    let text = String::from_utf8(done.get_output().stderr.clone()).unwrap();
    assert!(text.contains("unreadable: broken.png: "), "{text}");
    assert!(text.contains("train-00002.safetensors: 0 images"), "{text}");
    assert_eq!(shop.open(Split::Train).shape(), [10, 12, 3]);
    let header = SafeFile::open(settings.out.join("test-00000.safetensors")).unwrap();
    assert!(header.metadata()["settings"].contains("\"background\":\"#ffffff\""));
    let text = String::from_utf8(here(&args).assert().success().get_output().stderr.clone()).unwrap();
    assert!(text.contains("train-00000.safetensors: 16 images (was there)"), "{text}");
}

#[test]
fn the_command_fails_with_one_clear_line() {
    let shop = gallery();
    let (folder, settings) = (shop.folder(), shop.settings());
    let path = |path: &Path| path.to_str().unwrap().to_string();
    let (images, metadata) = (path(&folder.images), path(&folder.metadata));
    let taken = path(&shop.dir.path().join("taken"));
    fs::File::create(&taken).unwrap().write_all(b"precious").unwrap();
    let out = path(&settings.out);
    let run = |out: &str, metadata: &str, more: &[&str]| {
        let mut args = vec!["prepare", "--images", &images, "--metadata", metadata, "--out", out];
        args.extend(more);
        let failed = here(&args).assert().failure();
        String::from_utf8(failed.get_output().stderr.clone()).unwrap()
    };
    let one_line = |text: String, expected: &str| {
        assert!(text.starts_with("edm2k: error: cannot prepare the dataset: "), "{text}");
        assert!(text.contains(expected) && text.trim_end().lines().count() == 1, "{text}");
    };
    one_line(run(&out, "absent.jsonl", &["--size", "8x8"]), "absent.jsonl: No such file");
    one_line(run(&taken, &metadata, &["--size", "8x8"]), "taken: File exists");
    one_line(run(&out, &metadata, &["--size", "8x20000"]), "the size is 8x20000, expected");
    assert_eq!(fs::read(&taken).unwrap(), b"precious");
    assert!(!settings.out.exists(), "nothing is made when the settings are wrong");
    for (more, expected) in [
        (vec!["--size", "8"], "invalid value '8' for '--size <WxH>': '8' is not a size, expected"),
        (vec!["--size", "8x8", "--background", "#12345é"], "expected a colour such as #ffffff"),
        (vec!["--size", "8x8", "--colour", "x"], "unexpected argument '--colour'"),
        (vec![], "--size <WxH>"),
    ] {
        let text = run(&out, &metadata, &more);
        assert!(text.contains(expected), "{text}");
    }
}
