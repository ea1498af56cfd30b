//! What each model offers, given the other files that the server was started with.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use super::refusal::{Refusal, ensure};
use super::{Files, ServeError};
use crate::codec::{CodecError, CodecFile};
use crate::condition::Conditioning;
use crate::condition::classes::Classes;
use crate::condition::vae::Vae;
use crate::condition::vocabulary::{Vocabulary, VocabularyError};
use crate::formats::fingerprint::name;
use crate::model::{Config, ImageSpace, ModelError, ModelFile, ModelMeta};
use crate::pipeline::Domain;

/// Longest text of tags.
const MAX_TEXT: usize = 1 << 14;

/// How a model takes tags.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Tags {
    /// It takes no tags.
    No,
    /// It takes tags as they are.
    Plain,
    /// The condition model makes a condition of them.
    Invented,
}

/// What guides a model, other than itself.
#[derive(Clone, Debug)]
pub struct Guide {
    /// What pictures call it.
    pub name: String,
    /// Whether it takes conditions.
    pub conditional: bool,
}

/// Why something that the server was given does not go with a model.
#[derive(Debug, Default)]
pub struct Misfits {
    /// The network that guides.
    pub guide: Option<String>,
    /// The condition model.
    pub condition_model: Option<String>,
}

/// What a model is, as far as requests are concerned.
#[derive(Debug)]
pub struct Offer {
    /// What requests call it.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// Its network.
    pub config: Config,
    /// What its file says.
    pub meta: ModelMeta,
    /// The tags that it takes, with their counts where they are known.
    pub vocabulary: Vocabulary,
    /// How it takes them.
    pub tags: Tags,
    /// The names of its classes, if it is class-conditional; there may be fewer than classes.
    pub classes: Option<Classes>,
    /// Whether it takes pictures.
    pub like: bool,
    /// Whether the condition model goes with it.
    pub invents: bool,
    /// The network that guides it (autoguidance).
    pub guide: Option<Guide>,
    /// Pixels for each value of its images, in each direction.
    pub factor: usize,
    /// Why it goes without the rest.
    pub misfits: Misfits,
}

impl Offer {
    /// Whether images whose request says no guidance are guided, if they have no negative tags either.
    pub fn guided(&self) -> bool {
        self.guide.is_some() || !self.meta.is_always_conditional(&self.config)
    }

    /// [height, width] of the images that it learned from.
    pub fn size(&self) -> [usize; 2] {
        [self.meta.height, self.meta.width]
    }

    /// What a text is read as: tags with their weights, or the class of a class-conditional model.
    ///
    /// # Errors
    /// [`Refusal::Invalid`]: it is too long, or has an unknown tag, or is no class.
    pub fn read(&self, text: &str) -> Result<Vec<(String, f32)>, Refusal> {
        ensure(text.len() <= MAX_TEXT, || format!("{} bytes of tags, expected {MAX_TEXT} at most", text.len()))?;
        if let Some(names) = &self.classes {
            return Ok(vec![(names.label(self.class(names, text)?), 1.0)]);
        }
        let prompt = self.vocabulary.parse(text).map_err(|error| Refusal::Invalid(error.to_string()))?;
        let tag = |&(tag, weight): &(u32, f32)| Some((self.vocabulary.tag(tag)?.to_owned(), weight));
        Ok(prompt.tags().iter().filter_map(tag).collect())
    }

    /// The class of a number or a name.
    fn class(&self, names: &Classes, text: &str) -> Result<usize, Refusal> {
        let classes = self.config.label_dim;
        let class = names.find(text).map_err(|error| Refusal::Invalid(error.to_string()))?;
        ensure(class < classes, || format!("class {class} of {}, expected 0 to {}", self.name, classes - 1))?;
        Ok(class)
    }
}

/// What there is to be used with a model.
pub(super) struct Shelf {
    /// Pixels for each value of latents.
    factor: Option<usize>,
    /// The network that guides, and what it works on.
    guide: Option<(Guide, Domain)>,
    class_names: Classes,
    condition_model: Option<(Domain, Vocabulary)>,
    tagger: bool,
}

impl Shelf {
    pub fn new(files: &Files) -> Result<Self, ServeError> {
        let vae = files.condition_model.as_ref().map(Vae::load).transpose()?;
        let guide = |path: &PathBuf| {
            let file = ModelFile::open(path)?;
            let (config, name) = (&file.net.config, name(path));
            Ok::<_, ModelError>((
                Guide { name, conditional: config.label_dim > 0 },
                Domain::of_model(config, &file.meta),
            ))
        };
        if let Some(path) = &files.preview {
            CodecFile::open(path)?;
        }
        Ok(Self {
            guide: files.guide.as_ref().map(guide).transpose()?,
            class_names: files.class_names.as_deref().map(Classes::load).transpose()?.unwrap_or_default(),
            factor: files.vae.as_ref().map(|path| Ok::<_, CodecError>(CodecFile::open(path)?.factor())).transpose()?,
            condition_model: vae.map(|vae| (Domain::of_condition_model(&vae), vae.vocabulary().clone())),
            tagger: files.tagger.is_some(),
        })
    }

    /// What a model file offers.
    pub fn offer(&self, name: String, path: &Path) -> Result<Offer, ServeError> {
        let file = ModelFile::open(path)?;
        let (config, meta) = (file.net.config.clone(), file.meta.clone());
        let (model, channels) = (path.to_owned(), config.img_channels);
        let factor = match (meta.encoder, self.factor) {
            (ImageSpace::Rgb, _) if channels == 3 => 1,
            (ImageSpace::SdVae, None) => return Err(ServeError::NoCodec { model }),
            (ImageSpace::SdVae, Some(factor)) if channels == crate::codec::LATENTS => factor,
            _ => return Err(ServeError::NoPicture { model, channels }),
        };
        let domain = Domain::of_model(&config, &meta);
        let inventor = self.condition_model.as_ref().filter(|_| config.label_dim > 0);
        let misfits = Misfits {
            guide: self
                .guide
                .as_ref()
                .and_then(|(guide, theirs)| Some(theirs.check_guide(&guide.name, &domain, &name).err()?.to_string())),
            condition_model: inventor.and_then(|(theirs, _)| {
                Some(theirs.check_given("the condition model", &domain, &name).err()?.to_string())
            }),
        };
        let guide = self.guide.as_ref().filter(|_| misfits.guide.is_none()).map(|(guide, _)| guide.clone());
        let invented = inventor.filter(|_| misfits.condition_model.is_none()).map(|(_, vocabulary)| vocabulary);
        let classes = config.label_dim > 0 && meta.is_of_classes() && invented.is_none();
        let classes = classes.then(|| self.class_names.clone());
        let features = matches!(meta.conditioning, Conditioning::Features { .. });
        let (tags, vocabulary) = match invented {
            _ if config.label_dim == 0 => (Tags::No, None),
            // The tags are the same, and here it is known how often each occurs.
            Some(known) if !features && known.tags().iter().map(|tag| &tag.tag).eq(&meta.vocabulary) => {
                (Tags::Plain, Some(known.clone()))
            }
            Some(known) if features => (Tags::Invented, Some(known.clone())),
            _ if features || meta.vocabulary.is_empty() => (Tags::No, None),
            _ => (Tags::Plain, None),
        };
        let named =
            |cause: VocabularyError| ModelError::Metadata { path: path.into(), key: "edm2k", what: cause.to_string() };
        let vocabulary = match (tags, vocabulary) {
            (_, Some(vocabulary)) => vocabulary,
            (Tags::No, None) => Vocabulary::default(),
            (_, None) => meta.tags().map_err(named)?,
        };
        let (like, invents) = (features && self.tagger, invented.is_some());
        let path = path.into();
        Ok(Offer { name, path, config, meta, vocabulary, tags, classes, like, invents, guide, factor, misfits })
    }

    /// The offers of the given models, named after their files. With `more` there may be others later, of runs.
    pub fn offers(&self, files: &Files, more: bool) -> Result<Vec<Arc<Offer>>, ServeError> {
        let mut offers: Vec<Arc<Offer>> = Vec::new();
        for path in &files.models {
            let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let name = |number: u32| if number == 1 { stem.clone() } else { format!("{stem}-{number}") };
            let free = |name: &String| offers.iter().all(|offer| offer.name != *name);
            let name = (1..).map(name).find(free).unwrap_or_default();
            offers.push(Arc::new(self.offer(name, path)?));
        }
        let used = |path: &Option<PathBuf>, by: &dyn Fn(&Offer) -> bool| match path {
            Some(path) if !more && !offers.iter().any(|offer| by(offer)) => Err(path.clone()),
            _ => Ok(()),
        };
        let unused = |why: Option<String>| move |path| ServeError::Unused { path, why };
        let first = |why: fn(&Misfits) -> &Option<String>| offers.iter().find_map(|offer| why(&offer.misfits).clone());
        used(&files.condition_model, &|offer| offer.invents).map_err(unused(first(|all| &all.condition_model)))?;
        used(&files.guide, &|offer| offer.guide.is_some()).map_err(unused(first(|all| &all.guide)))?;
        used(&files.class_names, &|offer| offer.classes.is_some()).map_err(unused(None))?;
        let latents = |offer: &Offer| offer.meta.encoder == ImageSpace::SdVae;
        used(&files.vae, &latents).map_err(unused(None))?;
        used(&files.preview, &latents).map_err(unused(None))?;
        used(&files.tagger, &|offer| offer.like).map_err(unused(None))?;
        Ok(offers)
    }
}
