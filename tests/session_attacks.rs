//! Peers that attack `tng/1`, each refused with its reason. What each has and lacks is what docs/tng-1.md says.

#[path = "common/tls.rs"]
mod common;
#[path = "common/raw.rs"]
mod raw;

use std::sync::Arc;
use std::time::Duration;

use common::*;
use raw::{Keys, Raw, message};
use tng::attest::Evidence;
use tng::tls::EndpointTls;
use tng::tls::session::{MAX_EVIDENCE, Message};

const TNG1: &[&str] = &["tng/1"];

fn verifier() -> Arc<EndpointTls> {
    endpoint(ra(None, Some(verify_sample(true))))
}

/// What `verifier`, a client, makes of the server `keys` that answers as `answers` does; and what it told the server.
async fn meets(
    verifier: &EndpointTls,
    keys: &Keys,
    answers: impl AsyncFnOnce(&mut Raw),
) -> (&'static str, Option<String>) {
    let (c, s) = pair().await;
    let serving = async {
        let mut raw = keys.accept(s, TNG1).await.unwrap();
        answers(&mut raw).await;
        raw.refusal().await
    };
    let connecting = async {
        let outcome = verifier.connect(c, None).await;
        outcome.as_ref().map_or_else(|e| e.reason(), |_| "ok")
    };
    tokio::join!(connecting, serving)
}

/// The same with new keys and a new verifier, and the message that answers the question.
async fn answered(make: impl AsyncFnOnce(&Raw, &[u8; 32]) -> Message) -> &'static str {
    let (reason, told) = meets(&verifier(), &*Keys::new().await, async |raw| {
        let (nonce, _) = raw.asked().await;
        let answer = make(raw, &nonce).await;
        raw.say(answer).await;
        raw.say(Message::Pass).await;
    })
    .await;
    assert_eq!(told.as_deref(), (reason != "ok").then_some(reason), "what the server is told");
    reason
}

#[tokio::test]
async fn true_evidence_is_accepted() {
    assert_eq!(answered(async |raw, nonce| message(&raw.evidence(nonce).await)).await, "ok");
}

/// A genuine TEE that answers whoever asks, and a machine in the middle that asks it in a connection of its own.
async fn relayed(tee: &Keys, middle: &Keys) -> &'static str {
    answer_of(&verifier(), middle, async |nonce, resume| asked_elsewhere(tee, nonce, resume).await).await
}

/// What the TEE answers to this question in another connection.
async fn asked_elsewhere(tee: &Keys, nonce: [u8; 32], resume: Option<tng::tls::session::SessionId>) -> Message {
    let anybody = Keys::new().await;
    let (c, s) = pair().await;
    let (raw, tee) = tokio::join!(anybody.connect(c, TNG1), tee.accept(s, TNG1));
    let (mut raw, mut tee) = (raw.unwrap(), tee.unwrap());
    raw.say(Message::Ask { nonce, resume }).await;
    let (nonce, _) = tee.asked().await;
    tee.say(message(&tee.evidence(&nonce).await)).await;
    raw.hear().await
}

async fn answer_of(
    verifier: &EndpointTls,
    keys: &Keys,
    answer: impl AsyncFnOnce([u8; 32], Option<tng::tls::session::SessionId>) -> Message,
) -> &'static str {
    meets(verifier, keys, async |raw| {
        let (nonce, resume) = raw.asked().await;
        raw.say(answer(nonce, resume).await).await;
        raw.say(Message::Pass).await;
    })
    .await
    .0
}

#[tokio::test]
async fn evidence_relayed_by_a_machine_in_the_middle_is_refused() {
    let tee = Keys::new().await;
    // It has a key of its own, or even that of the TEE: the connection is another one.
    assert_eq!(relayed(&tee, &*Keys::new().await).await, "session-other-key");
    assert_eq!(relayed(&tee, &tee).await, "session-exporter");
}

#[tokio::test]
async fn replayed_evidence_is_refused() {
    let tee = Keys::new().await;
    let mut kept: Option<Evidence> = None;
    let verifier = verifier();
    let first = meets(&verifier, &tee, async |raw| {
        let (nonce, _) = raw.asked().await;
        let evidence = raw.evidence(&nonce).await;
        raw.say(message(&evidence)).await;
        raw.say(Message::Pass).await;
        kept = Some(evidence);
    });
    assert_eq!(first.await.0, "ok");
    let kept = kept.unwrap();
    let again = endpoint(ra(None, Some(verify_sample(true))));
    assert_eq!(answer_of(&again, &tee, async |_, _| message(&kept)).await, "session-nonce");
}

#[tokio::test]
async fn a_stolen_key_without_its_tee_is_refused_in_each_disguise() {
    let stolen = Keys::new().await;
    let of_certificate = stolen.evidence().await;
    assert_eq!(answer_of(&verifier(), &stolen, async |_, _| message(&of_certificate)).await, "session-nonce");
    // The runtime data say what they should; the TEE never signed them.
    let verifier = verifier();
    let forged = meets(&verifier, &stolen, async |raw| {
        let (nonce, _) = raw.asked().await;
        let forged = Evidence { runtime_data: raw.about(&nonce).canonical().into(), ..of_certificate.clone() };
        raw.say(message(&forged)).await;
        raw.say(Message::Pass).await;
    });
    assert_eq!(forged.await.0, "evidence-report-data");
}

#[tokio::test]
async fn a_stolen_key_does_not_resume_the_session_of_its_tee() {
    let (tee, verifier) = (Keys::new().await, verifier());
    let mut secret = None;
    let first = meets(&verifier, &tee, async |raw| {
        let (nonce, resume) = raw.asked().await;
        assert_eq!(resume, None);
        secret = Some(raw.session(&nonce));
        raw.say(message(&raw.evidence(&nonce).await)).await;
        raw.say(Message::Pass).await;
    });
    assert_eq!(first.await.0, "ok");
    let (id, secret) = secret.unwrap();

    let guessed = answer_of(&verifier, &tee, async |_, resume| {
        assert_eq!(resume, Some(id));
        Message::Confirm([0; 32])
    });
    assert_eq!(guessed.await, "session-confirmation");
    // The TEE confirms to whoever asks, but about the connection in which it is asked.
    let diverted = meets(&verifier, &tee, async |raw| {
        let (nonce, _) = raw.asked().await;
        let (c, s) = pair().await;
        let anybody = Keys::new().await;
        let (_asking, asked) = tokio::join!(anybody.connect(c, TNG1), tee.accept(s, TNG1));
        raw.say(Message::Confirm(secret.confirm(&asked.unwrap().about(&nonce)))).await;
        raw.say(Message::Pass).await;
    });
    assert_eq!(diverted.await.0, "session-confirmation");
    // The TEE itself may.
    let mut kept = [0; 32];
    let confirmed = meets(&verifier, &tee, async |raw| {
        let (nonce, resume) = raw.asked().await;
        assert_eq!(resume, Some(id), "an attack does not end the session");
        kept = secret.confirm(&raw.about(&nonce));
        raw.say(Message::Confirm(kept)).await;
        raw.say(Message::Pass).await;
    });
    assert_eq!(confirmed.await.0, "ok");
    // What it said is of no use in another connection.
    assert_eq!(answer_of(&verifier, &tee, async |_, _| Message::Confirm(kept)).await, "session-confirmation");
    assert_eq!(verifier.status().session_confirmed, 1);
}

#[tokio::test]
async fn no_nonce_is_used_twice_and_one_that_is_binds_nothing() {
    let (tee, verifier) = (Keys::new().await, verifier());
    let mut seen = std::collections::HashSet::new();
    for _ in 0..20 {
        answer_of(&verifier, &tee, async |nonce, _| {
            assert!(seen.insert(nonce));
            Message::Refuse("no".into())
        })
        .await;
    }
    // A verifier that is careless enough: an honest endpoint's evidence still is about one connection each.
    let server = endpoint(ra(Some(attest_sample()), None));
    let mut evidence = Vec::new();
    for _ in 0..2 {
        let (c, s) = pair().await;
        let asking = async {
            let mut raw = Keys::new().await.connect(c, TNG1).await.unwrap();
            raw.say(Message::Ask { nonce: [7; 32], resume: None }).await;
            let answer = raw.hear().await;
            raw.say(Message::Accept).await;
            answer
        };
        evidence.push(tokio::join!(asking, server.accept(s)).0);
    }
    assert_ne!(evidence[0], evidence[1]);
}

#[tokio::test]
async fn what_is_no_answer_is_refused_each_with_its_reason() {
    let refused = async |bytes: &[u8]| {
        let tee = Keys::new().await;
        let (reason, told) = meets(&verifier(), &tee, async |raw| {
            raw.asked().await;
            raw.bytes(bytes).await;
        })
        .await;
        assert_eq!(told.as_deref(), Some(reason), "what the server is told");
        reason
    };
    assert_eq!(refused(b"HTTP/1.1 200 OK\r\n\r\n").await, "session-version");
    assert_eq!(refused(&[1, 9, 0, 0, 0, 0]).await, "session-unknown-message");
    let mut long = vec![1, 3];
    long.extend((MAX_EVIDENCE as u32 + 1).to_be_bytes());
    assert_eq!(refused(&long).await, "session-too-large");
    assert_eq!(refused(&[1, 4, 0, 0, 0, 1, 0]).await, "session-malformed");
    assert_eq!(refused(&Message::Evidence(vec![0xff]).encode()).await, "peer-evidence-malformed");
    for message in [Message::Accept, Message::Pass, Message::Confirm([0; 32])] {
        assert_eq!(refused(&message.encode()).await, "session-unexpected", "{message:?}");
    }
}

#[tokio::test]
async fn a_connection_that_ends_within_the_exchange_is_refused() {
    let tee = Keys::new().await;
    for bytes in [&[][..], &[1, 3, 0], &[1, 3, 0, 0, 1, 0, 0xda]] {
        let (c, s) = pair().await;
        let verifier = verifier();
        let serving = async {
            let mut raw = tee.accept(s, TNG1).await.unwrap();
            raw.asked().await;
            raw.bytes(bytes).await;
            tokio::io::AsyncWriteExt::shutdown(&mut raw.stream).await.unwrap();
            raw.refusal().await
        };
        let (outcome, _) = tokio::join!(verifier.connect(c, None), serving);
        assert_eq!(outcome.err().unwrap().reason(), "session-truncated");
    }
}

#[tokio::test]
async fn a_silent_connection_does_not_hold_up_the_peers_others() {
    let (tee, verifier) =
        (Keys::new().await, endpoint_within(ra(None, Some(verify_sample(true))), Duration::from_secs(3)));
    let (ours, theirs) = pair().await;
    let silent = {
        let verifier = verifier.clone();
        tokio::spawn(async move { verifier.connect(ours, None).await.map(drop) })
    };
    let mut held = tee.accept(theirs, TNG1).await.unwrap();
    held.asked().await;
    let begun = std::time::Instant::now();
    let other = meets(&verifier, &tee, async |raw| {
        let (nonce, resume) = raw.asked().await;
        assert_eq!(resume, None);
        raw.say(message(&raw.evidence(&nonce).await)).await;
        raw.say(Message::Pass).await;
    });
    assert_eq!(other.await.0, "ok");
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    assert_eq!(silent.await.unwrap().unwrap_err().reason(), "handshake-timeout");
}

#[tokio::test]
async fn a_peer_that_never_answers_is_given_up() {
    let brief = Duration::from_millis(300);
    let both = || ra(Some(attest_sample()), Some(verify_sample(true)));
    let tee = Keys::new().await;
    // Not a word, a part of one, an announcement alone.
    for bytes in [&[][..], &[1], &[1, 3, 0, 0, 0, 9]] {
        for as_client in [true, false] {
            let endpoint = endpoint_within(both(), brief);
            let (ours, theirs) = pair().await;
            let (outcome, _held) = if as_client {
                let serving = async {
                    let mut raw = tee.accept(theirs, TNG1).await.unwrap();
                    raw.bytes(bytes).await;
                    raw
                };
                tokio::join!(endpoint.connect(ours, None), serving)
            } else {
                let connecting = async {
                    let mut raw = tee.connect(theirs, TNG1).await.unwrap();
                    raw.bytes(bytes).await;
                    raw
                };
                tokio::join!(endpoint.accept(ours), connecting)
            };
            let reason = outcome.err().unwrap().reason();
            assert_eq!(reason, "handshake-timeout", "{bytes:?} client: {as_client}");
        }
    }
}

#[tokio::test]
async fn what_a_requiring_server_is_offered_else_is_refused_before_its_evidence_is_shown() {
    let server = endpoint(requiring(ra(Some(attest_sample()), Some(verify_sample(true)))));
    let offered: [(&[&str], &str); 4] = [
        (&["rats-tls"], "session-binding-required"),
        (&["h2", "rats-tls"], "session-binding-required"),
        (&["tng/2"], "session-binding-required"),
        // Without ALPN there is nothing to refuse in the handshake.
        (&[], "session-binding-required"),
    ];
    for (alpn, reason) in offered {
        let (c, s) = pair().await;
        let connecting = async {
            let met = Keys::new().await.connect(c, alpn).await;
            if let Ok(mut raw) = met {
                raw.refusal().await;
            }
        };
        let (outcome, ()) = tokio::join!(server.accept(s), connecting);
        assert_eq!(outcome.err().unwrap().reason(), reason, "{alpn:?}");
    }
    let bare = endpoint(ra(None, None));
    let (c, s) = meet(&bare, &server).await;
    assert_eq!((c.err().unwrap().reason(), s.err().unwrap().reason()), ("tls-alpn", "session-binding-required"));
}

/// A session that ends while its confirmation is under way is not accepted, and the peer hears that in ACCEPT's place.
#[tokio::test]
async fn a_session_that_ends_during_the_exchange_is_refused_before_accept() {
    let (tee, verifier) = (Keys::new().await, verifier());
    let mut secret = None;
    let first = meets(&verifier, &tee, async |raw| {
        let (nonce, _) = raw.asked().await;
        secret = Some(raw.session(&nonce));
        raw.say(message(&raw.evidence(&nonce).await)).await;
        raw.say(Message::Pass).await;
    });
    assert_eq!(first.await.0, "ok");
    let (id, secret) = secret.unwrap();
    for ends in [false, true] {
        let outcome = meets(&verifier, &tee, async |raw| {
            let (nonce, resume) = raw.asked().await;
            assert_eq!(resume, Some(id));
            if ends {
                verifier.reloaded();
            }
            raw.say(Message::Confirm(secret.confirm(&raw.about(&nonce)))).await;
            raw.say(Message::Pass).await;
            if ends {
                let refused = Message::Refuse("session-ended".into());
                assert_eq!(raw.hear().await, refused, "not ACCEPT");
            }
        });
        assert_eq!(outcome.await.0, if ends { "session-ended" } else { "ok" });
    }
}
