use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::time::Instant;

use super::*;
use crate::attest::VerifyError;
use crate::config::{Model, Ra, Verify, VerifyProvider};
use crate::tls::snapshot::Snapshot;

const TTL: Duration = Duration::from_secs(300);

/// Wall-clock time that passes as the timers' does.
struct Paused(SystemTime, Instant);

impl Clock for Paused {
    fn now(&self) -> SystemTime {
        self.0 + self.1.elapsed()
    }
}

/// Answers each attempt with the next of its list, then with the last for ever.
struct Answers {
    clock: Arc<Paused>,
    list: Mutex<VecDeque<Result<(), ChannelError>>>,
    asked: AtomicUsize,
    hangs: bool,
    grace: Duration,
}

fn verdict(now: SystemTime, ttl: Duration) -> Arc<Verdict> {
    Arc::new(Verdict {
        tee: "tdx".into(),
        policy_ids: vec!["default".into()],
        verifier: "as".into(),
        trust_anchor: "test".into(),
        sample: false,
        claims: Default::default(),
        appraised_at: now,
        expires_at: now + ttl,
        ..Verdict::default()
    })
}

#[async_trait]
impl Judge for Answers {
    async fn judge(&self, _: &Shown) -> Result<Option<Arc<Verdict>>, ChannelError> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if self.hangs {
            std::future::pending::<()>().await;
        }
        let mut list = self.list.lock().unwrap();
        let answer = if list.len() > 1 { list.pop_front().unwrap() } else { list[0].clone() };
        answer.map(|()| Some(verdict(self.clock.now(), TTL)))
    }
    fn grace(&self) -> Duration {
        self.grace
    }
}

fn answers(clock: &Arc<Paused>, list: Vec<Result<(), VerifyError>>, grace: Duration) -> Arc<Answers> {
    let hangs = list.is_empty();
    let list = Mutex::new(list.into_iter().map(|r| r.map_err(Into::into)).collect());
    Arc::new(Answers { clock: clock.clone(), list, asked: AtomicUsize::new(0), hangs, grace })
}

fn settings(number: u64) -> Arc<Settings> {
    let verify = Verify {
        provider: VerifyProvider::Sample,
        policy_ids: vec![number.to_string()],
        allow_sample: true,
        verdict_ttl: TTL,
        model: Model::BackgroundCheck,
        rego: None,
    };
    Arc::new(Settings::new(&Ra { verify: Some(verify), ..Ra::default() }, Snapshot::default()))
}

fn contraindicated() -> Result<(), VerifyError> {
    Err(VerifyError::TokenStatusContraindicated("cpu0".into()))
}

fn down() -> Result<(), VerifyError> {
    Err(VerifyError::AsUnreachable("refused".into()))
}

struct Case {
    standings: Standings,
    clock: Arc<Paused>,
    answers: Arc<Answers>,
}

impl Case {
    fn new(list: Vec<Result<(), VerifyError>>) -> Self {
        Self::with_grace(list, Duration::ZERO)
    }

    fn with_grace(list: Vec<Result<(), VerifyError>>, grace: Duration) -> Self {
        let clock = Arc::new(Paused(SystemTime::now(), Instant::now()));
        let answers = answers(&clock, list, grace);
        Self { standings: Standings::new(answers.clone(), settings(0)), clock, answers }
    }

    /// A reload; `number` stands for all that is demanded.
    fn reload(&self, number: u64, list: Vec<Result<(), VerifyError>>, grace: Duration) -> Arc<Answers> {
        let answers = answers(&self.clock, list, grace);
        self.standings.enforce(answers.clone(), settings(number));
        answers
    }

    fn admit(&self, certificate: Duration) -> Arc<Standing> {
        self.admit_in(self.standings.term(), certificate)
    }

    fn admit_in(&self, term: u64, certificate: Duration) -> Arc<Standing> {
        let now = self.clock.now();
        let verdict = Some(verdict(now, TTL.min(certificate)));
        let shown = Shown::Certificate(b"der".as_slice().into());
        let entry = Entry { key: [1; 32], shown, not_after: now + certificate, verdict, term };
        self.standings.admit(entry, self.clock.clone())
    }

    fn elapsed(&self) -> u64 {
        self.clock.1.elapsed().as_secs()
    }

    fn asked(&self) -> usize {
        self.answers.asked.load(Ordering::SeqCst)
    }

    /// Seconds until the peer's standing ended, and why.
    async fn ending(&self, certificate: Duration) -> (u64, Withdrawn) {
        let standing = self.admit(certificate);
        standing.ended().await;
        (self.elapsed(), standing.why().expect("a reason"))
    }
}

const HOURS: Duration = Duration::from_secs(6 * 3600);

#[tokio::test(start_paused = true)]
async fn an_affirmed_peer_stays_and_its_verdict_moves() {
    let case = Case::new(vec![Ok(())]);
    let (first, second) = (case.admit(HOURS), case.admit(HOURS));
    let shown = first.current().unwrap();
    let at_first = shown.load().expires_at;
    tokio::time::sleep(TTL * 10).await;
    assert!(first.why().is_none() && second.why().is_none());
    assert!(shown.load().expires_at > at_first + TTL * 9, "the list that shows it follows");
    // One attempt a period for both connections, 75 s or a little less before each end.
    assert!((10..=14).contains(&case.asked()), "{}", case.asked());
}

#[tokio::test(start_paused = true)]
async fn a_refused_peer_leaves_at_once_with_the_verifiers_reason() {
    let (after, why) = Case::new(vec![Ok(()), contraindicated()]).ending(HOURS).await;
    assert_eq!(why.reason, "token-status-contraindicated");
    assert!((400..600).contains(&after), "in the second period and before its end: {after}");
}

#[tokio::test(start_paused = true)]
async fn a_service_that_is_down_ends_the_connection_only_with_the_verdict() {
    let case = Case::new(vec![down()]);
    let (after, why) = case.ending(HOURS).await;
    assert_eq!((after, why.reason), (300, "verdict-expired"));
    assert!(why.text.contains("unreachable"), "{}", why.text);
    assert!((5..=9).contains(&case.asked()), "{} attempts", case.asked());

    let broken = Err(VerifyError::AsError { status: crate::attest::AsStatus::Http(500), text: "policy".into() });
    assert_eq!(Case::new(vec![broken]).ending(HOURS).await.1.reason, "as-error");
    let (after, why) = Case::new(vec![]).ending(HOURS).await;
    assert_eq!((after, why.reason), (300, "verdict-expired"), "a verifier that hangs");

    let case = Case::new(vec![down(), down(), Ok(())]);
    let standing = case.admit(HOURS);
    tokio::time::sleep(TTL * 3).await;
    assert_eq!(standing.why(), None, "it came back in time");
}

#[tokio::test(start_paused = true)]
async fn the_end_of_the_certificate_is_the_end() {
    let case = Case::new(vec![Ok(())]);
    let (after, why) = case.ending(Duration::from_secs(200)).await;
    assert_eq!((after, why.reason), (200, "peer-certificate-expired"));
    assert_eq!(case.asked(), 0, "nothing could be won");
}

#[tokio::test(start_paused = true)]
async fn the_last_connection_takes_the_timer_with_it() {
    let case = Case::new(vec![Ok(())]);
    let (first, second) = (case.admit(HOURS), case.admit(HOURS));
    drop(first);
    assert_eq!(case.standings.len(), 1);
    drop(second);
    assert_eq!(case.standings.len(), 0);
    tokio::time::sleep(TTL * 2).await;
    assert_eq!(case.asked(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_comes_back_after_its_end_gets_a_standing_of_its_own() {
    let case = Case::new(vec![Err(VerifyError::ReportData), Ok(())]);
    let old = case.admit(HOURS);
    old.ended().await;
    let new = case.admit(HOURS);
    drop(old);
    assert_eq!(case.standings.len(), 1);
    tokio::time::sleep(TTL * 2).await;
    assert_eq!(new.why(), None);
}

#[tokio::test(start_paused = true)]
async fn a_reload_that_demands_something_else_has_everybody_appraised_again() {
    let case = Case::new(vec![Ok(())]);
    let standing = case.admit(HOURS);
    let same = case.reload(0, vec![contraindicated()], Duration::ZERO);
    tokio::time::sleep(TTL / 2).await;
    assert_eq!((same.asked.load(Ordering::SeqCst), standing.why()), (0, None), "nothing else is demanded");

    let other = case.reload(1, vec![Ok(())], Duration::ZERO);
    let before = standing.verdict().unwrap().appraised_at;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!((other.asked.load(Ordering::SeqCst), standing.why()), (1, None));
    assert!(standing.verdict().unwrap().appraised_at > before, "the verdict of the new rules is shown");
    assert_eq!(case.standings.counts().reappraised.load(Ordering::Relaxed), 1);

    case.reload(2, vec![contraindicated()], Duration::ZERO);
    standing.ended().await;
    assert_eq!(standing.why().unwrap().reason, "token-status-contraindicated");
    assert!(case.elapsed() < 160, "{}", case.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_token_that_the_new_rules_do_not_take_ends_its_peer_and_a_service_that_is_down_does_not_yet() {
    let case = Case::new(vec![Ok(())]);
    let standing = case.admit(HOURS);
    case.reload(1, vec![Err(VerifyError::TokenUntrustedSigner("who?".into()))], Duration::ZERO);
    standing.ended().await;
    assert_eq!((standing.why().unwrap().reason, case.elapsed()), ("token-untrusted-signer", 0));

    let case = Case::new(vec![Ok(())]);
    let standing = case.admit(HOURS);
    tokio::time::sleep(TTL / 2).await;
    let silent = case.reload(1, vec![down()], Duration::ZERO);
    standing.ended().await;
    // Not a second longer than the verdict that the rules of before had made.
    assert_eq!((standing.why().unwrap().reason, case.elapsed()), ("verdict-expired", 300));
    let asked = silent.asked.load(Ordering::SeqCst);
    assert!((8..=40).contains(&asked), "{asked} attempts");
}

#[tokio::test(start_paused = true)]
async fn a_verdict_of_rules_gone_by_does_not_let_its_peer_stay() {
    let case = Case::new(vec![Ok(())]);
    let old = case.standings.term();
    case.reload(1, vec![contraindicated()], Duration::ZERO);
    // A handshake that had begun before the reload ends after it.
    let standing = case.admit_in(old, HOURS);
    standing.ended().await;
    assert_eq!((standing.why().unwrap().reason, case.elapsed()), ("token-status-contraindicated", 0));

    // Nor does it replace a newer one.
    let case = Case::new(vec![Ok(())]);
    case.reload(1, vec![Ok(())], Duration::ZERO);
    let first = case.admit(HOURS);
    let made = first.verdict().unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let second = case.admit_in(old, HOURS);
    assert!(Arc::ptr_eq(&first, &second) && Arc::ptr_eq(&made, &first.verdict().unwrap()));
}

#[tokio::test(start_paused = true)]
async fn the_grace_is_given_once_and_shown() {
    let grace = Duration::from_secs(60);
    let case = Case::with_grace(vec![contraindicated()], grace);
    let standing = case.admit(HOURS);
    while standing.closing().is_none() {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let begun = case.elapsed();
    assert!((225..300).contains(&begun), "{begun}");
    let closing = standing.current().unwrap().closing().unwrap();
    assert_eq!(closing.why.reason, "token-status-contraindicated");
    assert!(closing.left > grace - Duration::from_secs(1) && closing.left <= grace, "{closing:?}");
    assert_eq!((standing.why(), case.standings.closing()), (None, 1));
    standing.ended().await;
    assert!((begun + 59..=begun + 61).contains(&case.elapsed()), "{}", case.elapsed());
    assert_eq!((standing.closing(), standing.why().unwrap().reason), (None, "token-status-contraindicated"));
    assert!((7..=10).contains(&case.asked()), "{} attempts", case.asked());
    assert_eq!(case.standings.counts().failed.load(Ordering::Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn a_verdict_that_ends_unrenewed_has_its_grace_too() {
    let case = Case::with_grace(vec![down()], Duration::from_secs(100));
    let (after, why) = case.ending(HOURS).await;
    assert_eq!((after, why.reason), (400, "verdict-expired"));
    let case = Case::with_grace(vec![Ok(())], Duration::from_secs(100));
    let (after, why) = case.ending(Duration::from_secs(200)).await;
    assert_eq!((after, why.reason), (300, "peer-certificate-expired"));
}

#[tokio::test(start_paused = true)]
async fn who_is_affirmed_again_within_the_grace_stays() {
    let grace = Duration::from_secs(60);
    let case = Case::with_grace(vec![contraindicated(), contraindicated(), Ok(())], grace);
    let standing = case.admit(HOURS);
    tokio::time::sleep(TTL * 3).await;
    assert_eq!((standing.why(), standing.closing()), (None, None));
    assert_eq!(case.standings.counts().recovered.load(Ordering::Relaxed), 1);

    // By a reload that is undone.
    let case = Case::with_grace(vec![Ok(())], grace);
    let standing = case.admit(HOURS);
    case.reload(1, vec![contraindicated()], grace);
    tokio::time::sleep(grace / 2).await;
    assert!(standing.closing().is_some());
    case.reload(2, vec![Ok(())], grace);
    tokio::time::sleep(grace * 2).await;
    assert_eq!((standing.why(), standing.closing()), (None, None));

    // By a new connection; not by one that was let in on what is known from before.
    let case = Case::with_grace(vec![contraindicated()], Duration::from_secs(20));
    let (standing, first) = (case.admit(HOURS), case.elapsed());
    while standing.closing().is_none() {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let cached = standing.verdict();
    let entry = |verdict| {
        let shown = Shown::Certificate(b"der".as_slice().into());
        Entry { key: [1; 32], shown, not_after: case.clock.now() + HOURS, verdict, term: case.standings.term() }
    };
    case.standings.admit(entry(cached), case.clock.clone());
    assert!(standing.closing().is_some());
    case.admit(HOURS);
    assert_eq!(standing.closing(), None);
    standing.ended().await;
    assert!(case.elapsed() - first > 450, "until it failed once more: {}", case.elapsed());
}

#[tokio::test(start_paused = true)]
async fn another_grace_holds_at_once() {
    let case = Case::with_grace(vec![contraindicated()], HOURS);
    let standing = case.admit(HOURS);
    tokio::time::sleep(TTL).await;
    assert!(standing.closing().is_some());
    case.reload(0, vec![contraindicated()], Duration::from_secs(3600));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(standing.closing().unwrap().left < Duration::from_secs(3600));
    case.reload(0, vec![contraindicated()], Duration::ZERO);
    standing.ended().await;
    assert_eq!(case.elapsed(), 301);
}

/// Rules that ask nobody for anything.
struct Anybody;

#[async_trait]
impl Judge for Anybody {
    async fn judge(&self, _: &Shown) -> Result<Option<Arc<Verdict>>, ChannelError> {
        Ok(None)
    }
    fn grace(&self) -> Duration {
        Duration::ZERO
    }
}

#[tokio::test(start_paused = true)]
async fn without_verification_peers_stay_and_are_asked_when_it_comes_back() {
    let case = Case::new(vec![Ok(())]);
    let standing = case.admit(HOURS);
    case.standings.enforce(Arc::new(Anybody), Arc::default());
    tokio::time::sleep(TTL * 4).await;
    assert_eq!((standing.why(), standing.expires_at()), (None, None));
    let back = case.reload(0, vec![Ok(())], Duration::ZERO);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!((standing.why(), back.asked.load(Ordering::SeqCst)), (None, 1));
    assert!(standing.expires_at().unwrap() > case.clock.now());

    // What it had ended meanwhile, and nobody answers.
    case.standings.enforce(Arc::new(Anybody), Arc::default());
    tokio::time::sleep(TTL * 2).await;
    case.reload(0, vec![down()], Duration::ZERO);
    standing.ended().await;
    assert_eq!(standing.why().unwrap().reason, "verdict-expired");
}

#[tokio::test(start_paused = true)]
async fn many_peers_are_appraised_one_after_the_other() {
    let case = Case::new(vec![Ok(())]);
    let mut open = Vec::new();
    for n in 0..200 {
        let (now, shown) = (case.clock.now(), Shown::Certificate(b"der".as_slice().into()));
        let entry = Entry { key: [n; 32], shown, not_after: now + HOURS, verdict: Some(verdict(now, TTL)), term: 1 };
        open.push(case.standings.admit(entry, case.clock.clone()));
    }
    let other = case.reload(1, vec![Ok(())], Duration::ZERO);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let half = other.asked.load(Ordering::SeqCst);
    assert!((60..=140).contains(&half), "{half} in the first half of two seconds");
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(other.asked.load(Ordering::SeqCst), 200);
}
