use proptest::prelude::*;

use super::*;

/// Answers from a list, and keeps what was asked.
struct Script {
    answers: Vec<Vec<u8>>,
    asked: Vec<Vec<u8>>,
}

impl Transport for Script {
    fn exchange(&mut self, command: &[u8]) -> io::Result<Vec<u8>> {
        self.asked.push(command.to_vec());
        self.answers.pop().ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

fn tpm(mut answers: Vec<Vec<u8>>) -> Tpm<Script> {
    answers.reverse();
    Tpm(Script { answers, asked: Vec::new() })
}

fn answer(code: u32, body: &[u8]) -> Vec<u8> {
    let mut out = NO_SESSIONS.to_be_bytes().to_vec();
    out.extend((10 + body.len() as u32).to_be_bytes());
    out.extend(code.to_be_bytes());
    out.extend(body);
    out
}

/// PCR_Read's answer: update counter, selection, values.
fn pcrs(selected: &[u8], value: u8) -> Vec<u8> {
    let mut body = 9u32.to_be_bytes().to_vec();
    PcrSelection::of(selected.iter().copied()).unwrap().put(&mut body);
    body.extend((selected.len() as u32).to_be_bytes());
    selected.iter().for_each(|_| put_sized(&mut body, &[value; 32]));
    body
}

#[test]
fn a_tpm_that_tells_eight_pcrs_at_a_time_is_asked_until_all_are_told() {
    let mut tpm = tpm(vec![answer(0, &pcrs(&[8, 9], 2)), answer(0, &pcrs(&[1], 1))]);
    let values = tpm.read_pcrs(PcrSelection::of([1, 8, 9]).unwrap()).unwrap();
    assert_eq!(values, [(1, [1; 32]), (8, [2; 32]), (9, [2; 32])]);
    assert_eq!(tpm.0.asked.len(), 2);
    assert_eq!(tpm.0.asked[1], [0x80, 1, 0, 0, 0, 20, 0, 0, 1, 0x7e, 0, 0, 0, 1, 0, 0x0b, 3, 2, 0, 0]);
}

#[test]
fn answers_that_make_no_progress_or_tell_too_much_are_refused() {
    let asked = PcrSelection::of([1]).unwrap();
    let mut empty = 9u32.to_be_bytes().to_vec();
    empty.extend([0, 0, 0, 1, 0, 0x0b, 3, 0, 0, 0, 0, 0, 0, 0]);
    for body in [empty, pcrs(&[2], 1), pcrs(&[1], 1)[..30].to_vec(), Vec::new()] {
        assert!(matches!(tpm(vec![answer(0, &body)]).read_pcrs(asked), Err(CommandError::Unreadable(..))));
    }
}

#[test]
fn a_refusal_names_command_and_code() {
    let error = tpm(vec![answer(0x18b, &[])]).read_public(0x8100_0000).map(|_| ()).unwrap_err();
    assert_eq!(error.to_string(), "ReadPublic answered error 0x18b");
    let mut lying = answer(0, &[]);
    lying[5] = 200;
    assert!(matches!(tpm(vec![lying]).flush(1), Err(CommandError::Unreadable(..))));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100_000))]

    #[test]
    fn no_answer_panics(code in prop_oneof![Just(0u32), any::<u32>()], body in proptest::collection::vec(any::<u8>(), 0..64)) {
        let answers = || vec![answer(code, &body); 2];
        let _ = tpm(answers()).read_pcrs(PcrSelection::ALL);
        let _ = tpm(answers()).read_public(1);
        let _ = tpm(answers()).create_primary(Hierarchy::Owner, KeyAlgorithm::EccP256);
        let _ = tpm(answers()).quote(1, &[0; 32], PcrSelection::ALL);
        let _ = tpm(vec![body.clone()]).flush(1);
    }
}
