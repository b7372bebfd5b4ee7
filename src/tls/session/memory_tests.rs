use super::*;
use crate::attest::{Credential, Evidence, RuntimeData, VerifyError};

fn session(key: u8, id: u8, ttl: i64) -> Arc<BoundSession> {
    let now = SystemTime::now();
    let ends = if ttl < 0 { now - Duration::from_secs(1) } else { now + Duration::from_secs(ttl as u64) };
    let verdict = Verdict {
        tee: "tdx".into(),
        policy_ids: vec![],
        verifier: "as".into(),
        trust_anchor: "test".into(),
        appraised_at: now,
        expires_at: ends,
        ..Verdict::default()
    };
    let evidence =
        Evidence { tee: "tdx".into(), evidence: vec![1], additional: None, runtime_data: String::from("{}") };
    Arc::new(BoundSession {
        key: [key; 32],
        id: SessionId([id; 16]),
        secret: Secret::new([id; 32]),
        shown: PeerCertificate {
            credential: Credential::Evidence(evidence),
            expected: RuntimeData::for_key(&[key]),
            not_after: ends,
        },
        verdict: Arc::new(verdict),
        until: Instant::now() + Duration::from_secs(ttl.max(0) as u64),
    })
}

async fn enter(sessions: &Sessions, key: u8) -> Turn {
    sessions.enter([key; 32], SystemTime::now).await.expect("a turn")
}

fn lead(turn: Turn) -> Lead {
    let Turn::Lead(lead) = turn else { panic!("not the leader") };
    lead
}

fn resumes(turn: &Turn, id: u8) -> bool {
    matches!(turn, Turn::Resume(s) if s.id == SessionId([id; 16]))
}

#[tokio::test]
async fn a_thousand_at_once_wait_for_one_exchange() {
    let sessions = Arc::new(Sessions::new(8));
    let first = lead(enter(&sessions, 1).await);
    let waiting: Vec<_> = (0..1000)
        .map(|_| {
            let sessions = sessions.clone();
            tokio::spawn(async move { resumes(&enter(&sessions, 1).await, 5) })
        })
        .collect();
    tokio::task::yield_now().await;
    first.land(Ok(session(1, 5, 60)));
    for one in waiting {
        assert!(one.await.unwrap());
    }
}

#[tokio::test]
async fn refused_evidence_is_everybodys_and_a_broken_connection_its_own() {
    let sessions = Arc::new(Sessions::new(8));
    let wait = || {
        let sessions = sessions.clone();
        tokio::spawn(async move { sessions.enter([1; 32], SystemTime::now).await })
    };
    let first = lead(enter(&sessions, 1).await);
    let waiting = wait();
    tokio::task::yield_now().await;
    first.land(Err(VerifyError::ReportData.into()));
    assert_eq!(waiting.await.unwrap().err().unwrap().reason(), "evidence-report-data");

    let second = lead(enter(&sessions, 1).await);
    let waiting = wait();
    tokio::task::yield_now().await;
    drop(second);
    lead(waiting.await.unwrap().unwrap());
}

#[tokio::test]
async fn an_ended_a_forgotten_and_a_strangers_session_are_not_resumed() {
    let sessions = Sessions::new(8);
    lead(enter(&sessions, 1).await).land(Ok(session(1, 5, -1)));
    lead(enter(&sessions, 1).await).land(Ok(session(1, 6, 60)));
    assert!(resumes(&enter(&sessions, 1).await, 6));
    lead(enter(&sessions, 2).await);
    sessions.forget(&session(1, 5, 60));
    assert!(resumes(&enter(&sessions, 1).await, 6), "an older one was refused");
    sessions.put(session(1, 7, 60));
    assert!(resumes(&enter(&sessions, 1).await, 7));
    sessions.forget(&session(1, 7, 60));
    lead(enter(&sessions, 1).await);
}

#[tokio::test]
async fn what_an_exchange_from_before_a_reload_finds_is_not_kept() {
    let sessions = Sessions::new(8);
    let old = lead(enter(&sessions, 1).await);
    sessions.clear();
    let found = session(1, 5, 60);
    old.land(Ok(found.clone()));
    assert!(!sessions.holds(&found));
    lead(enter(&sessions, 1).await).land(Ok(found.clone()));
    assert!(sessions.holds(&found));
}

#[tokio::test]
async fn a_clock_that_is_set_back_prolongs_nothing() {
    let sessions = Sessions::new(8);
    let mut over = Arc::into_inner(session(1, 5, 60)).expect("the only one");
    over.until = Instant::now();
    lead(enter(&sessions, 1).await).land(Ok(Arc::new(over)));
    lead(enter(&sessions, 1).await);
}

#[tokio::test]
async fn both_memories_are_bounded() {
    let sessions = Sessions::new(4);
    for key in 0..50 {
        lead(enter(&sessions, key).await).land(Ok(session(key, key, 60)));
    }
    assert_eq!(sessions.slots.lock().unwrap().by_key.len(), 4);
    let leader = lead(enter(&sessions, 60).await);
    assert!(matches!(enter(&sessions, 61).await, Turn::Alone), "strangers push out one of four");
    for key in 47..50 {
        assert!(resumes(&enter(&sessions, key).await, key));
    }
    drop(leader);
    lead(enter(&sessions, 61).await);

    let proven = Proven::new(16, Duration::from_secs(60));
    for id in 0..100 {
        proven.keep(SessionId([id; 16]), Secret::new([id; 32]));
    }
    assert!(proven.known.lock().unwrap().len() <= 16);
    assert!(proven.secret(&SessionId([99; 16])).is_some() && proven.secret(&SessionId([0; 16])).is_none());
    let brief = Proven::new(16, Duration::ZERO);
    brief.keep(SessionId([1; 16]), Secret::new([1; 32]));
    assert!(brief.secret(&SessionId([1; 16])).is_none());
}
