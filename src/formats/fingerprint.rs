//! Fingerprints: what files, tensors and datasets are recognised by, wherever they lie and whatever they are called.
//!
//! A fingerprint is the first 128 bits of BLAKE3 of a content. It is computed where the content is read or written
//! anyway, and stored: in shards, models, condition models and checkpoints. Where two things are used together, their
//! fingerprints are compared. A file that is older than fingerprints has none, and is not compared.

use std::fmt;
use std::io::{self, Read};
use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::formats::input;

/// The fingerprint of a content: equal ones mean equal contents.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(u128);

impl Fingerprint {
    /// The fingerprint of some parts. It also depends on where one ends and the next begins.
    pub fn of<T: AsRef<[u8]>>(parts: impl IntoIterator<Item = T>) -> Self {
        let mut hasher = Hasher::default();
        parts.into_iter().for_each(|part| hasher.add(part.as_ref()));
        hasher.finish()
    }

    /// The fingerprint of all bytes of a file.
    pub fn of_file(path: &Path) -> io::Result<Self> {
        let mut file = input::open(path)?;
        let mut buffer = vec![0; 1 << 22];
        let mut hasher = Hasher::default();
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(hasher.finish()),
                n => hasher.0.update_rayon(&buffer[..n]),
            };
        }
    }
}

impl fmt::Display for Fingerprint {
    /// Writes its first digits, which are enough for people to tell things apart.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:012x}", self.0 >> 80)
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl Serialize for Fingerprint {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{self:?}"))
    }
}

impl<'de> Deserialize<'de> for Fingerprint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digits = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let number = u128::from_str_radix(&text, 16).ok().filter(|_| digits);
        number.map(Self).ok_or_else(|| serde::de::Error::custom("expected a fingerprint of 32 hexadecimal digits"))
    }
}

/// Makes a [`Fingerprint`] of parts, one after the other.
#[derive(Default)]
pub struct Hasher(blake3::Hasher);

impl Hasher {
    /// Adds a part, and its length.
    pub fn add(&mut self, part: &[u8]) {
        self.0.update(&(part.len() as u64).to_le_bytes());
        // The library says that threads pay off from here on.
        if part.len() < 128 << 10 {
            self.0.update(part)
        } else {
            self.0.update_rayon(part)
        };
    }

    /// The fingerprint of all parts so far.
    pub fn finish(&self) -> Fingerprint {
        let bytes: [u8; 16] = self.0.finalize().as_bytes()[..16].try_into().expect("a hash has 32 bytes");
        Fingerprint(u128::from_be_bytes(bytes))
    }
}

/// A file, by its name, for people, and by its content, which is what it is recognised by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Name of the file, without where it lies.
    pub name: String,
    /// Fingerprint of its bytes; `None` if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<Fingerprint>,
}

impl Identity {
    /// Reads a file.
    pub fn of_file(path: &Path) -> io::Result<Self> {
        Ok(Self { name: name(path), fingerprint: Some(Fingerprint::of_file(path)?) })
    }

    /// Whether the two are known to have different contents.
    pub fn differs(&self, other: &Self) -> bool {
        differ(&self.fingerprint, &other.fingerprint)
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        self.fingerprint.iter().try_for_each(|fingerprint| write!(f, " ({fingerprint})"))
    }
}

/// Name of a file, for people.
pub fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Whether both are known, and not the same.
pub fn differ<T: PartialEq>(a: &Option<T>, b: &Option<T>) -> bool {
    matches!((a, b), (Some(a), Some(b)) if a != b)
}

/// Replaces `now` by `then` unless both are known and differ. A comparison afterwards then finds only differences that
/// are known.
pub fn settle<T: PartialEq + Clone>(now: &mut Option<T>, then: &Option<T>) {
    if !differ(now, then) {
        now.clone_from(then);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fingerprints_are_of_the_content_and_its_parts() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| {
            std::fs::write(dir.path().join(name), bytes).unwrap();
            Identity::of_file(&dir.path().join(name)).unwrap()
        };
        let (a, b, c) = (write("a", b"content"), write("b", b"content"), write("c", b"Content"));
        assert!(!a.differs(&b) && a.differs(&c));
        assert_ne!(Fingerprint::of(["ab", "c"]), Fingerprint::of(["a", "bc"]));
        let long = vec![7; 3 << 20];
        assert_eq!(Fingerprint::of([&long]), Fingerprint::of([&long]));
        // The BLAKE3 hash of nothing begins with these digits.
        assert_eq!(format!("{:?}", write("d", b"").fingerprint.unwrap()), "af1349b9f5f9a1a6a0404dea36dcc949");
    }

    #[test]
    fn what_nobody_noted_is_not_compared() {
        let old: Identity = serde_json::from_str("{\"name\": \"start.safetensors\"}").unwrap();
        assert_eq!(old, Identity { name: "start.safetensors".into(), fingerprint: None });
        let new = Identity { name: "x".into(), fingerprint: Some(Fingerprint::of(["x"])) };
        assert!(!old.differs(&new) && !new.differs(&old));
        let text = serde_json::to_string(&new).unwrap();
        assert_eq!(serde_json::from_str::<Identity>(&text).unwrap(), new);
        assert!(serde_json::from_str::<Fingerprint>("\"+0001\"").is_err());
    }
}
