//! The model that invents conditions: what it invents is plausible, new, and has the tags asked for.

use std::collections::HashSet;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use crate::common::command::{self, printed, refused};
use crate::common::place::signal;
use edm2k::condition::prompt::Prompt;
use edm2k::condition::unit_norm;
use edm2k::condition::vae::{ConditionKind, Learning, LearningSettings, Rows, Vae};
use edm2k::condition::vocabulary::Vocabulary;
use edm2k::data::dataset::{Dataset, Split};
use edm2k::formats::safetensors::SafeFile;
use edm2k::rng::{Purpose, Stream};

/// Scenes of one place, one animal and one colour each, 3 x 4 x 5 of them less some combinations, and things
/// that only occur in one place.
fn scenes() -> Rows {
    let places = [("sea", ["ship", "wave"]), ("farm", ["barn", "tractor"]), ("city", ["tower", "bus"])];
    let animals = ["cat", "dog", "bird", "horse"];
    let colours = ["red", "green", "blue", "black", "white"];
    let mut sets: Vec<Vec<&str>> = Vec::new();
    for (p, (place, things)) in places.iter().enumerate() {
        for (a, animal) in animals.iter().enumerate() {
            for (c, colour) in colours.iter().enumerate() {
                let mut set = vec![*place, *animal, *colour];
                set.extend(&things[..(a + c) % 3]);
                // one in seven is left to be invented
                if (p + 2 * a + 3 * c) % 7 != 0 {
                    sets.extend(std::iter::repeat_n(set, 6));
                }
            }
        }
    }
    let vocabulary = Vocabulary::most_frequent(sets.iter().map(|set| set.iter().copied()), 64).unwrap();
    let tags = sets.iter().map(|set| vocabulary.parse(&set.join(",")).unwrap().places()).collect();
    Rows { kind: ConditionKind::Tags, vocabulary, tags, dense: Vec::new(), conditioning: None }
}

static SCENES: LazyLock<(Rows, Vae)> = LazyLock::new(|| {
    let rows = scenes();
    let how = LearningSettings { latent: 8, hidden: 64, epochs: 150, batch: 32, ..LearningSettings::default() };
    let vae = Vae::train(&rows, &how, |_, _| {}).unwrap();
    (rows, vae)
});

/// Share of the pairs of tags within a set that also occur together in `rows`.
fn coherence(rows: &Rows, sets: &[Vec<u32>]) -> f64 {
    let pairs = |set: &[u32]| -> Vec<(u32, u32)> {
        set.iter().flat_map(|&a| set.iter().filter(move |&&b| a < b).map(move |&b| (a, b))).collect()
    };
    let known: HashSet<_> = rows.tags.iter().flat_map(|set| pairs(set)).collect();
    let all: Vec<_> = sets.iter().flat_map(|set| pairs(set)).collect();
    all.iter().filter(|pair| known.contains(pair)).count() as f64 / all.len().max(1) as f64
}

/// Sets as long as those of `rows`, each tag drawn by its frequency alone: what no model is.
fn independent(rows: &Rows, count: usize) -> Vec<Vec<u32>> {
    let all: Vec<u32> = rows.tags.iter().flatten().copied().collect();
    (0..count)
        .map(|i| {
            let stream = Stream::new(3, Purpose::Order, i as u64);
            let length = rows.tags[stream.block(0)[0] as usize % rows.tags.len()].len() as u32;
            let mut set: Vec<u32> = (1..=length).map(|k| all[stream.block(k)[0] as usize % all.len()]).collect();
            set.sort_unstable();
            set.dedup();
            set
        })
        .collect()
}

#[test]
fn invented_tags_belong_together_and_differ_from_set_to_set() {
    let (rows, vae) = &*SCENES;
    let invented: Vec<Vec<u32>> = vae.invent(&Prompt::default(), 300, 1).tags.iter().map(Prompt::places).collect();
    let (ours, chance) = (coherence(rows, &invented), coherence(rows, &independent(rows, 300)));
    assert!(ours > 0.97 && ours > chance + 0.1, "pairs known: {ours:.3}, of independent tags {chance:.3}");
    let distinct: HashSet<_> = invented.iter().collect();
    assert!(distinct.len() > 30, "{} different sets of 300", distinct.len());
    let known: HashSet<_> = rows.tags.iter().collect();
    let new = distinct.iter().filter(|set| !known.contains(**set)).count();
    assert!(new > 0, "every set is copied from the training data");
    let mean = |sets: &[Vec<u32>]| sets.iter().map(Vec::len).sum::<usize>() as f64 / sets.len() as f64;
    let (length, expected) = (mean(&invented), mean(&rows.tags));
    assert!((length / expected - 1.0).abs() < 0.2, "{length:.1} tags a set, expected about {expected:.1}");
}

#[test]
fn a_condition_has_the_tags_it_was_asked_for_and_what_goes_with_them() {
    let (rows, vae) = &*SCENES;
    for asked in ["cat", "sea", "sea, horse", "bus"] {
        let given = vae.vocabulary().parse(asked).unwrap();
        let invented: Vec<Vec<u32>> = vae.invent(&given, 100, 5).tags.iter().map(Prompt::places).collect();
        let given = given.places();
        assert!(invented.iter().all(|set| given.iter().all(|tag| set.contains(tag))), "{asked}");
        let completed = invented.iter().filter(|set| set.len() > given.len()).count();
        assert!(completed > 90, "{asked}: {completed} of 100 have more tags than asked for");
        let known = coherence(rows, &invented);
        assert!(known > 0.95, "{asked}: share of known pairs {known:.3}");
    }
}

#[test]
fn a_condition_depends_on_its_seed_and_number_only_and_is_scaled_as_real_ones() {
    let (_, vae) = &*SCENES;
    let width = vae.header().width;
    let all = vae.invent(&Prompt::of(&[2]), 9, 77);
    assert_eq!(vae.invent(&Prompt::of(&[2]), 4, 77).tags, all.tags[..4]);
    assert_ne!(vae.invent(&Prompt::of(&[2]), 9, 78).tags, all.tags);
    for (condition, tags) in all.conditions.chunks(width).zip(&all.tags) {
        assert_eq!(condition, vae.vocabulary().condition(tags));
    }
}

#[test]
fn dense_conditions_keep_mean_spread_and_correlations() {
    // Two hidden causes, six features that are multiples of them, off centre.
    let mix = [[2.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 1.0], [3.0, -1.0], [0.5, 0.0]];
    let count = 1500;
    let mut dense = Vec::new();
    for i in 0..count {
        let mut causes = [0.0; 8];
        Stream::new(1, Purpose::Init, i).normals(&mut causes);
        dense.extend((0..6).map(|f| 10.0 + mix[f][0] * causes[0] + mix[f][1] * causes[1] + 0.05 * causes[2 + f]));
    }
    assert!(dense.chunks_mut(6).all(unit_norm));
    let (vocabulary, tags) = (Vocabulary::default(), vec![vec![]; count as usize]);
    let rows = Rows { kind: ConditionKind::Features, vocabulary, tags, dense, conditioning: None };
    let how = LearningSettings { latent: 4, hidden: 32, epochs: 40, ..LearningSettings::default() };
    let vae = Vae::train(&rows, &how, |_, _| {}).unwrap();
    let invented = vae.invent(&Prompt::default(), 1000, 3).conditions;
    for row in invented.chunks(6) {
        let norm = row.iter().map(|x| x * x).sum::<f32>();
        assert!((norm - 1.0).abs() < 1e-6, "{norm}");
    }
    let moments = |values: &[f32]| {
        let n = (values.len() / 6) as f64;
        let mean: Vec<f64> = (0..6).map(|f| values.chunks(6).map(|x| f64::from(x[f])).sum::<f64>() / n).collect();
        let cov = |f: usize, g: usize| {
            let sum: f64 = values.chunks(6).map(|x| (f64::from(x[f]) - mean[f]) * (f64::from(x[g]) - mean[g])).sum();
            sum / n
        };
        let covs: Vec<f64> = (0..36).map(|i| cov(i / 6, i % 6)).collect();
        (mean, covs)
    };
    let ((mean, cov), (mean0, cov0)) = (moments(&invented), moments(&rows.dense));
    for f in 0..6 {
        let sd = cov0[f * 7].sqrt();
        assert!((mean[f] - mean0[f]).abs() < 0.3 * sd, "mean of feature {f}: {}, expected {}", mean[f], mean0[f]);
        let ratio = (cov[f * 7] / cov0[f * 7]).sqrt();
        assert!((0.6..1.3).contains(&ratio), "spread of feature {f}: {ratio} times that of the data");
    }
    let correlation = |c: &[f64], f: usize, g: usize| c[f * 6 + g] / (c[f * 7] * c[g * 7]).sqrt();
    for (f, g) in [(0, 4), (0, 5), (2, 3), (1, 2), (3, 4)] {
        let (got, want) = (correlation(&cov, f, g), correlation(&cov0, f, g));
        assert!((got - want).abs() < 0.25, "correlation of features {f} and {g}: {got:.2}, expected {want:.2}");
    }
}

/// Features as a tagger makes them: each tag adds its direction, each image something of its own.
fn features(rows: &Rows, width: usize) -> Vec<f32> {
    let direction = |tag: u32| {
        let mut x = vec![0.0; width];
        Stream::new(4, Purpose::Init, tag.into()).normals(&mut x);
        x
    };
    let directions: Vec<_> = (0..rows.vocabulary.len() as u32).map(direction).collect();
    let mut all = Vec::new();
    for (i, tags) in rows.tags.iter().enumerate() {
        let mut x = vec![0.0; width];
        Stream::new(5, Purpose::Init, i as u64).normals(&mut x);
        x.iter_mut().for_each(|x| *x *= 0.5);
        tags.iter().for_each(|&tag| x.iter_mut().zip(&directions[tag as usize]).for_each(|(x, d)| *x += d));
        assert!(unit_norm(&mut x));
        all.extend(x);
    }
    all
}

#[test]
fn features_invented_for_tags_are_like_those_of_images_that_have_them() {
    let width = 48;
    let tagged = scenes();
    let dense = features(&tagged, width);
    let rows = Rows { kind: ConditionKind::Features, dense, ..tagged };
    let how = LearningSettings { latent: 8, hidden: 64, epochs: 80, batch: 32, ..LearningSettings::default() };
    let vae = Vae::train(&rows, &how, |_, _| {}).unwrap();
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
    // Mean feature of the images that have all of some tags.
    let mean = |tags: &[u32]| {
        let mut sum = vec![0.0f32; width];
        for (own, x) in rows.tags.iter().zip(rows.dense.chunks(width)) {
            if tags.iter().all(|tag| own.contains(tag)) {
                sum.iter_mut().zip(x).for_each(|(s, x)| *s += x);
            }
        }
        assert!(unit_norm(&mut sum));
        sum
    };
    let groups = [vec!["cat", "dog", "bird", "horse"], vec!["sea", "farm", "city"]];
    let (mut right, mut all) = (0, 0);
    for group in &groups {
        let means: Vec<_> = group.iter().map(|tag| mean(&[vae.vocabulary().get(tag).unwrap()])).collect();
        for (k, tag) in group.iter().enumerate() {
            let given = vae.vocabulary().parse(&format!("red, {tag}")).unwrap();
            let invented = vae.invent(&given, 50, 9);
            assert_eq!(invented.tags[0], given);
            for x in invented.conditions.chunks(width) {
                assert!((dot(x, x) - 1.0).abs() < 1e-6);
                let nearest = (0..group.len()).max_by(|&a, &b| dot(x, &means[a]).total_cmp(&dot(x, &means[b])));
                right += usize::from(nearest == Some(k));
                all += 1;
            }
            // They differ among themselves.
            let (first, second) = (&invented.conditions[..width], &invented.conditions[width..2 * width]);
            assert!(dot(first, second) < 0.9999, "{tag}");
        }
    }
    assert!(right as f64 > 0.95 * all as f64, "{right} of {all} are nearest to the images with the tag asked for");
    // Tags that no image has together, which no latent makes likely, still give conditions.
    for text in ["cat, dog", "cat, dog, bird, horse", "sea, farm, city, cat"] {
        let invented = vae.invent(&vae.vocabulary().parse(text).unwrap(), 50, 9);
        assert!(invented.conditions.chunks(width).all(|x| (dot(x, x) - 1.0).abs() < 1e-6), "{text}");
    }
}

#[test]
fn a_file_gives_back_the_model_and_a_bad_one_says_what_is_wrong() {
    let (_, vae) = &*SCENES;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.safetensors");
    vae.save(&path).unwrap();
    let loaded = Vae::load(&path).unwrap();
    assert_eq!(loaded.header(), vae.header());
    let (a, b) = (loaded.invent(&Prompt::default(), 50, 1).tags, vae.invent(&Prompt::default(), 50, 1).tags);
    let same = a.iter().zip(&b).filter(|(a, b)| a == b).count();
    assert!(same >= 40, "{same} of 50 survive rounding to f16");
    loaded.save(&path).unwrap();
    assert_eq!(Vae::load(&path).unwrap().invent(&Prompt::default(), 50, 1), loaded.invent(&Prompt::default(), 50, 1));

    let good = fs::read(&path).unwrap();
    let fails = |bytes: &[u8], message: &str| {
        fs::write(&path, bytes).unwrap();
        let error = Vae::load(&path).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(message) && error.contains("c.safetensors"), "{error}; expected {message}");
    };
    for length in (0..good.len()).step_by(997) {
        fails(&good[..length], ""); // the reader of safetensors has its own tests of what it says
    }
    let text = String::from_utf8_lossy(&good[8..]).find("ship").unwrap() + 8;
    let mut comma = good.clone();
    comma[text] = b',';
    fails(&comma, "contains a comma");
    let replaced = |from: &str, to: &str| {
        let at = good.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
        let mut bytes = good.clone();
        bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
        bytes
    };
    fails(&replaced("\\\"latent\\\":8", "\\\"latent\\\":9"), "encoder.weight");
    fails(&replaced("\\\"latent\\\":8", "\\\"latent\\\":0"), "latent is 0, expected 1");
    fails(&replaced("condition_model", "condition_madel"), "not a condition model");
    let mut nan = good.clone();
    let end = nan.len();
    nan[end - 1] = 0x7e;
    fails(&nan, "NaN");
}

#[test]
fn features_that_are_all_alike_are_refused() {
    let tagged = scenes();
    let mut rows = Rows { kind: ConditionKind::Features, dense: [0.6, 0.8].repeat(tagged.tags.len()), ..tagged };
    let train =
        |rows: &Rows| Vae::train(rows, &LearningSettings { epochs: 1, ..LearningSettings::default() }, |_, _| ());
    let said = train(&rows).err().unwrap().to_string();
    assert!(said.contains("features are the same, so there is nothing to learn"), "{said}");
    rows.dense[0] = 0.5;
    train(&rows).unwrap();
}

#[test]
fn a_training_that_makes_no_sense_is_refused() {
    let usual = LearningSettings::default;
    let cases = [
        ("latent = 0, expected 1 to 65536", LearningSettings { latent: 0, ..usual() }),
        ("hidden = 65537, expected 1 to 65536", LearningSettings { hidden: 65537, ..usual() }),
        ("epochs = 0, expected 1 at least", LearningSettings { epochs: 0, ..usual() }),
        ("batch = 0, expected 1 at least", LearningSettings { batch: 0, ..usual() }),
        ("lr = 0, expected a positive number", LearningSettings { lr: 0.0, ..usual() }),
        ("kl_weight = NaN, expected a number from 0", LearningSettings { kl_weight: f64::NAN, ..usual() }),
    ];
    for (expected, how) in cases {
        assert_eq!(Learning::new(&scenes(), &how).err().unwrap().to_string(), expected);
    }
}

/// A vocabulary with another name for its first tag.
fn vocabulary_with(known: &Vocabulary, name: &str) -> Vocabulary {
    let mut tags = known.tags().to_vec();
    tags[0].tag = name.into();
    Vocabulary::new(tags).unwrap()
}

#[test]
fn a_training_that_was_saved_goes_on_to_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let (progress, path) = (dir.path().join("p"), dir.path().join("c.safetensors"));
    let tagged = scenes();
    let dense = features(&tagged, 12);
    for mut rows in [scenes(), Rows { kind: ConditionKind::Features, dense, ..tagged }] {
        let how = LearningSettings { latent: 4, hidden: 8, epochs: 4, batch: 32, ..LearningSettings::default() };
        let bytes = |vae: Vae| {
            vae.save(&path).unwrap();
            fs::read(&path).unwrap()
        };
        let whole = bytes(Vae::train(&rows, &how, |_, _| ()).unwrap());
        let mut first = Learning::new(&rows, &how).unwrap();
        first.pass(&mut |_| ControlFlow::Continue(())).unwrap();
        first.pass(&mut |_| ControlFlow::Continue(())).unwrap();
        first.save(&progress, None).unwrap();
        let mut second = Learning::load(&progress, &rows, &how, None).unwrap();
        assert_eq!(second.passes(), 2);
        let mut seen = 0;
        while !second.is_done() {
            let mut step = |rows| {
                seen += rows;
                ControlFlow::Continue(())
            };
            second.pass(&mut step).unwrap();
        }
        assert_eq!(seen, 2 * rows.tags.len());
        assert!(bytes(second.finish().unwrap()) == whole, "{:?}", rows.kind);

        let mut broken = Learning::load(&progress, &rows, &how, None).unwrap();
        assert!(broken.pass(&mut |_| ControlFlow::Break(())).unwrap().is_none() && broken.passes() == 2);

        let good = fs::read(&progress).unwrap();
        let refused = |rows: &Rows, how: &LearningSettings, expected: &str| {
            let error = Learning::load(&progress, rows, how, None).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}; expected {expected}");
        };
        refused(&rows, &LearningSettings { seed: 1, ..how.clone() }, "of a training with seed 0, now 1; give the same");
        let mut bad = good.clone();
        *bad.last_mut().unwrap() ^= 1;
        fs::write(&progress, &bad).unwrap();
        refused(&rows, &how, "damaged: its checksum; remove it");
        fs::write(&progress, &good[..good.len() / 2]).unwrap();
        refused(&rows, &how, "damaged: ");
        fs::write(&progress, &good).unwrap();
        let mut renamed = vocabulary_with(&rows.vocabulary, "renamed");
        std::mem::swap(&mut renamed, &mut rows.vocabulary);
        refused(&rows, &how, "of a training with another vocabulary");
        rows.vocabulary = renamed;
        let Rows { mut tags, vocabulary, dense, .. } = rows;
        let width = dense.len() / tags.len();
        tags.pop();
        let fewer = Rows { tags, vocabulary, dense: dense[..dense.len() - width].to_vec(), ..rows };
        refused(&fewer, &how, "of a training with the data");
    }
}

// ---- the command line -----------------------------------------------------------------------

fn edm2k(dir: &Path, arguments: &[&str]) -> assert_cmd::assert::Assert {
    command::edm2k(dir, &[&["condition"], arguments].concat()).assert()
}

#[test]
fn the_commands_work_together_on_real_tags() {
    let emoji: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/emoji");
    let emoji = emoji.to_str().unwrap();
    let data = Dataset::open(Path::new(emoji), Split::Train).unwrap();
    let common = &data.vocabulary().tags()[0];
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();

    let listed = printed(edm2k(dir, &["tags", "--data", emoji, &common.tag]));
    assert!(listed.contains(&format!("{:6}  {}\n", common.count, common.tag)), "{listed}");
    assert!(refused(edm2k(dir, &["tags", "--data", emoji, "qqqqqqqq"])).contains("no tag is like \"qqqqqqqq\""));

    let train = ["train", "--data", emoji, "--out", "c.safetensors", "--epochs", "2"];
    assert!(printed(edm2k(dir, &train)).contains("tag sets"));
    assert!(refused(edm2k(dir, &train)).contains("c.safetensors exists; give --overwrite"));

    let sample = ["sample", "--model", "c.safetensors", "--count", "3", "--data", emoji, "--tags", &common.tag];
    let words = printed(edm2k(dir, &[&sample[..], &["--out", "v.safetensors"]].concat()));
    assert_eq!(words.matches("nearest (").count(), 3, "{words}");
    assert!(words.lines().filter(|line| line.contains(&common.tag)).count() >= 3, "{words}");
    let file = SafeFile::open(dir.join("v.safetensors")).unwrap();
    assert_eq!(file.shape("conditions").unwrap(), [3, data.condition_dim()]);
    for row in file.f32("conditions").unwrap().chunks(data.condition_dim()) {
        let norm: f32 = row.iter().map(|x| x * x).sum();
        assert!((norm - 1.0).abs() < 1e-5, "norm {norm}");
    }

    let images = ["sample", "--model", "c.safetensors", "--outdir", "out"];
    let said = refused(command::edm2k(dir, &images).assert());
    assert!(said.contains("a condition model, expected a model of images; --condition-model takes it"), "{said}");
    let said = refused(command::edm2k(dir, &["info", "v.safetensors"]).assert());
    assert!(said.contains("conditions of images, expected a model of images; --conditions takes it"), "{said}");
    let unknown = ["sample", "--model", "c.safetensors", "--tags", &format!("{}x", common.tag)];
    let message = refused(edm2k(dir, &unknown));
    assert!(message.contains("did you mean") && message.contains(&common.tag), "{message}");
    assert!(refused(edm2k(dir, &["train", "--data", ".", "--out", "x"])).contains("vocabulary.json"));
    assert!(refused(edm2k(dir, &["train", "--data", emoji, "--out", "no/x"])).contains("does not exist"));
}

#[test]
fn a_training_that_is_killed_goes_on_with_the_same_command() {
    let emoji: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/emoji");
    let dir = tempfile::tempdir().unwrap();
    let train = |out: &str, epochs: &str| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_edm2k"));
        command.args(["condition", "train", "--epochs", epochs, "--data"]).arg(&emoji).arg("--out").arg(out);
        command.current_dir(dir.path()).stdout(std::process::Stdio::null()).stderr(std::process::Stdio::piped());
        command
    };
    let said = |mut command: std::process::Command| {
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    assert_eq!(said(train("whole.safetensors", "40")).0, Some(0));
    let mut child = train("c.safetensors", "40").spawn().unwrap();
    let progress = dir.path().join("c.safetensors.progress");
    while !progress.exists() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(progress.exists() && !dir.path().join("c.safetensors").exists(), "it was killed in time");
    // Who is asked to end leaves what was learned, and nothing else.
    let mut child = train("t.safetensors", "2000").spawn().unwrap();
    while !dir.path().join("t.safetensors.progress").exists() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    signal(&child, "-TERM");
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(130) && text.contains("of 2000 passes; the same command again"), "{text}");
    let left = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut left: Vec<String> = left.filter(|name| name.starts_with("t.")).collect();
    left.sort();
    assert_eq!(left, ["t.safetensors.progress"]);
    let (code, text) = said(train("c.safetensors", "41"));
    assert!(
        code == Some(1) && text.contains("of a training with epochs 40, now 41") && text.lines().count() == 1,
        "{text}"
    );
    let (code, text) = said(train("c.safetensors", "40"));
    assert!(code == Some(0) && text.contains("going on after "), "{text}");
    let read = |name: &str| fs::read(dir.path().join(name)).unwrap();
    assert!(read("c.safetensors") == read("whole.safetensors"));
    assert!(!progress.exists());
}
