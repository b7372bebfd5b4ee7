use super::*;

const PATHS: [Path; 7] = [Path::Nobody, Path::Service, Path::Token, Path::Quote, Path::Snp, Path::Tpm, Path::Sample];

/// Reasons of the sections of the manual that say why a peer was refused.
fn manual() -> Vec<String> {
    let page = include_str!("../../../man/tng-reasons.7").replace("\\-", "-");
    let sections = page.split(".SH ").filter(|s| {
        let title = s.lines().next().unwrap_or_default();
        ["CERTIFICATE", "THE SESSION", "APPRAISAL", "NO EVIDENCE"].iter().any(|word| title.contains(word))
    });
    let terms = sections.flat_map(|s| {
        let lines: Vec<&str> = s.lines().collect();
        let pairs = lines.windows(2).filter(|w| w[0] == ".TP");
        pairs.filter_map(|w| w[1].strip_prefix(".B ").map(str::to_owned)).collect::<Vec<_>>()
    });
    terms.collect()
}

#[test]
fn every_reason_to_refuse_a_peer_belongs_to_a_check() {
    let known: Vec<&str> = PATHS
        .iter()
        .flat_map(|path| Checks::of_peer(*path, true, true).reasons)
        .flat_map(|reasons| reasons.iter().copied())
        .collect();
    let manual = manual();
    assert!(manual.len() > 80 && manual.contains(&"token-policy".to_owned()), "{manual:?}");
    let missing: Vec<_> = manual.iter().filter(|slug| !known.contains(&slug.as_str())).collect();
    assert!(missing.is_empty(), "no check for {missing:?}");
}

#[test]
fn a_reason_names_one_check_and_those_before_it_were_passed() {
    for path in PATHS {
        let all = Checks::of_peer(path, true, true);
        let mut ids: Vec<_> = all.list.iter().map(|c| c.id).collect();
        let mut reasons: Vec<_> = all.reasons.iter().flat_map(|r| r.iter()).collect();
        let (count, total) = (ids.len(), reasons.len());
        ids.sort_unstable();
        ids.dedup();
        reasons.sort_unstable();
        reasons.dedup();
        assert_eq!((ids.len(), reasons.len()), (count, total), "{path:?}");
    }
    let mut checks = Checks::of_peer(Path::Service, false, false);
    checks.refused("token-policy", "made under x".into());
    let of = |id: &str| checks.list.iter().find(|c| c.id == id).map(|c| c.state);
    assert_eq!(of("token-signature"), Some(State::Passed));
    assert_eq!(of("token-policy"), Some(State::Failed));
    assert_eq!(checks.first_failed().and_then(|c| c.reason.as_deref()), Some("token-policy"));
}

#[test]
fn an_appraisal_goes_before_what_was_seen_by_looking() {
    let mut checks = Checks::of_host(Path::Service);
    checks.failed("report-data", "evidence-report-data", None);
    assert!(checks.first_failed().is_some());
    checks.appraised();
    assert!(checks.first_failed().is_none());
    assert_eq!(checks.list[0].state, State::NotDone);
}

#[test]
fn a_failure_before_the_appraisal_leaves_it_undone() {
    let mut checks = Checks::of_peer(Path::Quote, false, true);
    checks.refused("peer-certificate-expired", "over".into());
    assert!(checks.list.iter().filter(|c| c.state == State::Failed).count() == 1);
    assert!(checks.list[checks.appraisal..].iter().all(|c| c.state == State::NotDone));
    let mut checks = Checks::of_peer(Path::Quote, false, true);
    checks.appraised();
    checks.refused("session-unattested", "wants some".into());
    assert_eq!(checks.first_failed().map(|c| c.id), Some("accepted"));
    assert!(checks.list.iter().any(|c| c.id == "reference" && c.state == State::Passed));
}

#[test]
fn what_nobody_looks_at_is_not_passed() {
    let state = |checks: &Checks, id: &str| checks.list.iter().find(|c| c.id == id).map(|c| c.state);
    let mut whole = Checks::of_peer(Path::Quote, false, false);
    whole.appraised();
    assert_eq!([state(&whole, "reference"), state(&whole, "devices")], [Some(State::Passed); 2]);
    let mut part = Checks::of_peer(Path::Quote, false, false).without_reference();
    part.left_out("devices", "shown, and named by nobody");
    part.appraised();
    assert_eq!([state(&part, "reference"), state(&part, "devices")], [None, Some(State::NotDone)]);
    assert_eq!(state(&part, "policy"), Some(State::Passed));
}
