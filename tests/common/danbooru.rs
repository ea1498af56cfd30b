//! A miniature of danbooru2023: posts as JSON lines, and their files in tar shards or a folder, of the emoji in
//! tests/data.

use std::fs::{self, File};
use std::io::Cursor;
use std::path::{Path, PathBuf};

use edm2k::data::dataset::{Dataset, Split};
use edm2k::rng::{Purpose, Stream};
use image::{ImageFormat, Rgb, RgbImage, imageops};
use serde_json::{Value, json};

/// A post, and its file if there is one.
#[derive(Clone)]
pub struct Post {
    pub id: i64,
    /// Line of the metadata.
    pub about: Value,
    pub bytes: Option<Vec<u8>>,
}

/// All posts, in the order of the metadata.
pub struct Danbooru {
    pub posts: Vec<Post>,
}

/// What `1girl solo` of rating `g` at 64x88 comes to: posts of [`Danbooru::miniature`] that are kept, by split.
pub const KEPT: [(Split, usize); 3] = [(Split::Train, 24), (Split::Validation, 4), (Split::Test, 4)];

/// Reasons of the others, under their names in the summary, with the number of posts.
pub const DROPPED: [(&str, usize); 11] = [
    ("banned", 1),
    ("cropped", 2),
    ("deleted", 2),
    ("lacks-tags", 3),
    ("no-file", 1),
    ("not-still", 3),
    ("other-rating", 3),
    ("repeated", 1),
    ("small", 2),
    ("unreadable", 2),
    ("no-feature", 0),
];

/// An emoji on a background of its colour, of any size: train image `i`.
pub fn picture(i: usize, width: u32, height: u32) -> RgbImage {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/emoji");
    let data = Dataset::open(&dir, Split::Train).unwrap();
    let mut values = vec![0.0; 32 * 32 * 3];
    data.image(i % data.len(), Stream::new(0, Purpose::Latent, 0), &mut values).unwrap();
    let values = values.iter().map(|x| ((x + 1.0) * 127.5).round() as u8).collect();
    let emoji = RgbImage::from_raw(32, 32, values).unwrap();
    let side = width.min(height);
    let mut all = RgbImage::from_pixel(width, height, Rgb([(40 * i % 256) as u8, 200, 220]));
    let emoji = imageops::resize(&emoji, side, side, imageops::FilterType::Triangle);
    imageops::overlay(&mut all, &emoji, i64::from(width - side) / 2, i64::from(height - side) / 2);
    all
}

fn encode(image: &RgbImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Vec::new();
    image.write_to(&mut Cursor::new(&mut bytes), format).unwrap();
    bytes
}

impl Danbooru {
    /// Posts of five id groups (id % 1000): 0 and 1, validation and test, and 2, 3 and 7. The first six posts of a
    /// group or four of the first two are good; then those follow that the filter refuses, each for one reason.
    pub fn miniature() -> Self {
        let mut all = Self { posts: Vec::new() };
        let hair = ["blue_hair", "red_hair", "long_hair"];
        for (group, count) in [(7, 8), (0, 4), (3, 8), (1, 4), (2, 8)] {
            for k in 1..=count {
                let id = 1000 * k + group;
                // Some exactly of the size, the others larger and odd, of up to 4 % another shape.
                let (width, height) = [(64, 88), (131, 177), (200, 270), (97, 132)][k as usize % 4];
                let tags = format!("solo 1girl {} smile", hair[(k + group) as usize % 3]);
                let format = [("png", ImageFormat::Png), ("jpg", ImageFormat::Jpeg), ("webp", ImageFormat::WebP)];
                let (ending, format) = format[(k % 3) as usize];
                all.add(id, &tags, ending, encode(&picture(id as usize % 157, width, height), format), width, height);
            }
        }
        let mut refused = |id: i64, change: &dyn Fn(&mut Post)| {
            let bytes = encode(&picture(id as usize % 157, 64, 88), ImageFormat::Png);
            let post = all.add(id, "1girl solo smile", "png", bytes, 64, 88);
            change(post);
        };
        let set = |key: &'static str, value: Value| move |post: &mut Post| post.about[key] = value.clone();
        refused(20_002, &set("tag_string", "1girl smile".into()));
        refused(20_003, &set("tag_string", "2girls solo".into()));
        refused(20_007, &set("tag_string", "".into()));
        refused(21_002, &set("file_ext", "gif".into()));
        refused(21_003, &set("file_ext", "mp4".into()));
        refused(21_007, &set("file_ext", Value::Null));
        refused(22_000, &set("is_deleted", true.into()));
        refused(22_001, &set("is_deleted", Value::Null));
        refused(22_002, &set("is_banned", true.into()));
        refused(23_002, &set("rating", "s".into()));
        refused(23_003, &set("rating", "q".into()));
        refused(23_007, &set("rating", "e".into()));
        refused(24_002, &|post| (post.about["image_width"], post.about["image_height"]) = (640.into(), 640.into()));
        // This one says that it has the size, which it has not; and the next but one likewise.
        refused(24_003, &|post| post.bytes = Some(encode(&picture(3, 88, 88), ImageFormat::Png)));
        refused(25_002, &|post| (post.about["image_width"], post.about["image_height"]) = (32.into(), 44.into()));
        refused(25_003, &|post| post.bytes = Some(encode(&picture(3, 32, 44), ImageFormat::Png)));
        refused(26_002, &|post| post.bytes = None);
        refused(27_002, &|post| post.bytes.as_mut().unwrap().truncate(300));
        refused(27_003, &|post| post.bytes = Some(b"this is no image".to_vec()));
        // Twice in the metadata.
        let again = Post { bytes: None, ..all.posts[5].clone() };
        all.posts.push(again);
        all
    }

    /// A good post; the last one, to be changed.
    pub fn add(&mut self, id: i64, tags: &str, ending: &str, bytes: Vec<u8>, width: u32, height: u32) -> &mut Post {
        // As danbooru gives them: more than anybody reads, in no useful order.
        let about = json!({
            "id": id, "created_at": "2023-05-05T00:00:00.000-04:00", "score": 7, "md5": "00ff", "parent_id": null,
            "tag_string": tags, "tag_string_artist": "some_one", "image_width": width, "image_height": height,
            "rating": "g", "file_ext": ending, "file_size": bytes.len(), "is_deleted": false, "is_banned": false,
            "is_pending": true, "media_asset": {"id": 1, "variants": [{"type": "original"}]},
        });
        self.posts.push(Post { id, about, bytes: Some(bytes) });
        self.posts.last_mut().unwrap()
    }

    /// Writes the metadata; where it is.
    pub fn write_posts(&self, dir: &Path) -> PathBuf {
        let path = dir.join("posts.json");
        let lines: Vec<_> = self.posts.iter().map(|post| post.about.to_string() + "\n").collect();
        fs::write(&path, lines.concat()).unwrap();
        path
    }

    fn name(post: &Post) -> String {
        format!("{}.{}", post.id, post.about["file_ext"].as_str().unwrap_or("bin"))
    }

    /// Writes the archives as the data set has them: `original/data-0MMM.tar`, newer posts in `recent/data-1MMM.tar`;
    /// and something else beside them.
    pub fn write_tars(&self, dir: &Path) {
        let files: Vec<_> = self.posts.iter().filter(|post| post.bytes.is_some()).collect();
        for (folder, digit, new) in [("original", 0, false), ("recent", 1, true)] {
            fs::create_dir_all(dir.join(folder)).unwrap();
            let in_folder: Vec<_> = files.iter().filter(|post| (post.id >= 20_000) == new).collect();
            let groups: std::collections::BTreeSet<_> = in_folder.iter().map(|post| post.id % 1000).collect();
            for group in groups {
                let path = dir.join(folder).join(format!("data-{digit}{group:03}.tar"));
                let mut tar = tar::Builder::new(File::create(path).unwrap());
                for post in in_folder.iter().filter(|post| post.id % 1000 == group) {
                    let bytes = post.bytes.as_ref().unwrap();
                    let mut header = tar::Header::new_ustar();
                    header.set_size(bytes.len() as u64);
                    header.set_mode(0o644);
                    tar.append_data(&mut header, Self::name(post), &bytes[..]).unwrap();
                }
                tar.finish().unwrap();
            }
        }
        fs::write(dir.join("README.md"), "not an image").unwrap();
    }

    /// Writes the files into folders `MMMM`.
    pub fn write_files(&self, dir: &Path) {
        for post in &self.posts {
            let Some(bytes) = &post.bytes else { continue };
            let folder = dir.join(format!("{:04}", post.id % 1000));
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join(Self::name(post)), bytes).unwrap();
        }
    }
}
