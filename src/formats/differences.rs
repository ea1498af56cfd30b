//! What differs between two things that should be alike: options of a run, what ranks were given.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::fingerprint::{Fingerprint, Identity};

/// Characters of a value that are shown, if it is a list.
const LIST: usize = 60;

/// A line for [`differing`]: what somebody else has, and what is here.
pub fn there_and_here(key: &str, ours: &str, theirs: &str) -> String {
    format!("{key} is {theirs} there, {ours} here")
}

/// What differs between two values of one type, a text for each field that does; a field within one has both names.
pub fn differing<T: Serialize>(a: &T, b: &T, line: impl Fn(&str, &str, &str) -> String) -> String {
    let [a, b] = [a, b].map(|value| serde_json::to_value(value).unwrap_or_default());
    let (mut text, mut others) = (String::new(), Vec::new());
    each_difference("", &a, &b, &mut |key, a, b| {
        let line = line(key, a, b);
        // All are named, and as many as a message has room for shown.
        if text.len() + line.len() < 150 || text.is_empty() {
            text += &format!("{}{line}", if text.is_empty() { "" } else { "; " });
        } else {
            others.push(key.to_owned());
        }
    });
    if others.is_empty() { text } else { format!("{text}; and {}", others.join(", ")) }
}

/// As [`differing`], of two texts in JSON: what somebody else has, and what is here.
pub fn differing_texts(ours: &str, theirs: &str) -> String {
    match [ours, theirs].map(serde_json::from_str::<Value>) {
        [Ok(ours), Ok(theirs)] => differing(&ours, &theirs, there_and_here),
        _ => "what was given there is not known".into(),
    }
}

fn each_difference(key: &str, a: &Value, b: &Value, each: &mut impl FnMut(&str, &str, &str)) {
    let file = |value: &Value| Identity::deserialize(value).ok();
    let shown = |value: &Value| match value {
        Value::Null => "not given".into(),
        Value::String(text) => Fingerprint::deserialize(value).map_or_else(|_| text.clone(), |print| print.to_string()),
        other => file(other).map_or_else(|| other.to_string(), |file| file.to_string()),
    };
    match (a, b) {
        // One content under two names is no difference.
        (Value::Object(_), Value::Object(_))
            if file(a).zip(file(b)).is_some_and(|(a, b)| a.fingerprint.is_some() && a.fingerprint == b.fingerprint) => {
        }
        (Value::Object(fields), Value::Object(others)) if file(a).is_none() => {
            let (a, b) = (fields, others);
            for name in a.keys().chain(b.keys().filter(|name| !a.contains_key(*name))) {
                let [a, b] = [a, b].map(|fields| fields.get(name).unwrap_or(&Value::Null));
                let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                each_difference(&key, a, b, each);
            }
        }
        // Of long lists, where they begin to differ.
        (Value::Array(ours), Value::Array(theirs))
            if a != b && a.to_string().len() + b.to_string().len() > 2 * LIST =>
        {
            if ours.len() != theirs.len() {
                let [ours, theirs] = [ours, theirs].map(|all| format!("{} values", all.len()));
                return each(key, &ours, &theirs);
            }
            let differ = ours.iter().zip(theirs).enumerate().find(|(_, (a, b))| a != b);
            differ.iter().for_each(|(at, (a, b))| each_difference(&format!("{key}[{at}]"), a, b, each));
        }
        (a, b) if a != b => each(key, &shown(a), &shown(b)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_differs_is_named_field_by_field() {
        let said = |a: Value, b: Value| differing(&a, &b, there_and_here);
        assert_eq!(said(json!({"a": 1, "b": {"c": "x"}}), json!({"a": 1, "b": {"c": "y"}})), "b.c is y there, x here");
        assert_eq!(said(json!({"a": [1, 2]}), json!({"a": [1]})), "a is [1] there, [1,2] here");
        assert_eq!(said(json!({"a": 1}), json!({})), "a is not given there, 1 here");
        let print = Fingerprint::of(["weights"]);
        let (file, bare) = (json!({"name": "m", "fingerprint": print}), json!({"name": "m"}));
        assert_eq!(said(json!({"file": file}), json!({"file": bare})), format!("file is m there, m ({print}) here"));
        let mut many: Vec<u64> = (0..100).collect();
        let all = json!({ "seeds": many });
        assert_eq!(said(all.clone(), json!({"seeds": [7]})), "seeds is 1 values there, 100 values here");
        many[70] = 7;
        assert_eq!(said(all, json!({ "seeds": many })), "seeds[70] is 7 there, 70 here");
    }
}
