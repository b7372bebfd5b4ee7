//! What is wrong with a configuration, where, and what to do about it.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

/// Diagnostics kept of one file; what comes after them is only counted.
const MAX_DIAGNOSTICS: usize = 200;

/// Whether a diagnostic stops the configuration from being used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The configuration is refused.
    Error,
    /// It is used, and the operator should know.
    Warning,
}

/// One finding. `Display` prints `FILE:LINE:COLUMN: PATH: MESSAGE` and an indented hint line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Diagnostic {
    /// Error or warning.
    pub severity: Severity,
    /// Stable slug, for machines.
    pub reason: &'static str,
    /// The file.
    pub file: PathBuf,
    /// Line, from 1. Absent when the finding is about the file as a whole.
    pub line: Option<usize>,
    /// Column, from 1, counted in characters.
    pub column: Option<usize>,
    /// Place in the configuration, as `ingress[0].netfilter.capture[1].port`; may be empty.
    pub path: String,
    /// What is wrong; names the value, never one that may be secret.
    pub message: String,
    /// The next step.
    pub hint: Option<String>,
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let (Some(line), Some(column)) = (self.line, self.column) {
            write!(f, ":{line}:{column}")?;
        }
        f.write_str(": ")?;
        if self.severity == Severity::Warning {
            f.write_str("warning: ")?;
        }
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)?;
        if let Some(hint) = &self.hint {
            write!(f, "\n    hint: {hint}")?;
        }
        Ok(())
    }
}

/// Why a configuration was refused: every error, and the warnings beside them, in file order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// At least one of them is an error.
    pub diagnostics: Vec<Diagnostic>,
}

impl Report {
    /// The findings that refuse the configuration.
    pub fn errors(&self) -> impl Iterator<Item = &Diagnostic> {
        self.diagnostics.iter().filter(|d| d.severity == Severity::Error)
    }
    /// The findings that would not.
    pub fn warnings(&self) -> impl Iterator<Item = &Diagnostic> {
        self.diagnostics.iter().filter(|d| d.severity == Severity::Warning)
    }
    /// A report of one error about a whole file.
    pub fn file_error(file: &Path, reason: &'static str, message: String, hint: &str) -> Self {
        Self {
            diagnostics: vec![Diagnostic {
                severity: Severity::Error,
                reason,
                file: file.to_owned(),
                line: None,
                column: None,
                path: String::new(),
                message,
                hint: Some(hint.to_owned()),
            }],
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Errors first: where only one line is shown, it is to be the one that refuses.
        let (errors, others): (Vec<_>, Vec<_>) = self.diagnostics.iter().partition(|d| d.severity == Severity::Error);
        for (i, d) in errors.into_iter().chain(others).enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            d.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for Report {}

/// Where a value stands: byte offset in the text, and path in the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub offset: usize,
    pub path: String,
}

impl Place {
    pub fn key(&self, key: &str, offset: usize) -> Self {
        let path = if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) };
        Self { offset, path }
    }
    pub fn index(&self, index: usize, offset: usize) -> Self {
        Self { offset, path: format!("{}[{index}]", self.path) }
    }
}

/// Collects the findings of one file and knows its lines.
pub(super) struct Sink<'t> {
    file: PathBuf,
    text: &'t str,
    line_starts: Vec<usize>,
    found: Vec<Diagnostic>,
    more: usize,
    errors: usize,
    /// Offset of every value that was read, by its path.
    places: HashMap<String, usize>,
}

impl<'t> Sink<'t> {
    pub fn new(file: &Path, text: &'t str) -> Self {
        let line_starts = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
        let file = file.to_owned();
        Self { file, text, line_starts, found: Vec::new(), more: 0, errors: 0, places: HashMap::new() }
    }

    /// Line and column of a byte offset, both from 1; the column counts characters.
    pub fn position(&self, offset: usize) -> (usize, usize) {
        let offset = offset.min(self.text.len());
        let line = self.line_starts.partition_point(|&start| start <= offset).max(1);
        let start = self.line_starts[line - 1];
        let column = self.text.as_bytes()[start..offset].iter().filter(|b| (**b as i8) >= -0x40).count();
        (line, column + 1)
    }

    pub fn remember(&mut self, place: &Place) {
        self.places.insert(place.path.clone(), place.offset);
    }

    /// Whether the file spells this key out, with whatever value.
    pub fn is_written(&self, table: &Place, key: &str) -> bool {
        self.places.contains_key(&table.key(key, 0).path)
    }

    /// The place of a path; of the nearest table above it when the file does not spell it out.
    pub fn place_of(&self, path: &str) -> Place {
        let mut known = path;
        loop {
            if let Some(&offset) = self.places.get(known) {
                return Place { offset, path: path.to_owned() };
            }
            match known.rfind(['.', '[']) {
                Some(at) => known = &known[..at],
                None => return Place { offset: 0, path: path.to_owned() },
            }
        }
    }

    pub fn error(&mut self, at: &Place, reason: &'static str, message: impl Into<String>, hint: impl Into<String>) {
        self.errors += 1;
        self.push(Severity::Error, at, reason, message.into(), hint.into());
    }

    pub fn warn(&mut self, at: &Place, reason: &'static str, message: impl Into<String>, hint: impl Into<String>) {
        self.push(Severity::Warning, at, reason, message.into(), hint.into());
    }

    fn push(&mut self, severity: Severity, at: &Place, reason: &'static str, message: String, hint: String) {
        if self.found.len() >= MAX_DIAGNOSTICS {
            self.more += 1;
            return;
        }
        let (line, column) = self.position(at.offset);
        self.found.push(Diagnostic {
            severity,
            reason,
            file: self.file.clone(),
            line: Some(line),
            column: Some(column),
            path: at.path.clone(),
            message,
            hint: Some(hint),
        });
    }

    /// Whether something below `path` was refused, so that what is left of it may look empty.
    pub fn has_errors_below(&self, path: &str) -> bool {
        self.found.iter().any(|d| d.severity == Severity::Error && d.path.starts_with(path))
    }

    pub fn has_errors(&self) -> bool {
        self.errors > 0
    }

    /// Removes findings that only follow from broken syntax: those on a line that could not be
    /// read, and keys that are missing because reading stopped before them.
    pub fn forget_after_syntax_errors(&mut self) {
        let broken: Vec<_> = self.found.iter().filter(|d| d.reason == "toml-syntax").map(|d| d.line).collect();
        self.found.retain(|d| {
            d.reason == "toml-syntax"
                || (!matches!(d.reason, "missing" | "no-endpoint" | "mode-count" | "no-attestation")
                    && !broken.contains(&d.line))
        });
    }

    /// All findings in file order.
    pub fn finish(mut self) -> Vec<Diagnostic> {
        self.found.sort_by_key(|d| (d.line, d.column));
        if self.more > 0
            && let Some(last) = self.found.last_mut()
        {
            last.message.push_str(&format!(" ({} more findings are not shown)", self.more));
        }
        self.found
    }
}

/// The candidate that `word` was most likely meant to be, if any is near.
pub(super) fn did_you_mean<'c>(word: &str, candidates: &[&'c str]) -> Option<&'c str> {
    let lower = word.to_ascii_lowercase();
    // A word of 1 MiB is compared with nothing: the distance is quadratic.
    if lower.len() > 64 {
        return None;
    }
    candidates
        .iter()
        .map(|c| (strsim::damerau_levenshtein(&lower, c), *c))
        .filter(|(distance, c)| *distance <= 1.max(c.len().max(lower.len()) / 3))
        .min()
        .map(|(_, c)| c)
}

/// "did you mean" when a candidate is near, otherwise the list of them.
pub(super) fn suggest(word: &str, candidates: &[&str]) -> String {
    match did_you_mean(word, candidates) {
        Some(c) => format!("did you mean `{c}`?"),
        None => format!("known here: {}", candidates.join(", ")),
    }
}

/// Text of a value in a message: quoted, escaped, and cut when long.
pub(super) fn quote(s: &str) -> String {
    let mut cut: String = s.chars().take(80).collect();
    if cut.len() < s.len() {
        cut.push_str("...");
    }
    format!("\"{}\"", cut.escape_debug().to_string().replace("\\'", "'"))
}
