use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::time::Instant;

use super::*;
use crate::attest::VerifyError;

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
impl Renew for Answers {
    async fn renew(&self, _: &[u8]) -> Result<Arc<Verdict>, ChannelError> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if self.hangs {
            std::future::pending::<()>().await;
        }
        let mut list = self.list.lock().unwrap();
        let answer = if list.len() > 1 { list.pop_front().unwrap() } else { list[0].clone() };
        answer.map(|()| verdict(self.clock.now(), TTL))
    }
}

struct Case {
    standings: Standings,
    clock: Arc<Paused>,
    answers: Arc<Answers>,
}

impl Case {
    fn new(list: Vec<Result<(), VerifyError>>) -> Self {
        let clock = Arc::new(Paused(SystemTime::now(), Instant::now()));
        let hangs = list.is_empty();
        let list = Mutex::new(list.into_iter().map(|r| r.map_err(Into::into)).collect());
        let answers = Arc::new(Answers { clock: clock.clone(), list, asked: AtomicUsize::new(0), hangs });
        Self { standings: Standings::default(), clock, answers }
    }

    fn admit(&self, certificate: Duration) -> Arc<Standing> {
        let now = self.clock.now();
        let (renew, clock) = (self.answers.clone(), self.clock.clone());
        self.standings.of([1; 32], b"der", now + certificate, verdict(now, TTL.min(certificate)), renew, clock)
    }

    fn asked(&self) -> usize {
        self.answers.asked.load(Ordering::SeqCst)
    }

    /// Seconds until the peer's standing ended, and why.
    async fn ending(&self, certificate: Duration) -> (u64, Withdrawn) {
        let standing = self.admit(certificate);
        standing.ended().await;
        (self.clock.1.elapsed().as_secs(), standing.why().expect("a reason"))
    }
}

const HOURS: Duration = Duration::from_secs(6 * 3600);

#[tokio::test(start_paused = true)]
async fn an_affirmed_peer_stays_and_its_verdict_moves() {
    let case = Case::new(vec![Ok(())]);
    let (first, second) = (case.admit(HOURS), case.admit(HOURS));
    let shown = first.current();
    let at_first = shown.load().expires_at;
    tokio::time::sleep(TTL * 10).await;
    assert!(first.why().is_none() && second.why().is_none());
    assert!(shown.load().expires_at > at_first + TTL * 9, "the list that shows it follows");
    // One attempt a period for both connections, 75 s or a little less before each end.
    assert!((10..=14).contains(&case.asked()), "{}", case.asked());
}

#[tokio::test(start_paused = true)]
async fn a_refused_peer_leaves_at_once_with_the_verifiers_reason() {
    let contraindicated = Err(VerifyError::TokenStatusContraindicated("cpu0".into()));
    let (after, why) = Case::new(vec![Ok(()), contraindicated]).ending(HOURS).await;
    assert_eq!(why.reason, "token-status-contraindicated");
    assert!((400..600).contains(&after), "in the second period and before its end: {after}");
}

#[tokio::test(start_paused = true)]
async fn a_service_that_is_down_ends_the_connection_only_with_the_verdict() {
    let down = || Err(VerifyError::AsUnreachable("refused".into()));
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
