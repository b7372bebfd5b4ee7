//! What a peer, or this host, is appraised with: an endpoint of a configuration, or options.
//!
//! Options become the text of a configuration with one endpoint, which is read and checked as any other: they mean what
//! the keys of the same names mean, and are refused with the same hints.

use std::path::{Path, PathBuf};

use super::options::{AppraisalOptions, BuiltinOptions, EvidenceOptions};
use crate::config::{Config, Diagnostic, Endpoint, InstanceName, Mode, Ra, Report, instance_path, load, parse};

/// Exit status for a wrong use of the command, as of the argument parser's own.
pub(super) const EX_WRONG_USE: u8 = 2;
/// Exit status for a configuration with errors (EX_CONFIG of sysexits.h).
const EX_CONFIG: u8 = 78;
/// Longest file of reference values.
const MAX_REFERENCES: u64 = 1 << 20;

/// An endpoint to act as.
#[derive(Debug, Clone)]
pub(super) struct Means {
    /// Roles, deadlines and, for a peer, where it is.
    pub endpoint: Endpoint,
    /// Where the roles come from, in words.
    pub source: String,
    /// Whether they come from a configuration, which says what the peer has to show.
    pub configured: bool,
}

/// Why the command cannot begin: lines for standard error, and the exit status.
#[derive(Debug)]
pub(super) struct Unfit {
    pub lines: Vec<String>,
    pub status: u8,
}

impl Unfit {
    pub(super) fn usage(line: impl Into<String>) -> Self {
        Self { lines: vec![line.into()], status: EX_WRONG_USE }
    }
}

/// Which role of a configuration's endpoint is needed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Verify,
    Attest,
}

impl Role {
    fn word(self) -> &'static str {
        match self {
            Self::Verify => "verify",
            Self::Attest => "attest",
        }
    }

    fn has(self, ra: &Ra) -> bool {
        match self {
            Self::Verify => ra.verify.is_some(),
            Self::Attest => ra.attest.is_some(),
        }
    }
}

/// A configuration in the making.
#[derive(Default)]
pub(super) struct Draft {
    target: Option<String>,
    timeout: Option<String>,
    attest: Vec<String>,
    verify: Vec<String>,
    references: Option<PathBuf>,
}

fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => out.push_str(&format!("\\u{:04X}", u32::from(c))),
            c => out.push(c),
        }
    }
    out + "\""
}

fn list(values: &[String]) -> String {
    format!("[{}]", values.iter().map(|v| quoted(v)).collect::<Vec<_>>().join(", "))
}

/// A configuration wants whole paths.
fn paths(files: &[PathBuf]) -> Vec<String> {
    let whole = |f: &PathBuf| std::path::absolute(f).unwrap_or_else(|_| f.clone()).to_string_lossy().into_owned();
    files.iter().map(whole).collect()
}

impl Draft {
    pub(super) fn target(mut self, target: &str) -> Self {
        self.target = Some(target.to_owned());
        self
    }

    pub(super) fn timeout(mut self, timeout: Option<&String>) -> Self {
        self.timeout = timeout.cloned();
        self
    }

    pub(super) fn appraisal(mut self, options: &AppraisalOptions, builtin: &BuiltinOptions) -> Self {
        let mut set = |key: &str, value: String| self.verify.push(format!("{key} = {value}"));
        let mut lists = vec![("policy_ids", options.policy_id.clone())];
        if builtin.builtin {
            set("provider", quoted("builtin"));
            lists.extend([
                ("collateral", paths(&builtin.collateral)),
                ("minimum_tcb", builtin.minimum_tcb.clone()),
                ("amd_certs", paths(&builtin.amd_certs)),
            ]);
            for (key, value) in [("pccs_addr", &builtin.pccs_addr), ("kds_addr", &builtin.kds_addr)] {
                value.iter().for_each(|v| set(key, quoted(v)));
            }
        } else if options.as_addr.is_empty() && !options.trusted_certs.is_empty() {
            set("model", quoted("passport"));
        } else if options.as_addr.is_empty() && options.allow_sample {
            set("provider", quoted("sample"));
        }
        lists.extend([
            ("as_addr", options.as_addr.clone()),
            ("as_ca", paths(&options.as_ca)),
            ("trusted_certs", paths(&options.trusted_certs)),
        ]);
        options.as_type.iter().for_each(|kind| set("as_type", quoted(kind)));
        for (key, values) in lists.into_iter().filter(|(_, values)| !values.is_empty()) {
            set(key, list(&values));
        }
        for (key, is_set) in [("as_insecure", options.as_insecure), ("allow_sample", options.allow_sample)] {
            if is_set {
                set(key, "true".into());
            }
        }
        self.references = builtin.reference_file.clone();
        self
    }

    pub(super) fn evidence(mut self, options: &EvidenceOptions) -> Self {
        let keys = [
            ("provider", &options.provider),
            ("aa_addr", &options.aa_addr),
            ("asr_addr", &options.asr_addr),
            ("evidence_addr", &options.evidence_addr),
            ("tpm_device", &options.tpm_device),
        ];
        for (key, value) in keys {
            self.attest.extend(value.iter().map(|v| format!("{key} = {}", quoted(v))));
        }
        if options.additional_evidence {
            self.attest.push("additional_evidence = true".into());
        }
        self
    }

    fn text(&self) -> String {
        let mut text = String::from("[[ingress]]\nname = \"tngctl\"\n");
        if self.verify.is_empty() && self.attest.is_empty() {
            text.push_str("no_ra = true\n");
        }
        if let Some(timeout) = &self.timeout {
            text.push_str(&format!("[ingress.limits]\nhandshake_timeout = {}\n", quoted(timeout)));
        }
        // Nobody listens there; an address of the discard prefix (RFC 6666) is nobody's target either.
        let target = quoted(self.target.as_deref().unwrap_or("192.0.2.2:1"));
        text.push_str(&format!("[ingress.mapping]\nlisten = \"[100::1]:1\"\ntarget = {target}\n"));
        for (table, lines) in [("attest", &self.attest), ("verify", &self.verify)] {
            if !lines.is_empty() {
                text.push_str(&format!("[ingress.{table}]\n{}\n", lines.join("\n")));
            }
        }
        text
    }

    /// The endpoint that the options make.
    pub(super) fn read(&self) -> Result<Means, Unfit> {
        let mut text = self.text();
        let own_lines = text.lines().count();
        if let Some(file) = &self.references {
            text.push_str(&references(file)?);
        }
        let name = InstanceName::new("tngctl").map_err(|e| Unfit::usage(e.to_string()))?;
        let loaded = parse(name, Path::new("options"), &text);
        let unfit = |report: Report| {
            let shown = report.errors().map(|d| self.explain(d, own_lines)).collect();
            Unfit { lines: shown, status: EX_WRONG_USE }
        };
        let endpoint = loaded.map_err(unfit)?.config.endpoints.into_iter().next();
        let endpoint = endpoint.ok_or_else(|| Unfit::usage("the options make no endpoint"))?;
        Ok(Means { endpoint, source: "options".into(), configured: false })
    }

    /// A finding about the text, in the words of the command line.
    fn explain(&self, found: &Diagnostic, own_lines: usize) -> String {
        let hint = found.hint.as_ref().map(|h| format!("\n    hint: {h}")).unwrap_or_default();
        if let (Some(file), Some(line)) = (&self.references, found.line.filter(|l| *l > own_lines)) {
            return format!("{}:{}: {}{hint}", file.display(), line - own_lines, found.message);
        }
        let key = found.path.rsplit('.').next().unwrap_or_default();
        let key = key.split('[').next().unwrap_or_default();
        let option = match key {
            "target" | "listen" | "mapping" => "HOST:PORT".to_owned(),
            "handshake_timeout" => "--timeout".to_owned(),
            "policy_ids" => "--policy-id".to_owned(),
            "reference" => "--reference-file".to_owned(),
            "" | "attest" | "verify" | "ingress" => String::new(),
            other => format!("--{}", other.replace('_', "-")),
        };
        let at = if option.is_empty() { option } else { format!("{option}: ") };
        format!("{at}{}{hint}", found.message)
    }
}

fn references(file: &Path) -> Result<String, Unfit> {
    let failed = |e: &dyn std::fmt::Display| Unfit::usage(format!("--reference-file {}: {e}", file.display()));
    let meta = std::fs::metadata(file).map_err(|e| failed(&e))?;
    if !meta.is_file() || meta.len() > MAX_REFERENCES {
        return Err(failed(&"not a regular file of at most 1 MiB"));
    }
    std::fs::read_to_string(file).map_err(|e| failed(&e))
}

/// The endpoint of a configuration that has `role`: the one that is named, or the only one.
pub(super) fn of_config(instance: &str, name: Option<&str>, role: Role) -> Result<Means, Unfit> {
    let broken = |report: Report| Unfit { lines: vec![report.to_string()], status: EX_CONFIG };
    let path = instance_path(instance).map_err(broken)?;
    let config = load(&path).map_err(broken)?.config;
    let endpoint = chosen(&config, name, role).map_err(Unfit::usage)?;
    let source = format!("endpoint {} of {}", endpoint.name, path.display());
    Ok(Means { endpoint, source, configured: true })
}

fn chosen(config: &Config, name: Option<&str>, role: Role) -> Result<Endpoint, String> {
    let names = |of: &[&Endpoint]| of.iter().map(|e| e.name.as_str()).collect::<Vec<_>>().join(", ");
    let all: Vec<&Endpoint> = config.endpoints.iter().collect();
    let file = config.source.display();
    if let Some(name) = name {
        let found = all.iter().find(|e| e.name.as_str() == name);
        return found
            .map(|e| (*e).clone())
            .ok_or_else(|| format!("--endpoint: {file} has no endpoint {name:?}\n    hint: it has {}", names(&all)));
    }
    let fit: Vec<&Endpoint> = all.into_iter().filter(|e| role.has(&e.ra)).collect();
    match fit.as_slice() {
        [one] => Ok((*one).clone()),
        [] => Err(format!("no endpoint of {file} has a table `{}`", role.word())),
        many => Err(format!(
            "several endpoints of {file} have a table `{}`\n    hint: name one with --endpoint: {}",
            role.word(),
            names(many)
        )),
    }
}

impl Means {
    /// Takes where the peer is from `options`, and a deadline if one is given there.
    pub(super) fn toward(mut self, options: &Means, timeout: bool) -> Self {
        let mark = match &self.endpoint.mode {
            Mode::Mapping(mapping) => mapping.so_mark,
            Mode::Netfilter(netfilter) => netfilter.so_mark,
        };
        let side = self.endpoint.side;
        self.endpoint.mode = options.endpoint.mode.clone();
        if let (Mode::Mapping(mapping), crate::config::Side::Ingress) = (&mut self.endpoint.mode, side) {
            mapping.so_mark = mark;
        }
        if timeout {
            self.endpoint.limits.handshake_timeout = options.endpoint.limits.handshake_timeout;
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::VerifyProvider;

    fn verify(options: AppraisalOptions, builtin: BuiltinOptions) -> Result<Means, Unfit> {
        Draft::default().target("192.0.2.1:443").appraisal(&options, &builtin).read()
    }

    #[test]
    fn options_mean_what_the_keys_mean() {
        let service = AppraisalOptions {
            as_addr: vec!["http://127.0.0.1:8080".into(), "https://as.example/\"x\"".into()],
            policy_id: vec!["a".into(), "b\\c".into()],
            allow_sample: true,
            ..Default::default()
        };
        let ra = verify(service, BuiltinOptions::default()).unwrap().endpoint.ra;
        let made = ra.verify.unwrap();
        let VerifyProvider::As(service) = made.provider else { panic!("{made:?}") };
        assert_eq!(
            (service.addrs.len(), made.policy_ids, made.allow_sample),
            (2, vec!["a".into(), "b\\c".into()], true)
        );
        let none = verify(AppraisalOptions::default(), BuiltinOptions::default()).unwrap();
        assert_eq!(none.endpoint.ra, Ra::default());
    }

    #[test]
    fn what_is_wrong_is_said_of_the_option_with_the_hint() {
        let bad = AppraisalOptions { as_addr: vec!["http://as.example/".into()], ..Default::default() };
        let unfit = verify(bad, BuiltinOptions::default()).unwrap_err();
        assert_eq!(unfit.status, EX_WRONG_USE);
        assert!(unfit.lines[0].starts_with("--as-addr: ") && unfit.lines[0].contains("hint: "), "{unfit:?}");
        for target in ["nothing", "2001:db8::1:443", "192.0.2.1:0", "192.0.2.1:1-2", ""] {
            let unfit = Draft::default().target(target).read().unwrap_err();
            assert!(unfit.lines[0].starts_with("HOST:PORT: "), "{target}: {unfit:?}");
        }
        let late = Draft::default().target("[2001:db8::1]:443").timeout(Some(&"5".into())).read().unwrap_err();
        assert!(late.lines[0].starts_with("--timeout: "), "{late:?}");
    }

    #[test]
    fn a_mistake_in_a_reference_file_has_its_own_line() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("reference.toml");
        std::fs::write(&file, "# two\n[[ingress.verify.reference]]\ntee = \"tdx\"\nmr_tdx = \"00\"\n").unwrap();
        let builtin = BuiltinOptions {
            builtin: true,
            reference_file: Some(file.clone()),
            kds_addr: Some("https://kds.example/".into()),
            ..Default::default()
        };
        let unfit = verify(AppraisalOptions::default(), builtin).unwrap_err();
        assert!(unfit.lines[0].starts_with(&format!("{}:4: ", file.display())), "{unfit:?}");
    }
}
