//! No text makes the reader panic, and every finding has a place in the text.

use proptest::prelude::*;

use super::*;

const EXAMPLES: [&str; 4] = [
    include_str!("../../../etc/tng/ingress-netfilter.toml"),
    include_str!("../../../etc/tng/egress-netfilter.toml"),
    include_str!("../../../etc/tng/mutual.toml"),
    include_str!("../../../etc/tng/ingress-mapping.toml"),
];

fn never_panics(text: &str) -> Result<(), TestCaseError> {
    if let Err(report) = parsed(text) {
        prop_assert!(report.errors().next().is_some());
        let lines = text.matches('\n').count() + 1;
        for d in &report.diagnostics {
            prop_assert!(d.line.is_some_and(|l| (1..=lines).contains(&l)) && d.column.is_some_and(|c| c >= 1));
            let _ = d.to_string();
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn any_text_is_answered(text in "\\PC*") {
        never_panics(&text)?;
    }

    #[test]
    fn any_tables_are_answered(words in prop::collection::vec(
        prop::sample::select(vec!["[[ingress]]\n", "[ingress]\n", "[ingress.netfilter]\n", "capture = ", "[{", "}]", "\n", "port = ", "1",
            "to = ", "\"::/0\"", "no_ra = true\n", "[egress.mapping]\n", "listen = \"[::]:1-9\"\n", ", ", "-9999999999999999999", "\"é\""]), 0..40)) {
        never_panics(&words.concat())?;
    }

    #[test]
    fn mutated_examples_are_answered(
        example in 0..EXAMPLES.len(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), 0usize..12, "\\PC{0,3}"), 1..6),
    ) {
        let mut text: Vec<char> = EXAMPLES[example].chars().collect();
        for (at, remove, insert) in edits {
            let at = at.index(text.len() + 1);
            let end = (at + remove).min(text.len());
            text.splice(at..end, insert.chars());
        }
        never_panics(&text.into_iter().collect::<String>())?;
    }
}
