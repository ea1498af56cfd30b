//! Names of the classes of a class-conditional model: a text file with a line for each, such as `tench, Tinca tinca`.
//! The names between commas all name that class.
//!
//! ```
//! use edm2k::condition::classes::Classes;
//!
//! let classes = Classes::new(["tench, Tinca tinca", "goldfish, Carassius auratus"]);
//! assert_eq!(classes.find("Goldfish"), Ok(1));
//! assert_eq!(classes.name(0), Some("tench, Tinca tinca"));
//! assert_eq!(classes.label(2), "2");
//! let unknown = classes.find("goldfisch").unwrap_err().to_string();
//! assert_eq!(unknown, "unknown class \"goldfisch\", did you mean \"goldfish\"?");
//! ```

use std::collections::HashMap;
use std::path::Path;

use super::vocabulary::VocabularyError;
use crate::formats::{At, input};

/// Longest text that is compared with names.
const LONGEST: usize = 200;

/// Why a text names no class.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum ClassError {
    #[error("\"{name}\" is the name of several classes: {}", classes.iter().map(usize::to_string).collect::<Vec<_>>().join(", "))]
    Several { name: String, classes: Vec<usize> },
    #[error("\"{0}\" is no number, and there are no names of classes")]
    NoNames(String),
    #[error("unknown class \"{name}\"{}", nearest.iter().map(|near| format!(", did you mean \"{near}\"?")).collect::<String>())]
    Unknown { name: String, nearest: Option<String> },
}

/// The names, looked up without regard to case.
#[derive(Clone, Debug, Default)]
pub struct Classes {
    lines: Vec<String>,
    /// The classes of each name, in lower case.
    named: HashMap<String, Vec<usize>>,
}

impl Classes {
    /// Reads a file of names.
    ///
    /// # Errors
    /// [`VocabularyError::Io`]: the file cannot be read, or is no text.
    pub fn load(path: &Path) -> Result<Self, VocabularyError> {
        let text = input::text(path).at(path)?;
        Ok(Self::new(text.lines()))
    }

    /// The names in the lines of such a file.
    pub fn new<'a>(lines: impl IntoIterator<Item = &'a str>) -> Self {
        let mut classes = Self::default();
        for (number, line) in lines.into_iter().enumerate() {
            classes.lines.push(line.trim().into());
            for name in line.split(',').map(|name| name.trim().to_lowercase()).filter(|name| !name.is_empty()) {
                classes.named.entry(name).or_default().push(number);
            }
        }
        classes
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.lines.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// What a class is called.
    pub fn name(&self, class: usize) -> Option<&str> {
        self.lines.get(class).map(String::as_str)
    }

    /// A text by which [`Classes::find`] finds this class: its line, or its number where another class has the same line.
    pub fn label(&self, class: usize) -> String {
        let line = self.name(class).filter(|line| !line.is_empty() && self.find(line) == Ok(class));
        line.map_or_else(|| class.to_string(), String::from)
    }

    /// The classes that have a name like this text, at most `most`, the most alike first.
    pub fn nearest(&self, text: &str, most: usize) -> Vec<usize> {
        let mut classes = Vec::new();
        for name in self.alike(text) {
            let all = &self.named[name];
            classes.extend(all.iter().filter(|class| !classes.contains(*class)).copied().collect::<Vec<_>>());
        }
        classes.truncate(most);
        classes
    }

    /// Names like this text, in lower case, the most alike first.
    fn alike(&self, text: &str) -> Vec<&String> {
        if text.len() > LONGEST {
            return Vec::new();
        }
        let text = text.to_lowercase();
        let scored = self.named.keys().map(|name| (strsim::jaro_winkler(name, &text), name));
        let mut scored: Vec<_> = scored.filter(|(score, _)| *score > 0.8).collect();
        scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
        scored.into_iter().map(|(_, name)| name).collect()
    }

    /// The class of a number, of a whole line, or of one of a line's names.
    ///
    /// # Errors
    /// See [`ClassError`].
    pub fn find(&self, text: &str) -> Result<usize, ClassError> {
        if let Ok(number) = text.parse() {
            return Ok(number);
        }
        if let Some(number) = self.lines.iter().position(|line| line == text) {
            return Ok(number);
        }
        let (name, lower) = (text.to_owned(), text.to_lowercase());
        match self.named.get(&lower).map(Vec::as_slice) {
            Some([one]) => Ok(*one),
            Some(several) => Err(ClassError::Several { name, classes: several.into() }),
            None if self.is_empty() => Err(ClassError::NoNames(name)),
            None => Err(ClassError::Unknown { name, nearest: self.alike(text).first().map(|name| (*name).clone()) }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_have_numbers_and_any_of_their_names() {
        let classes = Classes::new(["tench, Tinca tinca", "goldfish", "crane", "crane, bird"]);
        for (text, class) in [("3", 3), ("tench", 0), ("tinca TINCA", 0), ("tench, Tinca tinca", 0), ("bird", 3)] {
            assert_eq!(classes.find(text), Ok(class));
        }
        // A whole line counts before a name that two classes have.
        assert_eq!(classes.find("crane"), Ok(2));
        let refused = |classes: &Classes, text| classes.find(text).unwrap_err().to_string();
        assert_eq!(refused(&classes, "Crane"), "\"Crane\" is the name of several classes: 2, 3");
        assert_eq!(refused(&classes, "goldfsh"), "unknown class \"goldfsh\", did you mean \"goldfish\"?");
        assert_eq!(refused(&classes, "zeppelin"), "unknown class \"zeppelin\"");
        assert_eq!(refused(&Classes::default(), "cat"), "\"cat\" is no number, and there are no names of classes");
        assert_eq!((classes.name(1), classes.name(4), classes.len()), (Some("goldfish"), None, 4));
        assert_eq!(classes.nearest("cranes", 8), [2, 3]);
        assert_eq!(classes.nearest("cranes", 1), [2]);
        assert_eq!(classes.nearest(&"crane".repeat(100), 8), []);
    }

    #[test]
    fn a_label_finds_its_class() {
        let classes = Classes::new(["tench, Tinca tinca", "crane", "crane", "", "7", "tench"]);
        let labels: Vec<_> = (0..7).map(|class| classes.label(class)).collect();
        assert_eq!(labels, ["tench, Tinca tinca", "crane", "2", "3", "4", "tench", "6"]);
        for (class, label) in labels.iter().enumerate() {
            assert_eq!(classes.find(label), Ok(class));
        }
    }
}
