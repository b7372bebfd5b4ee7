//! A token's claims, cut down to what a person reads.

use std::collections::BTreeMap;

use serde_json::Value;

/// Claims kept of one verdict.
const MAX_CLAIMS: usize = 64;
/// Longest name kept, characters.
const MAX_NAME: usize = 64;
/// Longest value kept, characters: a SHA-512 in hexadecimal.
const MAX_VALUE: usize = 128;
/// Prefix of the names of what the policy found.
const VECTOR: &str = "ar4si.";
/// Members of the trustworthiness vector.
const VECTOR_NAMES: [&str; 8] = [
    "instance-identity",
    "configuration",
    "executables",
    "file-system",
    "hardware",
    "runtime-opaque",
    "storage-opaque",
    "sourced-data",
];
/// Deepest nesting followed.
const MAX_DEPTH: usize = 6;

/// Leaves of `value` by their path (`platform_version.major`), printable and bounded. Arrays are left out (event
/// logs), as is what is longer than a digest: half a value would only mislead.
pub fn printable(value: &Value) -> BTreeMap<String, String> {
    let mut out = BTreeMap::new();
    collect(String::new(), value, 0, &mut out);
    out
}

/// Claims of a token's submodule: those of its TEE, and what the policy made of them (AR4SI's trustworthiness vector,
/// draft-ietf-rats-ar4si, section 2.3) as `ar4si.NAME`, which no claim of the TEE can take the place of.
pub fn with_vector(tee: &Value, vector: Option<&Value>) -> BTreeMap<String, String> {
    let mut out = printable(tee);
    out.retain(|name, _| !name.starts_with(VECTOR));
    for name in VECTOR_NAMES {
        let value = vector.and_then(|v| v.get(name).or_else(|| v.get(name.replace('-', "_"))));
        if let Some(value) = value.and_then(Value::as_i64) {
            out.insert(format!("{VECTOR}{name}"), format!("{} ({value})", tier(value)));
        }
    }
    out
}

/// The tier that a value of the vector belongs to (section 2.3.2).
fn tier(value: i64) -> &'static str {
    match value {
        -1..=1 => "none",
        2..=31 | -32..=-2 => "affirming",
        32..=95 | -96..=-33 => "warning",
        _ => "contraindicated",
    }
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
    fn what_the_policy_found_stands_beside_the_claims_and_cannot_be_forged_by_them() {
        let submod = json!({
            "ear.status": "affirming",
            "ear.trustworthiness-vector": {
                "hardware": 2, "executables": 33, "file-system": 0, "configuration": -128, "runtime-opaque": "2", "x": 2
            },
        });
        let tee = json!({ "launch_digest": "abcde", "ar4si": { "hardware": "affirming (3)", "sourced-data": "2" } });
        let claims = with_vector(&tee, submod.get("ear.trustworthiness-vector"));
        let shown: Vec<_> = claims.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        let wanted = [
            ("ar4si.configuration", "contraindicated (-128)"),
            ("ar4si.executables", "warning (33)"),
            ("ar4si.file-system", "none (0)"),
            ("ar4si.hardware", "affirming (2)"),
            ("launch_digest", "abcde"),
        ];
        assert_eq!(shown, wanted);
        assert!(with_vector(&Value::Null, None).is_empty());
        let many: serde_json::Map<_, _> = (0..1000).map(|n| (format!("c{n}"), json!(n))).collect();
        let claims = with_vector(&Value::Object(many), submod.get("ear.trustworthiness-vector"));
        assert_eq!((claims.len(), claims["ar4si.hardware"].as_str()), (MAX_CLAIMS + 4, "affirming (2)"));
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
