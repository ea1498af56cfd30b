//! The import of NVIDIA's snapshots gives every tensor and the config, runs nothing, and meets whatever a disk or an
//! attacker makes of a pickle with one line, in bounded time and memory.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::common::command::{here, refused, refused_in_one_line};
use crate::weights::swapped;
use edm2k::formats::pickle::{Id, MAX_OPCODES, Pickle, Value};
use edm2k::formats::safetensors::{Dtype, SafeFile};
use edm2k::model::{Config, ImageSpace, Model, OfficialSnapshot, Stored};
use half::{bf16, f16};
use predicates::str::contains;

/// Counts the bytes that each thread holds.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    HELD.set(HELD.get() + bytes);
    PEAK.set(PEAK.get().max(HELD.get()));
}

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What `run` returns, the bytes that it held at most, and how long it took.
fn measured<T>(run: impl FnOnce() -> T) -> (T, usize, Duration) {
    let (before, started) = (HELD.get(), Instant::now());
    PEAK.set(before);
    let result = run();
    (result, (PEAK.get() - before) as usize, started.elapsed())
}

const GOLDEN: &str = "tests/golden/official_style_snapshot_nosrc.pkl";

fn parse(bytes: &[u8]) -> Result<OfficialSnapshot, String> {
    OfficialSnapshot::parse(Path::new("x.pkl"), bytes).map_err(|e| e.to_string())
}

/// The message of the error that must be.
fn refusal(bytes: &[u8]) -> String {
    parse(bytes).expect_err("it was taken")
}

/// A pickle taken apart into its opcodes with their arguments, without frames, to be changed.
#[derive(Clone)]
struct Ops(Vec<Vec<u8>>);

impl Ops {
    fn golden() -> Self {
        Self::of(&fs::read(GOLDEN).unwrap())
    }

    fn of(mut bytes: &[u8]) -> Self {
        let mut ops = Vec::new();
        while let &[op, ref rest @ ..] = bytes {
            let wide = |n| rest[..n].iter().rev().fold(0, |sum, &b| sum << 8 | usize::from(b));
            let length = match op {
                0x80 | b'K' | b'h' => 1,
                b'M' => 2,
                b'J' | b'j' => 4,
                b'G' | 0x95 => 8,
                0x8c | b'C' => 1 + wide(1),
                b'X' | b'B' => 4 + wide(4),
                _ => 0,
            };
            if op != 0x95 {
                ops.push(bytes[..=length].to_vec());
            }
            bytes = &rest[length..];
        }
        Self(ops)
    }

    fn bytes(&self) -> Vec<u8> {
        self.0.concat()
    }

    /// Where the text first stands.
    fn text(&self, text: &str) -> usize {
        let op = [&[0x8c, text.len() as u8], text.as_bytes()].concat();
        self.0.iter().position(|o| *o == op).expect(text)
    }

    /// Replaces opcode number `at` by a pickle's worth of others.
    fn with(mut self, at: usize, new: &[u8]) -> Self {
        self.0[at] = new.to_vec();
        self
    }

    /// Replaces the value of a key where that first stands (there it is remembered, hence the 2).
    fn with_value(self, key: &str, new: &[u8]) -> Self {
        let at = self.text(key) + 2;
        self.with(at, new)
    }

    /// Opcode of the `n`th storage; 3 is that of `ema.unet.emb_noise.weight` [32, 16], f16.
    fn storage(&self, n: usize) -> usize {
        let is_storage = |op: &Vec<u8>| matches!(op[0], b'B' | b'C') && op.len() > 200;
        self.0.iter().enumerate().filter(|(_, op)| is_storage(op)).nth(n).unwrap().0
    }
}

impl Ops {
    /// The same network with its storages as zips.
    fn zipped(&self) -> Self {
        let mut ops = self.clone();
        let storages = ops.0.iter_mut().filter(|op| matches!(op[0], b'B' | b'C') && op.len() > 200);
        for op in storages {
            let numel_at = |i: &usize| {
                let (head, rest) = op[*i..].split_at(2);
                head == b"a." && u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize * 2 == rest.len() - 8
            };
            let at = (0..op.len() - 10).find(numel_at).expect("f16 in the older format") + 10;
            *op = bytes_op(&zip("HalfStorage", (op.len() - at) / 2, &op[at..], b"little"));
        }
        ops
    }
}

const NOISE: &str = "unet.emb_noise.weight";

fn bytes_op(bytes: &[u8]) -> Vec<u8> {
    [b"B", &(bytes.len() as u32).to_le_bytes()[..], bytes].concat()
}

fn int_op(n: usize) -> Vec<u8> {
    [b"J", &(n as u32).to_le_bytes()[..]].concat()
}

fn text_op(text: &str) -> Vec<u8> {
    [&[0x8c, text.len() as u8], text.as_bytes()].concat()
}

/// The persistent id of a storage, up to its end, as protocol 2 writes it.
fn description(kind: &str, key: &str, numel: usize) -> Vec<u8> {
    let words = |word: &str| [b"X", &(word.len() as u32).to_le_bytes()[..], word.as_bytes()].concat();
    let global = format!("ctorch\n{kind}\n");
    let numel = int_op(numel);
    [b"(", &words("storage")[..], global.as_bytes(), &words(key), &words("cpu"), &numel, b"tQ."].concat()
}

/// A storage in the older format.
fn legacy(kind: &str, numel: usize, data: &[u8]) -> Vec<u8> {
    [
        b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.\x80\x02}X\x0d\x00\x00\x00little_endian\x88s.\x80\x02",
        &description(kind, "7", numel)[..],
        b"\x80\x02]X\x01\x00\x00\x007a.",
        &(numel as u64).to_le_bytes(),
        data,
    ]
    .concat()
}

/// A storage as a zip.
fn zip(kind: &str, numel: usize, data: &[u8], order: &[u8]) -> Vec<u8> {
    let mut file = Vec::new();
    let mut archive = rawzip::ZipArchiveWriter::new(&mut file);
    let pickle = [b"\x80\x02", &description(kind, "0", numel)[..]].concat();
    for (name, content) in [
        ("archive/data.pkl", &pickle[..]),
        ("archive/byteorder", order),
        ("archive/data/0", data),
        ("archive/version", b"3\n"),
    ] {
        let builder = archive.new_file(name).compression_method(rawzip::CompressionMethod::STORE);
        let (mut entry, config) = builder.start().unwrap();
        let mut writer = config.wrap(&mut entry);
        writer.write_all(content).unwrap();
        let (_, descriptor) = writer.finish().unwrap();
        entry.finish(descriptor).unwrap();
    }
    archive.finish().unwrap();
    file
}

/// Values of a tensor of a model.
fn values<'m>(model: &'m Model, name: &str) -> &'m [f32] {
    &model.weights[model.table.find(name).unwrap().0]
}

#[test]
fn the_official_snapshots_give_every_tensor_and_the_config() {
    let mut dirs = vec![PathBuf::from("tests/golden")];
    dirs.extend(std::env::var_os("EDM2K_GOLDEN").map(PathBuf::from));
    let mut snapshots = 0;
    for dir in dirs {
        let expected = SafeFile::open(dir.join("official_style_snapshot.safetensors")).unwrap();
        let config: Config = serde_json::from_str(&expected.metadata()["config"]).unwrap();
        for name in ["official_style_snapshot_nosrc.pkl", "official_style_snapshot_nosrc_legacy.pkl"] {
            let path = dir.join(name);
            if !path.exists() {
                continue;
            }
            snapshots += 1;
            let OfficialSnapshot { model, stored } = OfficialSnapshot::open(&path).unwrap();
            assert_eq!(model.net.config, config);
            assert_eq!(stored, Stored::F16);
            assert_eq!(model.meta.encoder, ImageSpace::SdVae);
            assert_eq!([model.meta.height, model.meta.width], [config.img_resolution; 2]);
            assert_eq!((model.meta.images_seen, model.meta.ema_std), (0, None));
            assert_eq!(expected.names().count(), model.table.len());
            for ((_, spec), values) in model.table.iter().zip(&model.weights) {
                assert_eq!(expected.shape(&spec.name).unwrap(), spec.shape, "{}", spec.name);
                let same =
                    expected.f32(&spec.name).unwrap().iter().zip(values).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{}: {}", path.display(), spec.name);
            }
        }
    }
    assert!(snapshots > 0);
}

#[test]
fn an_imported_model_is_exported_under_the_official_names_and_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::copy(GOLDEN, path("edm2-img512-xs-2147483-0.135.pkl")).unwrap();
    let imported = path("imported.safetensors");
    let import = |out: &Path| {
        let mut command = here(&["import"]);
        command.arg(path("edm2-img512-xs-2147483-0.135.pkl")).arg("--out").arg(out);
        command
    };
    import(&imported).assert().success().stdout(contains("imported a network of 0.2 M parameters"));
    let model = Model::load(&imported).unwrap();
    assert_eq!((model.meta.images_seen, model.meta.ema_std), (2_147_483_000, Some(0.135)));
    assert_eq!(model.meta.cond_dropout, Some(0.0), "the published networks saw all labels");
    import(&imported).assert().failure().stderr(contains("imported.safetensors exists; give --overwrite"));
    import(&imported).arg("--overwrite").assert().success();
    import(&path("no/such.safetensors")).assert().failure().stderr(contains("the directory does not exist"));

    let golden = SafeFile::open("tests/golden/official_style_snapshot.safetensors").unwrap();
    let export = |from: &Path, to: &Path, dtype: &str| {
        let mut command = here(&["export"]);
        command.arg(from).arg("--out").arg(to).args(["--dtype", dtype]);
        command
    };
    let (single, half) = (path("single.safetensors"), path("half.safetensors"));
    export(&imported, &single, "f32").assert().success().stdout(contains("exported 63 tensors"));
    let pickle = single.with_extension("pkl");
    let said = refused_in_one_line(export(&imported, &pickle, "f32").assert());
    assert!(said.contains("found the ending .pkl, expected .safetensors") && !pickle.exists(), "{said}");
    export(&single, &half, "f16").assert().success();
    export(&single, &half, "f16").assert().failure().stderr(contains("half.safetensors exists"));
    assert_eq!(fs::read(&imported).unwrap(), fs::read(&half).unwrap(), "f16 -> f32 -> f16");
    for (file, dtype) in [(&imported, Dtype::F16), (&single, Dtype::F32)] {
        let file = SafeFile::open(file).unwrap();
        assert_eq!(file.names().collect::<Vec<_>>(), golden.names().collect::<Vec<_>>());
        for name in golden.names() {
            assert_eq!(file.dtype(name).unwrap(), dtype, "{name}");
            assert_eq!(file.shape(name).unwrap(), golden.shape(name).unwrap(), "{name}");
            assert_eq!(file.f32(name).unwrap(), golden.f32(name).unwrap(), "{name}");
        }
    }
}

#[test]
fn another_condition_has_a_fresh_embedding_and_the_rest_stays() {
    let dir = tempfile::tempdir().unwrap();
    let import = |width: &str| {
        let out = dir.path().join(format!("{width}.safetensors"));
        here(&["import", GOLDEN, "--condition-dim", width, "--out"]).arg(&out).assert().success();
        Model::load(out).unwrap()
    };
    let snapshot = OfficialSnapshot::open(Path::new(GOLDEN)).unwrap().model;
    const LABEL: &str = "unet.emb_label.weight";
    for (width, text) in [(24, "24"), (16, "16")] {
        let model = import(text);
        assert_eq!(model.net.config, Config { label_dim: width, ..snapshot.net.config.clone() });
        assert_eq!(model.meta, snapshot.meta);
        for (_, spec) in model.table.iter().filter(|(_, spec)| spec.name != LABEL) {
            assert_eq!(values(&model, &spec.name), values(&snapshot, &spec.name), "{}", spec.name);
        }
        let fresh = values(&model, LABEL);
        assert_eq!(fresh.len(), 32 * width);
        assert_ne!(fresh[..512.min(fresh.len())], values(&snapshot, LABEL)[..]);
        // N(0, 1): five standard errors of the variance of 512 values or more.
        let variance = fresh.iter().map(|x| x * x).sum::<f32>() / fresh.len() as f32;
        assert!((variance - 1.0).abs() < 5.0 * (2.0f32 / 512.0).sqrt(), "{variance}");
    }
    here(&["import", GOLDEN, "--condition-dim", "0", "--out", "x"]).assert().failure().stderr(contains("1..=1048576"));
}

#[test]
fn storages_of_every_kind_are_read() {
    let ops = Ops::golden();
    let at = ops.storage(3);
    let numbers: Vec<f32> = (0..512).map(|i| i as f32 / 8.0 - 20.0).collect();
    let halves: Vec<u8> = numbers.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect();
    let brains: Vec<u8> = numbers.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
    let singles: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
    for (kind, data, stored) in [
        ("HalfStorage", &halves, Stored::F16),
        ("BFloat16Storage", &brains, Stored::F32),
        ("FloatStorage", &singles, Stored::F32),
    ] {
        for blob in [legacy(kind, 512, data), zip(kind, 512, data, b"little")] {
            let read = parse(&ops.clone().with(at, &bytes_op(&blob)).bytes()).unwrap();
            let round = |x: f32| if kind == "BFloat16Storage" { bf16::from_f32(x).to_f32() } else { x };
            let expected: Vec<f32> = numbers.iter().map(|&x| round(x)).collect();
            assert_eq!(values(&read.model, NOISE), expected, "{kind}");
            assert_eq!(read.stored, stored, "{kind}");
        }
    }

    // A view: every second number of the second half, transposed. Offset, size and stride follow the storage.
    let wide: Vec<u8> = (0..2048).flat_map(|i| f16::from_f32(i as f32).to_le_bytes()).collect();
    let view = ops.clone().with(at, &bytes_op(&legacy("HalfStorage", 2048, &wide)));
    let view = view.with(at + 6, &int_op(1024)).with(at + 11, &int_op(2)).with(at + 12, &int_op(64));
    let expected: Vec<f32> = (0..512).map(|i| (1024 + i / 16 * 2 + i % 16 * 64) as f32).collect();
    assert_eq!(values(&parse(&view.bytes()).unwrap().model, NOISE), expected);
}

#[test]
fn tensors_that_are_not_what_they_say_are_refused_with_their_place() {
    let ops = Ops::golden();
    let at = ops.storage(3);
    let tampered = |place: usize, n: usize| ops.clone().with(place, &int_op(n)).bytes();
    let within = "ema.unet.emb_noise.weight: byte 6125: a tensor that is not within the 512 elements of its storage";
    for (place, n) in [(at + 6, 1), (at + 6, (i32::MAX) as usize), (at + 11, 17), (at + 12, 2), (at + 7, 33)] {
        let message = refusal(&tampered(place, n));
        assert!(message.contains(&within[..within.find(": byte").unwrap()]), "{message}");
        assert!(message.contains("a tensor that is not within the 512 elements of its storage: shape ["), "{message}");
    }
    // All in one element: within the storage, but more values than it has.
    let spread = ops.clone().with(at + 7, &int_op(1 << 30)).with(at + 11, &int_op(0)).with(at + 12, &int_op(0)).bytes();
    assert!(refusal(&spread).contains("not within the 512 elements"), "{}", refusal(&spread));
    assert!(refusal(&tampered(at + 6, u32::MAX as usize)).contains("found the number -1, expected a whole number"));
    assert!(refusal(&tampered(at + 7, 31)).contains("found shape [31, 16], expected [32, 16]"));

    let data = vec![0; 1024];
    let mut nan = data.clone();
    nan[8..10].copy_from_slice(&f16::NAN.to_le_bytes());
    let mut flipped = zip("HalfStorage", 512, &data, b"little");
    let zeros = flipped.windows(512).position(|w| w.iter().all(|&b| b == 0)).unwrap();
    flipped[zeros + 100] = 1;
    let whole = legacy("HalfStorage", 512, &data);
    let swapped = |from: &[u8], to: &[u8]| swapped(&whole, from, to);
    for (blob, message) in [
        (legacy("HalfStorage", 512, &nan), "found NaN at 4, expected numbers"),
        (legacy("HalfStorage", 511, &data), "1024 bytes of data for 511 elements of F16"),
        (legacy("BoolStorage", 1024, &data), "found a tensor of torch.BoolStorage, expected floats or integers"),
        (legacy("HalfStorage", 1 << 31, &data), "found a tuple of 5, expected a number of elements"),
        (whole[..whole.len() - 1].to_vec(), "1023 bytes of data for 512 elements of F16"),
        (whole[..100].to_vec(), "but the file ends after"),
        (swapped(b"\xe9\x03", b"\xea\x03"), "found the number 1002, expected version 1001"),
        (swapped(b"\x6c\xfc", b"\x6d\xfc"), "expected the number that begins a PyTorch file"),
        (swapped(b"endian\x88", b"endian\x89"), "found False, expected True for little_endian"),
        (swapped(b"7a.", b"8a."), "expected a list of the key '7'"),
        (swapped(&512u64.to_le_bytes(), &513u64.to_le_bytes()), "513 elements, expected 512"),
        (zip("HalfStorage", 512, &data, b"big"), "byte order 'big', expected 'little'"),
        (zip("HalfStorage", 512, &data[2..], b"little"), "1022 bytes of data for 512 elements of F16"),
        (flipped, "entry 'data/0' of a zip: checksum "),
        (b"PK\x03\x04".to_vec(), "a damaged zip"),
        (vec![], "it is empty, expected a pickle"),
        (b"\x80\x02}.".to_vec(), "expected the number that begins a PyTorch file"),
        (whole[..15].to_vec(), "the file ends here, expected more of what torch.save writes"),
    ] {
        let found = refusal(&ops.clone().with(at, &bytes_op(&blob)).bytes());
        assert!(found.contains(message) && found.contains("x.pkl: ema.unet.emb_noise.weight: "), "{found}\n{message}");
    }
}

#[test]
fn a_network_that_is_not_edm2s_is_refused_with_the_place() {
    let ops = Ops::golden();
    let gone = |text: &str| ops.clone().with(ops.text(text), &text_op("other"));
    for (changed, message) in [
        (gone("ema"), "the file: it has no ema"),
        (gone("unet"), "ema: it has no unet"),
        (gone("label_balance"), "ema.unet: it has no label_balance"),
        (gone("emb_noise"), "ema.unet.other.weight: a tensor that a network of these options does not have"),
        (gone("Precond"), "ema: found a module of class 'other', expected Precond"),
        (
            gone("MPFourier"),
            "ema.logvar_fourier: found a module of class 'other', expected UNet, Block, MPConv, MPFourier",
        ),
        (gone("phases"), "ema.logvar_fourier.other: a tensor that"),
        (ops.clone().with_value("clip_act", b"K\x07"), "clip_act: found 256, expected 7 as in the other blocks"),
        (ops.clone().with_value("num_heads", b"K\x01"), "ema.unet.enc.32x32_block0.num_heads: found 1, expected 0"),
        (ops.clone().with_value("flavor", b"\x8c\x03dec"), "32x32_block0.flavor: found \"dec\", expected \"enc\""),
        (
            ops.clone().with_value("resample_mode", b"\x8c\x02up"),
            "32x32_block0.resample_mode: found \"up\", expected \"keep\"",
        ),
        (ops.clone().with(ops.text("resample_filter") + 5, b"K\x02"), "resample_filter: found [2,1], expected [1,1]"),
        (ops.clone().with_value("sigma_data", b"G\xbf\xf0\0\0\0\0\0\0"), ""),
        (ops.clone().with_value("version", b"K\x07"), ""),
    ] {
        match parse(&changed.bytes()) {
            // Those two stand first in the loss and in the encoder, which are not looked at.
            Ok(_) => assert_eq!(message, ""),
            Err(found) => assert!(!message.is_empty() && found.contains(message), "{found}\nexpected {message}"),
        }
    }
    // The network's options stand last in the file, and before them some of them as attributes.
    let nth_last = |n: usize, key: &str, new: &[u8]| {
        let recall = recall(&ops, key);
        let key = (0..ops.0.len()).rev().filter(|&at| ops.0[at] == recall).nth(n).unwrap();
        ops.clone().with(key + 1, new)
    };
    for (changed, message) in [
        (nth_last(0, "model_channels", b"K\x18"), "ema._init_kwargs: a network of 408659 values, more than the file's"),
        (nth_last(0, "model_channels", b"M\xff\xff"), "ema._init_kwargs: model_channels = 65535, expected 8 to 4096"),
        (nth_last(0, "model_channels", b"\x8c\x01a"), "ema._init_kwargs: invalid type: string \"a\", expected usize"),
        (nth_last(0, "channels_per_head", b"K\x08"), "num_heads: found 2, expected 4"),
        (nth_last(0, "use_fp16", b"\x89\x8c\x05gamma\x89"), "ema._init_kwargs: unknown field `gamma`"),
        (
            nth_last(0, "sigma_data", b"G\xbf\xf0\0\0\0\0\0\0"),
            "ema._init_kwargs: sigma_data = -1, expected 1e-6 to 1e6",
        ),
        (
            nth_last(1, "img_channels", b"K\x03"),
            "ema.unet.out_conv.weight: found shape [4, 16, 3, 3], expected [3, 16, 3, 3]",
        ),
        (
            nth_last(1, "label_dim", b"K\x00"),
            "ema.unet.emb_label.weight: a tensor that a network of these options does",
        ),
        (nth_last(1, "label_dim", b"N"), "ema._init_kwargs: invalid type: null, expected usize"),
    ] {
        let found = refusal(&changed.bytes());
        assert!(found.contains(message), "{found}\nexpected {message}");
    }
}

/// The opcode that recalls a text from the memo.
fn recall(ops: &Ops, text: &str) -> Vec<u8> {
    let number = ops.0[..ops.text(text)].iter().filter(|op| op[0] == 0x94).count();
    match u8::try_from(number) {
        Ok(n) => vec![b'h', n],
        Err(_) => [b"j", &(number as u32).to_le_bytes()[..]].concat(),
    }
}

#[test]
fn nothing_that_a_pickle_names_is_run() {
    let dir = tempfile::tempdir().unwrap();
    let (pickle, out, proof) = (dir.path().join("x.pkl"), dir.path().join("x.safetensors"), dir.path().join("proof"));
    let order = format!("touch {}", proof.display());
    let call = [text_op("os"), text_op("system"), vec![0x93], text_op(&order), b"\x85R".to_vec()].concat();
    let import = |ops: Ops| {
        fs::write(&pickle, ops.bytes()).unwrap();
        here(&["import"]).arg(&pickle).arg("--out").arg(&out).assert()
    };
    let ops = Ops::golden();

    // As the value of the key; the one that was there becomes another key's.
    let before = |key: &str, call: &[u8]| {
        let at = ops.text(key);
        ops.clone().with(at, &[text_op(key), call.to_vec(), text_op("other")].concat())
    };
    // Where it is needed: a weight, an option, a module, and the network itself.
    let (weight, parameter) = (ops.storage(3), ops.text("_rebuild_parameter"));
    let tensor = ops.text("_rebuild_tensor_v2");
    for (changed, message) in [
        (ops.clone().with(weight, &call), "ema.unet.emb_noise.weight"),
        (ops.clone().with(parameter - 2, &text_op("os")).with(parameter, &text_op("system")), "ema.unet.out_gain"),
        (ops.clone().with(tensor - 1, &text_op("os")).with(tensor, &text_op("system")), "ema.unet.out_gain"),
        (ops.clone().with_value("num_heads", &call), "ema.unet.enc.32x32_block0.num_heads"),
        (ops.clone().with_value("label_balance", &call), "ema.unet.label_balance"),
        (before("emb_noise", &call), "ema.unet.emb_noise"),
    ] {
        let assert = import(changed).failure().stderr(contains(message)).stderr(contains("os.system"));
        let error = String::from_utf8(assert.get_output().stderr.clone()).unwrap();
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(error.contains("(which is not run), expected"), "{error}");
        assert!(!proof.exists() && !out.exists());
    }

    // Where it is not needed it means nothing.
    import(ops.clone().with_value("vae_name", &call)).success();
    let expected = OfficialSnapshot::open(Path::new(GOLDEN)).unwrap().model;
    let model = Model::load(&out).unwrap();
    assert!(model.weights == expected.weights && model.net.config == expected.net.config);
    assert!(!proof.exists());
}

#[test]
fn files_that_are_no_pickles_are_refused_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let golden = fs::read(GOLDEN).unwrap();
    for (name, content, message) in [
        ("empty.pkl", &b""[..], ": it is empty, expected a pickle"),
        ("page.pkl", b"<html>", ": it is a web page (HTML)"),
        ("old.pkl", b"\x80\x01.", ": protocol 1, expected 2 to 5"),
        ("new.pkl", b"\x80\x06.", ": protocol 6, expected 2 to 5"),
        ("half.pkl", &golden[..golden.len() / 2], "but only"),
        ("short.pkl", &golden[..golden.len() - 1], "but only"),
        ("long.pkl", &[&golden[..], b"x"].concat(), "byte 397848: 1 bytes after its end"),
        ("none.pkl", b"\x80\x04N.", "the file: byte 2: found None, expected a dictionary"),
    ] {
        let (path, out) = (dir.path().join(name), dir.path().join("out.safetensors"));
        fs::write(&path, content).unwrap();
        let error = refused(here(&["import"]).arg(&path).arg("--out").arg(&out).assert());
        assert!(error.contains(name) && error.contains(message) && error.lines().count() == 1, "{error}\n{message}");
        assert!(!out.exists());
    }
    for (path, message) in [(dir.path().join("absent.pkl"), "No such file"), (dir.path().into(), "not a regular file")]
    {
        let error = OfficialSnapshot::open(&path).err().unwrap().to_string();
        assert!(error.contains(message), "{error}");
    }
}

/// A value in Python's words.
fn show(pickle: &Pickle, id: Id) -> String {
    let all = |ids: &[Id]| ids.iter().map(|&id| show(pickle, id)).collect::<Vec<_>>().join(", ");
    let pairs = |items: &[(Id, Id)]| {
        items.iter().map(|&(k, v)| format!("{}: {}", show(pickle, k), show(pickle, v))).collect::<Vec<_>>().join(", ")
    };
    match &pickle[id] {
        Value::None => "None".into(),
        Value::Bool(value) => value.to_string(),
        Value::Int(value) => value.to_string(),
        Value::Long(bytes) => format!("{bytes:?}"),
        Value::Float(value) => format!("{value:?}"),
        Value::Text(text) if text.len() == 300 => "300".into(),
        Value::Text(text) => format!("'{text}'"),
        Value::Bytes { bytes, .. } => format!("b{bytes:?}"),
        Value::List(items) => format!("[{}]", all(items)),
        Value::Tuple(items) => format!("({})", all(items)),
        Value::Dict(items) => format!("{{{}}}", pairs(items)),
        Value::Set => "set".into(),
        Value::Global { module, name } => format!("{module}.{name}"),
        Value::Call { callee, args, items, .. } => {
            format!("{}{}{{{}}}", show(pickle, *callee), show(pickle, *args), pairs(items))
        }
        Value::Persistent(id) => format!("persistent {}", show(pickle, *id)),
    }
}

/// `pickle.dumps(value, protocol)` of Python 3.11, where value is what the last assertion says.
#[test]
fn what_python_writes_is_read_in_every_protocol() {
    let x = "x".repeat(300);
    let numbers = b"(K\x00K\xffJ\xff\xff\xff\xffM\xff\xffJp\x11\x01\x00J\x00\x00\x00\x80\x8a\x06\x00\x00\x00\x00\x00\x01\x8a\x08\x00\x00\x00\x00\x00\x00\x00\x80\x8a\t\x00\x00\x00\x00\x00\x00\x00\x00@e";
    let old = |version: u8, sets: &str, bytes: &[u8]| {
        [
            &[0x80, version],
            &b"}q\x00(X\x04\x00\x00\x00intsq\x01]q\x02"[..],
            numbers,
            b"X\x06\x00\x00\x00floatsq\x03G?\xf8\x00\x00\x00\x00\x00\x00G\x80\x00\x00\x00\x00\x00\x00\x00\x86q\x04X\x05\x00\x00\x00wordsq\x05]q\x06(X\x02\x00\x00\x00\xc3\xbcq\x07X,\x01\x00\x00",
            x.as_bytes(),
            b"q\x08eX\x05\x00\x00\x00flagsq\t\x88\x89N\x87q\nX\x06\x00\x00\x00tuplesq\x0b]q\x0c()K\x01\x85q\rK\x01K\x02\x86q\x0eK\x01K\x02K\x03\x87q\x0f(K\x01K\x02K\x03K\x04tq\x10eX\x03\x00\x00\x00setq\x11c",
            sets.as_bytes(),
            b"\nset\nq\x12]q\x13K\x01a\x85q\x14Rq\x15X\x05\x00\x00\x00bytesq\x1b",
            bytes,
            b"X\x06\x00\x00\x00sharedq!]q\"(]q#K\x07ah#eX\x07\x00\x00\x00orderedq$ccollections\nOrderedDict\nq%)Rq&X\x01\x00\x00\x00aq'K\x01sX\x04\x00\x00\x00nameq,h%u.",
        ]
        .concat()
    };
    let new = |version: u8| {
        let body = [
            &b"}\x94(\x8c\x04ints\x94]\x94"[..],
            numbers,
            b"\x8c\x06floats\x94G?\xf8\x00\x00\x00\x00\x00\x00G\x80\x00\x00\x00\x00\x00\x00\x00\x86\x94\x8c\x05words\x94]\x94(\x8c\x02\xc3\xbc\x94X,\x01\x00\x00",
            x.as_bytes(),
            b"\x94e\x8c\x05flags\x94\x88\x89N\x87\x94\x8c\x06tuples\x94]\x94()K\x01\x85\x94K\x01K\x02\x86\x94K\x01K\x02K\x03\x87\x94(K\x01K\x02K\x03K\x04t\x94e\x8c\x03set\x94\x8f\x94(K\x01\x90\x8c\x05bytes\x94C\x02\x00\xff\x94\x8c\x06shared\x94]\x94(]\x94K\x07ah\x17e\x8c\x07ordered\x94\x8c\x0bcollections\x94\x8c\x0bOrderedDict\x94\x93\x94)R\x94\x8c\x01a\x94K\x01s\x8c\x04name\x94h\x1bu.",
        ]
        .concat();
        [&[0x80, version, 0x95], &(body.len() as u64).to_le_bytes()[..], &body].concat()
    };
    let encoded = b"c_codecs\nencode\nq\x1cX\x03\x00\x00\x00\x00\xc3\xbfq\x1dX\x06\x00\x00\x00latin1q\x1e\x86q\x1fRq ";
    for (bytes, set, raw) in [
        (old(2, "__builtin__", encoded), "__builtin__.set([1]){}", "b[0, 255]"),
        (old(3, "builtins", b"C\x02\x00\xffq\x1c"), "builtins.set([1]){}", "b[0, 255]"),
        (new(4), "set", "b[0, 255]"),
        (new(5), "set", "b[0, 255]"),
    ] {
        let pickle = Pickle::parse(&bytes, 0).unwrap();
        assert_eq!(pickle.end(), bytes.len());
        let expected = format!(
            "{{'ints': [0, 255, -1, 65535, 70000, -2147483648, 1099511627776, -9223372036854775808, \
             [0, 0, 0, 0, 0, 0, 0, 0, 64]], 'floats': (1.5, -0.0), 'words': ['ü', 300], 'flags': (true, false, None), \
             'tuples': [(), (1), (1, 2), (1, 2, 3), (1, 2, 3, 4)], 'set': {set}, 'bytes': {raw}, \
             'shared': [[7], [7]], 'ordered': collections.OrderedDict(){{'a': 1}}, 'name': collections.OrderedDict}}"
        );
        assert_eq!(show(&pickle, pickle.root()), expected);
    }
}

/// Protocol 2 has no bytes: Python writes a call that makes them of a text.
#[test]
fn a_snapshot_that_python_wrote_anew_at_protocol_2_is_the_same() {
    let bytes = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(GOLDEN)).unwrap();
    let storage = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20";
    let (mut old, mut at) = (Vec::new(), 0);
    while let Some(found) = bytes[at..].windows(storage.len()).position(|window| window == storage) {
        let begin = at + found;
        // Bytes are as long as four bytes say, or one.
        let (opcode, length) = match bytes[begin - 5] {
            b'B' => (begin - 5, u32::from_le_bytes(bytes[begin - 4..begin].try_into().unwrap()) as usize),
            _ => (begin - 2, bytes[begin - 1].into()),
        };
        assert!(b"BC".contains(&bytes[opcode]), "{}", bytes[opcode]);
        let text: String = bytes[begin..begin + length].iter().map(|&byte| char::from(byte)).collect();
        old.extend(&bytes[at..opcode]);
        old.extend(b"c_codecs\nencode\nX");
        old.extend((text.len() as u32).to_le_bytes());
        old.extend(text.bytes().chain(*b"X\x06\0\0\0latin1\x86R"));
        at = begin + length;
    }
    assert!(at > 0, "no storage found");
    old.extend(&bytes[at..]);
    let (new, expected) = (parse(&old).unwrap(), parse(&bytes).unwrap());
    assert!(new.model.weights == expected.model.weights && new.stored == expected.stored);
    // A text that many calls make bytes of takes no more than the file has.
    let many = [
        &b"\x80\x02X\x00\x10\x00\x00"[..],
        &[b'a'; 4096],
        b"q\0",
        &b"c_codecs\nencode\nh\0X\x06\0\0\0latin1\x86R".repeat(999),
        b".",
    ];
    let why = parse(&many.concat()).map(|_| ()).unwrap_err();
    assert!(why.contains("more bytes made of texts than the input has"), "{why}");
}

/// The most that a pickle may take however it is made, and how long.
fn assert_harmless(name: &str, bytes: &[u8]) -> String {
    let (result, peak, time) = measured(|| parse(bytes).map(|_| ()));
    let message = result.expect_err(name);
    assert!(peak < 150 << 20, "{name}: {peak} bytes");
    // A debugging build on a busy machine; quadratic work on a million opcodes would take hours.
    assert!(time < Duration::from_secs(10), "{name}: {time:?}");
    assert!(message.len() < 600 && !message.contains('\n'), "{name}: {message}");
    message
}

#[test]
fn hostile_pickles_take_neither_memory_nor_time_nor_the_stack() {
    let begun = |body: &[u8]| [b"\x80\x04", body].concat();
    let repeated = |unit: &[u8], times: usize, end: &[u8]| begun(&[&unit.repeat(times), end].concat());
    let many = MAX_OPCODES - 10;
    for (name, bytes, message) in [
        ("deep tuples", begun(&[b")", &b"\x85".repeat(many)[..], b"."].concat()), "expected a dictionary"),
        ("deep lists", begun(&[&b"]".repeat(many / 2)[..], &b"a".repeat(many / 2 - 1), b"."].concat()), "a dictionary"),
        ("deep calls", begun(&[b")", &b")R".repeat(many / 2)[..], b"."].concat()), "expected a dictionary"),
        ("marks", repeated(b"(", many, b"N."), "expected a dictionary"),
        (
            "marks and tuples",
            begun(&[&b"(".repeat(many / 2)[..], &b"t".repeat(many / 2), b"."].concat()),
            "a dictionary",
        ),
        ("opcodes", repeated(b"N0", many, b"N."), "more than 1048576 opcodes"),
        ("copies", begun(&[b"]", &b"2".repeat(many / 2)[..], &b"a".repeat(many / 2), b"."].concat()), "a dictionary"),
        ("memo", repeated(b"N\x94", many / 2, b"N."), "expected a dictionary"),
        ("memo far away", begun(b"Nr\xff\xff\xff\xff."), "expected a dictionary"),
        ("doubling", begun(&[b"]", &b"2\x86\x94".repeat(many / 3)[..], b"."].concat()), "expected a dictionary"),
        ("dictionaries", repeated(b"}NNs", many / 4, b"."), "it has no ema"),
        ("itself", begun(b"}2\x8c\x03ema2s2s."), ""),
        ("text", begun(b"X\xff\xff\xff\xffa"), "byte 2: 4294967295 bytes needed, but the file ends after 1"),
        (
            "long text",
            begun(&[&[0x8d][..], &u64::MAX.to_le_bytes()].concat()),
            "bytes needed, but the file ends after 0",
        ),
        ("long bytes", begun(&[&[0x8e][..], &(u64::MAX / 2).to_le_bytes()].concat()), "bytes needed"),
        ("number", begun(b"\x8b\xff\xff\xff\x7f"), "2147483647 bytes needed, but the file ends after 0"),
        ("frame", begun(&[&[0x95][..], &u64::MAX.to_le_bytes()].concat()), "a frame of 18446744073709551615 bytes"),
        ("no mark", begun(b"t."), "byte 2: there is no mark on the stack"),
        ("no value", begun(b"."), "byte 2: it takes more from the stack than there is"),
        ("below the mark", begun(b"N(0."), "expected a dictionary"),
        ("below the mark", begun(b"N(\x85."), "it takes more from the stack than there is"),
        ("no memory", begun(b"h\x00."), "byte 2: nothing is remembered as 0"),
        ("text as list", begun(b"\x8c\x01aNa."), "items for something that is no list"),
        ("text as dictionary", begun(b"\x8c\x01aNNs."), "keys for something that is no dictionary"),
        ("text as object", begun(b"\x8c\x01a}b."), "state for something that takes none"),
        ("half an item", begun(b"}(Nu."), "a key without a value"),
        ("no UTF-8", begun(b"\x8c\x01\xff."), "text that is not UTF-8"),
        ("no name", begun(b"NN\x93."), "a global whose module or name is no text"),
        ("keywords", begun(b"cos\nsystem\n)}\x92."), "found a call of os.system (which is not run), expected a dict"),
        ("set", begun(b"\x8f(K\x01\x90."), "found a set, expected a dictionary"),
        ("frozen set", begun(b"(K\x01\x91."), "found a set, expected a dictionary"),
        ("byte array", begun(b"\x96\x02\0\0\0\0\0\0\0ab."), "found 2 bytes, expected a dictionary"),
        ("old opcode", begun(b"I1\n."), "opcode 0x49 is not one of those that are read"),
        ("extension", begun(b"\x82\x01."), "opcode 0x82"),
        ("outside", begun(b"\x97."), "opcode 0x97"),
        ("an endless line", begun(b"cos"), "a line without end"),
        ("a terminal's colours", begun(b"\x8c\x07\x1b[31m\n\x07."), "found the text '\\u{1b}[31m\\n\\u{7}', expected"),
    ] {
        let found = assert_harmless(name, &bytes);
        assert!(found.contains(message), "{name}: {found}\nexpected {message}");
    }
}

#[test]
fn hostile_trees_take_neither_memory_nor_time() {
    let ops = Ops::golden();
    // `torch_utils.persistence._reconstruct_persistent_obj` and texts as the memo has them.
    let word = |text: &str| recall(&ops, text);
    let module_with = |children: &[u8], parameters: &[u8]| {
        [
            &b"h\x07}("[..],
            &[word("type"), word("class"), word("version"), b"K\x06".to_vec()].concat(),
            &[word("class_name"), word("UNet"), word("state"), b"}(".to_vec()].concat(),
            &[word("_modules"), children.to_vec()].concat(),
            &[word("_parameters"), parameters.to_vec(), word("_buffers"), b"}uu\x85R".to_vec()].concat(),
        ]
        .concat()
    };
    let module = |children: &[u8]| module_with(children, b"}");
    // Put in the place of the network's second module, `unet.emb_noise`.
    let at = ops.text("emb_noise");
    let with = |value: &[u8]| {
        let mut ops = ops.clone();
        // The module that stands there is made all the same, as the key of another.
        ops.0[at] = [text_op("bomb"), value.to_vec(), text_op("emb_noise")].concat();
        ops.bytes()
    };
    // Two places of the memo that nothing recalls later (a new one would shift those that follow).
    const A: &[u8] = b"h\x00";
    const B: &[u8] = b"h\x01";
    let (put_a, put_b) = (b"q\x000", b"q\x010");

    // Each level holds the one below twice: 2^40 modules.
    let mut doubled = module(b"}");
    for _ in 0..40 {
        let children = [b"}(", &text_op("a")[..], A, &text_op("b"), A, b"u"].concat();
        doubled = [&doubled, &put_a[..], &module(&children)].concat();
    }
    let message = assert_harmless("doubled", &with(&doubled));
    assert!(message.contains("more than 16384 modules"), "{message}");

    // A module within itself.
    let children = [b"}", &put_a[..], A].concat();
    let within = [&module(&children)[..], put_b, A, &text_op("a"), B, b"s0", B].concat();
    let message = assert_harmless("within itself", &with(&within));
    assert!(message.contains("ema.unet.bomb.a.a.a.a") && message.contains("expected a name"), "{message}");

    // Ten thousand modules that share a dictionary of a hundred thousand entries, all None.
    let shared = [b"}(", &b"NN".repeat(100_000)[..], b"u", put_a].concat();
    let crowd = |parameters: &[u8]| {
        let children: Vec<u8> =
            (0..10_000).flat_map(|i| [text_op(&i.to_string()), module_with(b"}", parameters)].concat()).collect();
        [&shared[..], &module(&[b"}(", &children[..], b"u"].concat())].concat()
    };
    let message = assert_harmless("a shared dictionary", &with(&crowd(A)));
    assert!(message.contains("ema: more than 16777216 entries to look through"), "{message}");
    assert!(parse(&with(&crowd(b"}"))).is_ok(), "modules without tensors are none of the network's");
}

/// Numbers that depend on the seed only.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((u128::from(z ^ z >> 31) * n as u128) >> 64) as usize
    }
}

/// Damages the pickle at one to three places: bytes of its structure, or whole opcodes.
fn damage(ops: &Ops, dice: &mut Dice) -> Vec<u8> {
    const OPCODES: &[u8] = b"NKMJGXBC)]}(tasueRbcQ012hqjr.\x80\x81\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8d\x8e\x8f\x90\x91\x92\x93\x94\x95\x96";
    let mut ops = ops.0.clone();
    let mut bytewise = Vec::new();
    for _ in 0..=dice.below(3) {
        if ops.len() < 2 {
            break;
        }
        let (a, b) = (dice.below(ops.len()), dice.below(ops.len()));
        match dice.below(12) {
            0 => drop(ops.remove(a)),
            1 => ops.insert(a, ops[b].clone()),
            2 => ops.swap(a, b),
            3 => ops[a] = ops[b].clone(),
            4 => ops[a] = vec![OPCODES[dice.below(OPCODES.len())]],
            5 => {
                let chunk = ops[b..(b + 1 + dice.below(40)).min(ops.len())].to_vec();
                ops.splice(a..a, chunk);
            }
            6 => drop(ops.drain(a..(a + 1 + dice.below(40)).min(a.max(ops.len())))),
            7 => {
                let number = [0, 1, 255, 65535, i32::MAX as usize, u32::MAX as usize, dice.below(1 << 32)];
                ops[a] = int_op(number[dice.below(number.len())]);
            }
            8 => ops.truncate(a.max(1)),
            _ => bytewise.push(a),
        }
    }
    // The head of an opcode, which for a storage is its own pickles; of the weights' bytes, few are worth damaging.
    for at in bytewise {
        let at = at % ops.len();
        let length = ops[at].len();
        let anywhere = dice.below(20) == 0;
        let place = dice.below(if anywhere { length } else { length.min(300) });
        match dice.below(4) {
            0 => ops[at][place] ^= 1 << dice.below(8),
            1 => ops[at][place] = dice.below(256) as u8,
            2 => ops[at].insert(place, dice.below(256) as u8),
            _ => ops[at].truncate(place.max(1)),
        }
    }
    ops.concat()
}

/// `EDM2K_FUZZ=N` damages N pickles, from `EDM2K_FUZZ_SEED` on.
#[test]
fn damaged_pickles_are_refused_or_read_but_never_a_panic() {
    let number = |name| std::env::var(name).ok().map(|n| n.parse::<u64>().expect(name));
    let (count, first) = (number("EDM2K_FUZZ").unwrap_or(10_000), number("EDM2K_FUZZ_SEED").unwrap_or(0));
    let golden = Ops::golden();
    let zipped = golden.zipped();
    let (mut refused, mut worst_memory, mut worst_time) = (0, 0, Duration::ZERO);
    for seed in first..first + count {
        let bytes = damage(if seed % 2 == 0 { &golden } else { &zipped }, &mut Dice(seed));
        let run = || measured(|| parse(&bytes).map(|_| ()));
        let Ok((result, peak, time)) = catch_unwind(AssertUnwindSafe(run)) else {
            panic!("EDM2K_FUZZ=1 EDM2K_FUZZ_SEED={seed}");
        };
        refused += u64::from(result.is_err());
        (worst_memory, worst_time) = (worst_memory.max(peak), worst_time.max(time));
        assert!(peak < 16 << 20, "seed {seed}: {peak} bytes");
    }
    eprintln!("{count} damaged pickles, {refused} refused; at most {worst_memory} bytes and {worst_time:?} each");
    // As many as one sees; damage in what is not read, or in a weight, is none.
    assert!(refused > count / 2, "{refused} of {count} refused");
}
