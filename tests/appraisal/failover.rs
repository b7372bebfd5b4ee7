//! Several addresses of one service: who is asked, who is asked next, and when nobody is.

use std::time::Instant;

use super::*;

/// An address where nobody listens.
async fn nobody() -> url::Url {
    let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    format!("http://{closed}/").parse().unwrap()
}

#[tokio::test]
async fn the_next_address_answers_for_one_that_is_down_and_status_shows_it() {
    let service = start(AFFIRMING, Serves::Rest).await;
    let mut both = at(&[&service]);
    both.addrs.insert(0, nobody().await);
    let verifier = verifier(&both);
    ask(&verifier).await.unwrap();
    let [down, well] = <[_; 2]>::try_from(verifier.services()).unwrap();
    assert_eq!((down.state, down.reason, down.answered), ("failing", Some("as-unreachable"), 0));
    assert_eq!((well.state, well.reason, well.answered), ("ok", None, 1));
    assert_eq!(verifier.failovers(), 1);
    // While the first one rests, it costs nothing.
    ask(&verifier).await.unwrap();
    assert_eq!((verifier.failovers(), service.appraisals()), (1, 2));
}

#[tokio::test]
async fn an_address_that_is_back_is_asked_first_again() {
    let (first, second) = (start(Mode::Unavailable, Serves::Rest).await, start(AFFIRMING, Serves::Grpc).await);
    let verifier = verifier(&at(&[&first, &second]));
    ask(&verifier).await.unwrap();
    first.set(AFFIRMING);
    let end = Instant::now() + Duration::from_secs(10);
    while verifier.services()[0].answered == 0 {
        assert!(Instant::now() < end, "{:?}", verifier.services());
        ask(&verifier).await.unwrap();
    }
    assert_eq!(verifier.services()[0].state, "ok");
    let asked = second.appraisals();
    ask(&verifier).await.unwrap();
    assert_eq!(second.appraisals(), asked);
}

#[tokio::test]
async fn a_refusal_gets_no_second_opinion() {
    for serves in [Serves::Rest, Serves::Grpc] {
        let (first, second) = (start(AFFIRMING, serves).await, start(AFFIRMING, Serves::Rest).await);
        let verifier = verifier(&at(&[&first, &second]));
        for (mode, expected) in [
            (Mode::Rejected, "as-rejected"),
            (Mode::Status("warning"), "token-status-warning"),
            (Mode::Status("contraindicated"), "token-status-contraindicated"),
            (Mode::WrongPolicy, "token-policy"),
            (Mode::WrongRuntimeData, "token-runtime-data"),
            (Mode::Stranger, "token-untrusted-signer"),
            (Mode::Expired, "token-expired"),
        ] {
            first.set(mode);
            assert_eq!(ask(&verifier).await.unwrap_err().reason(), expected, "{serves:?} {mode:?}");
        }
        assert_eq!((second.requests(), verifier.failovers()), (0, 0), "{serves:?}");
    }
}

#[tokio::test]
async fn whatever_is_broken_gives_way() {
    for mode in [Mode::Unavailable, Mode::NotHttp, Mode::Html, Mode::Silent, Mode::Stalls, Mode::NoPolicy] {
        for serves in [Serves::Rest, Serves::Grpc] {
            let (first, second) = (start(mode, serves).await, start(AFFIRMING, Serves::Rest).await);
            let begun = Instant::now();
            assert_eq!(reason(&at(&[&first, &second])).await, "ok", "{serves:?} {mode:?}");
            assert!(begun.elapsed() < Duration::from_secs(3), "{serves:?} {mode:?}: {:?}", begun.elapsed());
        }
    }
}

#[tokio::test]
async fn all_addresses_together_have_one_deadline() {
    let services = [start(Mode::Silent, Serves::Rest).await, start(Mode::Silent, Serves::Rest).await];
    let asked = AsService { timeout: Duration::from_millis(600), ..at(&[&services[0], &services[1]]) };
    let begun = Instant::now();
    assert_eq!(reason(&asked).await, "as-timeout");
    assert!(begun.elapsed() < Duration::from_millis(1500), "{:?}", begun.elapsed());
    assert!(services.iter().all(|s| s.appraisals() == 1), "each got its share");
}

#[tokio::test]
async fn a_request_that_one_service_cannot_handle_does_not_put_it_last() {
    let (first, second) = (start(Mode::NoPolicy, Serves::Rest).await, start(AFFIRMING, Serves::Rest).await);
    let verifier = verifier(&at(&[&first, &second]));
    ask(&verifier).await.unwrap();
    first.set(AFFIRMING);
    ask(&verifier).await.unwrap();
    assert_eq!((first.appraisals(), second.appraisals(), verifier.failovers()), (2, 1, 1));
}

#[tokio::test]
async fn evidence_over_which_a_service_fails_does_not_put_its_address_last() {
    for serves in [Serves::Rest, Serves::Grpc] {
        let (first, second) = (start(AFFIRMING, serves).await, start(AFFIRMING, serves).await);
        let verifier = verifier(&at(&[&first, &second]));
        ask(&verifier).await.unwrap();
        let mut elsewhere = 0;
        for mode in [Mode::Drops, Mode::Drops, Mode::Silent] {
            first.set(mode);
            ask(&verifier).await.unwrap();
            elsewhere += 1;
            assert_eq!(second.appraisals(), elsewhere, "{serves:?} {mode:?}: the next address answered");
            first.set(AFFIRMING);
            ask(&verifier).await.unwrap();
            assert_eq!(second.appraisals(), elsewhere, "{serves:?} {mode:?}: the first one is still asked first");
        }
        // One that is late twice in a row rests.
        first.set(Mode::Silent);
        for _ in 0..2 {
            ask(&verifier).await.unwrap();
        }
        let asked = first.appraisals();
        ask(&verifier).await.unwrap();
        assert_eq!(first.appraisals(), asked, "{serves:?}");
        assert_eq!((verifier.services()[0].state, verifier.services()[0].reason), ("failing", Some("as-timeout")));
    }
}

#[tokio::test]
async fn what_a_service_said_is_told_rather_than_that_the_next_was_silent() {
    let service = start(Mode::NoPolicy, Serves::Rest).await;
    let mut both = at(&[&service]);
    both.addrs.push(nobody().await);
    let error = appraise(&both).await.unwrap_err();
    assert!(error.reason() == "as-policy" && error.to_string().contains("not found"), "{error}");
    both.addrs.reverse();
    assert_eq!(reason(&both).await, "as-policy");
}
