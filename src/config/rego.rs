//! `verify.rego`: a file with the operator's own policy.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::diagnostics::{Sink, quote};
use super::raw::RawVerify;
use crate::attest::rego::{MAX_TEXT, Policy};

/// A policy as it was when the configuration was read: what was checked is what judges.
#[derive(Clone, PartialEq, Eq)]
pub struct RegoFile {
    /// Where it was.
    pub path: PathBuf,
    /// What it said.
    pub text: Arc<str>,
}

impl RegoFile {
    /// What stands among the policies of a verdict: `rego:sha256:` and the digest of the text in hexadecimal.
    pub fn id(&self) -> String {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, self.text.as_bytes());
        digest.as_ref().iter().fold("rego:sha256:".to_owned(), |id, byte| id + &format!("{byte:02x}"))
    }
}

impl fmt::Debug for RegoFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.path.display(), self.id())
    }
}

/// The key `rego`, with providers that appraise in process.
pub(super) fn policy(v: &RawVerify, provider: &str, sink: &mut Sink<'_>) -> Option<Option<RegoFile>> {
    let Some(raw) = &v.rego else { return Some(None) };
    if !["builtin", "sample"].contains(&provider) {
        let message = "`rego` goes with an appraisal in process only: a service has policies of its own";
        let hint = "remove `rego` and name the service's policy in `policy_ids`, or use provider = \"builtin\"";
        sink.error(&raw.at, "contradiction", message, hint);
        return None;
    }
    match read(Path::new(&raw.value)) {
        Ok(file) => Some(Some(file)),
        Err((why, hint)) => {
            sink.error(&raw.at, "bad-rego", why, hint);
            None
        }
    }
}

fn read(path: &Path) -> Result<RegoFile, (String, &'static str)> {
    let shown = quote(&path.to_string_lossy());
    if !path.is_absolute() {
        let hint = "write the whole path: \"/etc/tng/policy.rego\"";
        return Err((format!("{shown} is not an absolute path"), hint));
    }
    let readable = "the file must exist and the user `tng` must be able to read it";
    let unreadable = |e: std::io::Error| (format!("{shown} cannot be read: {e}"), readable);
    let meta = std::fs::metadata(path).map_err(unreadable)?;
    if !meta.is_file() || meta.len() > MAX_TEXT as u64 {
        return Err((format!("{shown} is not a regular file of at most 64 KiB"), "name one Rego file"));
    }
    let text = String::from_utf8(std::fs::read(path).map_err(unreadable)?)
        .map_err(|_| (format!("{shown} is not UTF-8"), "a policy is text"))?;
    match Policy::compile(&text) {
        Ok(_) => Ok(RegoFile { path: path.to_owned(), text: text.into() }),
        Err(problem) => {
            let hint = "correct it; tng.toml(5), POLICIES, says what a policy looks like and which functions there are";
            Err((format!("{}:{problem}", path.display()), hint))
        }
    }
}
