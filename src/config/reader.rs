//! Reads a spanned TOML tree into typed tables and goes on after an error, so that one run shows
//! every mistake. (serde's derive would end at the first.)

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::diagnostics::{Place, Sink, quote, suggest};

/// Entries of one array; more is a generated file gone wrong.
const MAX_ENTRIES: usize = 4096;

/// A value and where it stands.
#[derive(Debug, Clone)]
pub(super) struct At<T> {
    pub value: T,
    pub at: Place,
}

/// An integer or a string, as ports and user names are written.
#[derive(Debug, Clone)]
pub(super) enum Scalar {
    Int(i64),
    Text(String),
}

impl std::fmt::Display for Scalar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Scalar::Int(n) => write!(f, "{n}"),
            Scalar::Text(s) => f.write_str(&quote(s)),
        }
    }
}

/// Text that no message repeats: it may be secret.
#[derive(Clone)]
pub(super) struct Hidden(pub String);

impl std::fmt::Debug for Hidden {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("(hidden)")
    }
}

/// A table with keys of the operator's own choice.
pub(super) type Free<T> = Vec<(At<String>, At<T>)>;

/// What a TOML value can be read as. Reports what does not fit and returns `None`.
pub(super) trait FromToml: Sized {
    fn from_toml(value: &DeValue<'_>, at: &Place, sink: &mut Sink<'_>) -> Option<Self>;
}

/// Reads one value, remembering its place.
pub(super) fn read<T: FromToml>(value: &Spanned<DeValue<'_>>, at: Place, sink: &mut Sink<'_>) -> Option<At<T>> {
    sink.remember(&at);
    T::from_toml(value.get_ref(), &at, sink).map(|value| At { value, at })
}

fn show(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(s) => quote(s),
        DeValue::Integer(i) => quote(&i.to_string()).trim_matches('"').to_owned(),
        DeValue::Float(x) => quote(&x.to_string()).trim_matches('"').to_owned(),
        DeValue::Boolean(b) => b.to_string(),
        DeValue::Datetime(d) => d.to_string(),
        DeValue::Array(_) => "an array".to_owned(),
        DeValue::Table(_) => "a table".to_owned(),
    }
}

fn wrong_type<T>(value: &DeValue<'_>, at: &Place, sink: &mut Sink<'_>, wanted: &str, example: &str) -> Option<T> {
    let message = match value {
        DeValue::Array(_) | DeValue::Table(_) => format!("{} where {wanted} belongs", show(value)),
        _ => format!("{} is of type {}, not {wanted}", show(value), value.type_str()),
    };
    sink.error(at, "wrong-type", message, format!("write for example {example}"));
    None
}

fn last_key(at: &Place) -> &str {
    at.path.rsplit('.').next().unwrap_or(&at.path)
}

impl FromToml for String {
    fn from_toml(value: &DeValue<'_>, at: &Place, sink: &mut Sink<'_>) -> Option<Self> {
        match value {
            DeValue::String(s) => Some(s.to_string()),
            DeValue::Integer(_) | DeValue::Float(_) | DeValue::Boolean(_) | DeValue::Datetime(_) => {
                let key = last_key(at);
                let duration = ["timeout", "interval", "ttl"].iter().any(|end| key.ends_with(end));
                let unit = if duration && value.is_integer() { "s" } else { "" };
                wrong_type(value, at, sink, "a string", &format!("{key} = \"{}{unit}\"", show(value)))
            }
            _ => wrong_type(value, at, sink, "a string", &format!("{} = \"...\"", last_key(at))),
        }
    }
}

impl FromToml for Hidden {
    fn from_toml(value: &DeValue<'_>, at: &Place, sink: &mut Sink<'_>) -> Option<Self> {
        match value.as_str() {
            Some(s) => Some(Hidden(s.to_owned())),
            None => {
                let message = format!("a value of type {} where a string belongs", value.type_str());
                sink.error(at, "wrong-type", message, "put the value in quotes");
                None
            }
        }
    }
}

impl FromToml for bool {
    fn from_toml(value: &DeValue<'_>, at: &Place, sink: &mut Sink<'_>) -> Option<Self> {
        let example = format!("{} = true", last_key(at));
        value.as_bool().or_else(|| wrong_type(value, at, sink, "true or false", &example))
    }
}

impl FromToml for i64 {
    fn from_toml(value: &DeValue<'_>, at: &Place, sink: &mut Sink<'_>) -> Option<Self> {
        let Some(int) = value.as_integer() else {
            return wrong_type(value, at, sink, "an integer", &format!("{} = 1000", last_key(at)));
        };
        // A number beyond 64 bits is out of every range there is; the range check names it.
        let big = if int.as_str().starts_with('-') { i64::MIN } else { i64::MAX };
        Some(i64::from_str_radix(int.as_str(), int.radix()).unwrap_or(big))
    }
}

impl FromToml for Scalar {
    fn from_toml(value: &DeValue<'_>, at: &Place, sink: &mut Sink<'_>) -> Option<Self> {
        match value {
            DeValue::String(s) => Some(Scalar::Text(s.to_string())),
            DeValue::Integer(_) => i64::from_toml(value, at, sink).map(Scalar::Int),
            _ => {
                let key = last_key(at);
                let example = if key.starts_with("port") { "8443" } else { "1000" };
                wrong_type(value, at, sink, "an integer or a string", &format!("{key} = {example}"))
            }
        }
    }
}

impl<T: FromToml> FromToml for Vec<At<T>> {
    fn from_toml(value: &DeValue<'_>, at: &Place, sink: &mut Sink<'_>) -> Option<Self> {
        let Some(array) = value.as_array() else {
            let (key, top) = (last_key(at), !at.path.contains('.'));
            let example = match value {
                DeValue::Table(_) if top => format!("[[{key}]] instead of [{key}]"),
                DeValue::Table(_) => format!("{key} = [{{ ... }}]"),
                _ => format!("{key} = [{}]", show(value)),
            };
            return wrong_type(value, at, sink, "an array", &example);
        };
        if array.len() > MAX_ENTRIES {
            let message = format!("{} entries, more than {MAX_ENTRIES}", array.len());
            sink.error(at, "too-many", message, "use prefixes and port ranges, or several files");
            return None;
        }
        // A bad entry is left out of the list; its error refuses the file, so nothing runs without it.
        let entries = array.iter().enumerate();
        Some(entries.filter_map(|(i, v)| read(v, at.index(i, v.span().start), sink)).collect())
    }
}

/// One string or several, as `as_addr` is written.
#[derive(Debug, Clone, Default)]
pub(super) struct OneOrMany(pub Vec<At<String>>);

impl FromToml for OneOrMany {
    fn from_toml(value: &DeValue<'_>, at: &Place, sink: &mut Sink<'_>) -> Option<Self> {
        match value {
            DeValue::Array(_) => Vec::from_toml(value, at, sink).map(Self),
            DeValue::String(s) => Some(Self(vec![At { value: s.to_string(), at: at.clone() }])),
            _ => wrong_type(value, at, sink, "a string or an array of strings", &format!("{} = \"...\"", last_key(at))),
        }
    }
}

impl<T: FromToml> FromToml for Free<T> {
    fn from_toml(value: &DeValue<'_>, at: &Place, sink: &mut Sink<'_>) -> Option<Self> {
        let Some(table) = value.as_table() else {
            // Not the value: what belongs into this table may be secret.
            let message = format!("a value of type {} where a table belongs", value.type_str());
            sink.error(at, "wrong-type", message, format!("write {} = {{ name = \"value\" }}", last_key(at)));
            return None;
        };
        let mut entries = Vec::new();
        for (key, value) in table {
            let name: &str = key.get_ref();
            let key = At { value: name.to_owned(), at: at.key(name, key.span().start) };
            if let Some(value) = read(value, at.key(name, value.span().start), sink) {
                entries.push((key, value));
            }
        }
        Some(entries)
    }
}

/// The table of a value, or a wrong-type finding.
pub(super) fn table<'v, 'i>(value: &'v DeValue<'i>, at: &Place, sink: &mut Sink<'_>) -> Option<&'v DeTable<'i>> {
    match value.as_table() {
        Some(table) => Some(table),
        None => wrong_type(value, at, sink, "a table", &format!("{} = {{ key = value }}", last_key(at))),
    }
}

/// One field of a table, if it is there.
pub(super) fn field<T: FromToml>(table: &DeTable<'_>, key: &str, at: &Place, sink: &mut Sink<'_>) -> Option<At<T>> {
    table.get(key).and_then(|value| read(value, at.key(key, value.span().start), sink))
}

/// Reports each key that is neither known nor announced for a later version.
pub(super) fn other_keys(table: &DeTable<'_>, known: &[&str], later: &[&str], at: &Place, sink: &mut Sink<'_>) {
    for (key, value) in table {
        let name: &str = key.get_ref();
        let place = at.key(name, key.span().start);
        if known.contains(&name) {
            continue;
        }
        if later.contains(&name) {
            // `false` asks for what this version does anyway.
            if value.get_ref().as_bool() != Some(false) {
                let message = format!("`{name}` is not in this version");
                sink.error(&place, "not-in-this-version", message, format!("remove `{name}`"));
            }
            continue;
        }
        let message = format!("unknown key `{}`", quote(name).trim_matches('"'));
        sink.error(&place, "unknown-key", message, suggest(name, known));
    }
}

/// Declares a table as the file writes it: each field optional and with its place, unknown keys
/// refused, keys of later versions refused with their own words.
macro_rules! raw_table {
    ($(#[$meta:meta])* $name:ident { $($field:ident: $type:ty,)* } later { $($later:literal),* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Default)]
        pub(super) struct $name {
            $(pub $field: Option<At<$type>>,)*
        }
        impl FromToml for $name {
            fn from_toml(value: &DeValue<'_>, at: &Place, sink: &mut Sink<'_>) -> Option<Self> {
                let table = reader::table(value, at, sink)?;
                reader::other_keys(table, &[$(stringify!($field)),*], &[$($later),*], at, sink);
                Some(Self { $($field: reader::field(table, stringify!($field), at, sink),)* })
            }
        }
    };
}
pub(super) use raw_table;
