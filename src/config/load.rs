//! From a name or path to a configuration.

use std::io::Read;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use super::check::check;
use super::diagnostics::{Diagnostic, Place, Report, Sink, quote};
use super::foreign;
use super::raw::RawFile;
use super::reader::FromToml;
use super::{Config, InstanceName};

/// Where the instances' files are.
pub const CONFIG_DIR: &str = "/etc/tng";
/// Names another directory instead, for tests.
pub const CONFIG_DIR_ENV: &str = "TNG_CONFIG_DIR";
/// The largest file that is read.
pub const MAX_FILE: u64 = 1 << 20;

/// A usable configuration and what the operator should know about it.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// Findings that do not refuse it.
    pub warnings: Vec<Diagnostic>,
}

/// The directory of the instances' files: `TNG_CONFIG_DIR`, otherwise `/etc/tng`.
pub fn config_dir() -> PathBuf {
    match std::env::var_os(CONFIG_DIR_ENV) {
        Some(dir) if !dir.is_empty() => dir.into(),
        _ => CONFIG_DIR.into(),
    }
}

/// The file that an operator means: something with `/` or ending in `.toml` is a path, anything
/// else the name of an instance in [`config_dir`]. Fails on an illegal name.
pub fn instance_path(name_or_path: &str) -> Result<PathBuf, Report> {
    if name_or_path.contains('/') || name_or_path.ends_with(".toml") {
        let path = PathBuf::from(name_or_path);
        instance_of(&path)?;
        return Ok(path);
    }
    let path = config_dir().join(format!("{name_or_path}.toml"));
    instance_of(&path)?;
    Ok(path)
}

/// The file of a unit's instance, which is a name and nothing else: `tng@web.toml` is not another word for `tng@web`.
pub fn unit_path(name: &str) -> Result<PathBuf, Report> {
    let file = config_dir().join(format!("{name}.toml"));
    if InstanceName::new(name).is_err() {
        let message = format!("{} is not a legal instance name", quote(name));
        let hint = "a unit's instance is the file's name without .toml: systemctl start tng@NAME";
        return Err(Report::file_error(&file, "bad-name", message, hint));
    }
    Ok(file)
}

/// The instance that a file makes: its stem.
pub fn instance_of(path: &Path) -> Result<InstanceName, Report> {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    InstanceName::new(&stem).map_err(|_| {
        let message = format!("{} is not a legal instance name", quote(&stem));
        let hint = "name the file with 1 to 32 of a-z, 0-9 and -, beginning with a letter or digit, and .toml";
        Report::file_error(path, "bad-name", message, hint)
    })
}

/// The `*.toml` files of [`config_dir`], sorted; hidden files are left out, illegal names are not
/// (loading them says what is wrong). A directory that does not exist holds none.
pub fn list_instances() -> Result<Vec<PathBuf>, Report> {
    list_in(&config_dir())
}

pub(super) fn list_in(dir: &Path) -> Result<Vec<PathBuf>, Report> {
    let failed = |e: std::io::Error| {
        let hint = "check the directory and its permissions";
        Report::file_error(dir, "file-unreadable", format!("cannot be listed: {e}"), hint)
    };
    let entries = match std::fs::read_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        let hidden = path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"."));
        if !hidden && path.extension().is_some_and(|e| e == "toml") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Reads and checks a file. Everything that is wrong with it is in the report.
pub fn load(path: &Path) -> Result<Loaded, Report> {
    let instance = instance_of(path)?;
    let bytes = read(path)?;
    let text = match String::from_utf8(bytes) {
        Ok(text) => text,
        Err(e) => {
            let valid = e.utf8_error().valid_up_to();
            let good = String::from_utf8_lossy(&e.as_bytes()[..valid]).into_owned();
            let mut sink = Sink::new(path, &good);
            let at = Place { offset: valid, path: String::new() };
            let byte = e.as_bytes().get(valid).copied().unwrap_or_default();
            let message = format!("byte {byte:#04x} is not UTF-8");
            sink.error(&at, "not-utf8", message, "TOML is UTF-8: convert the file, for example with iconv");
            return Err(Report { diagnostics: sink.finish() });
        }
    };
    parse(instance, path, &text)
}

fn read(path: &Path) -> Result<Vec<u8>, Report> {
    let report = |reason, message: String, hint: &str| Report::file_error(path, reason, message, hint);
    let failed = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::NotFound => {
            let dir = config_dir();
            report(
                "file-missing",
                "no such file".into(),
                &format!("instances are files NAME.toml in {}", dir.display()),
            )
        }
        std::io::ErrorKind::PermissionDenied => report(
            "file-unreadable",
            "permission denied".into(),
            "make it readable, for example chgrp tng and chmod 640",
        ),
        _ => report("file-unreadable", format!("cannot be read: {e}"), "check the path"),
    };
    // Before the open: opening a FIFO would wait for its writer.
    let meta = std::fs::metadata(path).map_err(failed)?;
    if meta.is_dir() {
        return Err(report("file-is-directory", "is a directory".into(), "name a file in it"));
    }
    if !meta.is_file() {
        return Err(report("file-not-regular", "is not a regular file".into(), "name a TOML file"));
    }
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE {
        let hint = "use prefixes and port ranges, or several files";
        return Err(report("file-too-large", format!("is larger than {MAX_FILE} bytes"), hint));
    }
    Ok(bytes)
}

/// Checks the text of a file. `source` is only named in findings.
pub fn parse(instance: InstanceName, source: &Path, text: &str) -> Result<Loaded, Report> {
    let mut sink = Sink::new(source, text);
    let root = Place { offset: 0, path: String::new() };
    let (table, syntax) = DeTable::parse_recoverable(text);
    // Another program's file may happen to be TOML; ours has a section of ours.
    let is_ours = syntax.is_empty() && ["ingress", "egress"].iter().any(|key| table.get_ref().get(*key).is_some());
    if let (false, Some((whose, hint))) = (is_ours, foreign::recognise(text)) {
        sink.error(&root, "foreign-file", format!("this is {whose}, not of tng"), hint);
        return Err(Report { diagnostics: sink.finish() });
    }
    for error in &syntax {
        let offset = error.span().map_or(text.len(), |span| span.start);
        if let Some((offset, name, hint)) = foreign::lookalike(text, offset) {
            let at = Place { offset, path: String::new() };
            sink.error(&at, "toml-syntax", format!("not TOML: {name}"), hint);
            continue;
        }
        let at = Place { offset, path: String::new() };
        sink.error(&at, "toml-syntax", format!("not TOML: {}", error.message()), syntax_hint(error.message()));
    }
    let raw = RawFile::from_toml(&DeValue::Table(table.into_inner()), &root, &mut sink);
    let config = raw.and_then(|raw| check(&raw, instance, source, &mut sink));
    if !syntax.is_empty() {
        sink.forget_after_syntax_errors();
    }
    let refused = sink.has_errors();
    let diagnostics = sink.finish();
    match config {
        Some(config) if !refused => Ok(Loaded { config, warnings: diagnostics }),
        _ => Err(Report { diagnostics }),
    }
}

fn syntax_hint(message: &str) -> &'static str {
    if message.contains("duplicate key") {
        "each key and each table stands once; several endpoints are [[ingress]] with two brackets"
    } else if message.contains("string") || message.contains("quote") {
        "text stands in double quotes: listen = \"127.0.0.1:10001\""
    } else {
        "a line is [table], [[table]] or key = value; see tng.toml(5)"
    }
}
