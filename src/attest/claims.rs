//! A token's claims, cut down to what a person reads.

use std::collections::BTreeMap;

use serde_json::Value;

/// Claims kept of one verdict.
const MAX_CLAIMS: usize = 32;
/// Longest name kept, characters.
const MAX_NAME: usize = 64;
/// Longest value kept, characters: a SHA-512 in hexadecimal.
const MAX_VALUE: usize = 128;
/// Deepest nesting followed.
const MAX_DEPTH: usize = 6;

/// Leaves of `value` by their path (`platform_version.major`), printable and bounded. Arrays are left out (event
/// logs), as is what is longer than a digest: half a value would only mislead.
pub fn printable(value: &Value) -> BTreeMap<String, String> {
    let mut out = BTreeMap::new();
    collect(String::new(), value, 0, &mut out);
    out
}

fn collect(path: String, value: &Value, depth: usize, out: &mut BTreeMap<String, String>) {
    if out.len() >= MAX_CLAIMS {
        return;
    }
    let text = match value {
        Value::Object(members) if depth < MAX_DEPTH => {
            for (name, member) in members {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                collect(path, member, depth + 1, out);
            }
            return;
        }
        Value::Object(_) | Value::Array(_) | Value::Null => return,
        Value::String(text) => text.clone(),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
    };
    let fits = |s: &str, max: usize| !s.is_empty() && s.len() <= max && s.bytes().all(|b| (0x20..0x7f).contains(&b));
    if fits(&path, MAX_NAME) && fits(&text, MAX_VALUE) {
        out.insert(path, text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn leaves_are_kept_by_path_and_what_nobody_can_read_is_not() {
        let claims = printable(&json!({
            "launch_digest": "abcde",
            "debug": false,
            "platform_version": { "major": 1, "minor": 4 },
            "log": [1, 2],
            "long": "x".repeat(129),
            "escape": "\u{1b}[31m",
            "none": null,
            "x\ny": "z",
        }));
        let shown: Vec<_> = claims.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        let wanted = [
            ("debug", "false"),
            ("launch_digest", "abcde"),
            ("platform_version.major", "1"),
            ("platform_version.minor", "4"),
        ];
        assert_eq!(shown, wanted);
    }

    #[test]
    fn the_number_of_claims_and_their_depth_are_bounded() {
        let many: serde_json::Map<_, _> = (0..1000).map(|n| (format!("c{n}"), json!(n))).collect();
        assert_eq!(printable(&Value::Object(many)).len(), MAX_CLAIMS);
        let deep = (0..100).fold(json!(1), |inner, _| json!({ "a": inner }));
        assert!(printable(&deep).is_empty());
        assert!(printable(&json!("alone")).is_empty());
    }
}
