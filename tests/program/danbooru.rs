//! Claims about danbooru2023 as it is published: archives are read in place or refused with the reason, and of the
//! posts those that pass the filter become a dataset, the others a count.

use std::fs;
use std::io::Write as _;
use std::path::Path;

use crate::common::danbooru::{self, DROPPED, Danbooru, KEPT};
use crate::common::place::{self, files};
use assert_cmd::assert::OutputAssertExt as _;
use edm2k::data::dataset::Split;
use edm2k::formats::tar::{Member, TarError, index};
use edm2k::rng::{Purpose, Stream};
use proptest::prelude::*;
use serde_json::Value;

// ---- archives -------------------------------------------------------------------------------

fn members(bytes: &[u8]) -> Result<Vec<Member>, TarError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.tar");
    fs::write(&path, bytes).unwrap();
    let mut found = Vec::new();
    index(&path, &mut |member| found.push(member)).map(|()| found)
}

fn header(name: &str, size: u64, kind: u8) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
    header.set_size(size);
    header.set_entry_type(tar::EntryType::new(kind));
    header.set_cksum();
    header
}

/// Headers and contents, padded, and the end of the archive.
fn archive(parts: &[(tar::Header, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (header, content) in parts {
        bytes.extend(header.as_bytes());
        bytes.extend(*content);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
    }
    bytes.resize(bytes.len() + 1024, 0);
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// Written by an independent implementation, which gives long names members of their own.
    #[test]
    fn every_file_of_an_archive_is_found_where_it_lies(
        files in prop::collection::vec(
            (prop::collection::vec("[a-z0-9_ é.]{1,60}", 1..5), prop::collection::vec(any::<u8>(), 0..1500)), 0..8,
        ),
        gnu in any::<bool>(), pax in any::<bool>(), folder in any::<bool>(),
    ) {
        let mut tar = tar::Builder::new(Vec::new());
        let mut expected = Vec::new();
        for (i, (parts, content)) in files.iter().enumerate() {
            let name = format!("{i}{}x", parts.join("/").replace("..", "_").replace("/.", "/_"));
            let mut header = if gnu { tar::Header::new_gnu() } else { tar::Header::new_ustar() };
            header.set_size(content.len() as u64);
            if pax {
                tar.append_pax_extensions([("comment", "hello".as_bytes()), ("mtime", b"1.5")]).unwrap();
            }
            if folder {
                let mut header = tar::Header::new_gnu();
                header.set_entry_type(tar::EntryType::Directory);
                header.set_size(0);
                tar.append_data(&mut header, format!("folder{i}/"), std::io::empty()).unwrap();
            }
            // POSIX's header alone cannot hold all of these names.
            if tar.append_data(&mut header, &name, &content[..]).is_err() {
                prop_assume!(false);
            }
            expected.push((name, content));
        }
        let bytes = tar.into_inner().unwrap();
        let found = members(&bytes).unwrap();
        prop_assert_eq!(found.len(), expected.len());
        for (member, (name, content)) in found.iter().zip(expected) {
            prop_assert_eq!(&member.name, &name);
            prop_assert_eq!(&bytes[member.offset as usize..][..member.size as usize], &content[..]);
        }
    }

    #[test]
    fn a_damaged_archive_is_an_error_or_all_of_its_files_lie_within_it(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let content: Vec<u8> = (0..700).map(|i| i as u8).collect();
        let mut bytes = archive(&[
            (header("1000.png", 700, b'0'), &content),
            (header("long", 20, b'L'), b"a/long/name/2000.png"),
            (header("2000.png", 512, b'0'), &content[..512]),
            (header("pax", 19, b'x'), b"19 path=b/3000.png\n"),
            (header("3000.png", 3, b'0'), b"abc"),
        ]);
        for (place, byte) in damage {
            let at = place.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        for member in members(&bytes).unwrap_or_default() {
            prop_assert!(member.offset + member.size <= bytes.len() as u64, "{member:?}");
        }
    }
}

#[test]
fn names_and_sizes_may_stand_in_extensions() {
    let long = format!("{}/2000.png", "deep/".repeat(40));
    let pax = b"27 path=from/pax/3000.webp\n10 size=4\n";
    let mut large = header("4000.jpg", 0, b'0');
    large.as_mut_bytes()[124..136].copy_from_slice(&[0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5]);
    large.set_cksum();
    let bytes = archive(&[
        (header("global", 12, b'g'), b"12 comment=x"),
        (header("l", long.len() as u64, b'L'), long.as_bytes()),
        (header("k", 4, b'K'), b"link"),
        (header("2000.pn", 3, b'0'), b"abc"),
        (header("p", pax.len() as u64, b'x'), pax),
        (header("3000.we", 0, b'0'), b"defg"),
        (header("folder/", 0, b'5'), b""),
        (header("link", 0, b'2'), b""),
        (large, b"12345"),
    ]);
    let found = members(&bytes).unwrap();
    let names: Vec<_> = found.iter().map(|member| member.name.as_str()).collect();
    assert_eq!(names, [long.as_str(), "from/pax/3000.webp", "4000.jpg"]);
    let contents: Vec<_> = found.iter().map(|m| &bytes[m.offset as usize..][..m.size as usize]).collect();
    assert_eq!(contents, [&b"abc"[..], b"defg", b"12345"]);
}

#[test]
fn hard_links_and_members_of_one_name_are_what_an_archive_unpacks_to() {
    let link = |name: &str, to: &str| {
        let mut link = header(name, 0, b'1');
        link.as_mut_bytes()[157..157 + to.len()].copy_from_slice(to.as_bytes());
        link.set_cksum();
        (link, &b""[..])
    };
    let long = format!("{}/1.png", "deep/".repeat(40));
    let pax = format!("{} linkpath={long}\n", long.len() + 14);
    let bytes = archive(&[
        (header("1.png", 3, b'0'), b"old"),
        link("2.png", "1.png"),
        (header("l", long.len() as u64, b'L'), long.as_bytes()),
        (header("cut", 4, b'0'), b"long"),
        (header("k", long.len() as u64, b'K'), long.as_bytes()),
        link("3.png", "cut"),
        (header("p", pax.len() as u64, b'x'), pax.as_bytes()),
        link("4.png", "cut"),
        link("5.png", "elsewhere.png"),
        (header("1.png", 3, b'0'), b"new"),
        link("6.png", "1.png"),
        link("6.png", "6.png"), // what tar writes for a file that it was given twice
    ]);
    let content = |m: &Member| String::from_utf8_lossy(&bytes[m.offset as usize..][..m.size as usize]).into_owned();
    let found: Vec<_> = members(&bytes).unwrap().iter().map(|m| (m.name.clone(), content(m))).collect();
    let expected =
        [("2.png", "old"), (&long, "long"), ("3.png", "long"), ("4.png", "long"), ("1.png", "new"), ("6.png", "new")];
    assert_eq!(found, expected.map(|(name, content)| (name.to_owned(), content.to_owned())));
}

#[test]
fn what_is_wrong_with_an_archive_is_said_with_the_place() {
    let content = [7; 600];
    let good = archive(&[(header("1.png", 600, b'0'), &content), (header("2.png", 600, b'0'), &content)]);
    assert_eq!(members(&good).unwrap().len(), 2);
    // Without the blocks of zeros, and without the last padding.
    assert_eq!(members(&good[..good.len() - 1024]).unwrap().len(), 2);
    assert_eq!(members(&good[..512 + 600]).unwrap().len(), 1);

    let says = |bytes: &[u8], expected: &str| {
        let text = members(bytes).unwrap_err().to_string();
        assert!(text.contains("a.tar: ") && text.ends_with(expected), "{text}\nexpected {expected}");
    };
    says(b"", "damaged at byte 0: it is empty");
    says(b"<html>not found</html>", "damaged at byte 0: 22 bytes, expected a header of 512");
    says(&[b'x'; 4096], "damaged at byte 0: no header (its checksum is wrong)");
    says(&good[..2200], "damaged at byte 1536: member 2.png claims 600 bytes, but 152 are left");
    says(&good[..1700], "damaged at byte 1536: 164 bytes, expected a header of 512");
    // Lies about sizes: beyond the end, into the next header, short of it.
    let lie = |size: u64| archive(&[(header("1.png", size, b'0'), &content), (header("2.png", 600, b'0'), &content)]);
    says(&lie(1 << 32), "damaged at byte 0: member 1.png claims 4294967296 bytes, but 3584 are left");
    says(&lie(2000), "damaged at byte 2560: no header (its checksum is wrong)");
    says(&lie(100), "damaged at byte 1024: no header (its checksum is wrong)");
    let mut changed = good.clone();
    changed[1536 + 3] ^= 1;
    says(&changed, "damaged at byte 1536: no header (its checksum is wrong)");
    // A hole, and a download that was given its whole length before its content.
    let mut hole = good.clone();
    hole[1536..2048].fill(0);
    says(&hole, "damaged at byte 1536: zeros end it, but 2048 bytes follow");
    let padded = [&good[..], &[0; 100_000]].concat();
    assert_eq!(members(&padded).unwrap().len(), 2);
    says(&[&good[..], &vec![0; 2 << 20]].concat(), "damaged at byte 3072: zeros end it, but 2097664 bytes follow");
    let mut number = header("1.png", 0, b'0');
    number.as_mut_bytes()[124..136].copy_from_slice(b"many bytes\0\0");
    number.set_cksum();
    says(&archive(&[(number, b"")]), "damaged at byte 0: the size of member 1.png is no number");
    says(&archive(&[(header("x", 3, b'x'), b"9 a")]), "damaged at byte 0: unreadable POSIX attributes");
    says(&archive(&[(header("x", 9, b'x'), b"9 size=z\n")]), "damaged at byte 0: a size that is no number");
    says(&archive(&[(header("s.png", 0, b'S'), b"")]), "member s.png is a sparse file, which is not known here");
    let pax = b"22 GNU.sparse.major=1\n25 GNU.sparse.name=p.png\n";
    says(
        &archive(&[(header("x", 47, b'x'), pax), (header("GNUSparseFile.0/p.png", 0, b'0'), b"")]),
        "member p.png is a sparse file, which is not known here",
    );
    let huge = vec![b'a'; 3 << 20];
    says(
        &archive(&[(header("long", huge.len() as u64, b'L'), &huge)]),
        "a name or list of attributes of 3145728 bytes, expected 1048576 at most",
    );
    let missing = index(Path::new("nowhere.tar"), &mut |_| ()).unwrap_err().to_string();
    assert!(missing.starts_with("nowhere.tar: No such file"), "{missing}");
}

// ---- the command ----------------------------------------------------------------------------

/// A miniature of the data set, as archives.
enum Here {}
type Place = place::Place<Here>;

impl Place {
    fn new(all: &Danbooru) -> Self {
        let place = Self::empty();
        all.write_tars(&place.path("danbooru"));
        all.write_posts(place.dir());
        place
    }

    fn prepare(&self, out: &str, options: &str) -> assert_cmd::assert::Assert {
        let from = "prepare --danbooru danbooru --metadata posts.json --size 64x88 --shard-size 5";
        self.command(&format!("{from} --out {out} {options}")).assert()
    }

    /// What it says on stderr.
    fn fails(&self, options: &str) -> String {
        let failed = self.prepare("out", options).failure();
        let text = String::from_utf8(failed.get_output().stderr.clone()).unwrap();
        let (progress, others): (Vec<_>, Vec<_>) = text.lines().partition(|line| line.starts_with("read "));
        assert!(progress.len() <= 2 && others.len() == 1 && others[0].starts_with("edm2k: error: "), "{text}");
        others[0].to_owned()
    }

    fn summary(&self, out: &str) -> Value {
        serde_json::from_slice(&fs::read(self.path(out).join("summary.json")).unwrap()).unwrap()
    }
}

#[test]
fn posts_become_a_dataset_and_what_is_left_out_is_counted() {
    let all = Danbooru::miniature();
    let place = Place::new(&all);
    let done = place.prepare("out", "").success();
    let said = String::from_utf8(done.get_output().stdout.clone()).unwrap();
    let summary = place.summary("out");
    for (split, kept) in KEPT {
        let data = place.open("out", split);
        assert_eq!((data.len(), data.shape()), (kept, [88, 64, 3]));
        assert_eq!(summary["splits"][split.to_string()]["kept"], kept);
        for i in 0..data.len() {
            let of_id = match data.id(i) % 1000 {
                0 => Split::Validation,
                1 => Split::Test,
                _ => Split::Train,
            };
            assert_eq!(split, of_id, "id {}", data.id(i));
        }
    }
    for (reason, count) in DROPPED {
        assert_eq!(summary["dropped"][reason].as_u64().unwrap_or(0), count as u64, "{reason}: {summary}");
    }
    assert_eq!(summary["records"], all.posts.len());
    for line in
        ["train            24 images\n", "validation        4 images\n", "dropped           3 without the required"]
    {
        assert!(said.contains(line), "{said}\nexpected {line}");
    }
    assert!(said.contains("  1 banned\n") && said.contains("  2 of too different a shape ("), "{said}");

    // Archive by archive, each from its beginning: by id % 1000, then id.
    let data = place.open("out", Split::Train);
    let ids: Vec<i64> = (0..data.len()).map(|i| data.id(i)).collect();
    let expected: Vec<i64> = [2, 3, 7].into_iter().flat_map(|group| (1..=8).map(move |k| 1000 * k + group)).collect();
    assert_eq!(ids, expected);
    // Tags with spaces for underscores, and the picture of the right post.
    let vocabulary = data.vocabulary();
    assert_eq!(vocabulary.words(data.tags(data.find(2002).unwrap())), "1girl, smile, solo, red hair");
    let mut image = vec![0.0; 64 * 88 * 3];
    data.image(data.find(4007).unwrap(), Stream::new(0, Purpose::Latent, 0), &mut image).unwrap();
    let exact = danbooru::picture(4007 % 157, 64, 88);
    let found: Vec<u8> = image.iter().map(|x| ((x + 1.0) * 127.5).round() as u8).collect();
    // The eighth of a group is of the size and JPEG; the fourth of the size too, and JPEG: near, not equal.
    let far: f64 = found.iter().zip(exact.as_raw()).map(|(&a, &b)| f64::from(a.abs_diff(b))).sum();
    assert!(far / (found.len() as f64) < 6.0, "mean difference {}", far / found.len() as f64);
}

#[test]
fn a_folder_of_files_gives_the_same_shards_as_the_archives() {
    let all = Danbooru::miniature();
    let place = Place::new(&all);
    place.prepare("archives", "").success();
    fs::remove_dir_all(place.path("danbooru")).unwrap();
    all.write_files(&place.path("danbooru"));
    place.prepare("files", "").success();
    assert!(files(&place.path("archives")) == files(&place.path("files")));
}

#[test]
fn ratings_tags_and_small_images_are_as_asked() {
    let all = Danbooru::miniature();
    let place = Place::new(&all);
    place.prepare("s", "--rating g,s,e").success();
    assert_eq!(place.summary("s")["dropped"]["other-rating"], 1);
    assert_eq!(place.open("s", Split::Train).len(), 26);
    place.prepare("hair", "--require blue_hair").success();
    let data = place.open("hair", Split::Train);
    let blue = data.vocabulary().get("blue hair").unwrap();
    assert!((0..data.len()).all(|i| data.tags(i).contains(&blue)), "all have what is required");
    place.prepare("any", "--enlarge").success();
    // Of the two, one is small only in the metadata.
    assert_eq!(place.summary("any")["splits"]["train"]["enlarged"], 1);
    assert!(place.summary("any")["dropped"].get("small").is_none());
    for (option, value) in [("--rating", "x"), ("--enlarge", "--images d"), ("--images", "d")] {
        place.prepare("out", &format!("{option} {value}")).failure();
    }
    assert!(!place.path("out").exists());
}

#[test]
fn a_tag_that_commas_would_split_is_left_out_and_counted() {
    let mut all = Danbooru::miniature();
    for k in [0, 3] {
        all.posts[k].about["tag_string"] = "1girl solo hello,_world trailing_ \\u00e9t\u{e9}_\"x\"".into();
    }
    let place = Place::new(&all);
    let done = place.prepare("out", "").success();
    let said = String::from_utf8(done.get_output().stdout.clone()).unwrap();
    assert!(said.contains("2 tags with a comma in them or a space at an end"), "{said}");
    assert_eq!(place.summary("out")["unusable_tags"], 2);
    let data = place.open("out", Split::Train);
    let words = data.vocabulary().words(data.tags(data.find(all.posts[0].id).unwrap()));
    assert_eq!(words, "1girl, solo, \\u00e9t\u{e9} \"x\"");
}

#[test]
fn a_killed_run_is_gone_on_with_and_gives_the_same_bytes() {
    let place = Place::new(&Danbooru::miniature());
    place.prepare("out", "").success();
    let whole = files(&place.path("out"));
    assert_eq!(whole.len(), 6 + 1 + 1 + 2, "{:?}", whole.keys());
    for name in ["train-00001.safetensors", "train-00004.safetensors", "validation-00000.safetensors", "summary.json"] {
        fs::remove_file(place.path("out").join(name)).unwrap();
    }
    fs::write(place.path("out/train-00004.safetensors.0123456789abcdef.tmp"), "half").unwrap();
    let again = place.prepare("out", "").success();
    let said = String::from_utf8(again.get_output().stderr.clone()).unwrap();
    assert!(said.contains("train-00000.safetensors: 5 images (was there)"), "{said}");
    assert!(said.contains("train-00001.safetensors: 4 images (") && said.contains(" a second)"), "{said}");
    assert!(files(&place.path("out")) == whole);
    assert!(place.fails("--rating g,s").contains("made before with records 36 ("), "another filter");
}

#[test]
fn headers_of_archives_are_read_once_and_again_when_they_change() {
    let place = Place::new(&Danbooru::miniature());
    let said = |place: &Place| {
        let done = place.prepare("out", "").success();
        String::from_utf8(done.get_output().stderr.clone()).unwrap()
    };
    let noted = "archives, by what was noted of them";
    // Of files that have only just changed nothing is noted.
    std::thread::sleep(std::time::Duration::from_millis(2100));
    assert!(!said(&place).contains(noted));
    let whole = files(&place.path("out"));
    let notes = || fs::read_dir(place.path("out/archives")).unwrap().map(|entry| entry.unwrap().path());
    assert!(notes().count() > 2);
    for name in ["train-00001.safetensors", "validation-00000.safetensors"] {
        fs::remove_file(place.path("out").join(name)).unwrap();
    }
    assert!(said(&place).contains(noted));
    assert!(files(&place.path("out")) == whole, "by the notes, the same pictures are found");

    // A damaged note is made again.
    let note = notes().min().unwrap();
    let good = fs::read(&note).unwrap();
    let elsewhere = String::from_utf8(good.clone()).unwrap().replacen("[512,", "[513,", 1).into_bytes();
    assert!(elsewhere != good);
    for bad in [good[..good.len() - 5].to_vec(), elsewhere] {
        fs::write(&note, &bad).unwrap();
        assert!(!said(&place).contains(noted));
        assert!(fs::read(&note).unwrap() == good);
    }
    // A picture that was taken away from an archive is missed, though the archive's length is the same.
    let tar = place.path("danbooru/original/data-0000.tar");
    let mut bytes = fs::read(&tar).unwrap();
    let mut header = tar::Header::new_gnu();
    header.as_mut_bytes().copy_from_slice(&bytes[..512]);
    header.as_mut_bytes()[0] = b'x';
    header.set_cksum();
    bytes[..512].copy_from_slice(header.as_bytes());
    fs::write(&tar, bytes).unwrap();
    assert!(place.fails("").contains("made before with records 36 ("));
}

#[test]
fn a_renamed_tag_stays_renamed() {
    let place = Place::new(&Danbooru::miniature());
    place.prepare("out", "").success();
    let path = place.path("out/vocabulary.json");
    let renamed = fs::read_to_string(&path).unwrap().replace("\"blue hair\"", "\"azure hair\"");
    fs::write(&path, &renamed).unwrap();
    fs::remove_file(place.path("out/train-00000.safetensors")).unwrap();
    place.prepare("out", "").success();
    assert_eq!(fs::read_to_string(&path).unwrap(), renamed);
    let data = place.open("out", Split::Train);
    let azure = data.vocabulary().get("azure hair").unwrap();
    assert!(data.tags(data.find(3003).unwrap()).contains(&azure), "id 3003 has blue hair");
}

#[test]
fn bad_input_is_one_clear_line_and_nothing_is_lost() {
    let all = Danbooru::miniature();
    let place = Place::new(&all);
    place.prepare("out", "").success();
    let before = files(&place.path("out"));
    let posts = fs::read_to_string(place.path("posts.json")).unwrap();
    let wrong_line = |line: &str, expected: &str| {
        let mut lines: Vec<&str> = posts.lines().collect();
        lines.insert(11, line);
        fs::write(place.path("posts.json"), lines.join("\n")).unwrap();
        let said = place.fails("");
        assert!(said.contains("posts.json line 12: ") && said.contains(expected), "{said}\nexpected {expected}");
    };
    wrong_line("{\"id\": 5, \"tag_string\": \"1girl", "EOF while parsing a string");
    wrong_line("<html>", "expected value at column 1; expected a post of danbooru");
    wrong_line("{\"id\": \"5\"}", "id: invalid type: string \"5\", expected a whole number at column 10");
    wrong_line("{\"id\": 5}", "missing field `tag_string`");
    wrong_line("{\"id\": 5, \"tag_string\": \"\", \"image_width\": -3}", "invalid value: integer `-3`");
    let long = posts.trim_end().replace('\n', ",").repeat(1000);
    fs::write(place.path("posts.json"), format!("[{long}]")).unwrap();
    assert!(place.fails("").contains("posts.json: it is a list in JSON, expected a JSON object a line"));
    fs::write(place.path("posts.json"), long).unwrap();
    assert!(place.fails("").contains("posts.json line 1: longer than 16777216 bytes, expected a record a line"));
    fs::write(place.path("posts.json"), "").unwrap();
    assert!(place.fails("").contains("posts.json: no records"));
    fs::write(place.path("posts.json"), &posts).unwrap();

    let tar = place.path("danbooru/original/data-0002.tar");
    let bytes = fs::read(&tar).unwrap();
    fs::write(&tar, &bytes[..bytes.len() / 2]).unwrap();
    let said = place.fails("");
    assert!(said.contains("original/data-0002.tar: damaged at byte ") && said.contains(" are left"), "{said}");
    let mut lying = bytes.clone();
    lying[124..136].copy_from_slice(b"00077777777\0");
    fs::write(&tar, &lying).unwrap();
    assert!(place.fails("").contains("data-0002.tar: damaged at byte 0: no header (its checksum is wrong)"));
    fs::write(&tar, &bytes).unwrap();

    fs::create_dir(place.path("empty")).unwrap();
    fs::File::create(place.path("empty/notes.txt")).unwrap().write_all(b"x").unwrap();
    let failed = place.command("prepare --danbooru empty --metadata posts.json --out new").assert().failure();
    let said = String::from_utf8(failed.get_output().stderr.clone()).unwrap();
    // At the size that danbooru has by default nothing of these posts is left, before any folder is looked into.
    assert!(said.contains("empty: neither archives (.tar) nor images named by their ids, such as 1003.png"), "{said}");
    assert!(place.fails("--require nobody_has_this").contains("none of the 52 images could be kept (52 without"));
    assert!(files(&place.path("out")) == before, "the dataset was changed");
}
