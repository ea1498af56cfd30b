//! JSON that people and other programs write. An error names the field that is wrong by its path, and what was expected
//! in words that are no Rust.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{DeserializeOwned, Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::{RawValue, to_raw_value};
use serde_path_to_error::{Path, Segment};

/// Most fields of an object. Some clients of A1111's API send a hundred.
const MAX_FIELDS: usize = 256;

/// What is wrong with a text in JSON, and where.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct JsonError(String);

/// Reads a whole text.
///
/// # Errors
/// It is no JSON, or not of that type.
pub fn read<'de, T: Deserialize<'de>>(json: &'de (impl AsRef<[u8]> + ?Sized)) -> Result<T, JsonError> {
    let json = json.as_ref();
    // To keep a path takes time, so it is kept on the way to an error only.
    serde_json::from_slice(json).or_else(|_| {
        let mut reader = serde_json::Deserializer::from_slice(json);
        let read = serde_path_to_error::deserialize(&mut reader);
        let read =
            read.map_err(|error| JsonError(behind(error.path(), error.inner(), in_place(json, error.inner()))))?;
        reader.end().map_err(|error| JsonError(in_place(json, &error)))?;
        Ok(read)
    })
}

/// Reads an object, as [`Fields`] do: a list is none.
///
/// # Errors
/// As those of [`Fields::parse`] and [`Fields::read`].
pub fn object<T: DeserializeOwned>(json: &str) -> Result<T, JsonError> {
    Fields::parse(json)?.read()
}

/// The fields of an object as they are written, each once.
#[derive(Debug, Serialize)]
pub struct Fields(BTreeMap<String, Box<RawValue>>);

impl Fields {
    /// Finds the fields; what is in them is not expanded.
    ///
    /// # Errors
    /// It is no JSON, or no object; a field occurs twice; there are more than 256.
    pub fn parse(json: &str) -> Result<Self, JsonError> {
        read(json)
    }

    /// Those that are not null, which is what many programs write for what they leave out.
    #[must_use]
    pub fn without_nulls(mut self) -> Self {
        self.0.retain(|_, value| value.get() != "null");
        self
    }

    /// A field, as it is written.
    pub fn get(&self, field: &str) -> Option<&str> {
        self.0.get(field).map(|value| value.get())
    }

    /// Sets a field that is not there.
    pub fn or(&mut self, field: &str, value: impl Serialize) {
        if !self.0.contains_key(field) {
            self.set(field, value);
        }
    }

    /// Sets a field.
    pub fn set(&mut self, field: &str, value: impl Serialize) {
        if let Ok(value) = to_raw_value(&value) {
            self.0.insert(field.into(), value);
        }
    }

    /// Reads them as something.
    ///
    /// # Errors
    /// A field is unknown, missing, or not of its type.
    pub fn read<T: DeserializeOwned>(&self) -> Result<T, JsonError> {
        let json = serde_json::to_string(self).map_err(|error| JsonError(error.to_string()))?;
        let read = serde_path_to_error::deserialize(&mut serde_json::Deserializer::from_str(&json));
        // Where it is in this text, which nobody wrote, is left out.
        read.map_err(|error| JsonError(behind(error.path(), error.inner(), plain(error.inner()))))
    }
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Self(BTreeMap::new()))
    }
}

impl<'de> Visitor<'de> for Fields {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Self, A::Error> {
        while let Some((field, value)) = map.next_entry::<String, Box<RawValue>>()? {
            if self.0.contains_key(&field) {
                return Err(A::Error::custom(format!("duplicate field `{field}`")));
            }
            if self.0.len() == MAX_FIELDS {
                return Err(A::Error::custom(format!("more than {MAX_FIELDS} fields")));
            }
            self.0.insert(field, value);
        }
        Ok(self)
    }
}

/// A message behind the path of the field that it is about. An unknown field is behind that of its object. Where the text
/// ends early or is no JSON, the place in it says more than a path.
fn behind(path: &Path, error: &serde_json::Error, what: String) -> String {
    let whole = path.to_string();
    let known = match path.iter().next_back() {
        _ if !error.is_data() => "",
        Some(Segment::Map { key }) if what.starts_with(&format!("unknown field `{key}`")) => {
            whole.strip_suffix(key.as_str()).map_or(&whole[..], |object| object.trim_end_matches('.'))
        }
        _ => &whole,
    };
    if matches!(known, "" | ".") { what } else { format!("{known}: {what}") }
}

/// The message of an error, with its place in the text: line and column, or of a text of one line the column.
fn in_place(json: &[u8], error: &serde_json::Error) -> String {
    match (error.line(), error.column(), json.trim_ascii().contains(&b'\n')) {
        (0, ..) => plain(error),
        (line, column, true) => format!("{} at line {line} column {column}", plain(error)),
        (_, column, false) => format!("{} at column {column}", plain(error)),
    }
}

/// The message of an error, with JSON's words for Rust's, without its place.
fn plain(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    let mut text = text.strip_suffix(&place).unwrap_or(&text).to_owned();
    for (found, plain) in [("sequence", "a list"), ("map", "an object")] {
        if let Some(rest) = text.strip_prefix(&format!("invalid type: {found}, ")) {
            text = format!("invalid type: {plain}, {rest}");
        }
    }
    let unsigned = ["u64", "u32", "u16", "u8", "usize"].map(|kind| (kind, "a whole number that is not negative"));
    let others = [("i64", "a whole number"), ("f64", "a number"), ("f32", "a number")];
    let containers = [("a sequence", "a list"), ("a map", "an object")];
    let nonzero = [("a nonzero u8", "a whole number from 1 to 255"), ("a nonzero u32", "a whole number from 1 on")];
    for (kind, plain) in unsigned.into_iter().chain(others).chain(containers).chain(nonzero) {
        if let Some(what) = text.strip_suffix(&format!("expected {kind}")) {
            return format!("{what}expected {plain}");
        }
    }
    for several in ["expected a tuple of size ", "expected an array of length "] {
        if let Some((what, count)) = text.rsplit_once(several) {
            return format!("{what}expected a list of {count}");
        }
    }
    match text.rsplit_once("expected struct ") {
        Some((what, _)) => format!("{what}expected an object"),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Thing {
        size: Option<u64>,
        parts: Option<Vec<Thing>>,
    }

    #[test]
    fn errors_have_the_path_of_the_field_and_no_words_of_rust() {
        let whole = "expected a whole number that is not negative";
        for (json, expected) in [
            (
                r#"{"size": "a at line 1"}"#,
                format!(r#"size: invalid type: string "a at line 1", {whole} at column 22"#),
            ),
            (r#"{"size": -1}"#, format!("size: invalid value: integer `-1`, {whole} at column 11")),
            (r#"{"parts": [{"size": {}}]}"#, format!("parts[0].size: invalid type: an object, {whole} at column 20")),
            ("{\"size\":\n\n2.5}\n", format!("size: invalid type: floating point `2.5`, {whole} at line 3 column 3")),
            (r#"{"parts": 7}"#, "parts: invalid type: integer `7`, expected a list at column 11".into()),
            (r#"{"parts": [7]}"#, "parts[0]: invalid type: integer `7`, expected an object at column 12".into()),
            (r#"{"siez": 1}"#, "unknown field `siez`, expected `size` or `parts` at column 7".into()),
            (
                r#"{"parts": [{"a.siez": 1}]}"#,
                "parts[0]: unknown field `a.siez`, expected `size` or `parts` at column 20".into(),
            ),
            (r#"{"size": 1, "size": 1}"#, "duplicate field `size` at column 18".into()),
            ("{} {}", "trailing characters at column 4".into()),
        ] {
            assert_eq!(read::<Thing>(json).unwrap_err().to_string(), expected, "{json}");
        }
        assert_eq!(
            read::<(f64, f64)>("[1]").unwrap_err().to_string(),
            "invalid length 1, expected a list of 2 at column 3"
        );
        assert_eq!(read::<Vec<u64>>("[1").unwrap_err().to_string(), "EOF while parsing a list at column 2");
        assert_eq!(read::<Thing>(r#"{"size""#).unwrap_err().to_string(), "EOF while parsing an object at column 7");
    }

    #[test]
    fn objects_have_each_field_once_and_none_that_is_null() {
        let said = |json: &str| object::<Thing>(json).unwrap_err().to_string();
        assert_eq!(said(r#"{"size": 1, "size": null}"#), "duplicate field `size` at column 25");
        assert_eq!(said("[7, null]"), "invalid type: a list, expected an object at column 0");
        assert_eq!(
            said(r#"{"parts": [{"size": true}]}"#),
            "parts[0].size: invalid type: boolean `true`, expected a whole number that is not negative"
        );
        let many = Value::from_iter((0..300).map(|i| (format!("f{i}"), i)));
        assert!(said(&many.to_string()).starts_with("more than 256 fields"));
        assert_eq!(
            read::<std::num::NonZeroU8>("0").unwrap_err().to_string(),
            "invalid value: integer `0`, expected a whole number from 1 to 255 at column 1"
        );
        let mut fields = Fields::parse(r#"{"parts": [], "size": null}"#).unwrap();
        fields.or("size", 3);
        assert_eq!(fields.get("size"), Some("null"));
        let mut fields = fields.without_nulls();
        fields.or("size", 3);
        fields.or("parts", "is there");
        let thing: Thing = fields.read().unwrap();
        assert_eq!((thing.size, thing.parts.unwrap().len()), (Some(3), 0));
    }
}
