//! Claims about the file formats: what is written is read back, and nothing that a disk,
//! a broken download or an attacker can do to a file makes a reader panic.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use edm2k::formats::safetensors::{self, Dtype, SafeFile};
use edm2k::pictures::{Picture, png};
use half::{bf16, f16};
use proptest::prelude::*;

fn metadata() -> HashMap<String, String> {
    HashMap::from([("config".into(), r#"{"a": "1"}"#.into()), ("b".into(), "ü".into())])
}

fn sample(path: &Path) {
    let halves: Vec<u8> = [0.5f32, -2.0, 65504.0].iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect();
    let brains: Vec<u8> = [1.0f32, 1e30].iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
    safetensors::write(
        path,
        &[
            ("bytes", Dtype::U8, &[5], &[1, 2, 3, 4, 255]),
            ("half", Dtype::F16, &[3, 1], &halves),
            ("brain", Dtype::BF16, &[2], &brains),
            ("single", Dtype::F32, &[], &1.25f32.to_le_bytes()),
            ("double", Dtype::F64, &[1], &(-0.125f64).to_le_bytes()),
            ("ids", Dtype::I64, &[1], &(-7i64).to_le_bytes()),
            ("nothing", Dtype::F32, &[0, 4], &[]),
        ],
        &metadata(),
    )
    .unwrap();
}

#[test]
fn what_is_written_is_read_back_in_every_type() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    sample(&path);
    let file = SafeFile::open(&path).unwrap();
    assert_eq!(file.metadata(), &metadata());
    assert_eq!(file.f32("half").unwrap(), [0.5, -2.0, 65504.0]);
    assert_eq!(file.shape("half").unwrap(), [3, 1]);
    assert_eq!(file.f32("brain").unwrap(), [1.0, bf16::from_f32(1e30).to_f32()]);
    assert_eq!(file.f32("single").unwrap(), [1.25]);
    assert!(file.shape("single").unwrap().is_empty());
    assert_eq!(file.f64("double").unwrap(), [-0.125]);
    assert_eq!(file.i64("ids").unwrap(), [-7]);
    assert_eq!(file.i64("bytes").unwrap(), [1, 2, 3, 4, 255]);
    assert!(file.f32("nothing").unwrap().is_empty());
    assert_eq!(file.dtype("brain").unwrap(), Dtype::BF16);
    assert_eq!(file.names().collect::<Vec<_>>(), ["brain", "bytes", "double", "half", "ids", "nothing", "single"]);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "a temporary file was left");
}

#[test]
fn a_file_written_tensor_by_tensor_appears_when_it_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    let tensors: [(&str, Dtype, &[usize]); 2] = [("b", Dtype::F32, &[1]), ("a", Dtype::U8, &[3])];
    let begin = || safetensors::Writer::create(&path, &tensors, &metadata()).unwrap();
    let mut writer = begin();
    writer.write(&1.5f32.to_le_bytes()).unwrap();
    assert!(!path.exists());
    writer.write(&[7, 8, 9]).unwrap();
    writer.finish().unwrap();
    let file = SafeFile::open(&path).unwrap();
    assert_eq!((file.f32("b").unwrap(), file.i64("a").unwrap()), (vec![1.5], vec![7, 8, 9]));
    assert_eq!(file.metadata(), &metadata());

    let before = fs::read(&path).unwrap();
    let missing = begin().finish().unwrap_err();
    assert!(missing.to_string().ends_with("tensor b was not written"), "{missing}");
    let wrong = begin().write(&[0; 3]).unwrap_err();
    assert!(wrong.to_string().ends_with("tensor b: found 3 bytes, expected the size of F32 [1]"), "{wrong}");
    let mut writer = begin();
    writer.write(&[0; 4]).unwrap();
    writer.write(&[0; 3]).unwrap();
    let surplus = writer.write(&[]).unwrap_err();
    assert!(surplus.to_string().ends_with("more tensors than announced"), "{surplus}");
    drop(writer);
    assert_eq!(fs::read(&path).unwrap(), before);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "a temporary file was left");
}

#[test]
fn the_same_content_makes_the_same_bytes_and_the_reference_reader_accepts_them() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    sample(&a);
    sample(&b);
    let bytes = fs::read(&a).unwrap();
    assert_eq!(bytes, fs::read(&b).unwrap());
    let reference = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(reference.tensor("single").unwrap().data(), 1.25f32.to_le_bytes());
}

#[test]
fn errors_name_the_file_the_tensor_and_what_was_found() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    sample(&path);
    let file = SafeFile::open(&path).unwrap();
    let text = file.f32("halv").unwrap_err().to_string();
    assert!(text.ends_with("a.safetensors: tensor halv is missing (the file has half)"), "{text}");
    let text = file.f32("ids").unwrap_err().to_string();
    assert!(text.contains("tensor ids: found I64, expected F16, BF16, F32 or F64"), "{text}");

    let text = SafeFile::open(dir.path().join("none")).unwrap_err().to_string();
    assert!(text.contains("none: No such file"), "{text}");
    let text = SafeFile::open(dir.path()).unwrap_err().to_string();
    assert!(text.contains("not a regular file"), "{text}");

    let wrong = safetensors::write(&path, &[("x", Dtype::F32, &[3], &[0; 8])], &HashMap::new());
    let text = wrong.unwrap_err().to_string();
    assert!(text.contains("tensor x: found 8 bytes, expected the size of F32 [3]"), "{text}");
    assert!(SafeFile::open(&path).is_ok(), "a failed write must leave the old file");
}

#[test]
fn hostile_headers_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hostile");
    let x = |shape: &str, offsets: &str| format!(r#""x":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}"#);
    let y = r#""y":{"dtype":"U8","shape":[8],"data_offsets":[4,12]}"#;
    let huge = format!("[{0},{0}]", usize::MAX / 2);
    let cases = [
        (format!("{{{}}}", x("[2]", "[0,16]")), "tensor x: 16 bytes, expected 8"),
        (format!("{{{}}}", x(&huge, "[0,16]")), "tensor x: impossible shape"),
        (format!("{{{}}}", x("[400]", "[0,1600]")), "truncated?"),
        (format!("{{{}}}", x("[2]", "[16,8]")), "16..8"),
        (format!("{{{}}}", x("[2]", "[8,16]")), "begins at byte 8, expected 0"),
        (format!("{{{}}}", x("[2]", "[0,8]")), "tensors end at byte 8"),
        (format!("{{{}}}", x("[-4]", "[0,16]")), "tensor x: invalid value"),
        (format!("{{{},{}}}", x("[2]", "[0,8]"), x("[2]", "[8,16]")), "x occurs twice"),
        (format!("{{{},{y}}}", x("[4]", "[0,16]")), "tensor y: begins at byte 4, expected 16"),
        (r#"{"x":{"dtype":"F33","shape":[4],"data_offsets":[0,16]}}"#.into(), "x: unknown variant"),
        (r#"{"__metadata__":{"a":1}}"#.into(), "__metadata__"),
        (format!("{{{}}}", x(&format!("[{}1]", "1,".repeat(64)), "[0,4]")), "tensor x: 65 sides"),
        ("[".repeat(100_000), "its header"),
        ("{\"x\":".repeat(1000), "its header"),
    ];
    for (header, expected) in cases {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend([0; 16]);
        fs::write(&path, bytes).unwrap();
        let text = SafeFile::open(&path).unwrap_err().to_string();
        assert!(text.contains(expected), "{}: {text}", &header[..header.len().min(80)]);
    }
    fs::write(&path, u64::MAX.to_le_bytes()).unwrap();
    assert!(SafeFile::open(&path).unwrap_err().to_string().contains("only 0 bytes follow"));
}

/// Opens and reads everything; the result does not matter, only that there is one.
fn read_all(path: &Path) {
    let Ok(file) = SafeFile::open(path) else {
        return;
    };
    for name in file.names() {
        let _ = (file.f32(name), file.f64(name), file.i64(name));
        assert!(file.bytes(name).is_ok());
    }
}

proptest! {
    #[test]
    fn damaged_files_never_panic(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        sample(&path);
        let mut bytes = fs::read(&path).unwrap();
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
            fs::write(&path, &bytes).unwrap();
            prop_assert!(SafeFile::open(&path).is_err(), "a truncated file was accepted");
        } else {
            for (place, byte) in damage {
                let place = place.index(bytes.len());
                bytes[place] = byte;
            }
            fs::write(&path, &bytes).unwrap();
            read_all(&path);
        }
    }

    #[test]
    fn any_tensor_survives_the_round_trip(values in prop::collection::vec(any::<f32>(), 0..40)) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        safetensors::write(&path, &[("x", Dtype::F32, &[values.len()], &bytes)], &HashMap::new())
            .unwrap();
        let read = SafeFile::open(&path).unwrap().f32("x").unwrap();
        prop_assert_eq!(values.len(), read.len());
        for (a, b) in values.iter().zip(&read) {
            prop_assert_eq!(a.to_bits(), b.to_bits());
        }
    }
}

#[test]
fn long_tensors_have_the_values_of_their_elements() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    // Every half there is, the order of the shares that threads take, and an odd end.
    let bits: Vec<u16> = (0..=u16::MAX).chain((0..777).map(|i| i * 31)).collect();
    let halves: Vec<u8> = bits.iter().flat_map(|x| x.to_le_bytes()).collect();
    let singles: Vec<f32> = (0..bits.len()).map(|i| i as f32 * 0.25 - 7.0).collect();
    let bytes: Vec<u8> = singles.iter().flat_map(|x| x.to_le_bytes()).collect();
    let doubles: Vec<u8> = singles.iter().flat_map(|&x| (f64::from(x) * (1.0 + 1e-12)).to_le_bytes()).collect();
    let mut broken = bytes.clone();
    for at in [66_000, 65_999, 66_200] {
        broken[4 * at..4 * (at + 1)].copy_from_slice(&f32::NEG_INFINITY.to_le_bytes());
    }
    let shape = [bits.len()];
    safetensors::write(
        &path,
        &[
            ("half", Dtype::F16, &shape, &halves),
            ("brain", Dtype::BF16, &shape, &halves),
            ("single", Dtype::F32, &shape, &bytes),
            ("double", Dtype::F64, &shape, &doubles),
            ("broken", Dtype::F32, &shape, &broken),
        ],
        &HashMap::new(),
    )
    .unwrap();
    let file = SafeFile::open(&path).unwrap();
    let same = |name: &str, widen: fn(u16) -> f32| {
        for (&bits, found) in bits.iter().zip(file.f32(name).unwrap()) {
            assert_eq!(found.to_bits(), widen(bits).to_bits(), "{name} {bits:04x}");
        }
        let wide = file.f64(name).unwrap();
        assert!(wide.iter().zip(&bits).all(|(x, &bits)| x.is_nan() || *x == f64::from(widen(bits))), "{name}");
        assert_eq!(wide.len(), bits.len());
    };
    same("half", |bits| f16::from_bits(bits).to_f32());
    same("brain", |bits| bf16::from_bits(bits).to_f32());
    // Not `assert_eq`, which would print them all.
    assert!(file.finite_f32("single").unwrap() == singles);
    assert!(file.f32("double").unwrap() == singles);
    let text = file.finite_f32("broken").unwrap_err().to_string();
    assert!(text.contains("tensor broken: found -inf at 65999, expected finite numbers"), "{text}");
}

// ---- PNG ----

fn gradient(height: usize, width: usize) -> Vec<f32> {
    (0..height * width * 3).map(|i| (i % 256) as f32 / 127.5 - 1.0).collect()
}

#[test]
fn pictures_invert_model_space_exactly_and_survive_their_file_with_their_text() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.png");
    let picture = Picture::from_model(7, 13, &gradient(7, 13));
    assert!(picture.rgb().iter().enumerate().all(|(i, &x)| x == (i % 256) as u8));
    let wild = Picture::from_model(1, 2, &[-9.0, 9.0, f32::NAN, f32::INFINITY, -1.0, 1.0]);
    assert_eq!(wild.rgb(), [0, 255, 0, 255, 0, 255]);

    let text = [("parameters", "{\"tags\": \"Kräuter, 茶\"}\nseed 3"), ("Software", "edm2k")];
    picture.save(&path, &text).unwrap();
    let read = image::open(&path).unwrap().into_rgb8();
    assert_eq!((read.width(), read.height()), (13, 7));
    assert_eq!(read.into_raw(), picture.rgb());
    let found = png::read_text(&path).unwrap();
    assert_eq!(found, text.map(|(keyword, text)| (keyword.to_string(), text.to_string())));
}

#[test]
fn a_picture_s_file_is_hardly_larger_than_its_pixels_and_small_where_there_is_little_to_see() {
    let (height, width) = (61, 47);
    let mut state = 7u32;
    let mut noise = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    let noisy = Picture::new(height, width, (0..height * width * 3).map(|_| noise()).collect());
    let flat = Picture::new(height, width, (0..height * width * 3).map(|i| (i / (width * 3)) as u8).collect());
    for (picture, most) in [(&noisy, height * (width * 3 + 1) + 100), (&flat, height * width * 3 / 10)] {
        let png = picture.png(&[]).unwrap();
        assert!(png.len() <= most, "{} bytes, at most {most}", png.len());
        assert_eq!(image::load_from_memory(&png).unwrap().into_rgb8().into_raw(), picture.rgb());
        assert_eq!(png, picture.png(&[]).unwrap(), "the same picture gives the same bytes");
    }
}

#[test]
fn grids_keep_their_gutters_and_leave_missing_cells_grey() {
    let cells: Vec<_> = (0..5u8).map(|i| Picture::new(2, 3, vec![i * 10; 18])).collect();
    let grid = Picture::grid(&cells, 3);
    assert_eq!((grid.width(), grid.height()), (3 * 3 + 4 * 2, 2 * 2 + 3 * 2));
    let at = |x: usize, y: usize| grid.rgb()[(y * grid.width() + x) * 3];
    for (number, (x, y)) in [(2, 2), (7, 2), (12, 2), (2, 6), (7, 6)].into_iter().enumerate() {
        assert_eq!((at(x, y), at(x + 2, y + 1)), (number as u8 * 10, number as u8 * 10));
        assert_eq!((at(x - 1, y), at(x, y - 1), at(x + 3, y), at(x, y + 2)), (0xc0, 0xc0, 0xc0, 0xc0));
    }
    assert_eq!(at(13, 6), 0xc0, "the sixth cell is empty");
    assert_eq!(Picture::grid(&cells[..2], 8).width(), 2 * 3 + 3 * 2, "no more columns than pictures");
}

#[test]
fn png_faults_are_errors_that_name_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.png");
    fs::write(&path, b"old").unwrap();
    let picture = Picture::from_model(2, 2, &gradient(2, 2));
    for bad in [picture.save(&path, &[("", "x")]), Picture::new(0, 4, vec![]).save(&path, &[])] {
        assert!(bad.unwrap_err().to_string().contains("a.png: "));
        assert_eq!(fs::read(&path).unwrap(), b"old", "a failed write must leave the old file");
    }
    let text = picture.save(&dir.path().join("no/a.png"), &[]).unwrap_err().to_string();
    assert!(text.contains("no/a.png: No such file"), "{text}");
    let text = png::read_text(&path).unwrap_err().to_string();
    assert!(text.contains("a.png: not a readable PNG"), "{text}");
    assert!(png::read_text(&dir.path().join("b.png")).is_err());
}

proptest! {
    #[test]
    fn damaged_pngs_never_panic_the_text_reader(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.png");
        Picture::from_model(3, 3, &gradient(3, 3)).save(&path, &[("parameters", "{}")]).unwrap();
        let mut bytes = fs::read(&path).unwrap();
        for (place, byte) in damage {
            let place = place.index(bytes.len());
            bytes[place] = byte;
        }
        fs::write(&path, bytes).unwrap();
        let _ = png::read_text(&path);
    }
}
