//! Files of other programs that do the same job, and characters that an editor put in the place of others.

/// Whose file a text is that is no TOML: a name, and where the manual says what corresponds to what.
pub(super) fn recognise(text: &str) -> Option<(&'static str, &'static str)> {
    let lines = || text.lines().map(str::trim).filter(|line| !line.is_empty());
    let begins = |words: &[&str]| lines().any(|line| words.iter().any(|word| line.starts_with(word)));
    let first = lines().find(|line| !line.starts_with("//"))?;
    if first.starts_with('{') && ["\"add_ingress\"", "\"add_egress\""].iter().any(|key| text.contains(key)) {
        return Some((
            "a configuration of TNG (JSON)",
            "each object of add_ingress is an [[ingress]], each of add_egress an [[egress]]: see docs/interop.md and tng.toml(5)",
        ));
    }
    if first.starts_with('{') {
        return Some(("JSON", "an instance is TOML: see tng.toml(5) and the examples in /usr/share/doc/tng/examples"));
    }
    let is_option = |line: &str, key: &str| {
        line.strip_prefix(key).is_some_and(|rest| rest.trim_start().starts_with('=') && !rest.contains('"'))
    };
    if lines().any(|line| is_option(line, "accept")) && lines().any(|line| is_option(line, "connect")) {
        return Some((
            "a configuration of stunnel",
            "`accept` is `listen` and `connect` is `target` of an [ingress.mapping] (client = yes) or an [egress.mapping]: \
             see docs/interop.md and tng.toml(5)",
        ));
    }
    let flags = ["--listen", "--target", "--keystore", "--cacert", "--allow-cn", "ghostunnel "];
    let yaml = begins(&["listen: "]) && begins(&["target: "]) && !begins(&["["]);
    if begins(&flags) || yaml {
        return Some((
            "a configuration of ghostunnel",
            "`listen` and `target` are those of an [ingress.mapping] (client) or an [egress.mapping] (server): see \
             docs/interop.md and tng.toml(5)",
        ));
    }
    None
}

/// A character that looks like another one and is not, in the line of `offset`: where it is, its name, what to write.
pub(super) fn lookalike(text: &str, offset: usize) -> Option<(usize, &'static str, &'static str)> {
    let start = text.get(..offset)?.rfind('\n').map_or(0, |at| at + 1);
    // What stands in a comment is no mistake.
    let line = text.get(start..)?.lines().next()?.split('#').next()?;
    line.char_indices().find_map(|(at, c)| {
        let (name, write) = match c {
            '\u{a0}' | '\u{2007}' | '\u{202f}' => ("a no-break space", "write an ordinary space"),
            '\u{201c}' | '\u{201d}' | '\u{201e}' | '\u{ab}' | '\u{bb}' => {
                ("a typographic quotation mark", "write the straight one: \"")
            }
            '\u{2018}' | '\u{2019}' | '\u{201a}' => ("a typographic apostrophe", "write the straight one: \""),
            '\u{2013}' | '\u{2014}' | '\u{2212}' => ("a dash", "write a hyphen: -"),
            '\u{200b}' | '\u{200c}' | '\u{200d}' | '\u{2060}' => ("an invisible character", "delete it"),
            _ => return None,
        };
        Some((start + at, name, write))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_programs_files_are_recognised_and_toml_is_not_taken_for_one() {
        let name = |text: &str| recognise(text).map(|(name, _)| name);
        assert_eq!(name("// old\n{\"add_ingress\": [{}]}"), Some("a configuration of TNG (JSON)"));
        assert_eq!(name("{ \"a\": 1 }"), Some("JSON"));
        assert_eq!(
            name("; web\n[https]\naccept = 443\nconnect = 192.0.2.1:80\ncert = /etc/x.pem\n"),
            Some("a configuration of stunnel")
        );
        assert_eq!(
            name("server\n--listen localhost:8443\n--target localhost:80\n"),
            Some("a configuration of ghostunnel")
        );
        assert_eq!(name("listen: localhost:8443\ntarget: localhost:80\n"), Some("a configuration of ghostunnel"));
        assert_eq!(name("[[ingress]]\n[ingress.mapping]\nlisten = \"127.0.0.1:1\"\ntarget = \"x:1\"\n"), None);
        assert_eq!(name("[[ingress]]\n[ingress.mapping]\nlisten: \"127.0.0.1:1\"\ntarget: \"x:1\"\n"), None, "a slip");
        assert_eq!(name(""), None);
    }

    #[test]
    fn a_look_alike_is_named_with_its_place() {
        let text = "a = 1\nlisten = \u{201c}x\u{201d}\n";
        assert_eq!(lookalike(text, 8).map(|(at, name, _)| (at, name)), Some((15, "a typographic quotation mark")));
        assert_eq!(lookalike("a\u{a0}= 1", 0).map(|(at, name, _)| (at, name)), Some((1, "a no-break space")));
        assert_eq!(lookalike("a = 1", 0), None);
        assert_eq!(lookalike("a = 1", 99), None);
        assert_eq!(lookalike("a = = 1 # from 1\u{2013}9", 4), None);
    }
}
