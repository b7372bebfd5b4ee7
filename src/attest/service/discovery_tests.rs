//! Who causes a fetch of keys, who waits for one, and who is told to come later.

use std::sync::atomic::{AtomicU64, Ordering};

use super::*;

/// A source that counts.
#[derive(Default)]
struct Source {
    kept: Kept,
    fetches: AtomicU64,
}

impl Source {
    fn need<'a>(&self, beside: Option<&'a Fetched>, outages: u64) -> Need<'a> {
        let now = Instant::now();
        Need { beside, since: now, outages, until: now + Duration::from_secs(60) }
    }

    async fn ask(&self, need: Need<'_>, outcome: Result<(), VerifyError>) -> Result<Fetched, Missing> {
        let fetch = async {
            self.fetches.fetch_add(1, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(100)).await;
            outcome.map(|()| Anchors::default())
        };
        self.kept.anchors(need, fetch).await
    }

    fn fetches(&self) -> u64 {
        self.fetches.load(Ordering::SeqCst)
    }
}

fn unreachable() -> Result<(), VerifyError> {
    Err(VerifyError::AsUnreachable("refused".into()))
}

#[tokio::test(start_paused = true)]
async fn an_unknown_signer_has_keys_fetched_a_few_times_and_is_then_told_when() {
    let source = Source::default();
    let mut newest = source.ask(source.need(None, 0), Ok(())).await.unwrap();
    source.ask(source.need(None, 0), Ok(())).await.unwrap();
    assert_eq!(source.fetches(), 1, "those at hand will do");
    for _ in 0..2 {
        newest = source.ask(source.need(Some(&newest), 0), Ok(())).await.unwrap();
    }
    let refused = source.ask(source.need(Some(&newest), 0), Ok(())).await.unwrap_err();
    let Missing::Later(left) = refused else { panic!("{refused:?}") };
    assert!(left <= Duration::from_secs(10) && later(left).contains("asked for again in 10 s"), "{left:?}");
    assert_eq!(source.fetches(), 3);
    tokio::time::sleep(left).await;
    source.ask(source.need(Some(&newest), 0), Ok(())).await.unwrap();
    assert_eq!(source.fetches(), 4);
}

#[tokio::test(start_paused = true)]
async fn after_an_outage_keys_are_fetched_at_once() {
    let source = Source::default();
    let mut newest = source.ask(source.need(None, 0), Ok(())).await.unwrap();
    for _ in 0..2 {
        newest = source.ask(source.need(Some(&newest), 0), Ok(())).await.unwrap();
    }
    assert!(matches!(source.ask(source.need(Some(&newest), 0), Ok(())).await, Err(Missing::Later(_))));
    // The service was seen to be away.
    newest = source.ask(source.need(Some(&newest), 1), Ok(())).await.unwrap();
    assert!(matches!(source.ask(source.need(Some(&newest), 1), Ok(())).await, Err(Missing::Later(_))));
    // A fetch itself found it away.
    let failed = source.ask(source.need(Some(&newest), 2), unreachable()).await;
    assert!(matches!(failed, Err(Missing::Failed(VerifyError::AsUnreachable(_)))), "{failed:?}");
    source.ask(source.need(Some(&newest), 2), Ok(())).await.unwrap();
    assert_eq!(source.fetches(), 6);
}

#[tokio::test(start_paused = true)]
async fn many_who_need_keys_at_once_wait_for_one_fetch() {
    for outcome in [Ok(()), unreachable()] {
        let source = Arc::new(Source::default());
        let mut all = tokio::task::JoinSet::new();
        for _ in 0..50 {
            let (source, outcome) = (source.clone(), outcome.clone());
            all.spawn(async move { source.ask(source.need(None, 0), outcome).await.is_ok() });
        }
        let ends = all.join_all().await;
        assert!(ends.iter().all(|ok| *ok == outcome.is_ok()));
        assert_eq!(source.fetches(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn keys_are_fetched_again_when_they_are_old() {
    let source = Source::default();
    source.ask(source.need(None, 0), Ok(())).await.unwrap();
    tokio::time::sleep(TTL).await;
    source.ask(source.need(None, 0), Ok(())).await.unwrap();
    assert_eq!(source.fetches(), 2);
}
