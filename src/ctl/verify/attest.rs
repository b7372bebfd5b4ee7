//! `tngctl attest`: what this host would show a peer.

use std::sync::Arc;

use super::checks::{Checks, Path};
use super::means::{Draft, Means, Role, Unfit, of_config};
use super::report::{AppraiserView, Outcome, Report};
use super::save::Files;
use super::view::{EvidenceView, TokenView};
use super::{AttestOptions, BuiltinOptions, Style, block_on, explained, finish, reasons, reference};
use crate::attest::VerifyError;
use crate::config::{Verify, VerifyProvider};
use crate::ctl::local::LocalAnswer;
use crate::os::clock::SystemClock;
use crate::tls::ChannelError;
use crate::tls::probe::{self, OwnEvidence};

/// `tngctl attest`.
pub fn attest(options: &AttestOptions, style: Style) -> LocalAnswer {
    match made(options) {
        Ok((report, files)) => {
            // To be shown evidence is all that was asked for where nobody appraises.
            let outcome = report.verdict.outcome;
            let status = if outcome == Outcome::NotAppraised { 0 } else { outcome.status() };
            finish(report, files, &options.output, status, style)
        }
        Err(unfit) => unfit.into(),
    }
}

/// Who appraises, and where that is said: options first, then the service of the endpoint's passport, then the service
/// that it has peers appraised by. Reference values are about peers and say nothing of this host.
fn appraiser(wanted: &Means, found: Option<&Means>) -> Option<(Verify, String)> {
    if let Some(verify) = &wanted.endpoint.ra.verify {
        return Some((verify.clone(), wanted.source.clone()));
    }
    let ra = &found?.endpoint.ra;
    let passport = ra.attest.as_ref().and_then(|a| a.passport.as_ref()).map(|p| p.as_verify());
    let service = ra.verify.clone().filter(|v| matches!(v.provider, VerifyProvider::As(_)));
    Some((passport.or(service)?, found?.source.clone()))
}

fn made(options: &AttestOptions) -> Result<(Report, Files), Unfit> {
    let draft = Draft::default().timeout(options.timeout.as_ref());
    let draft = draft.evidence(&options.evidence).appraisal(&options.appraisal, &BuiltinOptions::default());
    let wanted = draft.read()?;
    let found = match &options.config {
        Some(config) => Some(of_config(config, options.endpoint.as_deref(), Role::Attest)?),
        None if wanted.endpoint.ra.attest.is_none() => {
            return Err(Unfit::usage(
                "nothing says where the evidence comes from\n    hint: --config NAME, or --aa-addr, --asr-addr or --provider",
            ));
        }
        None => None,
    };
    let appraiser = appraiser(&wanted, found.as_ref());
    let means = match found {
        Some(found) => found.toward(&wanted, options.timeout.is_some()),
        None => wanted,
    };
    let verify = appraiser.as_ref().map(|(verify, _)| verify);
    let outcome = block_on(async {
        let work = probe::attest(&means.endpoint, verify, Arc::new(SystemClock));
        let all = means.endpoint.limits.handshake_timeout * 2;
        tokio::time::timeout(all, work).await.unwrap_or(Err(ChannelError::HandshakeTimeout))
    })?;
    let view = appraiser.as_ref().map(|(verify, source)| AppraiserView::of(verify, source));
    Ok(match outcome {
        Ok(own) => told(view, verify, own),
        Err(error) => (without(view, &error), Files::default()),
    })
}

/// The report on a host that has no evidence.
fn without(appraiser: Option<AppraiserView>, error: &ChannelError) -> Report {
    let mut verdict = explained(Outcome::NotJudged, None, None);
    verdict.failed = Some("own-evidence");
    verdict.reason = Some(error.reason().to_owned());
    verdict.detail = Some(error.to_string());
    verdict.explanation = reasons::explain(error.reason());
    Report { appraiser, ..empty(verdict) }
}

fn empty(verdict: super::VerdictView) -> Report {
    Report {
        target: None,
        address: None,
        tls: None,
        certificate: None,
        evidence: None,
        token: None,
        appraiser: None,
        checks: Vec::new(),
        verdict,
        notes: Vec::new(),
        saved: Vec::new(),
        reference: None,
    }
}

fn told(appraiser: Option<AppraiserView>, verify: Option<&Verify>, own: OwnEvidence) -> (Report, Files) {
    let (evidence, look) = EvidenceView::of_evidence(&own.evidence, "host");
    let path = Path::of(verify.map(|v| &v.provider), false, Some(&own.evidence.tee));
    let mut checks = Checks::of_host(path).without_policy();
    match look.as_ref().and_then(|l| l.bound) {
        Some(true) => checks.passed("report-data", Some("by the evidence's own words".into())),
        Some(false) => {
            let text = "it is not the SHA-384 of the runtime data";
            checks.failed("report-data", VerifyError::ReportData.reason(), Some(text.into()));
        }
        None => checks.not_done("report-data", "this version cannot read evidence of this TEE"),
    }
    let outcome = match &own.outcome {
        Some(Ok(_)) => {
            checks.appraised();
            Outcome::Verified
        }
        Some(Err(e)) => {
            checks.refused(e.reason(), e.to_string());
            let refused = e.is_about_peer() || e.reason().starts_with("token-");
            if refused { Outcome::Refused } else { Outcome::NotJudged }
        }
        None if evidence.problem.is_some() || checks.first_failed().is_some() => {
            if let Some(problem) = &evidence.problem {
                checks.refused(problem.slug, problem.text.clone());
            }
            Outcome::Refused
        }
        None => {
            checks.nobody_appraises();
            Outcome::NotAppraised
        }
    };
    let mut verdict = explained(outcome, checks.first_failed(), None);
    verdict.appraisal = own.outcome.as_ref().and_then(|o| o.as_ref().ok()).map(Into::into);
    let block = look.as_ref().and_then(|look| reference::block(&own.evidence.tee, look, "this host", reference::OWN));
    let mut notes = Vec::new();
    if evidence.sample {
        notes.push("the TEE is the sample one: its evidence proves nothing".into());
    }
    if evidence.debug == Some(true) {
        notes.push("the TEE says that it is in debug mode: its host can read it, and peers refuse it".into());
    }
    let mut files = Files::default();
    files.add("evidence.cbor", Some(own.evidence.to_extension()));
    files.add("evidence.json", Some(own.evidence.evidence.clone()));
    files.add("runtime-data.json", Some(own.evidence.runtime_data.clone().into_bytes()));
    files.add("additional-evidence.json", own.evidence.additional.clone());
    files.add("token.jwt", own.token.clone().map(String::into_bytes));
    let report = Report {
        evidence: Some(evidence),
        token: own.token.as_deref().map(|t| TokenView::of(t, "service")),
        appraiser,
        checks: checks.into_list(),
        notes,
        reference: block,
        ..empty(verdict)
    };
    (report, files)
}
