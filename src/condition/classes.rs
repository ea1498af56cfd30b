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
use std::path::{Path, PathBuf};

use crate::formats::{At, FileError, input};

/// What stands for a class that the seed draws, instead of a name.
pub const ANY: &str = "random";

/// Longest text that is compared with names.
const LONGEST: usize = 200;

/// Why a file has no names of classes.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
#[non_exhaustive]
pub enum ClassesError {
    #[error("{0}")]
    Io(#[from] FileError),
    #[error("{}: line {line} has a control character, expected names", path.display())]
    Control { path: PathBuf, line: usize },
}

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
    /// The classes of each line.
    whole: HashMap<String, Vec<usize>>,
    /// The classes of each name, in lower case.
    named: HashMap<String, Vec<usize>>,
}

impl Classes {
    /// Reads a file of names.
    ///
    /// # Errors
    /// [`ClassesError`]: the file cannot be read, or is no text of names.
    pub fn load(path: &Path) -> Result<Self, ClassesError> {
        let text = input::text(path).at(path)?;
        // They would go into pictures' text chunks, which must not have them.
        match text.lines().position(|line| line.contains(|c: char| c.is_control() && c != '\t')) {
            Some(line) => Err(ClassesError::Control { path: path.into(), line: line + 1 }),
            None => Ok(Self::new(text.lines())),
        }
    }

    /// The names in the lines of such a file.
    pub fn new<'a>(lines: impl IntoIterator<Item = &'a str>) -> Self {
        let mut classes = Self::default();
        for (number, line) in lines.into_iter().enumerate() {
            let line = line.trim().to_owned();
            classes.whole.entry(line.clone()).or_default().push(number);
            for name in line.split(',').map(|name| name.trim().to_lowercase()).filter(|name| !name.is_empty()) {
                let of_name = classes.named.entry(name).or_default();
                // A line may have a name twice.
                if of_name.last() != Some(&number) {
                    of_name.push(number);
                }
            }
            classes.lines.push(line);
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

    /// A text by which [`Classes::find`] finds this class and which is not [`ANY`]: its line, or its number where that says
    /// nothing or something else.
    pub fn label(&self, class: usize) -> String {
        let says = |line: &&str| !line.is_empty() && *line != ANY && self.find(line) == Ok(class);
        self.name(class).filter(says).map_or_else(|| class.to_string(), String::from)
    }

    /// The classes below `classes` that have a name like this text, at most `most`, the most alike first.
    pub fn nearest(&self, text: &str, classes: usize, most: usize) -> Vec<usize> {
        let mut nearest = Vec::new();
        for class in self.alike(text).into_iter().flat_map(|name| &self.named[name]).filter(|&&class| class < classes) {
            if nearest.len() == most {
                break;
            } else if !nearest.contains(class) {
                nearest.push(*class);
            }
        }
        nearest
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

    /// The class of a number, of a whole line, or of one of a line's names. Commas and white space around it do not count.
    ///
    /// # Errors
    /// See [`ClassError`].
    pub fn find(&self, text: &str) -> Result<usize, ClassError> {
        let text = text.trim_matches(|c: char| c == ',' || c.is_whitespace());
        if let Ok(number) = text.parse() {
            return Ok(number);
        }
        let name = text.to_owned();
        match self.whole.get(text).or_else(|| self.named.get(&text.to_lowercase())).map(Vec::as_slice) {
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
        assert_eq!(classes.nearest("cranes", 4, 8), [2, 3]);
        assert_eq!(classes.nearest("cranes", 4, 1), [2]);
        assert_eq!(classes.nearest("cranes", 3, 8), [2], "there are three classes");
        assert!(classes.nearest(&"crane".repeat(100), 4, 8).is_empty());
        assert_eq!(classes.find(" tench, "), Ok(0));
        assert_eq!(Classes::new(["pug, Pug", "7"]).find("Pug"), Ok(0), "a name twice");
        assert_eq!(
            refused(&Classes::new(["crane", "crane"]), "crane"),
            "\"crane\" is the name of several classes: 0, 1"
        );
    }

    #[test]
    fn a_label_finds_its_class() {
        let classes = Classes::new(["tench, Tinca tinca", "crane", "crane", "", "7", "tench", ANY]);
        let labels: Vec<_> = (0..8).map(|class| classes.label(class)).collect();
        assert_eq!(labels, ["tench, Tinca tinca", "1", "2", "3", "4", "tench", "6", "7"]);
        for (class, label) in labels.iter().enumerate() {
            assert_eq!(classes.find(label), Ok(class));
        }
    }

    #[test]
    fn names_are_text() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("names.txt");
        let refused = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Classes::load(&path).unwrap_err().to_string()
        };
        assert!(refused("tench\ngold\0fish\n").ends_with("names.txt: line 2 has a control character, expected names"));
        assert!(refused("tench\rgoldfish\r").ends_with("line 1 has a control character, expected names"));
        std::fs::write(&path, "tench\r\ngoldfish\r\n").unwrap();
        assert_eq!(Classes::load(&path).unwrap().find("goldfish"), Ok(1));
    }
}
