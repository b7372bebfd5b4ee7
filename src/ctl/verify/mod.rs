//! `tngctl verify` and `tngctl attest`: one look at a peer, or at this host, with everything that was seen and each
//! check by its name.
//!
//! A peer is met as an endpoint meets it ([`crate::tls::probe`]); [`means`] says with which roles, [`view`] puts what
//! was shown into words, [`checks`] names what failed, [`report`] is the outcome, and [`print`] the text of it.

mod attest;
mod checks;
mod means;
mod options;
mod peer;
mod print;
mod reasons;
mod reference;
mod report;
mod save;
mod view;

use std::future::Future;

use super::local::LocalAnswer;
use super::style::Style;

pub use attest::attest;
pub use checks::{Check, State};
pub use options::{
    AppraisalOptions, AttestOptions, BuiltinOptions, EvidenceOptions, OutputOptions, Protocol, VerifyOptions,
};
pub use peer::verify;
#[cfg(test)]
pub(crate) use reference::{block as reference_block, trust as reference_trust};
pub use report::{Outcome, Report};

use means::Unfit;
use report::VerdictView;
use save::{EX_CANTCREAT, Files};

/// Exit status for what should not happen: no runtime.
const EX_SOFTWARE: u8 = 70;

impl From<Unfit> for LocalAnswer {
    fn from(unfit: Unfit) -> Self {
        Self { text: String::new(), errors: unfit.lines, status: unfit.status }
    }
}

/// Runs `work` to its end, and leaves behind what a resolver or device still holds.
fn block_on<T>(work: impl Future<Output = T>) -> Result<T, Unfit> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| Unfit { lines: vec![format!("no runtime: {e}")], status: EX_SOFTWARE })?;
    let done = runtime.block_on(work);
    runtime.shutdown_background();
    Ok(done)
}

/// The explanation that belongs to a reason; of a peer's refusal also that of its own.
fn explained(outcome: Outcome, check: Option<&Check>, peers: Option<&str>) -> VerdictView {
    let reason = check.and_then(|c| c.reason.clone());
    let mut explanation = reason.as_deref().and_then(reasons::explain);
    if let (Some(text), Some(theirs)) = (&mut explanation, peers.and_then(reasons::explain)) {
        text.push_str(&format!(" Theirs, {}: {theirs}", peers.unwrap_or_default()));
    }
    VerdictView {
        outcome,
        failed: check.map(|c| c.id),
        reason,
        detail: check.and_then(|c| c.detail.clone()),
        explanation,
        appraisal: None,
    }
}

/// Writes the files, then says everything.
fn finish(mut report: Report, mut files: Files, output: &OutputOptions, status: u8, style: Style) -> LocalAnswer {
    let mut errors = Vec::new();
    let mut status = status;
    if let Some(dir) = &output.save {
        files.add("report.json", serde_json::to_vec_pretty(&report).ok());
        match files.write(dir, output.force) {
            Ok(()) => report.saved = files.paths(dir),
            Err(e) => {
                errors.push(e.to_string());
                status = EX_CANTCREAT;
            }
        }
    }
    if output.json {
        let text = serde_json::to_string_pretty(&report).unwrap_or_default() + "\n";
        return LocalAnswer { text, errors, status };
    }
    if !output.reference {
        return LocalAnswer { text: print::render(&report, style), errors, status };
    }
    errors.extend(print::on_the_side(&report));
    if report.reference.is_none() {
        status = status.max(report::NO_REFERENCE);
    }
    LocalAnswer { text: report.reference.unwrap_or_default(), errors, status }
}
