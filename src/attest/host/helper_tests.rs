use proptest::prelude::*;

use super::*;

#[test]
fn requests_are_written_and_read_alike() {
    for provider in [HostProvider::Tsm, HostProvider::Tpm] {
        assert_eq!(parse(&request(provider, &[9; 64])), Ok((provider, [9; 64])));
    }
    let good = request(HostProvider::Tsm, &[9; 64]);
    assert_eq!(&good[..8], b"tngE\x01\x01\0\0");
    for (at, byte) in [(0, 0), (4, 2), (5, 0), (5, 3), (6, 1), (7, 1)] {
        let mut bad = good;
        bad[at] = byte;
        assert!(parse(&bad).is_err(), "{at}");
    }
}

#[test]
fn failures_cross_the_socket_unchanged() {
    for failure in [HostError::TpmTimeout, HostError::TsmAbsent("x".into()), HostError::TsmContended] {
        let text = serde_json::to_string(&Answer::Failure(failure.clone())).unwrap();
        let Ok(Answer::Failure(read)) = serde_json::from_str(&text) else { panic!("{text}") };
        assert_eq!(read, failure);
    }
}

#[test]
fn evidence_that_is_too_long_is_a_failure() {
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    ours.write_all(&request(HostProvider::Tpm, &[0; 64])).unwrap();
    ours.shutdown(std::net::Shutdown::Write).unwrap();
    serve(&mut theirs, |_, _| Ok(HostEvidence { tee: "tpm".into(), evidence: "x".repeat(MAX_EVIDENCE + 1) })).unwrap();
    drop(theirs);
    let mut answer = String::new();
    ours.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("helper-refused") && answer.len() < 200, "{answer}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100_000))]

    #[test]
    fn only_a_whole_request_is_one(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
        prop_assert!(parse(&bytes).is_err());
    }
}
