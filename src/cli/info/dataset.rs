//! What is said of datasets and shards.

use std::path::Path;

use serde::Serialize;

use edm2k::data::dataset::{Dataset, DatasetError, Header, Split};
use edm2k::data::shard::check_whole;
use edm2k::formats::safetensors::SafeFile;

use super::{head, made_of};
use crate::cli::say::out;

/// A split of a dataset, or one shard.
#[derive(Serialize)]
pub struct SplitReport {
    name: String,
    images: usize,
    header: Header,
    /// How many images each width and height has; empty if the dataset has one size.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    buckets: Vec<Bucket>,
}

#[derive(Serialize)]
struct Bucket {
    size: String,
    images: usize,
}

#[derive(Serialize)]
pub struct DatasetInfo {
    kind: &'static str,
    parts: Vec<SplitReport>,
    vocabulary: Vec<String>,
    /// Whether tags have other names in the vocabulary's file than when the shards were made.
    renamed: bool,
    /// What [`Dataset::doubt`] says of the splits.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    doubts: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    checked: Option<Checked>,
    /// A zip of EDM2's.
    #[serde(skip)]
    archive: bool,
}

/// What `--check` has found to be whole.
#[derive(Default, Serialize)]
pub struct Checked {
    shards: usize,
    /// How many of these have no checksums, since an older version wrote them; only their small parts were looked at.
    unknown: usize,
}

impl DatasetInfo {
    /// Opens every split that the directory has.
    pub fn open(dir: &Path, check: bool) -> anyhow::Result<Self> {
        let archive = dir.is_file();
        let (parts, vocabulary, doubts) = (vec![], vec![], vec![]);
        let mut info = Self { kind: "dataset", parts, vocabulary, renamed: false, doubts, checked: None, archive };
        let mut nothing = None;
        for split in Split::ALL {
            match Dataset::open(dir, split) {
                Ok(data) => {
                    info.vocabulary = data.vocabulary().tags().iter().map(|tag| tag.tag.clone()).collect();
                    info.renamed |= data.renamed();
                    info.doubts.extend(data.doubt());
                    if check {
                        let checked = info.checked.get_or_insert_default();
                        let before = checked.shards;
                        let known = data.check(&mut || checked.shards += 1)?;
                        checked.unknown += checked.shards - before - known;
                    }
                    let header = data.header().clone();
                    let named = |([height, width], images): ([usize; 2], usize)| Bucket {
                        size: format!("{width}x{height}"),
                        images,
                    };
                    let buckets = match header.sizes.len() {
                        0 => Vec::new(),
                        _ => data.buckets().into_iter().map(named).collect(),
                    };
                    info.parts.push(SplitReport { name: split.to_string(), images: data.len(), header, buckets });
                }
                Err(
                    e @ (DatasetError::NoShards { .. } | DatasetError::NoSplit { .. } | DatasetError::Empty { .. }),
                ) => nothing = nothing.or(Some(e)),
                Err(e) => return Err(e.into()),
            }
        }
        match nothing {
            Some(e) if info.parts.is_empty() => Err(e.into()),
            _ => Ok(info),
        }
    }

    /// One shard, of which the caller has the header already.
    pub fn of_shard(file: &SafeFile, header: Header, check: bool) -> anyhow::Result<Self> {
        let checked = match check {
            true => Some(Checked { shards: 1, unknown: usize::from(!check_whole(file)?) }),
            false => None,
        };
        let name = file.path().file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let part = SplitReport { name, images: header.count, header, buckets: Vec::new() };
        let (parts, vocabulary, doubts) = (vec![part], vec![], vec![]);
        Ok(Self { kind: "shard", parts, vocabulary, renamed: false, doubts, checked, archive: false })
    }

    pub fn show(&self, json: bool) -> anyhow::Result<()> {
        if json {
            out!("{}", serde_json::to_value(self)?);
            return Ok(());
        }
        for SplitReport { name, images, buckets, .. } in &self.parts {
            out!("{name:<14} {images} images");
            for Bucket { size, images } in buckets {
                out!("{:15}{images:>8} of {size}", "");
            }
        }
        if let Some(SplitReport { header, .. }) = self.parts.first() {
            let Header {
                kind,
                sizes,
                height,
                width,
                channels,
                condition_dim,
                conditioning,
                autoencoder,
                source,
                licence,
                ..
            } = header;
            let kind = serde_json::json!(kind);
            let size = if sizes.is_empty() { format!("{width} x {height}") } else { format!("{} sizes", sizes.len()) };
            out!("{:15}{size} (width x height), {channels} channels", kind.as_str().unwrap_or_default());
            out!("condition      {condition_dim} values");
            // A shard alone has no vocabulary beside it.
            let tags = self.kind == "shard" || !self.vocabulary.is_empty();
            out!("conditions are {}", made_of(conditioning, tags, *condition_dim));
            if let Some(autoencoder) = autoencoder {
                out!("latents are of {autoencoder}");
            }
            for (name, text) in [("source", source), ("licence", licence)] {
                if !text.is_empty() {
                    out!("{name:15}{text}");
                }
            }
        }
        if !self.vocabulary.is_empty() {
            let renamed = if self.renamed { ", renamed since the shards were made" } else { "" };
            out!("vocabulary     {} tags{renamed}: {}", self.vocabulary.len(), head(&self.vocabulary));
        }
        self.doubts.iter().for_each(|doubt| out!("warning        {doubt}"));
        if let Some(Checked { shards, unknown }) = &self.checked {
            let unknown = if *unknown > 0 { format!(", {unknown} of them without checksums") } else { String::new() };
            match (shards, self.archive) {
                (_, true) => out!("checked        the archive is whole"),
                (1, _) => out!("checked        the shard is whole{unknown}"),
                _ => out!("checked        {shards} shards are whole{unknown}"),
            }
        }
        Ok(())
    }
}
