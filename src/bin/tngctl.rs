//! tngctl(1): the operator's tool.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, Parser, Subcommand};
use tng::ctl::{self, LocalAnswer, Scope, Style};
use tng::output;

/// Shows and steers tng instances.
#[derive(Parser)]
#[command(name = "tngctl", version, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show instances, endpoints, counts, verdicts and refusals
    Status {
        /// Instance name; all instances of this network namespace when absent
        name: Option<String>,
        /// Print machine-readable JSON
        #[arg(long)]
        json: bool,
        /// Show again every second until interrupted; with --json one object a line
        #[arg(long)]
        watch: bool,
    },
    /// Check configurations: every error at once, with file, line, column and a hint
    Check {
        /// Instance names (/etc/tng/NAME.toml) or files; all of /etc/tng when absent
        #[arg(value_name = "NAME|FILE")]
        instances: Vec<String>,
        /// Print machine-readable JSON
        #[arg(long)]
        json: bool,
    },
    /// Print the nftables rules that are, or would be, applied
    Rules {
        /// Instance name (/etc/tng/NAME.toml) or file
        #[arg(value_name = "NAME|FILE")]
        instance: String,
    },
    /// List open connections
    Connections {
        /// Instance name; all instances of this network namespace when absent
        name: Option<String>,
        /// Print machine-readable JSON
        #[arg(long)]
        json: bool,
    },
    /// Replace the configuration of a running instance: in all places, or in none
    Reload {
        /// Instance name (/etc/tng/NAME.toml) or file
        #[arg(value_name = "NAME|FILE")]
        instance: String,
    },
    /// Look at everything that instances depend on; for each finding: what, why, and the command that mends it
    Doctor {
        /// Instance name (/etc/tng/NAME.toml) or file; all when absent
        #[arg(value_name = "NAME|FILE")]
        instance: Option<String>,
        /// Print machine-readable JSON
        #[arg(long)]
        json: bool,
        /// List also what is well
        #[arg(long, short)]
        verbose: bool,
    },
    /// Look at a peer before trusting it: connect, show certificate, evidence and token, and name each check
    Verify(Box<ctl::verify::VerifyOptions>),
    /// Show this host's own evidence and, given an attestation service, its token
    Attest(Box<ctl::verify::AttestOptions>),
    /// Ask an attestation agent for its TEE, as another user
    #[command(hide = true, name = ctl::doctor::PROBE)]
    ProbeAgent { user: String, socket: std::path::PathBuf, groups: Vec<String> },
    /// Print shell completions
    #[command(hide = true)]
    Completions { shell: clap_complete::Shell },
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(usage) => return ExitCode::from(output::print_usage(&usage)),
    };
    let answer = match cli.command {
        Command::Status { name, json, watch: true } => watch(&scope(name), json),
        Command::Status { name, json, watch: false } => ctl::status(&scope(name), json, Style::of_stdout()).into(),
        Command::Check { instances, json } => ctl::check(&instances, json),
        Command::Rules { instance } => ctl::rules(&instance),
        Command::Connections { name, json } => ctl::connections(&scope(name), json).into(),
        Command::Reload { instance } => ctl::reload(&instance),
        Command::Doctor { instance, json, verbose } => {
            ctl::doctor::doctor(&ctl::doctor::RealHost, instance.as_deref(), json, verbose, Style::of_stdout())
        }
        Command::Verify(options) => ctl::verify::verify(&options, Style::of_stdout()),
        Command::Attest(options) => ctl::verify::attest(&options, Style::of_stdout()),
        Command::ProbeAgent { user, socket, groups } => match ctl::doctor::probe(&socket, &user, &groups) {
            Ok(text) => LocalAnswer { text, errors: Vec::new(), status: 0 },
            Err(e) => LocalAnswer { text: String::new(), errors: vec![e.to_string()], status: 1 },
        },
        Command::Completions { shell } => {
            LocalAnswer { text: ctl::completions("tngctl", &Cli::command(), shell), errors: Vec::new(), status: 0 }
        }
    };
    print(&answer);
    ExitCode::from(answer.status)
}

/// An instance may be named by its file as well: `tngctl status /etc/tng/ingress.toml`.
fn scope(name: Option<String>) -> Scope {
    Scope::here(name.map(|n| match std::path::Path::new(&n).file_stem() {
        Some(stem) if n.ends_with(".toml") => stem.to_string_lossy().into_owned(),
        _ => n,
    }))
}

fn watch(scope: &Scope, json: bool) -> LocalAnswer {
    // A file or a program that reads gets no terminal's codes.
    let clear = if std::io::stdout().is_terminal() { "\x1b[H\x1b[2J" } else { "" };
    loop {
        let (text, answer) = if json {
            let answer: LocalAnswer = ctl::status_line(scope).into();
            (answer.text.clone(), answer)
        } else {
            let answer: LocalAnswer = ctl::status(scope, false, Style::of_stdout()).into();
            let errors: String = answer.errors.iter().map(|e| format!("tngctl: {}\n", e.trim_end())).collect();
            (format!("{clear}{}{errors}", answer.text), answer)
        };
        // Who reads us has gone: that is how a watch ends.
        if !output::print(&text) {
            return LocalAnswer { text: String::new(), errors: Vec::new(), status: answer.status };
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn print(answer: &LocalAnswer) {
    let end = if answer.text.is_empty() || answer.text.ends_with('\n') { "" } else { "\n" };
    output::print(&format!("{}{end}", answer.text));
    for error in &answer.errors {
        let prefix = if error.starts_with("tngctl:") || error.starts_with("warning:") { "" } else { "tngctl: " };
        output::complain(&format!("{prefix}{}", error.trim_end()));
    }
}
