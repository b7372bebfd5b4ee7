//! `tngctl verify`.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use x509_parser::prelude::{FromDer, X509Certificate};

use super::checks::{Checks, Path};
use super::means::{Draft, Means, Role, Unfit, of_config};
use super::report::{AppraiserView, Outcome, Report, TlsView};
use super::save::{Files, pem};
use super::view::{CertificateView, EvidenceView, TokenView};
use super::{Style, VerifyOptions, block_on, explained, finish, reference};
use crate::attest::{Credential, EXPORTER, Look, NONCE, PUBKEY_HASH, RuntimeData, VerifyError, bound_devices, x509};
use crate::config::{Endpoint, Mark, Mode, VerifyProvider};
use crate::ctl::local::LocalAnswer;
use crate::os::clock::SystemClock;
use crate::relay::{Dialer, MarkPolicy, Refusal, Source, Target, probe_mark};
use crate::tls::probe::{Observation, Prober};
use crate::tls::{Alpn, ChannelError, PeerError, SessionError};

/// How far the peer's clock may be ahead, as an endpoint has it.
const SKEW: Duration = Duration::from_secs(300);
/// OID of the evidence extension as text.
const EVIDENCE_OID: &str = "2.23.133.5.4.9";

/// `tngctl verify HOST:PORT`.
pub fn verify(options: &VerifyOptions, style: Style) -> LocalAnswer {
    match looked(options) {
        Ok((report, files)) => {
            let status = report.verdict.outcome.status();
            finish(report, files, &options.output, status, style)
        }
        Err(unfit) => unfit.into(),
    }
}

/// What came of the way to the peer.
enum Reached {
    No(Refusal),
    Yes(Box<Met>),
}

/// A peer that was reached.
struct Met {
    seen: Observation,
    address: String,
    /// Whether this host's own captures let the connection pass.
    marked: bool,
}

fn looked(options: &VerifyOptions) -> Result<(Report, Files), Unfit> {
    let draft = Draft::default().target(&options.target).timeout(options.timeout.as_ref());
    let draft = draft.appraisal(&options.appraisal, &options.builtin);
    let wanted = draft.read()?;
    let means = match &options.config {
        Some(config) => {
            let found = of_config(config, options.endpoint.as_deref(), Role::Verify)?;
            found.toward(&wanted, options.timeout.is_some())
        }
        None => wanted,
    };
    let Mode::Mapping(mapping) = &means.endpoint.mode else { return Err(Unfit::usage("HOST:PORT: no target")) };
    let target = Target { host: mapping.target_host.clone(), port: mapping.target_ports.first };
    let (mark, only) = (mapping.so_mark, options.protocol.map(Alpn::from));
    let reached = block_on(async {
        // Made here: it wants a runtime.
        let prober = Prober::new(&means.endpoint, only, !means.configured, Arc::new(SystemClock));
        let prober = prober.map_err(|e| Unfit { lines: vec![format!("{e} [{}]", e.reason())], status: 78 })?;
        Ok::<_, Unfit>(reach(&prober, &target, mark, &means.endpoint).await)
    })??;
    Ok(match reached {
        Reached::No(refusal) => (unreached(&options.target, &means, &refusal), Files::default()),
        Reached::Yes(met) => told(options, &means, *met),
    })
}

async fn reach(prober: &Prober, target: &Target, mark: Mark, endpoint: &Endpoint) -> Reached {
    // Marked, so that a capture of this very host does not take it; without the right to mark there may be none.
    let marked = probe_mark(mark).is_ok();
    let mark = if marked { MarkPolicy::Required(mark) } else { MarkPolicy::Unmarked };
    let limits = &endpoint.limits;
    let connect_timeout = limits.connect_timeout.min(limits.handshake_timeout);
    let dialer = Dialer { mark, connect_timeout, unacknowledged_timeout: limits.unacknowledged_timeout };
    let connect = dialer.connect(target, Source::Own);
    let tcp = match tokio::time::timeout(limits.handshake_timeout, connect).await {
        Ok(Ok(tcp)) => tcp,
        Ok(Err(refusal)) => return Reached::No(refusal),
        Err(_) => return Reached::No(ChannelError::HandshakeTimeout.into()),
    };
    let address = tcp.peer_addr().map_or_else(|_| target.to_string(), |a| a.to_string());
    Reached::Yes(Box::new(Met { seen: prober.look(tcp, target.name()).await, address, marked }))
}

fn path_of(means: &Means, credential: Option<&Credential>) -> Path {
    let provider = means.endpoint.ra.verify.as_ref().map(|v| &v.provider);
    match credential {
        Some(Credential::Token(_)) => Path::of(provider, true, None),
        Some(Credential::Evidence(evidence)) => Path::of(provider, false, Some(&evidence.tee)),
        None => Path::of(provider, false, None),
    }
}

fn checks_of(means: &Means, credential: Option<&Credential>, asked: bool) -> Checks {
    let ra = &means.endpoint.ra;
    let path = path_of(means, credential);
    let mut checks = Checks::of_peer(path, ra.attest.is_some(), asked);
    let rego = ra.verify.as_ref().is_some_and(|v| v.rego.is_some());
    let provider = ra.verify.as_ref().map(|v| &v.provider);
    let alone = matches!(provider, Some(VerifyProvider::Builtin(b)) if b.references.is_empty());
    if !rego {
        checks = checks.without_policy();
    } else if alone && path != Path::Tpm {
        checks = checks.without_reference();
    }
    if let Some(Credential::Evidence(evidence)) = credential
        && evidence.additional.is_some()
        && matches!(bound_devices(evidence), Ok(None))
    {
        checks.left_out("devices", "the peer shows devices that its TEE does not name: they count for nothing");
    }
    checks
}

fn unreached(target: &str, means: &Means, refusal: &Refusal) -> Report {
    let mut checks = checks_of(means, None, false);
    checks.refused_in("connection", refusal.reason(), refusal.to_string());
    let verdict = explained(Outcome::NotJudged, checks.first_failed(), None);
    Report {
        target: Some(target.to_owned()),
        address: None,
        tls: None,
        certificate: None,
        evidence: None,
        token: None,
        appraiser: means.endpoint.ra.verify.as_ref().map(|v| AppraiserView::of(v, &means.source)),
        checks: checks.into_list(),
        verdict,
        notes: Vec::new(),
        saved: Vec::new(),
        reference: None,
    }
}

/// Evidence of a peer, from wherever it came last.
struct Shown {
    from: &'static str,
    extension: Vec<u8>,
    credential: Result<Credential, PeerError>,
    expected: RuntimeData,
}

fn shown(seen: &Observation) -> Option<Shown> {
    if let Some(session) = &seen.session {
        return Some(Shown {
            from: "session",
            credential: Credential::from_extension(&session.extension).map_err(PeerError::from),
            extension: session.extension.clone(),
            expected: session.expected.clone(),
        });
    }
    let (_, cert) = X509Certificate::from_der(seen.certificates.first()?).ok()?;
    let extension = cert.extensions().iter().find(|e| e.oid.to_id_string() == EVIDENCE_OID)?;
    Some(Shown {
        from: "certificate",
        credential: Credential::from_extension(extension.value).map_err(PeerError::from),
        extension: extension.value.to_vec(),
        expected: RuntimeData::for_key(cert.public_key().raw),
    })
}

/// The whole story of a peer that was reached.
fn told(options: &VerifyOptions, means: &Means, met: Met) -> (Report, Files) {
    let Met { seen, address, marked } = met;
    let shown = shown(&seen);
    let credential = shown.as_ref().and_then(|s| s.credential.as_ref().ok());
    let (evidence, look) = match credential.zip(shown.as_ref()) {
        Some((credential, shown)) => {
            let (view, look) = EvidenceView::of(credential, shown.from);
            (Some(view), look)
        }
        None => (None, None),
    };
    let own = means.endpoint.ra.attest.is_some();
    let mut checks = checks_of(means, credential, seen.wants_evidence);
    looked_at(&mut checks, &seen, shown.as_ref(), look.as_ref(), &address);
    let peers = judge(&mut checks, &seen, own);
    if means.endpoint.ra.verify.is_none() {
        // An appraiser would begin with this.
        if let (Some(problem), None) = (evidence.as_ref().and_then(|e| e.problem.as_ref()), &seen.failure) {
            checks.refused(problem.slug, problem.text.clone());
        }
        checks.nobody_appraises();
    }
    let outcome = outcome(&checks, &seen, means);
    let mut verdict = explained(outcome, checks.first_failed(), peers.as_deref());
    verdict.appraisal = seen.verdict.as_ref().map(Into::into);

    let token = match credential {
        Some(Credential::Token(token)) => Some((token.clone(), "peer")),
        _ => seen.token.clone().map(|token| (token, "service")),
    };
    let tee = evidence.as_ref().and_then(|e| e.tee.clone());
    let block = look.as_ref().zip(tee.as_deref()).and_then(|(look, tee)| {
        let trust = reference::trust(outcome, verdict.reason.as_deref());
        reference::block(tee, look, &format!("{} ({address})", options.target), trust)
    });
    let binding = match (&seen.session, credential) {
        (Some(_), _) => "session",
        (None, Some(_)) => "certificate",
        (None, None) => "none",
    };
    let mut notes = notes(&seen, means, evidence.as_ref());
    if !marked && seen.negotiated.is_none() {
        notes.push(
            "this process may not mark its connection: if a capture of this host takes connections to the peer, it went \
             through the tunnel to the bare service. Run it as root"
                .into(),
        );
    }
    let report = Report {
        target: Some(options.target.clone()),
        address: Some(address),
        tls: seen.negotiated.as_ref().map(|n| TlsView::of(n, seen.wants_evidence, binding)),
        certificate: CertificateView::of(&seen.certificates),
        evidence,
        token: token.as_ref().map(|(text, from)| TokenView::of(text, from)),
        appraiser: means.endpoint.ra.verify.as_ref().map(|v| AppraiserView::of(v, &means.source)),
        checks: checks.into_list(),
        verdict,
        notes,
        saved: Vec::new(),
        reference: block,
    };
    (report, files(&seen, shown.as_ref(), token.map(|(text, _)| text)))
}

/// What can be checked by looking alone.
fn looked_at(checks: &mut Checks, seen: &Observation, shown: Option<&Shown>, look: Option<&Look>, address: &str) {
    checks.passed("connection", Some(address.to_owned()));
    let Some(negotiated) = &seen.negotiated else { return };
    checks.passed("own-evidence", None);
    checks.passed("handshake", None);
    let alpn = negotiated.alpn.as_deref().map(|p| String::from_utf8_lossy(p).into_owned());
    checks.passed("protocol", alpn.clone());
    certificate(checks, seen, alpn.as_deref() == Some("tng/1"));
    let Some(Shown { credential: Ok(credential), expected, from, .. }) = shown else { return };
    checks.passed("evidence", Some(format!("in the {from}")));
    checks.passed("model", None);
    let found = match credential {
        Credential::Evidence(evidence) => evidence.runtime_object(),
        Credential::Token(_) => {
            for id in ["key-binding", "freshness", "session-binding"] {
                checks.not_done(id, "the token says it: see \"token is about the key that was shown\"");
            }
            return;
        }
    };
    let found = found.unwrap_or_default();
    let about = |member: &str| found.get(member) == expected.object().get(member);
    let other_key = if *from == "session" { SessionError::OtherKey.reason() } else { PeerError::OtherKey.reason() };
    for (id, member, reason) in [
        ("key-binding", PUBKEY_HASH, other_key),
        ("freshness", NONCE, SessionError::Nonce.reason()),
        ("session-binding", EXPORTER, SessionError::Exporter.reason()),
    ] {
        match expected.object().get(member) {
            None => checks.not_done(id, "RATS-TLS binds evidence to the key alone"),
            Some(_) if about(member) => checks.passed(id, None),
            Some(_) => checks.failed(id, reason, Some(format!("{member} of the evidence is another"))),
        }
    }
    match look.and_then(|l| l.bound) {
        Some(true) => checks.passed("report-data", Some("by the evidence's own words".into())),
        Some(false) => checks.failed(
            "report-data",
            VerifyError::ReportData.reason(),
            Some("it is not the SHA-384 of the runtime data".into()),
        ),
        None => checks.not_done("report-data", "this version cannot read evidence of this TEE"),
    }
}

/// Shape, signature and time of the certificate. `tng/1` takes only the key from it, and its end.
fn certificate(checks: &mut Checks, seen: &Observation, only_key: bool) {
    let Some(der) = seen.certificates.first() else { return };
    let Ok(([], cert)) = X509Certificate::from_der(der) else { return };
    checks.passed("certificate", None);
    let self_issued = cert.subject().as_raw() == cert.issuer().as_raw();
    let self_signed = x509::signed_by(&cert, cert.public_key());
    for (id, holds, error) in
        [("chain", self_issued, PeerError::Issuer), ("self-signature", self_signed, PeerError::SelfSignature)]
    {
        match (holds, only_key) {
            (true, _) => checks.passed(id, None),
            (false, true) => checks.not_done(id, "tng/1 does not ask for it"),
            (false, false) => checks.failed(id, error.reason(), Some(error.to_string())),
        }
    }
    let now = SystemTime::now();
    let (from, until): (SystemTime, SystemTime) =
        (cert.validity().not_before.to_datetime().into(), cert.validity().not_after.to_datetime().into());
    let error = match (until <= now, now + SKEW < from) {
        (true, _) => PeerError::Expired,
        (_, true) => PeerError::NotYetValid,
        _ => return checks.passed("validity", None),
    };
    checks.failed("validity", error.reason(), Some(error.to_string()));
}

/// What an endpoint makes of it. Returns the peer's own reason when it refused.
fn judge(checks: &mut Checks, seen: &Observation, own: bool) -> Option<String> {
    if seen.verdict.is_some() {
        checks.appraised();
    }
    let Some(failure) = &seen.failure else {
        if own || seen.wants_evidence {
            checks.passed("accepted", None);
        }
        return None;
    };
    let (reason, text) = (failure.reason(), failure.to_string());
    match failure {
        // Silence after the handshake is not one of the handshake.
        ChannelError::HandshakeTimeout if seen.negotiated.is_some() => {
            let id = if seen.session.is_some() { "service" } else { "evidence" };
            checks.refused_in(id, reason, text);
        }
        ChannelError::Alert(_) | ChannelError::Closed | ChannelError::Io(_) if seen.negotiated.is_some() => {
            checks.refused_in("evidence", reason, format!("{text}, after the handshake"));
        }
        ChannelError::Session(SessionError::Unattested) => {
            let text =
                "the peer demands evidence of this side: give it some with --config NAME of an endpoint that attests";
            checks.refused(reason, text.into());
        }
        _ => checks.refused(reason, text),
    }
    match failure {
        ChannelError::Session(SessionError::Refused(theirs)) => Some(theirs.clone()),
        _ => None,
    }
}

fn outcome(checks: &Checks, seen: &Observation, means: &Means) -> Outcome {
    let refuses = |error: &ChannelError| match error {
        ChannelError::Peer(e) => *e != PeerError::NoCertificate,
        // A token is the peer's when it shows it, and about the peer when the service made it.
        ChannelError::Verify(e) => e.is_about_peer() || e.reason().starts_with("token-"),
        ChannelError::Session(e) => !matches!(
            e,
            SessionError::Refused(_)
                | SessionError::Unattested
                | SessionError::Truncated
                | SessionError::Required
                | SessionError::OwnEvidence(_)
        ),
        _ => false,
    };
    // Seen by looking alone, where an endpoint did not come so far.
    let beyond = |failure: &ChannelError| {
        checks.first_failed().is_some_and(|check| check.reason.as_deref() != Some(failure.reason()))
    };
    match (&seen.failure, &seen.verdict) {
        (Some(failure), _) if refuses(failure) || beyond(failure) => Outcome::Refused,
        (Some(_), _) => Outcome::NotJudged,
        (None, _) if checks.first_failed().is_some() => Outcome::Refused,
        (None, Some(_)) => Outcome::Verified,
        (None, None) if means.endpoint.ra.verify.is_some() => Outcome::NotJudged,
        (None, None) => Outcome::NotAppraised,
    }
}

fn notes(seen: &Observation, means: &Means, evidence: Option<&EvidenceView>) -> Vec<String> {
    let mut notes = Vec::new();
    if means.endpoint.ra.verify.is_none() {
        notes.push(
            "nobody appraised the evidence: anybody could have made it. Name who does with --config, --as-addr, \
             --trusted-certs, --builtin or --allow-sample"
                .into(),
        );
    }
    if evidence.is_some_and(|e| e.sample) || seen.verdict.as_ref().is_some_and(|v| v.sample) {
        notes.push("the TEE is the sample one: its evidence proves nothing".into());
    }
    if evidence.is_some_and(|e| e.debug == Some(true)) {
        notes.push("the TEE says that it is in debug mode: its host can read it".into());
    }
    if seen.wants_evidence && means.endpoint.ra.attest.is_none() {
        notes
            .push("the peer asks for evidence of this side: --config NAME of an endpoint that attests gives it".into());
    }
    notes
}

fn files(seen: &Observation, shown: Option<&Shown>, token: Option<String>) -> Files {
    let mut files = Files::default();
    files.add("certificate.pem", (!seen.certificates.is_empty()).then(|| pem(&seen.certificates)));
    files.add("evidence.cbor", shown.map(|s| s.extension.clone()));
    if let Some(Ok(Credential::Evidence(evidence))) = shown.map(|s| &s.credential) {
        files.add("evidence.json", Some(evidence.evidence.clone()));
        files.add("runtime-data.json", Some(evidence.runtime_data.clone().into_bytes()));
        files.add("additional-evidence.json", evidence.additional.clone());
    }
    files.add("token.jwt", token.map(String::into_bytes));
    files
}
