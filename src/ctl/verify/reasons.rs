//! What a reason means and the next step: the words of tng-reasons(7) itself, so that there is one text.

/// The manual page, as it is installed.
const PAGE: &str = include_str!("../../../man/tng-reasons.7");

/// What the page says about `reason`, as plain text on one line.
pub(super) fn explain(reason: &str) -> Option<String> {
    let term = format!(".TP\n.B {}\n", reason.replace('-', "\\-"));
    let rest = &PAGE[PAGE.find(&term)? + term.len()..];
    let mut text = String::new();
    for line in rest.lines().take_while(|l| !l.starts_with(".TP") && !l.starts_with(".SH")) {
        let words = if line.starts_with('.') { macro_text(line) } else { plain(line) };
        if !text.is_empty() {
            text.push(' ');
        }
        text.push_str(&words);
    }
    (!text.is_empty()).then_some(text)
}

/// `.BR a " b"`: fonts change between the arguments, which stand side by side; `.B a b` has spaces between.
fn macro_text(line: &str) -> String {
    let (name, rest) = line.split_once(' ').unwrap_or((line, ""));
    let mut arguments = vec![String::new()];
    let mut in_quotes = false;
    for c in rest.chars() {
        match c {
            '"' => in_quotes = !in_quotes,
            ' ' if !in_quotes => arguments.push(String::new()),
            c => arguments.iter_mut().last().into_iter().for_each(|a| a.push(c)),
        }
    }
    plain(&arguments.join(if name.len() > 2 { "" } else { " " }))
}

fn plain(text: &str) -> String {
    let pairs = [
        ("\\-", "-"),
        ("\\(dq", "\""),
        ("\\(aq", "'"),
        ("\\fI", ""),
        ("\\fB", ""),
        ("\\fR", ""),
        ("\\fP", ""),
        ("\\&", ""),
    ];
    pairs.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_term_of_the_page_has_a_readable_text() {
        let mut count = 0;
        for raw in PAGE.lines().collect::<Vec<_>>().windows(2).filter(|w| w[0] == ".TP").map(|w| w[1]) {
            let slug = raw.strip_prefix(".B ").unwrap().replace("\\-", "-");
            let text = explain(&slug).unwrap_or_else(|| panic!("{slug}"));
            assert!(!text.contains('\\') && !text.contains('\n') && text.contains('.'), "{slug}: {text}");
            count += 1;
        }
        assert!(count > 100, "{count}");
        assert_eq!(explain("no-such-reason"), None);
    }

    #[test]
    fn fonts_leave_no_gaps() {
        assert_eq!(explain("tls-setup").unwrap().split_whitespace().next(), Some("TLS"));
        assert_eq!(macro_text(".BR trusted_certs ,"), "trusted_certs,");
        assert_eq!(macro_text(".B \"allow_sample = true\""), "allow_sample = true");
        assert_eq!(macro_text(".RB ( update\\-ca\\-certificates (8)),"), "(update-ca-certificates(8)),");
    }
}
