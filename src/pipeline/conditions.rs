//! Where conditions come from: tags, pictures, datasets, files, and the condition model.

use std::path::{Path, PathBuf, absolute};

use serde_json::{Map, Value, json};

use super::{Domain, Mismatch, Pipeline, learned_from};
use crate::condition::classes::{ClassError, Classes};
use crate::condition::prompt::Prompt;
use crate::condition::tagger::Tagger;
use crate::condition::vae::{Vae, VaeError};
use crate::condition::vocabulary::{Vocabulary, VocabularyError};
use crate::condition::{Conditioning, MEANING_KEY, Meaning, unit_norm};
use crate::data::dataset::{Dataset, DatasetError, Split};
use crate::data::features::CONDITIONING_KEY;
use crate::formats::ends_in;
use crate::formats::fingerprint::{Fingerprint, name};
use crate::formats::npy::{self, NpyError};
use crate::formats::safetensors::{SafeError, SafeFile};
use crate::onnx::OnnxError;
use crate::pictures::{Picture, PictureError, decode};
use crate::rng::{Purpose, Stream};

/// What an image is to show.
#[derive(Clone, Debug, PartialEq)]
pub struct Condition {
    /// The vector that the network is given, `[label_dim]`.
    pub values: Vec<f32>,
    /// Where it is from, for people. The text chunk of a picture has it.
    pub origin: Map<String, Value>,
    /// What guidance leads away from, `[label_dim]`; else that is no condition, or where another network guides, what that
    /// network makes of this same condition.
    pub away: Option<Vec<f32>>,
}

impl Condition {
    /// A condition by its values, `[label_dim]`. Zeros mean no condition.
    pub fn new<'a>(values: Vec<f32>, origin: impl IntoIterator<Item = (&'a str, Value)>) -> Self {
        let origin = origin.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        Self { values, origin, away: None }
    }

    /// Of what the network is given, whatever it was made of.
    pub fn fingerprint(&self) -> Fingerprint {
        let away = self.away.as_deref().unwrap_or_default();
        Fingerprint::of([&self.values, away].map(bytemuck::cast_slice::<f32, u8>))
    }

    /// The same condition, with one more entry in its origin.
    #[must_use]
    pub fn named(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.origin.insert(key.into(), value.into());
        self
    }

    /// The same, but guided away from another condition: a negative prompt.
    #[must_use]
    pub fn away_from(mut self, other: &Self) -> Self {
        self.away = Some(other.values.clone());
        self.named("negative", other.origin.clone())
    }

    /// What guidance leads this image away from, when another image of its batch has a negative prompt.
    pub(super) fn reference(&self, other_network: bool) -> Vec<f32> {
        match &self.away {
            Some(away) => away.clone(),
            None if other_network => self.values.clone(),
            None => vec![0.0; self.values.len()],
        }
    }

    /// Several conditions in one, each with its weight: their weighted sum, divided by its norm. Guidance leads away
    /// from what the first condition names.
    ///
    /// # Errors
    /// [`ConditionError::Nothing`] if the sum is zero; [`ConditionError::Mismatch`] if they are not equally wide.
    pub fn mix(parts: &[(Self, f64)]) -> Result<Self> {
        let Some((first, _)) = parts.first() else { return Err(ConditionError::Nothing) };
        let mut sums = vec![0.0; first.values.len()];
        // Only the ratio of the weights counts, so they may be of any size.
        let largest = parts.iter().map(|(_, weight)| weight.abs()).fold(0.0, f64::max);
        for (part, weight) in parts {
            part.as_wide_as(first)?;
            sums.iter_mut().zip(&part.values).for_each(|(sum, &x)| *sum += weight / largest * f64::from(x));
        }
        let mut values: Vec<f32> = sums.into_iter().map(|sum| sum as f32).collect();
        if !unit_norm(&mut values) {
            return Err(ConditionError::Nothing);
        }
        let mix = parts.iter().map(|(part, weight)| json!([part.origin, weight])).collect();
        Ok(Self { away: first.away.clone(), ..Self::new(values, [("mix", mix)]) })
    }

    /// The condition at a share of the way from one to another, along the great circle between them. Where one of them
    /// is zero, or both are the same, the way is a straight line. What guidance leads away from goes the same way.
    ///
    /// # Errors
    /// [`ConditionError::Mismatch`] if they are not equally wide; [`ConditionError::OneNegative`] if guidance leads one of
    /// them away from a condition of its own, and the other not.
    pub fn between(from: &Self, to: &Self, share: f64) -> Result<Self> {
        to.as_wide_as(from)?;
        let away = match (&from.away, &to.away) {
            (None, None) => None,
            (Some(from), Some(to)) => Some(on_the_way(from, to, share)),
            _ => return Err(ConditionError::OneNegative),
        };
        let origin = [("from", json!(from.origin)), ("to", json!(to.origin)), ("share", share.into())];
        Ok(Self { away, ..Self::new(on_the_way(&from.values, &to.values, share), origin) })
    }

    /// Conditions of one model are equally wide.
    fn as_wide_as(&self, first: &Self) -> Result<(), Mismatch> {
        let (found, expected) = (self.values.len(), first.values.len());
        let (name, other) = ("one of several".into(), "the first".into());
        if found == expected { Ok(()) } else { Err(Mismatch::Width { name, other, found, expected }) }
    }

    /// The condition of image `i` of a split of the dataset in `dir`. It is not checked whether it suits a model.
    ///
    /// # Panics
    /// If there is no such image.
    pub fn of_image(data: &Dataset, i: usize, dir: &Path, split: Split) -> Self {
        let mut values = vec![0.0; data.condition_dim()];
        data.condition(i, &mut values);
        // "." has no name of its own.
        let dir = name(&absolute(dir).unwrap_or_else(|_| dir.into()));
        let (split, tags) = (split.to_string(), data.vocabulary().words(data.tags(i)));
        let origin =
            [("dataset", dir.into()), ("id", data.id(i).into()), ("split", split.into()), ("tags", tags.into())];
        Self::new(values, origin)
    }
}

/// Why there is no condition.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum ConditionError {
    #[error("{}: the model is unconditional, so it takes no condition", model.display())]
    Unconditional { model: PathBuf },
    #[error("{}: the model has no vocabulary, so it takes no tags", model.display())]
    NoVocabulary { model: PathBuf },
    #[error(
        "{}: its conditions are {made_of}, so tags need a condition model that has learned from them",
        model.display()
    )]
    TagsOfFeatures { model: PathBuf, made_of: Box<Conditioning> },
    #[error("{}: its conditions are {made_of}, not features, so no picture has them", model.display())]
    NotFeatures { model: PathBuf, made_of: Box<Conditioning> },
    #[error("there is no condition model")]
    NoConditionModel,
    #[error("there is no tagger")]
    NoTagger,
    #[error("{}: its features are {found} wide, expected the model's {expected}", tagger.display())]
    FeatureWidth { tagger: PathBuf, found: usize, expected: usize },
    #[error("{} was trained on {made_of}, but these are {found}", model.display())]
    OtherTagger { model: PathBuf, made_of: Box<Conditioning>, found: Box<Conditioning> },
    #[error("{}: its conditions are {made_of}, not classes", model.display())]
    NotClasses { model: PathBuf, made_of: Box<Conditioning> },
    #[error("{}: its conditions are tags, not classes", model.display())]
    ClassOfTags { model: PathBuf },
    #[error("{}: class {class}, expected 0 to {}", model.display(), classes - 1)]
    NoSuchClass { model: PathBuf, class: usize, classes: usize },
    #[error("the weighted sum of these conditions is zero")]
    Nothing,
    #[error("one of two conditions has a negative and the other none, expected both or neither")]
    OneNegative,
    #[error("\"{text}\" has no tag")]
    NoTag { text: String },
    #[error("{name}: {why}")]
    Picture { name: String, why: Box<PictureError> },
    #[error("{name}: its features are all zero")]
    ZeroFeatures { name: String },
    #[error("no image of {} has the id {id}", dataset.display())]
    NoSuchId { dataset: PathBuf, id: i64 },
    #[error("{}: conditions of shape {found:?}, expected [N, {width}]", path.display())]
    Shape { path: PathBuf, found: Vec<usize>, width: usize },
    #[error("{}: row {row} {what}", path.display())]
    Row { path: PathBuf, row: usize, what: &'static str },
    #[error("{}: what its conditions mean: {why}", path.display())]
    Meaning { path: PathBuf, why: String },
    #[error("{0}")]
    Mismatch(#[from] Mismatch),
    #[error("{0}")]
    Class(#[from] ClassError),
    #[error("{0}")]
    Vocabulary(#[from] VocabularyError),
    #[error("{0}")]
    Vae(#[from] VaeError),
    #[error("{0}")]
    Dataset(#[from] DatasetError),
    #[error("{0}")]
    Tagger(#[from] OnnxError),
    #[error("{0}")]
    File(#[from] SafeError),
    #[error("{0}")]
    Npy(#[from] NpyError),
}

type Result<T, E = ConditionError> = std::result::Result<T, E>;

impl Pipeline {
    /// Takes a model of conditions, made by `edm2k condition train`.
    ///
    /// # Errors
    /// [`ConditionError`]: the file is no condition model, or one of other conditions.
    pub fn with_condition_model(mut self, path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let vae = Vae::load(path)?;
        self.width()?;
        let theirs = Domain::of_condition_model(&vae);
        theirs.check_given(path.display(), &self.domain(), self.path.display())?;
        self.warnings.extend(theirs.doubt(path.display(), &self.domain(), self.path.display()));
        self.inventor = Some((path.into(), vae));
        Ok(self)
    }

    /// Takes the tagger whose features the model's conditions are, an ONNX file; `node` names the tensor of the
    /// features in it, by default what a WD tagger's classifier is given. If all that is known is that the file has
    /// another name, it is taken with a warning.
    ///
    /// # Errors
    /// [`ConditionError`]: the model's conditions are no features, or known to be another tagger's.
    pub fn with_tagger(mut self, path: impl AsRef<Path>, node: Option<&str>) -> Result<Self> {
        let expected = self.width()?;
        let (model, made_of) = (self.path.clone(), self.meta.conditioning.clone());
        if made_of == Conditioning::Tags {
            return Err(ConditionError::NotFeatures { model, made_of: made_of.into() });
        }
        let tagger = Tagger::open(path.as_ref(), node)?;
        let found = tagger.network().width();
        if found != expected {
            return Err(ConditionError::FeatureWidth { tagger: tagger.network().path().into(), found, expected });
        }
        let theirs = tagger.conditioning();
        if theirs.differs(&made_of) {
            let known = matches!(made_of, Conditioning::Features { fingerprint: Some(_), .. });
            let other = ConditionError::OtherTagger { model, made_of: made_of.into(), found: theirs.into() };
            if known {
                return Err(other);
            }
            self.warnings.push(other.to_string());
        } else {
            let meaning = Meaning { conditioning: Some(theirs), tags: Vec::new() };
            let (theirs, shown) = (Domain::of_conditions(found, meaning), path.as_ref().display());
            self.warnings.extend(theirs.doubt(shown, &self.domain(), self.path.display()));
        }
        self.tagger = Some(tagger);
        Ok(self)
    }

    /// The tags that the model knows; for a model of features, those that its condition model knows.
    ///
    /// # Errors
    /// [`ConditionError`]: it knows none.
    pub fn vocabulary(&self) -> Result<Vocabulary> {
        self.width()?;
        let (model, meta) = (self.path.clone(), &self.meta);
        match (&meta.conditioning, &self.inventor) {
            (Conditioning::Features { .. }, Some((_, vae))) => Ok(vae.vocabulary().clone()),
            (made_of @ Conditioning::Features { .. }, None) => {
                Err(ConditionError::TagsOfFeatures { model, made_of: made_of.clone().into() })
            }
            (Conditioning::Tags, _) if meta.vocabulary.is_empty() => Err(ConditionError::NoVocabulary { model }),
            (Conditioning::Tags, _) => {
                Ok(meta.tags().map_err(|cause| VocabularyError::File { path: model, cause: Box::new(cause) })?)
            }
        }
    }

    /// The condition of some tags, separated by commas. A model of features takes no tags, so for it the condition is
    /// invented, as by [`Pipeline::complete`].
    ///
    /// # Errors
    /// [`ConditionError`]: no tag, an unknown one, or a model that takes none.
    pub fn tags(&self, text: &str, seed: u64) -> Result<Condition> {
        let vocabulary = self.vocabulary()?;
        if let Conditioning::Features { .. } = self.meta.conditioning {
            return self.complete(text, seed);
        }
        let tags = some_tags(&vocabulary, text)?;
        Ok(Condition::new(vocabulary.condition(&tags), [("tags", vocabulary.text(&tags).into())]))
    }

    /// A plausible condition that has some tags, separated by commas, and perhaps others: the condition model invents
    /// it with the noise of `seed`.
    ///
    /// # Errors
    /// [`ConditionError`]: no tag, an unknown one, or no condition model.
    pub fn complete(&self, text: &str, seed: u64) -> Result<Condition> {
        self.width()?;
        let (path, vae) = self.inventor.as_ref().ok_or(ConditionError::NoConditionModel)?;
        let vocabulary = vae.vocabulary();
        let tags = some_tags(vocabulary, text)?;
        let invented = vae.invent(&tags, 1, seed);
        let origin =
            [("asked", &tags), ("tags", &invented.tags[0])].map(|(key, tags)| (key, vocabulary.text(tags).into()));
        let condition = Condition::new(invented.conditions, origin).named("condition_seed", seed);
        Ok(condition.named("condition_model", name(path)))
    }

    /// Conditions that the condition model invents with the noise of `seed`.
    ///
    /// # Errors
    /// [`ConditionError::NoConditionModel`], [`ConditionError::Unconditional`].
    pub fn invent(&self, count: usize, seed: u64) -> Result<Vec<Condition>> {
        let width = self.width()?;
        let (path, vae) = self.inventor.as_ref().ok_or(ConditionError::NoConditionModel)?;
        let invented = vae.invent(&Prompt::default(), count, seed);
        let rows = invented.conditions.chunks(width).zip(&invented.tags).enumerate();
        let condition = |(index, (values, tags)): (usize, (&[f32], &Prompt))| {
            let words = vae.vocabulary().text(tags);
            let origin = [("invented", index.into()), ("condition_seed", seed.into()), ("tags", words.into())];
            Condition::new(values.to_vec(), origin).named("condition_model", name(path))
        };
        Ok(rows.map(condition).collect())
    }

    /// The condition of a picture in a file: the features that the tagger finds in it.
    ///
    /// # Errors
    /// [`ConditionError`]: no tagger, no picture, or no features.
    pub fn like(&mut self, path: impl AsRef<Path>) -> Result<Condition> {
        let path = path.as_ref();
        let shown = path.display().to_string();
        let image = decode::open(path, Tagger::BACKGROUND);
        let image = image.map_err(|why| ConditionError::Picture { name: shown.clone(), why: why.into() })?;
        self.warnings.extend(image.warning(&shown));
        Ok(self.like_picture(&image.picture, &shown)?.named("like", name(path)))
    }

    /// As [`Pipeline::like`], for a picture in memory that is called `shown`.
    ///
    /// # Errors
    /// As [`Pipeline::like`].
    pub fn like_picture(&self, picture: &Picture, shown: &str) -> Result<Condition> {
        self.width()?;
        let tagger = self.tagger.as_ref().ok_or(ConditionError::NoTagger)?;
        let mut values = tagger.features(picture, shown)?;
        if !unit_norm(&mut values) {
            return Err(ConditionError::ZeroFeatures { name: shown.into() });
        }
        let network = tagger.network();
        let (tagger, node) = (name(network.path()), network.node());
        let origin = [("like", shown.into()), ("tagger", tagger.into()), ("node", node.into())];
        Ok(Condition::new(values, origin))
    }

    /// The condition of the image with this id in a dataset, in whichever of its splits that is.
    ///
    /// # Errors
    /// [`ConditionError`]: there is no such image, or its condition means something else.
    pub fn row(&mut self, dataset: impl AsRef<Path>, id: i64) -> Result<Condition> {
        self.width()?;
        let dir = dataset.as_ref();
        for split in Split::ALL {
            let data = match Dataset::open(dir, split) {
                Err(DatasetError::NoShards { .. } | DatasetError::NoSplit { .. } | DatasetError::Empty { .. }) => {
                    continue;
                }
                opened => opened?,
            };
            let Some(i) = data.find(id) else { continue };
            let theirs = Domain::of_conditions(data.condition_dim(), data.meaning());
            theirs.check_given(dir.display(), &self.domain(), self.path.display())?;
            let condition = Condition::of_image(&data, i, dir, split);
            let doubt = theirs.doubt(dir.display(), &self.domain(), self.path.display());
            self.warnings.extend(doubt.filter(|_| !learned_from(&self.meta, dir)));
            return Ok(condition);
        }
        Err(ConditionError::NoSuchId { dataset: dir.into(), id })
    }

    /// Takes names for the classes of a class-conditional model. Those of another number of classes than it has are taken
    /// with a warning.
    ///
    /// # Errors
    /// [`ConditionError`]: the model's conditions are no classes.
    pub fn with_class_names(mut self, names: Classes) -> Result<Self> {
        let (classes, found, model) = (self.classes()?, names.len(), self.path.display());
        if found != classes {
            self.warnings.push(format!("{found} names of classes, but {model} has {classes}"));
        }
        self.class_names = names;
        Ok(self)
    }

    /// The condition of a class: one-hot. `class` is its number, or a name that [`Pipeline::with_class_names`] brought.
    ///
    /// # Errors
    /// [`ConditionError`]: a model of other conditions, or no class of it.
    pub fn class(&self, class: &str) -> Result<Condition> {
        self.classes()?;
        self.one_hot(self.class_names.find(class)?)
    }

    /// The condition of a class that is drawn by `seed`.
    ///
    /// # Errors
    /// As [`Pipeline::class`].
    pub fn any_class(&self, seed: u64) -> Result<Condition> {
        self.one_hot(Stream::new(seed, Purpose::Class, 0).below(self.classes()?))
    }

    /// The condition of a text: a class of a class-conditional model, tags of any other.
    ///
    /// # Errors
    /// As [`Pipeline::class`] and [`Pipeline::tags`].
    pub fn tags_or_class(&self, text: &str, seed: u64) -> Result<Condition> {
        if self.meta.is_of_classes() { self.class(text) } else { self.tags(text, seed) }
    }

    fn one_hot(&self, class: usize) -> Result<Condition> {
        let (model, classes) = (self.path.clone(), self.classes()?);
        let mut values = vec![0.0; classes];
        *values.get_mut(class).ok_or(ConditionError::NoSuchClass { model, class, classes })? = 1.0;
        let (condition, number) = (Condition::new(values, [("class", class.into())]), class.to_string());
        let name = Some(self.class_names.label(class)).filter(|label| *label != number);
        Ok(match name {
            Some(name) => condition.named("name", name),
            None => condition,
        })
    }

    /// How many classes the model knows.
    fn classes(&self) -> Result<usize> {
        let (classes, model, made_of) = (self.width()?, self.path.clone(), &self.meta.conditioning);
        match made_of {
            Conditioning::Features { .. } => Err(ConditionError::NotClasses { model, made_of: made_of.clone().into() }),
            Conditioning::Tags if !self.meta.is_of_classes() => Err(ConditionError::ClassOfTags { model }),
            Conditioning::Tags => Ok(classes),
        }
    }

    /// The empty condition, for an image that has a negative prompt only.
    ///
    /// # Errors
    /// [`ConditionError::Unconditional`].
    pub fn none(&self) -> Result<Condition> {
        Ok(Condition::new(vec![0.0; self.width()?], []))
    }

    /// The conditions [N, D] of a file: `.npy`, or `.safetensors` with one tensor or one that is named "conditions" or
    /// "features". Each is divided by its norm.
    ///
    /// # Errors
    /// [`ConditionError`]: the file cannot be read, or its conditions do not suit the model.
    pub fn conditions(&self, path: impl AsRef<Path>) -> Result<Vec<Condition>> {
        let (path, width) = (path.as_ref(), self.width()?);
        let (shape, mut values, meaning) = read(path)?;
        meaning.check(path.display(), &self.meta.meaning(), self.path.display()).map_err(Mismatch::Meaning)?;
        if !matches!(shape[..], [d] | [_, d] if d == width) || values.is_empty() {
            return Err(ConditionError::Shape { path: path.into(), found: shape, width });
        }
        let wrong = |row, what| Err(ConditionError::Row { path: path.into(), row, what });
        if let Some(at) = values.iter().position(|x| !x.is_finite()) {
            return wrong(at / width, "has a value that is not finite");
        }
        let features = matches!(self.meta.conditioning, Conditioning::Features { .. });
        let mut conditions = Vec::with_capacity(values.len() / width);
        for (row, values) in values.chunks_mut(width).enumerate() {
            // As `prepare` does, and as tags are laid out: the network has seen no other norm. Zero is no tag, and no feature.
            let norm = values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            let changes = features || (norm - 1.0).abs() > 1e-3;
            let has_norm = !changes || unit_norm(values);
            if features && !has_norm {
                return wrong(row, "is zero, which is no feature");
            }
            let origin = [("file", name(path).into()), ("row", row.into())];
            conditions.push(Condition::new(values.to_vec(), origin));
        }
        Ok(conditions)
    }

    /// Width of the conditions.
    fn width(&self) -> Result<usize> {
        match self.net.config.label_dim {
            0 => Err(ConditionError::Unconditional { model: self.path.clone() }),
            width => Ok(width),
        }
    }
}

/// The vector at a share of the way from one to another; see [`Condition::between`].
fn on_the_way(from: &[f32], to: &[f32], share: f64) -> Vec<f32> {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let norms = (dot(from, from) * dot(to, to)).sqrt();
    let angle = (dot(from, to) / norms.max(f64::MIN_POSITIVE)).clamp(-1.0, 1.0).acos();
    let (a, b) = match angle.sin() {
        sin if norms > 0.0 && sin > 1e-3 => (((1.0 - share) * angle).sin() / sin, (share * angle).sin() / sin),
        _ => (1.0 - share, share),
    };
    from.iter().zip(to).map(|(x, y)| (a * f64::from(*x) + b * f64::from(*y)) as f32).collect()
}

/// The tags of a text; an error if it has none.
fn some_tags(vocabulary: &Vocabulary, text: &str) -> Result<Prompt> {
    let tags = vocabulary.parse(text)?;
    if tags.tags().is_empty() { Err(ConditionError::NoTag { text: text.into() }) } else { Ok(tags) }
}

/// Shape and values of a file's conditions, and what they mean, as far as the file says so.
fn read(path: &Path) -> Result<(Vec<usize>, Vec<f32>, Meaning)> {
    if ends_in(path, "npy") {
        let (shape, values) = npy::read(path)?;
        return Ok((shape, values, Meaning::default()));
    }
    let file = SafeFile::open(path)?;
    let said = |key: &str| file.metadata().get(key).and_then(|text| serde_json::from_str::<Value>(text).ok());
    let meaning = match (said(MEANING_KEY), said(CONDITIONING_KEY)) {
        (Some(meaning), _) => serde_json::from_value(meaning),
        (None, Some(made_of)) => serde_json::from_value(json!({"conditioning": made_of, "tags": []})),
        (None, None) => Ok(Meaning::default()),
    };
    let mut meaning = meaning.map_err(|why| ConditionError::Meaning { path: path.into(), why: why.to_string() })?;
    let names: Vec<_> = file.names().collect();
    let name = match names[..] {
        [one] => one,
        _ if file.contains("features") => "features",
        _ => "conditions",
    };
    if name == "features" && meaning.conditioning.is_none() {
        meaning.conditioning = Some(Conditioning::UNKNOWN_FEATURES);
    }
    Ok((file.shape(name)?.to_vec(), file.f32(name)?, meaning))
}
